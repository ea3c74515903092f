"""The QEMU guest agent as a channel, for guests that do not have our own.

It can start a program and say later how it ended, and it can read and write files; there is no
streaming. So a command runs under a small shell script, which puts its output into files below /tmp in
the guest. Little output comes back with the exit; much of it is fetched from the files in pieces, since
the agent keeps no more than 16 MiB and libvirt carries no more than 4 MiB an answer.

The agent's commands: https://qemu.readthedocs.io/en/latest/interop/qemu-ga-ref.html
"""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import math
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from labkit.channel import protocol
from labkit.channel.result import Check, Input, OnOutput, Result, Stream, in_seconds, nothing_happened
from labkit.errors import CommandTimeout, MachineError, SpecError, ToolError

__all__ = ["AgentChannel"]

#: One call of the agent, JSON to JSON, with a timeout in seconds.
Call = Callable[[str, float], str]

_CALL_TIMEOUT = 10.0
_KILL_GRACE = 1.0
_PIECE = 1024 * 1024  # bytes that are read in one call: 1.4 MiB as Base64
#: Bytes that are given in one call. libvirt 9.0 never finishes sending a command that does not fit into the
#: buffer of the agent's socket (208 KiB, measured: 175 KiB arrive, 350 KiB do not), Base64 and all.
_GIVEN = 64 * 1024
_LOOK_AGAIN, _LOOK_AGAIN_MOST = 0.005, 0.1  # seconds between questions whether a command has ended
_HELLO_AGAIN, _HELLO_AGAIN_MOST = 0.05, 0.5

#: A session of its own makes a process group that can be killed as one. As `exec` is all that lies
#: between, the agent's pid is the group's. ("$@" is: the inner script, and its arguments.)
_OUTER = """
if command -v setsid >/dev/null; then exec setsid /bin/sh -c "$@"; else exec /bin/sh -c "$@"; fi
"""

#: $1 the directory for the files, $2 the directory to run in, $3… the command. The first word on
#: standard output says whether the output follows ("here") or has to be fetched ("there").
#: The shell's own words about a killed command ("Terminated") go nowhere.
_INNER = f"""
d=$1 w=$2
shift 2
[ -f "$d/in" ] || mkdir -m 700 "$d" || exit 125
[ ! -f "$d/in" ] || exec <"$d/in"
exec 3>&2 2>/dev/null
( exec 2>"$d/err" 3>&-; [ -z "$w" ] || cd "$w" || exit 126; exec "$@" ) >"$d/out"
code=$?
if [ $(($(wc -c <"$d/out") + $(wc -c <"$d/err"))) -gt {_PIECE} ]; then echo there; exit $code; fi
echo here
cat "$d/out"
cat "$d/err" >&3
rm -rf "$d"
exit $code
"""


#: How libvirt says that the agent answered with an error, rather than not at all.
_LIBVIRT_REFUSED = "unable to execute QEMU agent command"


def _refused(command: str, why: str) -> MachineError:
    return MachineError(
        f"The guest's QEMU agent refused {command}.",
        evidence=why,
        mend="See whether its configuration in the guest (/etc/qemu, /etc/sysconfig/qemu-ga) forbids it.",
    )


