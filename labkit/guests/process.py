"""Programs that run for long: watched while they run, and never left behind."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from labkit.errors import ToolError

_TICK = 0.2
_GRACE = 20.0


def run_watched(
    argv: Sequence[str | Path],
    *,
    what: str,
    log: Path,
    tick: Callable[[], None] = lambda: None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    mend: str = "",
) -> None:
    """Run a program to its end, with all that it says going to a file.

    When this process is interrupted the program is asked to end first, so that it can remove what it made.

    Arguments:
        argv: the program and its arguments.
        what: what it is for, completing "Could not …".
        log: where its output goes.
        tick: called several times a second while it runs.
        env: variables added to this process's own.

    Raises:
        ToolError: it failed, or could not be started; with the last lines that it said.
    """
    words = [str(word) for word in argv]
    try:
        with log.open("wb") as out:
            process = subprocess.Popen(
                words,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "LC_ALL": "C.UTF-8", **(env or {})},
            )
    except OSError as exc:
        raise ToolError(f"Could not {what}: {exc}.", command=shlex.join(words), mend=mend) from exc
    try:
        _wait(process, tick)
    except BaseException:
        _end(process)
        raise
    if process.returncode != 0:
        raise ToolError(
            f"Could not {what}: {Path(words[0]).name} exited with {process.returncode}.",
            command=shlex.join(words),
            returncode=process.returncode,
            evidence="\n".join(log.read_text(errors="replace").strip().splitlines()[-12:]),
            mend=mend,
        )


def _wait(process: subprocess.Popen[bytes], tick: Callable[[], None]) -> None:
    while True:
        try:
            process.wait(_TICK)
        except subprocess.TimeoutExpired:
            tick()
        else:
            return


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
