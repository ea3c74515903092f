"""What `Host`, `VM` and `Container` share: checking exits and copying files, over `run` alone."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, cast

from labkit.errors import CommandFailed, SpecError, TransferError
from labkit.machines.machine import Command, Completed, OnOutput, Stream, as_argv

#: Receives under another name, checks, and only then puts the file in place: readers of the target
#: see the old file or the new one, whole.
_PUT = """
set -e
aside="$1.labkit-$$"
trap 'rm -f "$aside"' EXIT
cat > "$aside"
sum=$(sha256sum < "$aside")
[ -z "$2" ] || chmod "$2" "$aside"
mv -f "$aside" "$1"
echo "${sum%% *}"
"""


class BaseMachine(ABC):
    """A machine, given a way to run an argument list on it."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What people call it."""

    @abstractmethod
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
        """Run it to its end, whatever its exit; where `keep` is false, output is only handed to
        `on_output` and not kept."""

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
        """Run a command to its end; see `Machine.run` for the arguments and what it raises."""
        argv = _argv(command)
        _check_timeout(timeout)
        _check_env(env or {})
        with contextlib.ExitStack() as stack:
            if isinstance(input, Path):
                source: bytes | BinaryIO | None = stack.enter_context(input.open("rb"))
            elif input is None or isinstance(input, str | bytes | bytearray):
                source = input.encode() if isinstance(input, str) else input
            else:
                raise SpecError(
                    f"The input of a command cannot be a {type(input).__name__}.",
                    mend="Give text, bytes, or the pathlib.Path of a file.",
                )
            done = self._execute(
                argv,
                input=source,
                timeout=timeout,
                cwd=cwd,
                env=env or {},
                on_output=on_output,
                keep=True,
            )
        if check and not done.ok:
            raise CommandFailed(self.name, done)
        return done

    def put(
        self,
        source: str | Path | bytes,
        target: str,
        *,
        mode: int | None = None,
        timeout: float | None = 600,
    ) -> str:
        """Copy a host file (or bytes) to a file on this machine, whole or not at all.

        Arguments:
            source: a host file's path, or the content itself as bytes.
            target: the path on this machine.
            mode: its permissions, such as 0o755; the machine's default where None.
            timeout: seconds until the copy is given up.

        Returns:
            The SHA-256 of the content, as 64 hexadecimal digits.

        Raises:
            TransferError: what arrived has another checksum than what was sent.
            CommandFailed: the machine could not store it (no such directory, disk full …).
        """
        argv = _checked(("/bin/sh", "-c", _PUT, "put", target, "" if mode is None else f"{mode:o}"))
        with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
            content = _Hashing(file)
            done = self._execute(
                argv,
                input=cast(BinaryIO, content),
                timeout=timeout,
                cwd=None,
                env={},
                on_output=None,
                keep=True,
            )
        if not done.ok:
            raise CommandFailed(self.name, replace(done, argv=("put", target)))
        what = "the data" if isinstance(source, bytes) else source
        return self._same(content.sha256, done.stdout.strip(), f"{what} to {target}")

    def get(self, source: str, target: str | Path, *, timeout: float | None = 600) -> str:
        """Copy a file of this machine to the host, whole or not at all.

        Arguments:
            source: the path on this machine.
            target: the host file, or a directory to put it in under its own name.
            timeout: seconds until the copy is given up.

        Returns:
            The SHA-256 of the content, as 64 hexadecimal digits.

        Raises:
            TransferError: what arrived has another checksum than the machine's file.
            CommandFailed: the machine could not read it.
        """
        path = Path(target)
        if path.is_dir():
            path = path / Path(source).name
        descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        digest, said = hashlib.sha256(), bytearray()
        try:
            with os.fdopen(descriptor, "wb") as file:

                def take(stream: Stream, data: bytes) -> None:
                    if stream == "stdout":
                        digest.update(data)
                        file.write(data)
                    else:
                        said.extend(data)

                # The checksum comes on the other stream, taken of the same bytes that were sent.
                script = 'cat < "$1" && sha256sum < "$1" >&2'
                argv = _checked(("/bin/sh", "-c", script, "get", source))
                done = self._execute(
                    argv, input=None, timeout=timeout, cwd=None, env={}, on_output=take, keep=False
                )
            if not done.ok:
                raise CommandFailed(self.name, replace(done, argv=("get", source), stderr_bytes=bytes(said)))
            seen = said.decode(errors="replace").split() or [""]
            result = self._same(seen[0], digest.hexdigest(), f"{source} to {path}")
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(aside, 0o666 & ~umask)
            os.replace(aside, path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
        return result

    def _same(self, expected: str, actual: str, what: str) -> str:
        if expected != actual:
            raise TransferError(
                f"Copying {what} on {self.name} went wrong: the checksums differ.",
                evidence=f"sent {expected}\ngot  {actual}",
                mend="Try again; if the file changes while it is copied, stop what writes to it first.",
            )
        return actual


class _Hashing:
    """A file that is hashed as it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        return data

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def _argv(command: Command) -> tuple[str, ...]:
    if isinstance(command, str):
        return _checked(as_argv(command if command.strip() else ()))
    if not isinstance(command, list | tuple):
        raise SpecError(
            f"A command cannot be a {type(command).__name__}.",
            mend='Give text for the shell, or a list of words: ["ls", "-l"].',
        )
    return _checked(as_argv(command))


def _check_timeout(timeout: object) -> None:
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if timeout is not None and not (number and timeout > 0):  # type: ignore[operator]  # it is a number
        raise SpecError(f"{timeout!r} is no time to run for.", mend="Give seconds, or None to wait for ever.")


def _check_env(env: Mapping[str, str]) -> None:
    for name, value in env.items():
        texts = all(isinstance(text, str) for text in (name, value))
        if not texts or not name or "=" in name or "\0" in name + value:
            raise SpecError(
                f"{name!r}: {value!r} cannot be a variable of the environment.",
                mend="Names and values are text; a name has no equals sign.",
            )


def _checked(argv: tuple[str, ...]) -> tuple[str, ...]:
    if not argv or not argv[0]:
        raise SpecError("There is no command to run.", mend='Give one: run("uname -a").')
    for word in argv:
        if not isinstance(word, str):
            raise SpecError(f"A command's words are text, not {word!r}.")
        if "\0" in word:
            raise SpecError("A command cannot hold a NUL character.")
    return argv
