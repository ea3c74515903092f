"""The ledger: what labkit made, for whom, written down before it exists.

    state/labs/NAME/lab.json               the lab and its owner
    state/labs/NAME/KIND-THING/entry.json  a machine, beside its disks, logs and firmware variables
    state/labs/.NAME.lock                  held while a lab is changed

An entry appears before the thing and goes after it, so whatever a crash leaves behind is found.
Each file is replaced whole (written aside, synced, renamed). One that cannot be read all the same (a disk
that failed, a hand that edited) hides only its own thing, and goes with the lab.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from labkit import owners, paths
from labkit.errors import HostError, LabInUse, LabkitError, NotFound
from labkit.specs import check_name

_log = logging.getLogger(__name__)

_FORMAT = 1
#: A thing's directory in its lab's, and a file of the ledger that a crash left half written.
_THING = re.compile(r"(vm|network|container)-[A-Za-z0-9-]+")
_warned: set[Path] = set()
_ASIDE = re.compile(r"\.[a-z]+\.json\.[0-9]+\.[0-9]+")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One thing that labkit made.

    Attributes:
        lab, kind, name: what it is; `kind` is "vm", later also "network" and "container".
        uuid: the thing's identity at its hypervisor.
        uri: the libvirt URI of the hypervisor, "" for labkit's own daemon.
        data: what the runtime object needs to find it again (the spec among it).
        created: seconds since the epoch.
    """

    lab: str
    kind: str
    name: str
    uuid: str
    uri: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    created: float = field(default_factory=time.time)

    @property
    def directory(self) -> Path:
        """Where the thing's files are."""
        return _lab_dir(self.lab) / f"{self.kind}-{self.name}"

    def save(self) -> Self:
        """Write it down, durably; to be done before the thing is made."""
        with _storing(self.directory):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            write_json(self.directory / "entry.json", dataclasses.asdict(self))
        except BaseException:
            with contextlib.suppress(OSError):
                self.directory.rmdir()  # empty where it is new
            raise
        return self

    def forget(self) -> None:
        """Remove it with its files; to be done after the thing is gone. Nothing where that was done, or
        where the place has gone to a later thing of the same name."""
        entry = self.directory / "entry.json"
        if not self.current():
            return
        for path in self.directory.iterdir():
            if path != entry:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        entry.unlink()
        self.directory.rmdir()

    def current(self) -> Entry | None:
        """The entry as the ledger has it now; None where it is gone."""
        found = _read_entry(self.directory / "entry.json")
        return found if found and found.uuid == self.uuid else None


@dataclass(frozen=True, kw_only=True)
class LabRecord:
    """A lab as the ledger has it."""

    name: str
    owner: owners.Owner
    created: float
    #: True where its file cannot be read: nobody is known to own it, and nobody takes it for abandoned.
    damaged: bool = False

    def entries(self, kind: str | None = None) -> list[Entry]:
        """What the lab has, by name; of one kind, or all."""
        return [entry for entry in _entries(_lab_dir(self.name)) if kind in (None, entry.kind)]

    def find(self, kind: str, name: str) -> Entry | None:
        """The entry of that kind and name, or None."""
        return _read_entry(_lab_dir(self.name) / f"{kind}-{name}" / "entry.json")


def lab_names() -> list[str]:
    """The labs that there are, by name."""
    root = _labs_dir()
    return sorted(path.parent.name for path in root.glob("*/lab.json"))


def lab(name: str) -> LabRecord:
    """A lab's record.

    Raises:
        NotFound: there is none of that name; names those that there are.
    """
    found = peek(check_name(name, "lab"))
    if found is None:
        there = ", ".join(lab_names()) or "none"
        raise NotFound(f"There is no lab named {name}.", evidence=f"labs: {there}")
    return found


def claim(name: str, owner: owners.Owner) -> LabRecord:
    """Make a lab, or take over one whose owner is gone or is this owner.

    Raises:
        LabInUse: another living owner holds it.
    """
    check_name(name, "lab")
    with locked(name):
        found = peek(name)
        if found and not found.damaged and not found.owner.same(owner) and found.owner.alive():
            raise LabInUse(
                f"The lab {name} is in use by {found.owner.describe()}.",
                mend="Give this lab another name, end the other user of it, or remove it: "
                f"labkit clean {name} --all",
            )
        record = LabRecord(name=name, owner=owner, created=found.created if found else time.time())
        with _storing(_lab_dir(name)):
            _lab_dir(name).mkdir(mode=0o700, parents=True, exist_ok=True)
        data = dataclasses.asdict(record)
        del data["damaged"]
        write_json(_lab_dir(name) / "lab.json", {"format": _FORMAT, **data})
        return record


