"""The ledger: whole or not there, whatever kills its writers or fills its disk."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from labkit import owners, paths, state
from labkit.errors import HostError, LabInUse, NotFound

DEAD = owners.Owner(kind="process", pid=1, started=1, boot="another boot")
LIVING = owners.Owner(
    kind="process",
    pid=1,
    started=owners._start_time(1) or 0,
    namespace=owners._pid_namespace(),
    boot=owners._boot_id(),
    command="/sbin/init",
)


def entry(lab: str = "a", name: str = "web", uuid: str = "1") -> state.Entry:
    return state.Entry(lab=lab, kind="vm", name=name, uuid=uuid, data={"spec": {"name": name}})


@pytest.fixture
def labs(labkit_home: Path) -> Path:
    return labkit_home / "state" / "labs"


def test_an_entry_comes_back_as_it_was_saved(labs: Path) -> None:
    state.claim("a", owners.explicit())
    saved = entry().save()
    assert state.lab("a").entries() == [saved]
    assert state.lab("a").find("vm", "web") == saved
    assert saved.current() == saved


def test_a_forgotten_entry_takes_its_files_along(labs: Path) -> None:
    state.claim("a", owners.explicit())
    saved = entry().save()
    (saved.directory / "disk0.qcow2").write_bytes(b"x")
    (saved.directory / "sub").mkdir()
    saved.forget()
    saved.forget()
    assert not saved.directory.exists()
    assert state.lab("a").entries() == []


def test_an_old_entry_does_not_forget_a_new_one_of_its_name(labs: Path) -> None:
    state.claim("a", owners.explicit())
    old = entry(uuid="old").save()
    old.forget()
    new = entry(uuid="new").save()
    old.forget()
    assert old.current() is None
    assert state.lab("a").entries() == [new]


def test_forgetting_goes_on_where_it_was_interrupted(labs: Path) -> None:
    state.claim("a", owners.explicit())
    saved = entry().save()
    disk = saved.directory / "disk0.qcow2"
    disk.write_bytes(b"x")
    with disk.open("rb"):  # in use: that keeps nobody from removing it
        saved.forget()
    assert not saved.directory.exists()


def test_there_is_no_lab_that_nobody_claimed(labs: Path) -> None:
    state.claim("here", owners.explicit())
    with pytest.raises(NotFound, match="labs: here"):
        state.lab("nowhere")


def test_a_living_owner_keeps_its_lab_and_is_named(labs: Path) -> None:
    state.claim("a", LIVING)
    with pytest.raises(LabInUse, match=r"process 1 \(/sbin/init\)"):
        state.claim("a", owners.current())
    assert state.lab("a").owner == LIVING


def test_a_dead_owners_lab_is_taken_over_with_its_machines(labs: Path) -> None:
    state.claim("a", DEAD)
    saved = entry().save()
    record = state.claim("a", owners.current())
    assert record.owner == owners.current()
    assert state.lab("a").entries() == [saved]


def test_the_same_owner_claims_again(labs: Path) -> None:
    first = state.claim("a", owners.current())
    assert state.claim("a", owners.current()).created == first.created


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "5", '{"name": "a"}', '{"owner": {"kind": "x", "y": 1}}', "\0"]
)
def test_a_torn_lab_file_is_kept_for_people_and_can_be_claimed(labs: Path, text: str) -> None:
    state.claim("a", DEAD)
    saved = entry().save()
    (labs / "a" / "lab.json").write_text(text)
    record = state.peek("a")
    assert record is not None
    assert record.damaged
    assert record.owner.alive()  # the reaper leaves it alone
    assert record.entries() == [saved]
    assert not state.claim("a", owners.current()).damaged


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"lab": "a"}', '{"surprise": 1}'])
def test_a_torn_entry_hides_itself_alone_and_goes_with_the_lab(labs: Path, text: str) -> None:
    state.claim("a", owners.explicit())
    torn, whole = entry(name="torn").save(), entry(name="whole").save()
    (torn.directory / "entry.json").write_text(text)
    assert state.lab("a").entries() == [whole]
    assert state.unreadable("a") == [torn.directory]
    whole.forget()
    state.forget_lab("a")
    assert not (labs / "a").exists()


def test_what_crashes_leave_in_a_lab_does_not_keep_it(labs: Path) -> None:
    state.claim("a", owners.explicit())
    (labs / "a" / ".lab.json.123.456").write_text("{")  # killed while writing
    (labs / "a" / "vm-web").mkdir()  # killed before the entry
    (labs / "a" / "vm-web" / ".entry.json.123.456").write_text("{")
    with state.locked("a"):
        state.forget_lab("a")
    assert list(labs.iterdir()) == []


def test_a_file_that_labkit_did_not_make_stays(labs: Path) -> None:
    state.claim("a", owners.explicit())
    (labs / "a" / "my-notes.txt").write_text("mine")
    (labs / "my-notes.txt").write_text("mine")
    state.forget_lab("a")
    assert state.lab_names() == []
    assert (labs / "a" / "my-notes.txt").read_text() == "mine"
    assert (labs / "my-notes.txt").read_text() == "mine"
    assert state.forget_strays() == []


def test_a_directory_that_a_crash_left_without_a_record_is_removed(labs: Path) -> None:
    (labs / "a").mkdir(parents=True)
    (labs / "a" / ".lab.json.1.2").write_text("{")
    state.claim("b", owners.explicit())
    assert state.forget_strays() == ["a"]
    assert state.lab_names() == ["b"]


def test_nothing_of_a_forgotten_lab_stays(labs: Path) -> None:
    state.claim("a", owners.explicit())
    with state.locked("a"):
        state.forget_lab("a")
    assert list(labs.iterdir()) == []


WRITER = """
import itertools, sys
from pathlib import Path
from labkit import state
path = Path(sys.argv[1])
print("ready", flush=True)
for n in itertools.count():
    state.write_json(path, {"n": n, "padding": [n] * 3000})
