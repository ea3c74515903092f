"""Whose a lab is, and that nothing of it stays when they are gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from labkit import Lab, state
from labkit.hypervisors import daemon, libvirt

pytestmark = pytest.mark.qemu
Eventually = Callable[..., Any]
Program = Callable[..., subprocess.Popen[str]]

OWNS_THREE = "lab = labkit.Lab('owned'); lab.start(*[lab.vm(f'n{n}') for n in range(3)])"


@pytest.fixture
def home(labkit_home: Path) -> Iterator[Path]:
    """A kit of the test's own."""
    yield labkit_home
    daemon.stop()


def processes(home: Path, what: str = "") -> list[str]:
    """The command lines of what runs for a kit."""
    found = []
    for each in psutil.process_iter():
        try:
            line = " ".join(each.cmdline())
            if each.pid == os.getpid() or what not in line or each.status() == psutil.STATUS_ZOMBIE:
                continue
            if str(home) in line or each.environ().get("LABKIT_HOME") == str(home):
                found.append(line)
        except psutil.Error:
            continue
    return found


def reapers(home: Path) -> list[psutil.Process]:
    return [
        each
        for each in psutil.process_iter(["cmdline", "environ"])
        if (each.info["cmdline"] or [])[-1:] == ["labkit.reaper"]
        and (each.info["environ"] or {}).get("LABKIT_HOME") == str(home)
    ]


def files(home: Path) -> list[str]:
    """What is there of any lab: ledger, disks, logs, domains, saved states, sockets."""
    return [
        str(path.relative_to(home))
        for pattern in (
            "state/labs/*",
            "state/labs/.*",
            "state/libvirt/libvirt/qemu/*.xml",
            "state/libvirt/libvirt/qemu/snapshot/*",
            "state/libvirt/libvirt/qemu/lib/domain*",
            "run/vm/*",
            "run/libvirt/qemu/run/*labkit*",
        )
        for path in home.glob(pattern)
    ]