def unreadable(name: str) -> list[Path]:
    """The directories of a lab's things whose entries cannot be read; a crash leaves such, too."""
    return [
        path
        for path in _lab_dir(name).glob("*-*")
        if _THING.fullmatch(path.name) and path.is_dir() and _read_entry(path / "entry.json") is None
    ]


def forget_lab(name: str) -> None:
    """Remove a lab's record and directory, whose things are gone; the caller holds its lock.

    What is there and not labkit's stays, and with it the directory.
    """
    directory = _lab_dir(name)
    for path in unreadable(name):
        shutil.rmtree(path)
    (directory / "lab.json").unlink(missing_ok=True)
    for path in directory.glob(".*"):
        if _ASIDE.fullmatch(path.name):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        directory.rmdir()
    _lock_path(name).unlink(missing_ok=True)


def forget_strays() -> list[str]:
    """Remove directories of labs that have no record, as a crash leaves them; returns the labs' names."""
    gone = []
    for directory in [path for path in _labs_dir().iterdir() if path.is_dir()]:
        with contextlib.suppress(LabkitError), locked(check_name(directory.name, "lab")):
            if peek(directory.name) is None:
                forget_lab(directory.name)
                gone += [] if directory.exists() else [directory.name]
    return gone


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a lab's lock across processes and threads; it goes with the process that holds it."""
    with lock_file(_lock_path(name)):
        yield


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, made if it is not there; its holder may remove the file."""
    while True:
        with _storing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_at(descriptor, path):
                continue  # removed while we waited: what we hold is nobody's lock any more
            yield
            return
        finally:
            # By hand: a child that was forked meanwhile has the descriptor, too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _lock_path(name: str) -> Path:
    return _labs_dir() / f".{name}.lock"


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Replace a file by this data: at any instant it holds the old text or the new, whole.

    Raises:
        HostError: it could not be written, say because the disk is full; the file is as it was.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    with _storing(path):
        try:
            with aside.open("w", encoding="utf-8") as file:
                json.dump(data, file, indent=1, sort_keys=True)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise HostError(
            f"labkit's ledger cannot be written: {exc.strerror}.",
            evidence=str(path),
            mend="Make room on that disk, or set LABKIT_HOME to a directory that you may write to.",
        ) from exc


def _labs_dir() -> Path:
    directory = paths.state_dir() / "labs"
    with _storing(directory):
        directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def _lab_dir(name: str) -> Path:
    return _labs_dir() / name


def peek(name: str) -> LabRecord | None:
    """A lab's record, or None where there is none of that name."""
    path = _lab_dir(name) / "lab.json"
    try:
        data = _read_json(path)
        if data is None:
            return None
        return LabRecord(name=name, owner=owners.Owner(**data["owner"]), created=float(data["created"]))
    except (ValueError, KeyError, TypeError, OSError) as exc:
        _warn(path, f"{exc}; labkit clean {name} removes the lab")
        return LabRecord(name=name, owner=owners.explicit(), created=0.0, damaged=True)


def _entries(directory: Path) -> list[Entry]:
    found = (_read_entry(path) for path in sorted(directory.glob("*/entry.json")))
    return [entry for entry in found if entry is not None]


def _read_entry(path: Path) -> Entry | None:
    try:
        data = _read_json(path)
        return Entry(**data) if data is not None else None
    except (ValueError, TypeError, OSError) as exc:
        _warn(path, str(exc))
        return None


def _warn(path: Path, why: str) -> None:
    """Say it once for each file: the reaper looks every second."""
    if path not in _warned:
        _warned.add(path)
        _log.warning("%s cannot be read: %s", path, why)


def _read_json(path: Path) -> dict[str, Any] | None:
    """The file's data; None where it is gone, which another process may do at any time."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not isinstance(data, dict):
        raise TypeError("it holds no object")
    return data
