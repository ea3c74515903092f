"""What a command left behind, whichever way it was run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, Literal

Stream = Literal["stdout", "stderr"]
#: Called with each piece of output as it arrives: which stream, and the bytes.
OnOutput = Callable[[Stream, bytes], None]
#: What a command gets on its standard input: bytes, an open file that is read to its end, or nothing.
Input = bytes | BinaryIO | None
#: Raises what has happened to the machine (it is off, it crashed); returns if nothing has.
Check = Callable[[], None]


@dataclass(frozen=True)
class Result:
    """A command that ended.

    Attributes:
        returncode: its exit; 128 + N where signal N ended it; 127 where it was not found, 126 where it
            could not be started.
        stdout, stderr: its output, raw; empty where it was not to be captured.
        seconds: wall time from the request to the exit, on the host's clock.
    """

    returncode: int
    stdout: bytes
    stderr: bytes
    seconds: float


def in_seconds(seconds: float) -> str:
    """A timeout as people gave it, though a little of it is used up: 4.9998 is "5 s"."""
    return f"{round(seconds, 1 if seconds >= 1 else 2):g} s"


def nothing_happened() -> None:
    """The `Check` of those who cannot tell."""
