"""What every machine can do: run commands, take and give files.

`Host`, `VM` and `Container` are machines; whoever measures, monitors or checks takes a `Machine`
and does not ask which.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

Command = str | Sequence[str]
Stream = Literal["stdout", "stderr"]
#: Called with each piece of output as it arrives: which stream, and the bytes.
OnOutput = Callable[[Stream, bytes], None]


@dataclass(frozen=True)
class Completed:
    """A command that ended.

    Attributes:
        argv: the argument list that ran.
        returncode: its exit; 128 + N where signal N ended it, as a shell says it.
        stdout_bytes, stderr_bytes: its whole output, raw.
        seconds: wall time from the request to the exit, on the host's clock.
    """

    argv: tuple[str, ...]
    returncode: int
    stdout_bytes: bytes
    stderr_bytes: bytes
    seconds: float

    @property
    def stdout(self) -> str:
        """Standard output as text (UTF-8; what is not is replaced)."""
        return self.stdout_bytes.decode(errors="replace")

    @property
    def stderr(self) -> str:
        """Standard error as text (UTF-8; what is not is replaced)."""
        return self.stderr_bytes.decode(errors="replace")

    @property
    def ok(self) -> bool:
        """True where the exit was 0."""
        return self.returncode == 0

    @property
    def command(self) -> str:
        """The command as one would type it."""
        if len(self.argv) == 3 and self.argv[:2] == ("/bin/sh", "-c"):
            return self.argv[2]
        return shlex.join(self.argv)

    def __repr__(self) -> str:
        return (
            f"Completed({self.command!r}, returncode={self.returncode}, "
            f"stdout={_short(self.stdout)}, stderr={_short(self.stderr)}, seconds={self.seconds:.3f})"
        )


def _short(text: str, limit: int = 60) -> str:
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}… ({len(text)} characters)"


def as_argv(command: Command) -> tuple[str, ...]:
    """A string goes to `/bin/sh -c`, a list runs as it is."""
    return ("/bin/sh", "-c", command) if isinstance(command, str) else tuple(command)


def echo(stream: Stream, data: bytes) -> None:
    """An `on_output` that shows output as it arrives, each stream on its own."""
    target = sys.stdout if stream == "stdout" else sys.stderr
    target.write(data.decode(errors="replace"))
    target.flush()


def echo_bytes(stream: Stream, data: bytes) -> None:
    """An `on_output` that passes output on as it is, for programs that write to a pipe."""
    target = sys.stdout if stream == "stdout" else sys.stderr
    target.buffer.write(data)
    target.buffer.flush()


@runtime_checkable
class Machine(Protocol):
    """Something that runs commands."""

    @property
    def name(self) -> str:
        """What people call it."""
        ...

    def run(
        self,
        command: Command,
        *,
        input: str | bytes | Path | None = None,
        timeout: float | None = 60,
        check: bool = True,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        on_output: OnOutput | None = None,
    ) -> Completed:
        """Run a command to its end.

        Arguments:
            command: a string goes to `/bin/sh -c`, a list runs as it is.
            input: given to its standard input: text (as UTF-8), bytes, or a host file that is streamed.
            timeout: seconds until it is killed; None waits for ever.
            check: raise on an exit other than 0.
            cwd: the directory to run it in.
            env: variables added to the machine's own.
            on_output: called with (stream, bytes) as output arrives.

        Raises:
            CommandFailed: it exited with something other than 0, and `check` is true.
            CommandTimeout: it, or the machine, missed the deadline.
            NotRunning: the machine is off or went away meanwhile.
            GuestCrashed: its kernel panicked.
        """
        ...

    def put(self, source: str | Path | bytes, target: str, *, mode: int | None = None) -> str:
        """Copy a host file (or bytes) to `target` on the machine; returns its SHA-256 (hex)."""
        ...

    def get(self, source: str, target: str | Path) -> str:
        """Copy the machine's file `source` to a host file; returns its SHA-256 (hex)."""
        ...
