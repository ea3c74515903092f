"""The ledger: what labkit made, for whom, written down before it exists.

    state/labs/NAME/lab.json               the lab and its owner
    state/labs/NAME/KIND-THING/entry.json  a machine, beside its disks, logs and firmware variables
    state/labs/.NAME.lock                  held while a lab is changed

An entry appears before the thing and goes after it, so whatever a crash leaves behind is found.
Each file is replaced whole (written aside, synced, renamed).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from labkit import owners, paths
from labkit.errors import LabInUse, NotFound
from labkit.specs import check_name

_FORMAT = 1


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
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(self.directory / "entry.json", dataclasses.asdict(self))
        return self

    def forget(self) -> None:
        """Remove it with its files; to be done after the thing is gone."""
        entry = self.directory / "entry.json"
        for path in self.directory.iterdir():
            if path != entry:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        entry.unlink()
        self.directory.rmdir()


@dataclass(frozen=True, kw_only=True)
class LabRecord:
    """A lab as the ledger has it."""

    name: str
    owner: owners.Owner
    created: float

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
        if found and not found.owner.same(owner) and found.owner.alive():
            raise LabInUse(
                f"The lab {name} is in use by {found.owner.describe()}.",
                mend="Give this lab another name, end the other user of it, or remove it: "
                f"labkit clean {name} --all",
            )
        record = LabRecord(name=name, owner=owner, created=found.created if found else time.time())
        _lab_dir(name).mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(_lab_dir(name) / "lab.json", {"format": _FORMAT, **dataclasses.asdict(record)})
        return record


def forget_lab(name: str) -> None:
    """Remove an empty lab's record and directory."""
    directory = _lab_dir(name)
    with contextlib.suppress(FileNotFoundError):
        (directory / "lab.json").unlink()
    with contextlib.suppress(FileNotFoundError):
        directory.rmdir()


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a lab's lock across processes and threads; it goes with the process that holds it."""
    with lock_file(_labs_dir() / f".{name}.lock"):
        yield


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, made if it is not there."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Replace a file by this data: at any instant it holds the old text or the new, whole."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(data, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _labs_dir() -> Path:
    directory = paths.state_dir() / "labs"
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def _lab_dir(name: str) -> Path:
    return _labs_dir() / name


def peek(name: str) -> LabRecord | None:
    """A lab's record, or None where there is none of that name."""
    data = _read_json(_lab_dir(name) / "lab.json")
    if data is None:
        return None
    return LabRecord(name=data["name"], owner=owners.Owner(**data["owner"]), created=data["created"])


def _entries(directory: Path) -> list[Entry]:
    found = (_read_entry(path) for path in sorted(directory.glob("*/entry.json")))
    return [entry for entry in found if entry is not None]


def _read_entry(path: Path) -> Entry | None:
    data = _read_json(path)
    return Entry(**data) if data is not None else None


def _read_json(path: Path) -> dict[str, Any] | None:
    """The file's data; None where it is gone, which another process may do at any time."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return data
