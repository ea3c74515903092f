"""The QEMU guest agent as a channel, over an agent's commands carried out for real on the host."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import random
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from labkit.channel.qga import AgentChannel
from labkit.errors import CommandTimeout, HypervisorError, MachineError, NotRunning, SpecError

# What libvirt 9.0 was seen to carry, in bytes.
COMMAND_MOST = 175_000
ANSWER_MOST = 4 << 20


class Guest:
    """The commands that labkit uses of qemu-ga's, done as its reference has them."""

    def __init__(self) -> None:
        self.processes: dict[int, tuple[subprocess.Popen[bytes], threading.Thread, list[bytes]]] = {}
        self.files: dict[int, Any] = {}
        self.silent = False
        self.directories: set[Path] = set()

    def call(self, command: str, timeout: float) -> str:
        if self.silent:
            raise HypervisorError("The hypervisor could not agent call.", evidence="agent is not connected")
        request = json.loads(command)
        act = getattr(self, request["execute"].replace("-", "_"))
        try:
            answer = json.dumps({"return": act(**self._names(request.get("arguments", {})))})
        except OSError as exc:
            answer = json.dumps({"error": {"class": "GenericError", "desc": str(exc)}})
        assert len(command) < COMMAND_MOST
        assert len(answer) < ANSWER_MOST
        return answer

    @staticmethod
    def _names(arguments: dict[str, Any]) -> dict[str, Any]:
        return {name.replace("-", "_"): value for name, value in arguments.items()}

    def guest_ping(self) -> dict[str, Any]:
        return {}

    def guest_exec(
        self, path: str, arg: list[str], capture_output: bool, input_data: str = ""
    ) -> dict[str, int]:
        self.directories |= {Path(word) for word in arg if word.startswith("/tmp/labkit-run-")}
        process = subprocess.Popen(
            [path, *arg],
            stdin=subprocess.PIPE if input_data else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        output: list[bytes] = []
        data = base64.b64decode(input_data) if input_data else None
        thread = threading.Thread(target=lambda: output.extend(process.communicate(data)))
        thread.start()
        self.processes[process.pid] = process, thread, output
        return {"pid": process.pid}

    def guest_exec_status(self, pid: int) -> dict[str, Any]:
        process, thread, output = self.processes[pid]
        if process.poll() is None or thread.is_alive():
            return {"exited": False}
        del self.processes[pid]
        code = process.returncode
        status: dict[str, Any] = {"exited": True}
        status |= {"signal": -code} if code < 0 else {"exitcode": code}
        for name, data in zip(("out-data", "err-data"), output, strict=True):
            if data:
                status[name] = base64.b64encode(data).decode()
        return status

    def guest_file_open(self, path: str, mode: str) -> int:
        file = open(path, mode + "b")  # noqa: SIM115  # closed by guest_file_close
        self.files[file.fileno()] = file
        return file.fileno()

    def guest_file_close(self, handle: int) -> dict[str, Any]:
        self.files.pop(handle).close()
        return {}

    def guest_file_read(self, handle: int, count: int) -> dict[str, Any]:
        data = self.files[handle].read(count)
        return {"count": len(data), "buf-b64": base64.b64encode(data).decode(), "eof": len(data) < count}

    def guest_file_write(self, handle: int, buf_b64: str) -> dict[str, Any]:
        data = base64.b64decode(buf_b64)[:50_000]  # it may take less than it was given
        self.files[handle].write(data)
        return {"count": len(data), "eof": False}


@pytest.fixture
def guest():
    guest = Guest()
    yield guest
    for process, thread, _ in guest.processes.values():
        process.kill()
        thread.join(10)
    assert not guest.files
    assert not [path for path in guest.directories if path.exists()]


@pytest.fixture
def channel(guest) -> AgentChannel:
    return AgentChannel(guest.call)


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def test_output_and_exit_come_back(channel) -> None:
    result = channel.run(shell("echo out; echo err >&2; exit 3"))
    assert (result.returncode, result.stdout, result.stderr) == (3, b"out\n", b"err\n")


def test_a_signal_is_told_as_a_shell_does(channel) -> None:
    result = channel.run(shell("kill -9 $$"))
    assert (result.returncode, result.stderr) == (137, b"")


def test_what_is_not_found_exits_with_127(channel) -> None:
    result = channel.run(["no-such-program"])
    assert result.returncode == 127
    assert b"not found" in result.stderr


def test_directory_and_environment_are_as_asked_for(channel, tmp_path: Path) -> None:
    result = channel.run(shell("pwd; echo $GREETING"), cwd=str(tmp_path), env={"GREETING": "hé 'é'"})
    assert result.stdout.decode() == f"{tmp_path}\nhé 'é'\n"
    assert channel.run(["pwd"], cwd="/no/such").returncode == 126


@pytest.mark.parametrize("text", ["", "a b", "ünïcödé ☃", "$HOME `ls` 'x' \"y\" \\", "\n", "-n", "A=B"])
def test_arguments_arrive_as_they_are(channel, text: str) -> None:
    assert channel.run(["printf", "%s", text]).stdout == text.encode()


@pytest.mark.parametrize("text", ["\udcff", "x" * 70_000])
def test_arguments_that_the_agent_cannot_be_given_are_refused(channel, text: str) -> None:
    with pytest.raises(SpecError):
        channel.run(["echo", text])


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 1 << 20, 2_500_000])
def test_input_and_output_of_any_size_are_whole(channel, size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert channel.run(["cat"], input=data).stdout == data
    assert channel.run(["cat"], input=io.BytesIO(data)).stdout == data


def test_much_output_is_handed_on_without_being_kept(channel) -> None:
    seen = hashlib.sha256()
    script = "head -c 5000000 /dev/zero; echo done >&2"
    result = channel.run(
        shell(script), keep=False, on_output=lambda stream, data: stream == "stdout" and seen.update(data)
    )
    assert seen.hexdigest() == hashlib.sha256(bytes(5_000_000)).hexdigest()
    assert (result.stdout, result.stderr) == (b"", b"done\n")


def test_the_background_does_not_keep_a_command_from_ending(channel, helpers) -> None:
    pid = int(channel.run(shell("sleep 1000 & echo $!")).stdout)
    assert helpers.is_alive(pid)
    os.kill(pid, 9)


def test_the_time_out_kills_the_whole_group(channel, helpers) -> None:
    with pytest.raises(CommandTimeout, match="was killed") as caught:
        channel.run(shell("sleep 1000 & echo $! $$; sleep 1000"), timeout=0.3)
    for pid in caught.value.stdout.split():
        helpers.eventually(lambda pid=int(pid): not helpers.is_alive(pid), "the command is killed")


def test_an_exception_out_of_on_output_leaves_nothing_behind(channel) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    for size in (10, 3_000_000):
        with pytest.raises(ZeroDivisionError):
            channel.run(["head", "-c", str(size), "/dev/zero"], on_output=fail)


def test_hello_waits_for_the_agent(guest, helpers) -> None:
    guest.silent = True
    asked = []

    def check() -> None:
        asked.append(1)
        guest.silent = len(asked) < 3

    AgentChannel(guest.call, check=check).hello(helpers.soon())
    assert len(asked) == 3


def test_hello_gives_up_at_its_deadline(guest, channel) -> None:
    guest.silent = True
    with pytest.raises(CommandTimeout, match="did not answer in time") as caught:
        channel.hello(time.monotonic() + 0.1)
    assert "agent is not connected" in caught.value.evidence


def test_silence_is_a_time_out_unless_check_knows_better(guest, channel) -> None:
    guest.silent = True
    with pytest.raises(CommandTimeout, match="does not answer"):
        channel.run(["true"])

    def check() -> None:
        raise NotRunning("web is off.")

    with pytest.raises(NotRunning, match="web is off"):
        AgentChannel(guest.call, check=check).run(["true"])


@pytest.mark.parametrize("from_libvirt", [True, False])
def test_a_refusal_is_told(from_libvirt: bool) -> None:
    why = "Command guest-exec has been disabled"

    def call(command: str, timeout: float) -> str:
        if from_libvirt:
            seen = f"internal error: unable to execute QEMU agent command 'guest-exec': {why}"
            raise HypervisorError("The hypervisor could not agent call.", evidence=seen)
        return json.dumps({"error": {"class": "CommandNotFound", "desc": why}})

    with pytest.raises(MachineError, match="refused guest-exec") as caught:
        AgentChannel(call).run(["true"])
    assert why in caught.value.evidence
