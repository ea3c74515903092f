"""Running the programs that labkit drives, with one way of saying that they failed."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from labkit.errors import HostError, ToolError

#: Where Debian keeps administrators' programs; an ordinary user's PATH often lacks them.
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def which(program: str) -> str | None:
    """The full path of a program, looked for in PATH and in the sbin directories; None if absent."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SBIN])
    return shutil.which(program, path=path)


def require(program: str, *, package: str) -> str:
    """The full path of a program.

    Raises:
        HostError: it is not installed; names the Debian package that has it.
    """
    found = which(program)
    if found is None:
        raise HostError(
            f"The program {program} is not installed on this computer.",
            mend=f"sudo apt install {package}   (or run ./lab up, which installs all that is needed)",
        )
    return found


def run_tool(
    argv: Sequence[str | Path],
    *,
    what: str,
    timeout: float | None = 600,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: bytes | None = None,
    mend: str = "",
    error: type[ToolError] = ToolError,
) -> str:
    """Run a program to its end and return its standard output as text.

    Arguments:
        argv: the program and its arguments.
        what: what it is for, completing "Could not …": `"create the disk"`.
        timeout: seconds.
        env: variables added to this process's own.

    Raises:
        ToolError: (or `error`) it exited with something other than 0, could not be started, or missed
            its deadline; with the command, the exit and the last lines that it printed.
    """
    words = [str(word) for word in argv]
    command = shlex.join(words)
    environment = {**os.environ, "LC_ALL": "C.UTF-8", **(env or {})}
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            timeout=timeout,
            cwd=cwd,
            env=environment,
            check=False,
            stdin=subprocess.DEVNULL if input is None else None,
            input=input,
        )
    except subprocess.TimeoutExpired as exc:
        raise error(
            f"Could not {what}: it took longer than {timeout:g} s.",
            command=command,
            evidence=_tail(exc.stderr or b""),
            mend=mend,
        ) from exc
    except OSError as exc:
        raise error(f"Could not {what}: {exc}.", command=command, mend=mend) from exc
    if done.returncode != 0:
        raise error(
            f"Could not {what}: {Path(words[0]).name} exited with {done.returncode}.",
            command=command,
            returncode=done.returncode,
            evidence=_tail(done.stderr or done.stdout),
            mend=mend,
        )
    return done.stdout.decode(errors="replace")


def _tail(output: bytes, lines: int = 12) -> str:
    return "\n".join(output.decode(errors="replace").strip().splitlines()[-lines:])
