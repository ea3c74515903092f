"""Where built guests are kept, so that a half-made one is never seen and two builders do not meet.

    cache/guests/pocket/
      .lock                  held while one process builds
      current-91bc….json     which build is current for one recipe: the only thing that a look-up reads
      0f3a…/vmlinux, …       one build, complete, never changed afterwards
      .building-…/           one in the making; whoever holds the lock next removes it

The pointer is named by the recipe's fingerprint, so that two versions of labkit that share a cache do not
take turns in rebuilding. Older builds stay until `prune`: a VM that was made from one refers to its files.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit import paths
from labkit.guests.image import Image
from labkit.progress import Progress

_PATHS = ("kernel", "initrd", "disk")
_FORMAT = 1


@dataclass(frozen=True)
class Record:
    """What `current.json` says.

    Attributes:
        image: the image, its files being there when it was written.
        recipe: the fingerprint of the recipe that made it.
        inputs: what it was made from: package -> version, or URL -> checksum.
    """

    image: Image
    recipe: str
    inputs: Mapping[str, str]


class Store:
    """The builds of one image.

    Arguments:
        name: the image's.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.directory = paths.cache_dir() / "guests" / name

    def current(self, recipe: str) -> Record | None:
        """The current build by a recipe, or None where there is none or its files are gone.

        Reads one small file.
        """
        try:
            data = json.loads(self._pointer(recipe).read_text())
            record = _from_json(data, self.directory)
        except (OSError, ValueError, KeyError, TypeError):
            return None  # no build, or one of another version of labkit: it will be made anew
        files = (getattr(record.image, field) for field in _PATHS)
        return record if all(path is None or path.exists() for path in files) else None

    def size(self, recipe: str) -> int:
        """Bytes that the current build takes on disk (a sparse file counts for what it holds)."""
        record = self.current(recipe)
        if record is None:
            return 0
        files = (getattr(record.image, field) for field in _PATHS)
        return sum(path.stat().st_blocks * 512 for path in files if path)

    @contextmanager
    def locked(self, waiting: Progress | None = None) -> Iterator[None]:
        """Hold the right to build; waits while another process has it. A dead one's lock is gone with it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with (self.directory / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting:
                    waiting.step("waiting for another process that is making it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            self._remove_leftovers()
            yield

    def publish(self, recipe: str, inputs: Mapping[str, str], build: Callable[[Path], Image]) -> Image:
        """Let `build` fill a fresh directory, then make that the current build in one step.

        The image that `build` returns names files in the directory that it was given. Hold the lock for this.
        """
        key = hashlib.sha256(json.dumps([recipe, dict(inputs)], sort_keys=True).encode()).hexdigest()[:16]
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=self.directory))
        try:
            building.chmod(0o755)
            image = build(building)
            final = self._move(building, self.directory / key)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        record = Record(_moved(image, building, final), recipe, inputs)
        self._write_pointer(record)
        return record.image

    def _move(self, building: Path, final: Path) -> Path:
        if final.exists():
            # The pointer was lost or its files damaged. A VM may use what is there, so leave it where it is.
            final = Path(tempfile.mkdtemp(prefix=f"{final.name}-", dir=self.directory))
        building.replace(final)
        return final

    def _write_pointer(self, record: Record) -> None:
        pointer = self._pointer(record.recipe)
        fresh = pointer.with_suffix(".new")
        fresh.write_text(json.dumps(_to_json(record, self.directory), indent=1) + "\n")
        fresh.replace(pointer)

    def _pointer(self, recipe: str) -> Path:
        return self.directory / f"current-{recipe[:16]}.json"

    def prune(self, recipe: str, in_use: Collection[Path]) -> int:
        """Remove the builds that are neither current nor in use; returns the bytes that came free.

        Call it with the lock held.

        Arguments:
            recipe: the current one.
            in_use: files that somebody refers to; what stands beside one of them stays.
        """
        record = self.current(recipe)
        kept = {path.parent for path in in_use}
        kept |= {path.parent for field in _PATHS if record and (path := getattr(record.image, field))}
        freed = 0
        for pointer in self.directory.glob("current-*.json"):
            if pointer != self._pointer(recipe):
                pointer.unlink()
        for build in self.directory.iterdir():
            if build.is_dir() and build not in kept:
                freed += sum(path.stat().st_blocks * 512 for path in build.rglob("*"))
                shutil.rmtree(build)
        return freed

    def _remove_leftovers(self) -> None:
        for leftover in self.directory.glob(".building-*"):
            shutil.rmtree(leftover, ignore_errors=True)


def _moved(image: Image, old: Path, new: Path) -> Image:
    changes = {field: new / path.relative_to(old) for field in _PATHS if (path := getattr(image, field))}
    return dataclasses.replace(image, **changes)


def _to_json(record: Record, base: Path) -> dict[str, Any]:
    image = dataclasses.asdict(record.image)
    for field in _PATHS:
        if image[field] is not None:
            image[field] = str(image[field].relative_to(base))
    return {"format": _FORMAT, "recipe": record.recipe, "inputs": dict(record.inputs), "image": image}


def _from_json(data: dict[str, Any], base: Path) -> Record:
    if data["format"] != _FORMAT:
        raise ValueError("written by another version")
    fields: dict[str, Any] = {**data["image"]}
    for field in _PATHS:
        if fields[field] is not None:
            fields[field] = base / fields[field]
    for field in ("boots", "firmware"):
        fields[field] = tuple(fields[field])
    return Record(Image(**fields), data["recipe"], data["inputs"])


def fingerprint(files: Iterable[Path], *more: str) -> str:
    """A hash of the sources that decide how an image is made: they ship with labkit and change with it."""
    digest = hashlib.sha256()
    for path in files:
        data = path.read_bytes()
        digest.update(f"{path.name} {len(data)}\n".encode())
        digest.update(data)
    for text in more:
        digest.update(f"{len(text)}\n{text}".encode())
    return digest.hexdigest()
