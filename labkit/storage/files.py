"""The files of one VM, wherever its hypervisor keeps them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from labkit.specs import DiskSpec
from labkit.storage import qemu_img


class Files(Protocol):
    """The disks and other files of one VM, by short names such as "disk0.qcow2"."""

    def path(self, name: str) -> str:
        """Where the hypervisor finds it (the file need not be there)."""
        ...

    def exists(self, name: str) -> bool:
        """Whether it is there."""
        ...

    def create(self, name: str, spec: DiskSpec) -> None:
        """Make a new disk."""
        ...

    def overlay(self, name: str, base: Path, size: int) -> None:
        """Make a disk of `size` bytes that begins as the image `base` (a host file, left unchanged)."""
        ...

    def copy(self, name: str, source: str) -> None:
        """Make a disk that begins as the disk at `source` (another VM's `path`), whole and of its own."""
        ...

    def keep(self, name: str, content: Path) -> str:
        """Keep a host file under this name, where it is not kept already; returns its path."""
        ...

    def shared(self, file: Path) -> str:
        """The path at which the hypervisor reads a host file that many VMs use (a kernel)."""
        ...

    def size(self, name: str) -> int:
        """A disk's size in bytes, as its guest sees it."""
        ...

    def resize(self, name: str, size: int) -> None:
        """Grow a disk that no VM has open."""
        ...

    def read(self, name: str) -> bytes:
        """A file's content; nothing where it is not there."""
        ...

    def remove(self, *, last: bool) -> None:
        """Remove all of them; for the `last` VM at its hypervisor also what VMs share there."""
        ...


class LocalFiles:
    """Files in a directory of this host."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def path(self, name: str) -> str:
        return str(self._directory / name)

    def exists(self, name: str) -> bool:
        return (self._directory / name).exists()

    def create(self, name: str, spec: DiskSpec) -> None:
        qemu_img.create(self._directory / name, spec)

    def overlay(self, name: str, base: Path, size: int) -> None:
        # A link keeps the image for this VM when the cache is emptied, and takes no space.
        link = self._directory / "base.qcow2"
        if not link.exists():
            try:
                os.link(base, link)
            except OSError:
                qemu_img.copy(base, link)
        qemu_img.overlay(self._directory / name, link, size)

    def copy(self, name: str, source: str) -> None:
        qemu_img.copy(Path(source), self._directory / name, in_use=True)

    def keep(self, name: str, content: Path) -> str:
        if not self.exists(name):
            (self._directory / name).write_bytes(content.read_bytes())
        return self.path(name)

    def shared(self, file: Path) -> str:
        return str(file)

    def size(self, name: str) -> int:
        return int(qemu_img.info(self._directory / name)["virtual-size"])

    def resize(self, name: str, size: int) -> None:
        qemu_img.resize(self._directory / name, size)

    def read(self, name: str) -> bytes:
        try:
            return (self._directory / name).read_bytes()
        except FileNotFoundError:
            return b""

    def remove(self, *, last: bool) -> None:
        """Nothing to do: the ledger removes the directory with its entry."""
