"""This computer as a machine, to be measured and compared beside its guests."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import selectors
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from typing import BinaryIO

from labkit.errors import CommandTimeout, MachineError
from labkit.machines.base import BaseMachine
from labkit.machines.machine import Completed, OnOutput, Stream

_CHUNK = 1 << 16
#: Seconds without output for which a finished command's pipes are still read.
_BACKGROUND_GRACE = 0.1


class Host(BaseMachine):
    """The computer that labkit runs on; commands run as the user."""

    @property
    def name(self) -> str:
        return "host"

    def __repr__(self) -> str:
        return f"<Host {socket.gethostname()}>"

    def _execute(
        self,
        argv: tuple[str, ...],
        *,
        input: bytes | BinaryIO | None,
        timeout: float | None,
        cwd: str | None,
        env: Mapping[str, str],
        on_output: OnOutput | None,
        keep: bool,
    ) -> Completed:
        start = time.perf_counter()
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE if input is not None else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=cwd,
                env={**os.environ, **env},
                # A group of its own, so that all that the command started can be ended with it.
                start_new_session=True,
            )
        except FileNotFoundError as exc:
            return Completed(argv, 127, b"", f"{exc.filename}: {exc.strerror}\n".encode(), 0.0)
        except PermissionError as exc:
            return Completed(argv, 126, b"", f"{exc.filename}: {exc.strerror}\n".encode(), 0.0)
        except OSError as exc:
            raise MachineError(f"The host could not start the command: {exc}.") from exc
        with process:
            try:
                output = _converse(process, input, timeout, on_output, keep)
            except BaseException:
                _kill_group(process)
                raise
            code = process.wait()
        seconds = time.perf_counter() - start
        return Completed(
            argv,
            128 - code if code < 0 else code,
            bytes(output["stdout"]),
            bytes(output["stderr"]),
            seconds,
        )


def _converse(
    process: subprocess.Popen[bytes],
    input: bytes | BinaryIO | None,
    timeout: float | None,
    on_output: OnOutput | None,
    keep: bool,
) -> dict[Stream, bytearray]:
    """Feed the process and collect what it says until it ends, or its deadline passes."""
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    output: dict[Stream, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
    assert process.stdout
    assert process.stderr
    ended = False
    # A child left in the background may keep the pipes open, so the command's own end is watched too.
    end = os.pidfd_open(process.pid)
    with contextlib.closing(selectors.DefaultSelector()) as selector:
        selector.register(end, selectors.EVENT_READ, "end")
        selector.register(process.stdout, selectors.EVENT_READ, "stdout")
        selector.register(process.stderr, selectors.EVENT_READ, "stderr")
        feed = _Feed(input) if input is not None else None
        if process.stdin:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE, "stdin")
        try:
            while selector.get_map():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise _timeout(process, timeout, output)
                ready = selector.select(_BACKGROUND_GRACE if ended else None if left == math.inf else left)
                if not ready and ended:
                    break
                for key, _ in ready:
                    match key.data:
                        case "end":
                            ended = True
                            selector.unregister(end)
                        case "stdin":
                            if feed is None or not feed.write(key.fd):
                                selector.unregister(process.stdin)  # type: ignore[arg-type]
                                process.stdin.close()  # type: ignore[union-attr]
                        case stream:
                            data = os.read(key.fd, _CHUNK)
                            if not data:
                                selector.unregister(key.fileobj)
                                continue
                            if keep:
                                output[stream] += data
                            if on_output:
                                on_output(stream, data)
        finally:
            os.close(end)
    return output


class _Feed:
    """Standard input, written piece by piece as the process takes it."""

    def __init__(self, source: bytes | BinaryIO) -> None:
        self._source = source
        self._pending = memoryview(source if isinstance(source, bytes) else b"")

    def write(self, descriptor: int) -> bool:
        """Write what fits now; False when all is written or nobody reads any more."""
        if not self._pending and not isinstance(self._source, bytes):
            self._pending = memoryview(self._source.read(_CHUNK))
        if not self._pending:
            return False
        try:
            written = os.write(descriptor, self._pending[:_CHUNK])
        except BlockingIOError:
            return True
        except BrokenPipeError:
            return False
        self._pending = self._pending[written:]
        return True


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()


def _timeout(
    process: subprocess.Popen[bytes], timeout: float | None, output: dict[Stream, bytearray]
) -> CommandTimeout:
    _kill_group(process)
    return CommandTimeout(
        f"On host, the command did not end within {timeout:g} s and was killed.",
        stdout=bytes(output["stdout"]),
        stderr=bytes(output["stderr"]),
        evidence="\n".join(output["stdout"].decode(errors="replace").splitlines()[-5:]),
        mend="Give it more time: run(…, timeout=SECONDS).",
    )


@functools.cache
def host() -> Host:
    """This computer, as a `Machine`."""
    return Host()