def ls(home: Path) -> Any:
    done = subprocess.run(
        [Path(sys.executable).with_name("labkit"), "ls", "--json"],
        env={**os.environ, "LABKIT_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout)


def nothing_left(home: Path) -> bool:
    return not state.lab_names() and not processes(home, "qemu-system") and not files(home)


def test_ten_seconds_after_a_kill_nothing_of_three_machines_is_left(
    home: Path, program: Program, eventually: Eventually
) -> None:
    owner = program(OWNS_THREE)
    assert [thing["state"] for thing in ls(home)] == ["running"] * 3
    owner.kill()
    owner.wait()
    eventually(lambda: nothing_left(home), within=10)
    assert ls(home) == []
    eventually(lambda: not reapers(home), within=10)


@pytest.mark.soak  # it waits for the daemon's idle time
def test_every_process_of_a_kit_ends_by_itself(home: Path, program: Program, eventually: Eventually) -> None:
    program("labkit.Lab('owned').vm('web').start()").kill()
    eventually(lambda: not processes(home), within=daemon.IDLE + 60)


def test_a_program_that_just_ends_is_reaped_too(home: Path, eventually: Eventually) -> None:
    code = "import labkit; labkit.Lab('forgotten').vm('web').start()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    eventually(lambda: nothing_left(home), within=10)


def test_a_kill_while_machines_are_being_made_leaves_nothing(
    home: Path, kill_at_end: Callable[[Any], Any], eventually: Eventually, repeats: Callable[[int, int], int]
) -> None:
    code = "import labkit; lab = labkit.Lab('cut'); n = 0\nwhile True: lab.vm(f'n{n}'); n += 1"
    for turn in range(repeats(3, 30)):
        owner = kill_at_end(subprocess.Popen([sys.executable, "-c", code]))
        eventually(lambda: len(list(home.glob("state/labs/cut/vm-*"))) > turn)  # noqa: B023
        owner.kill()
        owner.wait()
        eventually(lambda: nothing_left(home), within=10)


def test_a_killed_reaper_is_replaced_by_the_next_look(
    home: Path, program: Program, eventually: Eventually
) -> None:
    owner = program("labkit.Lab('owned').vm('web').start()")
    eventually(lambda: reapers(home))
    for reaper in reapers(home):
        reaper.kill()
    owner.kill()
    owner.wait()
    ls(home)
    eventually(lambda: nothing_left(home), within=10)


def test_a_killed_reaper_is_replaced_by_the_next_machine(home: Path, eventually: Eventually) -> None:
    with Lab("own") as lab:
        (first,) = eventually(lambda: reapers(home))
        first.kill()
        first.wait()
        lab.vm("web")
        (second,) = eventually(lambda: reapers(home))
    assert first.pid != second.pid


@pytest.mark.soak
def test_a_reaper_killed_at_its_work_is_replaced_by_the_next_lab(
    home: Path, program: Program, eventually: Eventually
) -> None:
    owner = program(OWNS_THREE)
    owner.kill()
    owner.wait()
    eventually(lambda: len(processes(home, "qemu-system")) < 3)
    for reaper in reapers(home):
        reaper.kill()
        reaper.wait()
    with Lab("next"):
        eventually(lambda: state.lab_names() == ["next"], within=10)
    eventually(lambda: nothing_left(home), within=10)


def test_a_daemon_killed_with_the_owner_does_not_keep_the_machines(
    home: Path, program: Program, eventually: Eventually
) -> None:
    owner = program(OWNS_THREE)
    pid = daemon._pid()
    assert pid
    owner.kill()
    os.kill(pid, signal.SIGKILL)
    owner.wait()
    eventually(lambda: nothing_left(home), within=15)


def test_a_lab_whose_file_was_torn_does_not_keep_the_reaper_from_the_others(
    home: Path, program: Program, eventually: Eventually
) -> None:
    state.claim("torn", state.owners.explicit())
    (home / "state/labs/torn/lab.json").write_text("{")
    owner = program("labkit.Lab('owned').vm('web')")
    owner.kill()
    owner.wait()
    eventually(lambda: state.lab_names() == ["torn"], within=10)


def test_a_stopped_owner_keeps_its_lab(home: Path, program: Program) -> None:
    owner = program("labkit.Lab('owned').vm('web')")
    owner.send_signal(signal.SIGSTOP)
    time.sleep(3)  # the reaper looks every second
    owner.send_signal(signal.SIGCONT)
    assert [thing["lab"] for thing in ls(home)] == ["owned"]


def test_a_zombie_owner_keeps_nothing(home: Path, eventually: Eventually) -> None:
    code = "import labkit; labkit.Lab('owned').vm('web')"
    owner = subprocess.Popen([sys.executable, "-c", code])
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    eventually(lambda: nothing_left(home), within=10)
    owner.wait()


def test_a_machine_that_labkit_did_not_make_survives_everything(
    home: Path, eventually: Eventually, program: Program
) -> None:
    domain = "<domain type='qemu'><name>{}</name><memory>65536</memory><os><type>hvm</type></os></domain>"
    connection = libvirt.connect()._connection
    for name in ("foreign", "labkit.mine.web"):  # the second looks like ours by its name alone
        connection.defineXML(domain.format(name))
    notes = [home / "state/notes", home / "state/labs/notes", home / "run/notes"]
    (home / "state/labs").mkdir(exist_ok=True)
    for path in notes:
        path.write_text("mine")
    program("labkit.Lab('owned').vm('web')").kill()
    eventually(lambda: state.lab_names() == [], within=10)
    Lab("more", keep=True).vm("web")
    command = [Path(sys.executable).with_name("labkit"), "clean", "--all"]
    subprocess.run(
        command, check=True, env={**os.environ, "LABKIT_HOME": str(home)}, stdout=subprocess.DEVNULL
    )
    connection = libvirt.connect()._connection
    assert sorted(each.name() for each in connection.listAllDomains()) == ["foreign", "labkit.mine.web"]
    assert [path.read_text() for path in notes] == ["mine"] * 3
    for each in connection.listAllDomains():
        each.undefine()


def test_clean_takes_what_the_ledger_lost(home: Path) -> None:
    lab = Lab("lost", keep=True)
    lab.vm("web").start()
    shutil.rmtree(home / "state/labs")  # by hand
    done = subprocess.run(
        [Path(sys.executable).with_name("labkit"), "clean"],
        env={**os.environ, "LABKIT_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "removed labkit.lost.web\n", done.stderr
    assert nothing_left(home)


def test_a_daemon_that_had_nothing_to_do_is_no_loss(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends when it is idle; whoever has a handle still goes on with the next one."""
    lab = Lab("idle", keep=True)
    vm = lab.vm("web")
    daemon.stop()
    assert vm.state == "off"
    daemon.stop()
    assert vm.start().run("hostname").stdout == "web\n"
    lab.close()


# Two users


def as_user(uid: int, place: Path, cache: Path, code: str, **more: str) -> subprocess.CompletedProcess[str]:
    # Password and group files that only this command sees have the user.
    names = place.with_name(f"names-{uid}")
    for kind, entry in (
        ("passwd", f"lk{uid}:x:{uid}:{uid}::{place}:/bin/sh"),
        ("group", f"lk{uid}:x:{uid}:"),
    ):
        text = Path(f"/etc/{kind}").read_text()
        place.with_name(f"{names.name}-{kind}").write_text(f"{text}{entry}\n")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(place),
        "LABKIT_CACHE": str(cache),
        "LABKIT_PROGRESS": "off",
        **more,
    }
    return subprocess.run(
        [
            *(
                "unshare",
                "--mount",
                "sh",
                "-c",
                'for n in passwd group; do mount --bind "$0-$n" /etc/$n; done; exec "$@"',
                names,
            ),
            *("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", sys.executable, "-c", code),
        ],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture
def users() -> Iterator[list[tuple[int, Path, Path]]]:
    """Two ordinary users: id, home and cache of each."""
    if os.geteuid() != 0:
        pytest.skip("needs something else: being two users takes root")
    made = []
    base = Path(tempfile.mkdtemp(prefix="u", dir=os.environ["LABKIT_TEST_BASE"]))
    for path in (base, Path(os.environ["LABKIT_TEST_BASE"])):
        path.chmod(0o755)
    for uid in (54321, 54322):
        place, cache = base / str(uid), base / f"cache-{uid}"
        place.mkdir()
        os.chown(place, uid, uid)
        shutil.copytree(
            os.environ["LABKIT_CACHE"], cache, ignore=shutil.ignore_patterns("distros", "libvirt")
        )
        for path in (cache, *cache.rglob("*")):
            os.chown(path, uid, uid, follow_symlinks=False)
        made.append((uid, place, cache))
    yield made
    stop = "from labkit.hypervisors import daemon; daemon.stop()"
    for uid, place, cache in made:
        as_user(uid, place, cache, stop)


MAKES_WEB = """
import labkit
vm = labkit.Lab("lesson", keep=True).vm("web").start()
vm.run("echo mine > /data/file; sync")
print(vm.run("hostname; id -u").stdout.split())
"""
SEES = """
import labkit, os
from labkit.lab import inventory
things = [(t["lab"], t["name"], t["state"]) for t in inventory()]
print(things)
try: labkit.Lab.attach("lesson")["web"]
except labkit.errors.NotFound as exc: print("not found")
"""
CLOSES = """
import labkit
print(labkit.Lab.attach("lesson")["web"].run("cat /data/file").stdout.strip())
labkit.Lab.attach("lesson").close()
"""


def test_two_users_do_not_meet(users: list[tuple[int, Path, Path]]) -> None:
    (first, *his), (second, *hers) = users
    done = as_user(first, *his, MAKES_WEB)
    assert done.stdout == "['web', '0']\n", done.stderr
    seen = as_user(second, *hers, SEES)
    assert seen.stdout == "[]\nnot found\n", seen.stderr
    # Not even by knowing where the other's things are.
    state_dir = his[0] / ".local/state/labkit"
    peek = as_user(second, *hers, f"import os; os.listdir({str(state_dir)!r})")
    assert "PermissionError" in peek.stderr
    reach = as_user(second, *hers, SEES, LABKIT_HOME=str(his[0]))
    assert "Traceback" in reach.stderr
    assert "LABKIT_HOME" in reach.stderr
    listening = [each for each in psutil.net_connections("inet") if each.status == psutil.CONN_LISTEN]
    ours = {each.pid for each in psutil.process_iter() if each.uids().real in (first, second)}
    assert not [each for each in listening if each.pid in ours]
    # The same names at the same time.
    assert as_user(second, *hers, MAKES_WEB).stdout == "['web', '0']\n"
    for uid, *place in users:
        assert as_user(uid, *place, CLOSES).stdout == "mine\n"
    assert as_user(first, *his, SEES).stdout == "[]\nnot found\n"


def test_anothers_runtime_directory_is_refused(users: list[tuple[int, Path, Path]]) -> None:
    """Where homes are long, sockets go to /tmp, where another may have been first."""
    (first, place, cache), _ = users
    long = place / ("x" * 60)
    long.mkdir()
    os.chown(long, first, first)
    code = "from labkit import paths; print(paths.runtime_dir())"
    runtime = Path(as_user(first, place, cache, code, LABKIT_HOME=str(long)).stdout.strip())
    runtime.rmdir()
    runtime.mkdir(mode=0o777)  # root's: anybody's but the user's own
    try:
        done = as_user(first, place, cache, code, LABKIT_HOME=str(long))
    finally:
        runtime.rmdir()
    assert "is not a directory of yours" in done.stderr


# Jupyter: a real server and kernel


@pytest.fixture
def jupyter(home: Path, tmp_path: Path) -> Iterator[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "LABKIT_GRACE": "3",
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTER_DATA_DIR": str(tmp_path / "data"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", f"--port={port}"),
            *(
                "--ServerApp.ip=127.0.0.1",
                "--IdentityProvider.token=secret",
                f"--ServerApp.root_dir={tmp_path}",
            ),
        ],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield {"url": f"http://127.0.0.1:{port}", "runtime": tmp_path / "runtime", "server": server}
    server.terminate()
    server.wait(timeout=30)


def ask(jupyter: dict[str, Any], method: str, path: str, body: Any = None) -> Any:
    import httpx

    headers = {"Authorization": "token secret"}
    answer = httpx.request(method, jupyter["url"] + path, json=body, headers=headers, timeout=30)
    answer.raise_for_status()
    return answer.json() if answer.content else None


def execute(jupyter: dict[str, Any], kernel: str, code: str) -> str:
    """What a cell prints."""
    from jupyter_client import BlockingKernelClient

    client = BlockingKernelClient(connection_file=str(jupyter["runtime"] / f"kernel-{kernel}.json"))
    client.load_connection_file()
    client.start_channels()
    said: list[str] = []

    def on_output(message: Any) -> None:
        content = message["content"]
        said.append(content.get("text") or "\n".join(content.get("traceback", [])))

    try:
        client.wait_for_ready(timeout=60)
        client.execute_interactive(code, timeout=120, output_hook=on_output)
    finally:
        client.stop_channels()
    return "".join(said)


CELL = """
import labkit
lab = labkit.Lab("lesson")
vm = lab.vm("web").start()
print(vm.run("cat /tmp/file", check=False).stdout or "new", end="")
vm.run("echo kept > /tmp/file")
"""


def test_a_notebooks_lab_survives_its_kernels_restart_and_goes_with_its_session(
    jupyter: dict[str, Any], home: Path, eventually: Eventually
) -> None:
    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", int(jupyter["url"].rpartition(":")[2]))) == 0

    eventually(answers, within=60)
    session = ask(
        jupyter,
        "POST",
        "/api/sessions",
        {"path": "lesson.ipynb", "type": "notebook", "name": "lesson.ipynb", "kernel": {"name": "python3"}},
    )
    kernel = session["kernel"]["id"]
    assert execute(jupyter, kernel, CELL) == "new"
    assert state.lab("lesson").owner.kind == "jupyter"
    ask(jupyter, "POST", f"/api/kernels/{kernel}/restart")
    time.sleep(5)  # longer than the grace time: the kernel has not been gone
    assert execute(jupyter, kernel, CELL) == "kept\n"
    # Another notebook is told who has it.
    other = ask(
        jupyter,
        "POST",
        "/api/sessions",
        {"path": "other.ipynb", "type": "notebook", "name": "other.ipynb", "kernel": {"name": "python3"}},
    )
    said = execute(jupyter, other["kernel"]["id"], "import labkit; labkit.Lab('lesson')")
    assert "in use by notebook kernel" in said
    assert "lesson.ipynb" in said
    # The session ends: its kernel is gone, and the lab after the grace time.
    ask(jupyter, "DELETE", f"/api/sessions/{session['id']}")
    ended = time.monotonic()
    eventually(lambda: nothing_left(home), within=20)
    assert time.monotonic() - ended > 2


def test_a_notebooks_lab_goes_when_its_server_is_killed(
    jupyter: dict[str, Any], home: Path, eventually: Eventually
) -> None:
    port = int(jupyter["url"].rpartition(":")[2])

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    eventually(answers, within=60)
    kernel = ask(jupyter, "POST", "/api/kernels", {"name": "python3"})["id"]
    assert execute(jupyter, kernel, "import labkit; labkit.Lab('lesson').vm('web')") == ""
    assert state.lab("lesson").owner.kind == "jupyter"
    jupyter["server"].kill()  # its kernels notice that their parent is gone
    eventually(lambda: nothing_left(home), within=30)