class AgentChannel:
    """Runs commands in a guest by its QEMU guest agent.

    Arguments:
        call: one call of the agent: JSON to JSON, with a timeout in seconds. A ToolError of its is
            taken for silence of the agent's.
        check: called when the agent was silent; raises what happened to the machine.
    """

    def __init__(self, call: Call, *, check: Check = nothing_happened) -> None:
        self._call = call
        self._check = check

    def hello(self, deadline: float) -> None:
        """Wait until the agent answers, by `deadline` on `time.monotonic`'s clock.

        Raises:
            CommandTimeout: it did not; or what `check` raises.
        """
        pause = _HELLO_AGAIN
        while True:
            try:
                left = max(1.0, deadline - time.monotonic())
                self._ask("guest-ping", timeout=min(_CALL_TIMEOUT, left))
                return
            except ToolError as exc:
                self._check()
                left = deadline - time.monotonic()
                if left <= 0:
                    raise CommandTimeout(
                        "The guest's QEMU agent did not answer in time.",
                        evidence=exc.evidence or str(exc),
                        mend="See whether the guest has the package qemu-guest-agent, and runs it.",
                    ) from exc
            time.sleep(min(pause, left))
            pause = min(2 * pause, _HELLO_AGAIN_MOST)

    def run(
        self,
        argv: Sequence[str],
        *,
        input: Input = None,
        timeout: float | None = 60,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        on_output: OnOutput | None = None,
        keep: bool = True,
    ) -> Result:
        """Run a command to its end, as `Session.run` does; but `on_output` hears of it when it has ended.

        Raises:
            SpecError: the command is none.
            CommandTimeout: it missed the deadline; says whether it was killed or the agent is silent.
            MachineError: the agent refused.
            NotRunning: the machine is off, as `call` or `check` says.
        """
        words = _words(argv, env)
        started = time.monotonic()
        deadline = started + (math.inf if timeout is None else timeout)
        directory = f"/tmp/labkit-run-{secrets.token_hex(8)}"
        pid = None
        try:
            small = self._put_input(directory, input, deadline)
            arguments = ["-c", _OUTER, "labkit", _INNER, "labkit", directory, cwd or "", *words]
            pid = self._start("/bin/sh", arguments, small)
            status = self._wait(pid, deadline)
            pid = None
            output = _Output(on_output, keep)
            self._collect(status, directory, output)
        except TimeoutError:
            raise self._timed_out(pid, directory, timeout or 0) from None
        except ToolError as exc:
            self._check()
            raise CommandTimeout(
                "The guest's QEMU agent does not answer (any more).",
                evidence=exc.evidence or str(exc),
                mend="See whether the guest still runs, and its agent in it.",
            ) from exc
        except BaseException:
            self._kill(pid, directory)
            raise
        code = 128 + status["signal"] if "signal" in status else status["exitcode"]
        seconds = time.monotonic() - started
        return Result(code, bytes(output.stdout), bytes(output.stderr), seconds)

    # -- the agent's commands

    def _ask(
        self, command: str, arguments: dict[str, Any] | None = None, timeout: float = _CALL_TIMEOUT
    ) -> Any:
        """One command of the agent's, and what it returns.

        Raises:
            MachineError: the agent answered with an error.
            ToolError, NotRunning: whatever `call` raises.
        """
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        try:
            answer = json.loads(self._call(json.dumps(request), timeout))
        except ToolError as exc:
            if _LIBVIRT_REFUSED in exc.evidence:
                raise _refused(command, exc.evidence) from exc
            raise
        if "error" in answer:
            raise _refused(command, answer["error"].get("desc", ""))
        return answer["return"]

    def _start(self, program: str, arguments: list[str], input: bytes | None = None) -> int:
        """Start a program in the guest; its pid there."""
        request = {"path": program, "arg": arguments, "capture-output": True}
        if input is not None:
            request["input-data"] = base64.b64encode(input).decode()
        return int(self._ask("guest-exec", request)["pid"])

    def _wait(self, pid: int, deadline: float) -> dict[str, Any]:
        """Wait for a program's end; the agent's words on it.

        Raises:
            TimeoutError: it had not ended by the deadline.
        """
        pause = _LOOK_AGAIN
        while True:
            status: dict[str, Any] = self._ask("guest-exec-status", {"pid": pid})
            if status["exited"]:
                return status
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            time.sleep(min(pause, left))
            pause = min(1.5 * pause, _LOOK_AGAIN_MOST)

    def _shell(self, script: str, *arguments: str) -> None:
        """Run a short script to its end, whatever its exit."""
        pid = self._start("/bin/sh", ["-c", script, "labkit", *arguments])
        with contextlib.suppress(TimeoutError):
            self._wait(pid, time.monotonic() + _CALL_TIMEOUT)

    @contextlib.contextmanager
    def _file(self, path: str, mode: str) -> Iterator[int]:
        """A file of the guest's, open: the agent's handle for it."""
        handle = self._ask("guest-file-open", {"path": path, "mode": mode})
        try:
            yield handle
        finally:
            self._ask("guest-file-close", {"handle": handle})

    def _read(self, path: str) -> Iterator[bytes]:
        """A file's content, in pieces."""
        with self._file(path, "r") as handle:
            while True:
                piece = self._ask("guest-file-read", {"handle": handle, "count": _PIECE})
                if piece["count"]:
                    yield base64.b64decode(piece["buf-b64"])
                if piece["eof"] or not piece["count"]:
                    return

    def _write(self, path: str, pieces: Iterable[bytes], deadline: float) -> None:
        """Write a file.

        Raises:
            TimeoutError: it was not written by the deadline.
        """
        with self._file(path, "w") as handle:
            for data in pieces:
                while data:
                    if time.monotonic() > deadline:
                        raise TimeoutError
                    request = {"handle": handle, "buf-b64": base64.b64encode(data).decode()}
                    data = data[self._ask("guest-file-write", request)["count"] :]

    # -- the course of a command

    def _put_input(self, directory: str, input: Input, deadline: float) -> bytes | None:
        """Bring input that is long into the guest; what is short is returned, to go with the command."""
        if input is None:
            return None
        source = io.BytesIO(input) if isinstance(input, bytes | bytearray) else input
        head = bytearray()
        while len(head) < _GIVEN and (data := source.read(_GIVEN - len(head))):
            head += data
        if len(head) < _GIVEN:
            return bytes(head)
        self._shell('mkdir -m 700 "$1"', directory)
        rest = iter(lambda: source.read(_GIVEN), b"")
        self._write(f"{directory}/in", itertools.chain([bytes(head)], rest), deadline)
        return None

    def _collect(self, status: dict[str, Any], directory: str, output: _Output) -> None:
        """A command's output, from the agent's answer or from the files."""
        out = base64.b64decode(status.get("out-data", ""))
        err = base64.b64decode(status.get("err-data", ""))
        where, _, rest = out.partition(b"\n")
        if where != b"there":
            # Neither word stands there where the script itself failed; then it said why.
            output.take("stdout", rest if where == b"here" else out)
            output.take("stderr", err)
            return
        try:
            self._fetch(directory, output)
        finally:
            self._shell('rm -rf "$1"', directory)

    def _fetch(self, directory: str, output: _Output) -> None:
        streams: tuple[tuple[Stream, str], ...] = (("stdout", "out"), ("stderr", "err"))
        for stream, file in streams:
            for piece in self._read(f"{directory}/{file}"):
                output.take(stream, piece)

    def _kill(self, pid: int | None, directory: str) -> bool | None:
        """Kill a command's group, and remove its files if it is gone: True; False if it is not.

        None where the agent does not answer, or refuses.
        """
        try:
            gone = pid is None or self._gone(pid)
            self._shell('rm -rf "$1"', directory)
            return gone
        except (ToolError, MachineError):
            return None

    def _gone(self, pid: int) -> bool:
        self._shell('kill -9 "-$1" || kill -9 "$1"', str(pid))
        try:
            self._wait(pid, time.monotonic() + _KILL_GRACE)
        except TimeoutError:
            return False
        return True

    def _timed_out(self, pid: int | None, directory: str, timeout: float) -> CommandTimeout:
        output = _Output(None, keep=True)
        with contextlib.suppress(ToolError, MachineError):
            self._fetch(directory, output)
        gone = self._kill(pid, directory)
        self._check()
        limit = in_seconds(timeout)
        message = {
            True: f"The command took longer than {limit}, and was killed.",
            False: f"The command took longer than {limit}, and could not be killed.",
            None: f"The command took longer than {limit}, and then the guest's agent did not answer.",
        }[gone]
        return CommandTimeout(message, stdout=bytes(output.stdout), stderr=bytes(output.stderr))


