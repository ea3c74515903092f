"""Commands and files on a VM, and several users of one VM at the same time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from labkit import VM, Lab, Machine
from labkit.errors import CommandFailed, CommandTimeout, SpecError

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def vm() -> Iterator[VM]:
    with Lab("run") as lab:
        yield lab.vm("web", memory="384 MiB").start()


def sleeping(vm: VM, seconds: str) -> bool:
    return f"sleep {seconds}\n" in vm.run(["ps", "-o", "args"]).stdout


def test_a_vm_is_a_machine(vm: VM) -> None:
    assert isinstance(vm, Machine)


def test_strings_go_to_the_shell_and_lists_run_as_they_are(vm: VM) -> None:
    assert vm.run("echo $((1 + 1)) | tr 2 3").stdout == "3\n"
    assert vm.run(["printf", "%s|", "a b", "$HOME", "*", ""]).stdout == "a b|$HOME|*||"


def test_streams_exit_and_time_come_back(vm: VM) -> None:
    done = vm.run("echo out; echo err >&2; exit 3", check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 3)
    assert 0 < done.seconds < 30


def test_a_failed_command_shows_what_it_said(vm: VM) -> None:
    with pytest.raises(CommandFailed, match="On web, the command exited with 1") as caught:
        vm.run("ls /no/such")
    assert "/no/such" in caught.value.evidence


@pytest.mark.parametrize(
    ("command", "code"),
    [("kill -9 $$", 137), ("kill -15 $$", 143), (["no-such-program"], 127), (["/etc/hosts"], 126)],
)
def test_other_ends_are_told_as_a_shell_tells_them(vm: VM, command: Any, code: int) -> None:
    assert vm.run(command, check=False).returncode == code


def test_input_env_and_cwd(vm: VM) -> None:
    done = vm.run('cat; pwd; echo "$COLOUR"', input="grüße\n", cwd="/tmp", env={"COLOUR": "red & blue"})
    assert done.stdout == "grüße\n/tmp\nred & blue\n"


def test_bytes_go_in_and_come_out_as_they_are(vm: VM) -> None:
    data = bytes(range(256)) * 100
    assert vm.run(["cat"], input=data).stdout_bytes == data


def test_input_from_a_file_is_streamed(vm: VM, tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(os.urandom(3 << 20))
    assert (
        vm.run(["sha256sum"], input=file).stdout.split()[0] == hashlib.sha256(file.read_bytes()).hexdigest()
    )


def test_a_missing_directory_is_said(vm: VM) -> None:
    with pytest.raises(CommandFailed, match="/no/such"):
        vm.run("true", cwd="/no/such")


def test_output_of_any_size_is_kept(vm: VM) -> None:
    done = vm.run("head -c 67108864 /dev/zero", timeout=240)
    assert len(done.stdout_bytes) == 64 << 20


def test_output_is_seen_while_it_comes(vm: VM) -> None:
    """The second half is only asked for when the first has been seen."""
    seen: list[tuple[str, bytes]] = []

    def on_output(stream: Any, data: bytes) -> None:
        if not seen:
            vm.run("echo go on > /tmp/fifo")
        seen.append((stream, data))

    vm.run("rm -f /tmp/fifo; mkfifo /tmp/fifo; echo first; cat /tmp/fifo >&2", on_output=on_output)
    assert seen == [("stdout", b"first\n"), ("stderr", b"go on\n")]


def test_a_missed_deadline_kills_the_whole_group_and_keeps_what_was_said(vm: VM) -> None:
    start = time.monotonic()
    with pytest.raises(CommandTimeout) as caught:
        vm.run("echo begun; sleep 7331 & sleep 7332", timeout=1)
    assert time.monotonic() - start < 5
    assert caught.value.stdout == b"begun\n"
    assert not sleeping(vm, "7331")
    assert not sleeping(vm, "7332")


def test_an_interrupt_kills_the_command_and_the_machine_goes_on(vm: VM) -> None:
    def on_output(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vm.run("echo x; sleep 7333", on_output=on_output)
    assert not sleeping(vm, "7333")


def test_a_child_in_the_background_is_not_waited_for(vm: VM) -> None:
    done = vm.run("sleep 7334 & echo done", timeout=20)
    assert done.stdout == "done\n"
    assert sleeping(vm, "7334")
    vm.run("killall sleep")


@pytest.mark.parametrize("command", ["", " ", [], [5], 5, None, ["a\0"]])
def test_what_is_no_command_is_a_spec_error(vm: VM, command: Any) -> None:
    with pytest.raises(SpecError):
        vm.run(command)


def test_a_fork_bomb_does_not_outlast_the_deadline(vm: VM) -> None:
    start = time.monotonic()
    try:
        vm.run("f() { f | f & }; f; sleep 2; exit 0", timeout=20, check=False)
    except CommandTimeout:
        pass
    assert time.monotonic() - start < 30
    assert vm.reset().run("echo back").stdout == "back\n"


def test_out_of_memory_ends_the_command_and_not_the_machine(vm: VM) -> None:
    done = vm.run(["tail", "/dev/zero"], timeout=120, check=False)
    assert done.returncode == 137
    assert vm.run("dmesg | grep -c 'Out of memory'").stdout.strip() != "0"


# Files


def test_a_large_file_goes_there_and_back_with_its_checksum(vm: VM, tmp_path: Path) -> None:
    size = 100 << 20
    file = tmp_path / "data"
    with file.open("wb") as out:
        for _ in range(size >> 20):
            out.write(os.urandom(1 << 20))
    sent = vm.put(file, "/data/data", timeout=280)
    assert vm.run(["stat", "-c", "%s", "/data/data"]).stdout == f"{size}\n"
    assert vm.get("/data/data", tmp_path / "back", timeout=280) == sent
    with file.open("rb") as first, (tmp_path / "back").open("rb") as second:
        assert hashlib.file_digest(first, "sha256").digest() == hashlib.file_digest(second, "sha256").digest()
    vm.run("rm /data/data")


def test_a_file_is_replaced_whole(vm: VM) -> None:
    vm.put(b"old" * 1000, "/data/file", mode=0o751)
    with_reader = vm.run(["sh", "-c", "exec 3< /data/file; cat /data/file | wc -c"]).stdout
    vm.put(b"new", "/data/file", mode=0o640)
    assert with_reader.strip() == "3000"
    assert vm.run("cat /data/file; stat -c ' %a' /data/file; ls -A /data").stdout.split() == [
        *("new", "640", "file", "lost+found")
    ]


def test_put_to_a_missing_directory_says_so(vm: VM) -> None:
    with pytest.raises(CommandFailed, match="put /no/such/file") as caught:
        vm.put(b"x", "/no/such/file")
    assert "set -e" not in str(caught.value)


def test_put_to_a_full_disk_says_so_and_leaves_the_old_file(vm: VM) -> None:
    vm.run("mkdir -p /tmp/small && mount -t tmpfs -o size=1m none /tmp/small && echo old > /tmp/small/file")
    with pytest.raises(CommandFailed, match="o space left"):
        vm.put(b"x" * (2 << 20), "/tmp/small/file")
    assert vm.run("cat /tmp/small/file; ls -A /tmp/small").stdout == "old\nfile\n"
    vm.run("umount /tmp/small")


def test_get_of_a_missing_file_leaves_nothing(vm: VM, tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="get /no/such"):
        vm.get("/no/such", tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


# Several at the same time


def test_many_threads_run_commands_at_the_same_time(vm: VM) -> None:
    results: dict[int, str] = {}

    def work(number: int) -> None:
        for turn in range(5):
            results[number * 100 + turn] = vm.run(f"echo {number}-{turn}").stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n * 100 + t: f"{n}-{t}\n" for n in range(8) for t in range(5)}


def test_two_processes_run_commands_on_one_machine(vm: VM) -> None:
    code = """if True:
        import labkit, sys
        vm = labkit.Lab.attach("run")["web"]
        for n in range(20):
            assert vm.run(f"echo {n}-{sys.argv[1]}").stdout == f"{n}-{sys.argv[1]}\\n"
    """
    others = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "ab"]
    for n in range(20):
        assert vm.run(f"echo {n}").stdout == f"{n}\n"
    assert [other.wait(timeout=120) for other in others] == [0, 0]


def test_the_child_of_a_fork_uses_the_machine_beside_its_parent(vm: VM) -> None:
    vm.run("true")
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if vm.run("echo child").stdout == "child\n" and vm.state == "running" else 1)
        finally:
            os._exit(2)
    said = vm.run("echo parent").stdout
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert said == "parent\n"
    assert vm.run("echo parent still").stdout == "parent still\n"
    assert vm.state == "running"
