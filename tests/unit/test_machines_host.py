"""The host as a machine: exits, signals, time-outs, input, output and files."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from labkit import Completed, Machine, host
from labkit.errors import CommandFailed, CommandTimeout, SpecError


def test_the_host_is_a_machine() -> None:
    assert isinstance(host(), Machine)
    assert host().name == "host"


def test_a_string_goes_to_the_shell() -> None:
    assert host().run("echo $((1 + 1)); echo oops >&2").stdout == "2\n"


def test_a_list_runs_as_it_is() -> None:
    done = host().run(["printf", "%s|", "a b", "$HOME", "*", ""])
    assert done.stdout == "a b|$HOME|*||"


def test_both_streams_are_kept_apart() -> None:
    done = host().run("echo out; echo err >&2")
    assert (done.stdout, done.stderr) == ("out\n", "err\n")


def test_output_that_is_no_text_is_kept_raw() -> None:
    done = host().run(r"printf '\377\000\n'")
    assert done.stdout_bytes == b"\xff\0\n"
    assert done.stdout == "\N{REPLACEMENT CHARACTER}\0\n"


def test_an_exit_other_than_0_raises_with_what_was_said() -> None:
    with pytest.raises(CommandFailed) as caught:
        host().run("echo why >&2; exit 3")
    assert caught.value.completed.returncode == 3
    assert "why" in str(caught.value)


def test_an_exit_can_be_looked_at_instead() -> None:
    assert host().run("exit 3", check=False).returncode == 3


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_death_by_a_signal_is_128_and_its_number(number: int) -> None:
    assert host().run(f"kill -{number:d} $$", check=False).returncode == 128 + number


def test_a_program_that_is_not_there_exits_with_127() -> None:
    done = host().run(["no-such-program-here"], check=False)
    assert done.returncode == 127
    assert "no-such-program-here" in done.stderr


def test_a_file_that_is_no_program_exits_with_126(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    assert host().run([str(tmp_path / "plain")], check=False).returncode == 126


def test_a_directory_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="gone"):
        host().run("true", cwd=str(tmp_path / "gone"))


def test_cwd_and_env_are_the_commands_own(tmp_path: Path) -> None:
    done = host().run("pwd; echo $COLOUR $HOME", cwd=str(tmp_path), env={"COLOUR": "red"})
    assert done.stdout == f"{tmp_path}\nred {os.environ.get('HOME', '')}\n"


@pytest.mark.parametrize("given", ["grüße\n", "grüße\n".encode()])
def test_input_is_text_or_bytes(given: str | bytes) -> None:
    assert host().run(["cat"], input=given).stdout == "grüße\n"


def test_input_from_a_file_is_streamed(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(os.urandom(3_000_000))
    done = host().run(["sha256sum"], input=file)
    assert done.stdout.split()[0] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_without_input_there_is_none() -> None:
    assert host().run(["cat"]).stdout == ""


def test_input_that_nobody_reads_does_no_harm() -> None:
    assert host().run("exit 0", input=b"x" * 10_000_000).ok


def test_input_and_output_flow_at_the_same_time() -> None:
    data = os.urandom(4_000_000)
    assert host().run(["cat"], input=data).stdout_bytes == data


def test_output_of_any_size_is_kept() -> None:
    done = host().run(["head", "-c", str(64 << 20), "/dev/zero"])
    assert len(done.stdout_bytes) == 64 << 20


def test_output_is_seen_while_it_comes(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    seen: list[tuple[str, bytes]] = []

    def on_output(stream: Any, data: bytes) -> None:
        if not seen:
            fifo.write_bytes(b"go on\n")  # the command waits for this
        seen.append((stream, data))

    host().run(f"echo first; cat {fifo} >&2", on_output=on_output)
    assert seen == [("stdout", b"first\n"), ("stderr", b"go on\n")]


def test_a_missed_deadline_kills_the_whole_group_and_keeps_what_was_said(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(CommandTimeout) as caught:
        host().run(f"echo begun; sleep 98 & echo $! > {tmp_path}/pid; sleep 99", timeout=0.5)
    assert time.monotonic() - start < 5
    assert caught.value.stdout == b"begun\n"
    assert caught.value.mend
    assert_gone(int((tmp_path / "pid").read_text()))


def assert_gone(pid: int) -> None:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":  # dead; whoever is its parent now may be slow to notice
            return
        time.sleep(0.01)
    pytest.fail(f"process {pid} is still there")


def test_an_exception_out_of_on_output_kills_the_command(tmp_path: Path) -> None:
    def on_output(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        host().run(f"echo $$ > {tmp_path}/pid; echo x; sleep 99", on_output=on_output)
    assert_gone(int((tmp_path / "pid").read_text()))


def test_a_child_in_the_background_is_not_waited_for(tmp_path: Path) -> None:
    start = time.monotonic()
    done = host().run(f"sleep 30 & echo $! > {tmp_path}/pid; echo done")
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert done.stdout == "done\n"
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("command", ["", [], [""], ["a\0b"], [5], [None]])
def test_what_is_no_command_is_a_spec_error(command: Any) -> None:
    with pytest.raises(SpecError):
        host().run(command)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "5", True, []])
def test_what_is_no_time_is_a_spec_error(timeout: Any) -> None:
    with pytest.raises(SpecError):
        host().run("true", timeout=timeout)


@pytest.mark.parametrize("given", [5, ["a"], {}])
def test_what_is_no_input_is_a_spec_error(given: Any) -> None:
    with pytest.raises(SpecError):
        host().run("cat", input=given)


@pytest.mark.parametrize("env", [{"A": 5}, {5: "a"}, {"A=B": "x"}, {"": "x"}, {"A": "\0"}])
def test_what_is_no_environment_is_a_spec_error(env: Any) -> None:
    with pytest.raises(SpecError):
        host().run("true", env=env)


def test_no_timeout_waits(tmp_path: Path) -> None:
    assert host().run("sleep 0.2; echo x", timeout=None).stdout == "x\n"


def test_many_commands_run_at_the_same_time() -> None:
    results: dict[int, Completed] = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: host().run(f"sleep 0.2; echo {n}")}))
        for n in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {n: done.stdout for n, done in results.items()} == {n: f"{n}\n" for n in range(16)}


def test_descriptors_are_given_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        host().run("true", input=b"x")
        with pytest.raises(CommandTimeout):
            host().run("sleep 9", timeout=0.01)
    assert len(os.listdir("/proc/self/fd")) == before


# Files


def test_put_and_get_bring_the_bytes_and_their_checksum(tmp_path: Path) -> None:
    data = os.urandom(2_000_000)
    expected = hashlib.sha256(data).hexdigest()
    assert host().put(data, str(tmp_path / "there")) == expected
    assert host().get(str(tmp_path / "there"), tmp_path / "back") == expected
    assert (tmp_path / "back").read_bytes() == data


def test_put_takes_a_file_and_a_mode(tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(b"#!/bin/sh\n")
    host().put(tmp_path / "from", str(tmp_path / "to"), mode=0o750)
    assert stat.S_IMODE((tmp_path / "to").stat().st_mode) == 0o750


def test_names_with_strange_characters_are_taken_as_they_are(tmp_path: Path) -> None:
    target = str(tmp_path / "a b'$(touch x)\"-*\n")
    host().put(b"x", target)
    assert host().get(target, tmp_path / "back") == hashlib.sha256(b"x").hexdigest()
    assert len(os.listdir(tmp_path)) == 2


def test_put_to_a_missing_directory_fails_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="put /") as caught:
        host().put(b"x", f"{tmp_path}/no/such")
    assert "irectory" in str(caught.value)
    assert "set -e" not in str(caught.value)  # our script is not the reader's business


def test_put_to_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    done = host().run("ulimit -f 100; exec $0 -c true", check=False)
    assert done
    with pytest.raises(CommandFailed):
        host().put(b"x", "/dev/full/x")
    assert target.read_text() == "old"


def test_get_into_a_directory_keeps_the_name(tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(b"x")
    (tmp_path / "dir").mkdir()
    host().get(str(tmp_path / "from"), tmp_path / "dir")
    assert (tmp_path / "dir" / "from").read_bytes() == b"x"


def test_get_of_a_missing_file_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("old")
    with pytest.raises(CommandFailed, match="get /") as caught:
        host().get(str(tmp_path / "missing"), tmp_path / "old")
    assert "o such file" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "old"


def test_get_gives_the_file_the_users_usual_mode(tmp_path: Path) -> None:
    (tmp_path / "from").write_bytes(b"x")
    before = os.umask(0o027)
    try:
        host().get(str(tmp_path / "from"), tmp_path / "to")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "to").stat().st_mode) == 0o640


def test_put_of_a_missing_file_is_the_usual_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        host().put(tmp_path / "missing", str(tmp_path / "to"))
    assert list(tmp_path.iterdir()) == []