class _Output:
    """What a command has said."""

    def __init__(self, on_output: OnOutput | None, keep: bool) -> None:
        self.stdout = bytearray()
        self.stderr = bytearray()
        self._on_output = on_output
        self._keep = keep

    def take(self, stream: Stream, data: bytes) -> None:
        if stream == "stderr":
            self.stderr += data
        elif self._keep:
            self.stdout += data
        if data and self._on_output is not None:
            self._on_output(stream, data)


def _words(argv: Sequence[str], env: Mapping[str, str] | None) -> list[str]:
    """The command with its environment put before it, as `env` takes it.

    Raises:
        SpecError: they make no command, or are no text that JSON could carry.
    """
    protocol.exec_payload(argv, has_input=False, env=env)
    pairs = [f"{name}={value}" for name, value in (env or {}).items()]
    words = ["env", *pairs, *argv] if pairs else list(argv)
    size = 0
    for word in words:
        try:
            size += len(json.dumps(word.encode().decode()))
        except UnicodeEncodeError:
            raise SpecError(
                f"{word[:40]!r} is no Unicode text, and the QEMU guest agent takes no other."
            ) from None
    if size > _GIVEN:
        raise SpecError(
            f"The command has {size} bytes, and {_GIVEN} are the most that the QEMU guest agent is given.",
            mend="Give long data by `input=`, or put a file on the machine first.",
        )
    return words
