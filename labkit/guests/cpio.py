"""Writing initramfs archives: cpio's "newc" form, by ourselves, so that it takes neither root nor a program.

Entries are sorted, times are 0 and inode numbers count up, so the same files give the same bytes.
Source: Documentation/driver-api/early-userspace/buffer-format.rst in the kernel.
"""

from __future__ import annotations

import stat
from pathlib import PurePosixPath

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"


class Archive:
    """Files, directories and links, to be written as one cpio archive.

    Paths are relative to the root, without a leading slash. Parent directories are made as needed, mode 0755.
    All belongs to root.
    """

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, bytes]] = {}

    def __contains__(self, path: str) -> bool:
        return path in self._entries

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory, or change the mode of one that is there."""
        self._add(path, stat.S_IFDIR | mode, b"")

    def file(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        """Add a file; text is written as UTF-8."""
        self._add(path, stat.S_IFREG | mode, data.encode() if isinstance(data, str) else data)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link to `target`."""
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def to_bytes(self) -> bytes:
        """The archive, padded to 4 bytes as the kernel wants it."""
        out = bytearray()
        for inode, path in enumerate(sorted(self._entries), start=1):
            mode, data = self._entries[path]
            out += _entry(path, inode, mode, data)
        out += _entry(_TRAILER, 0, 0, b"")
        return bytes(out)

    def _add(self, path: str, mode: int, data: bytes) -> None:
        if path.startswith("/") or ".." in PurePosixPath(path).parts:
            raise ValueError(f"{path!r} is not a path below the archive's root")
        for parent in PurePosixPath(path).parents:
            name = str(parent)
            if name != "." and name not in self._entries:
                self._entries[name] = (stat.S_IFDIR | 0o755, b"")
        self._entries[path] = (mode, data)


def _entry(path: str, inode: int, mode: int, data: bytes) -> bytes:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    #        ino    mode  uid gid links  mtime size       dev    rdev  name       check
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name), 0)
    header = _MAGIC + b"".join(b"%08X" % field for field in fields)
    return _padded(header + name) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