"""


def test_a_file_is_whole_whenever_its_writer_is_killed(labkit_home: Path, tmp_path: Path, repeats) -> None:
    path = tmp_path / "entry.json"
    last = -1
    for round_ in range(repeats(6, 60)):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        while not path.exists():
            pass
        for _ in range(3000 * round_):  # another instant in each round
            path.stat()
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        data = json.loads(path.read_text())
        assert data["padding"] == [data["n"]] * 3000
        last = max(last, data["n"])
    assert last > 0


def test_a_full_disk_is_said_and_leaves_the_old_text(
    labkit_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = labkit_home / "x.json"
    state.write_json(path, {"n": 1})
    # A real full device: the name of the file that is written aside leads there.
    monkeypatch.setattr("os.getpid", lambda: 7)
    monkeypatch.setattr("time.monotonic_ns", lambda: 7)
    (labkit_home / ".x.json.7.7").symlink_to("/dev/full")
    with pytest.raises(HostError, match="No space left"):
        state.write_json(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 1}
    assert [each.name for each in labkit_home.glob(".x*")] == []


def count_up(home: str, times: int) -> None:
    os.environ["LABKIT_HOME"] = home
    path = Path(home) / "count"
    for _ in range(times):
        with state.locked("a"):
            number = int(path.read_text())
            path.write_text(str(number + 1))


def test_a_lock_holds_across_processes_and_threads(labkit_home: Path) -> None:
    (labkit_home / "count").write_text("0")
    home = str(labkit_home)
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=count_up, args=(home, 50)) for _ in range(2)]
    threads = [threading.Thread(target=count_up, args=(home, 50)) for _ in range(3)]
    for each in [*workers, *threads]:
        each.start()
    for each in [*workers, *threads]:
        each.join()
    assert (labkit_home / "count").read_text() == "250"


def test_a_lock_whose_file_its_holder_removes_still_holds(labkit_home: Path) -> None:
    (labkit_home / "count").write_text("0")

    def count_and_forget() -> None:
        for _ in range(100):
            with state.locked("a"):
                number = int((labkit_home / "count").read_text())
                (labkit_home / "count").write_text(str(number + 1))
                state.forget_lab("a")

    threads = [threading.Thread(target=count_and_forget) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert (labkit_home / "count").read_text() == "400"


def test_the_child_of_a_fork_does_not_keep_its_parents_lock(labkit_home: Path) -> None:
    read, write = os.pipe()
    with state.locked("a"):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # until the parent ends
            os._exit(0)
    done = subprocess.run(
        [sys.executable, "-c", "from labkit import state\nwith state.locked('a'): print('had it')"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    os.close(write)
    os.waitpid(child, 0)
    os.close(read)
    assert done.stdout == "had it\n"


def test_a_killed_holder_frees_the_lock(labkit_home: Path) -> None:
    code = "from labkit import state\nwith state.locked('a'): print('has it', flush=True); input()"
    pipe = subprocess.PIPE
    holder = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "has it\n"
    holder.kill()
    holder.wait()
    holder.communicate()
    with state.locked("a"):
        pass


# Where things live


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o027])
def test_what_is_made_is_closed_to_others_whatever_the_umask(
    labkit_home: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LABKIT_HOME", str(labkit_home / "deep" / "home"))
    monkeypatch.setenv("LABKIT_CACHE", str(labkit_home / "deep" / "cache"))
    before = os.umask(umask)
    try:
        state.claim("a", owners.explicit())
        paths.cache_dir()
        paths.runtime_dir()
    finally:
        os.umask(before)
    for path in (labkit_home / "deep").rglob("*"):
        if path.is_dir():
            assert path.stat().st_mode & 0o777 == 0o700, path


def test_the_runtime_directory_hangs_on_the_state_alone(
    labkit_home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = paths.runtime_dir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert paths.runtime_dir() == seen


def test_a_long_home_gets_short_sockets(labkit_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_HOME", str(labkit_home / ("x" * 150)))
    found = paths.runtime_dir()
    try:
        assert len(str(found)) <= paths._RUNTIME_PATH_MAX
        assert found == paths.runtime_dir()
        monkeypatch.setenv("LABKIT_HOME", str(labkit_home / ("y" * 150)))
        other = paths.runtime_dir()
        other.rmdir()
        assert other != found
    finally:
        found.rmdir()


@pytest.mark.parametrize("name", ["file", "link"])
def test_a_home_that_is_no_directory_of_ours_is_refused(
    labkit_home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (labkit_home / "file").write_text("")
    (labkit_home / "link").mkdir()
    (labkit_home / "link" / "state").symlink_to("/tmp")
    monkeypatch.setenv("LABKIT_HOME", str(labkit_home / name))
    with pytest.raises(HostError, match="LABKIT_HOME"):
        state.lab_names()


def test_somebody_without_a_home_is_told_so(labkit_home: Path) -> None:
    code = (
        "from labkit import errors, paths\ntry: paths.state_dir()\nexcept errors.HostError as exc: print(exc)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in {"HOME", "LABKIT_HOME", "XDG_STATE_HOME"}}
    nobody = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"] if os.geteuid() == 0 else []
    done = subprocess.run(
        [*nobody, sys.executable, "-c", code],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    if nobody:
        assert "You have no home directory" in done.stdout
    else:
        assert done.stdout == ""  # the passwd entry has it
