"""The boundary to qemu-img and mke2fs: making, copying and asking about disk images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from labkit.errors import LabkitError
from labkit.specs import DiskSpec
from labkit.tools import require, run_tool


def create(path: Path, spec: DiskSpec) -> None:
    """Make a new disk image, sparse, with its file system where the spec names one.

    Raises:
        ToolError: it could not be made; nothing is left behind.
    """
    aside = path.with_name(f".{path.name}.new")
    try:
        if spec.filesystem is None:
            _qemu_img("create the disk", "create", "-q", "-f", spec.format, aside, str(spec.size))
        else:
            _formatted(aside, spec)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def overlay(path: Path, backing: Path, size: int) -> None:
    """Make a qcow2 of `size` bytes that holds the differences from `backing` (a qcow2, left unchanged)."""
    _qemu_img(
        "create the overlay", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing, path, str(size)
    )


def copy(source: Path, target: Path, *, in_use: bool = False) -> None:
    """Copy a disk whole to a qcow2 of its own, without its snapshots and its backing files.

    Arguments:
        in_use: read the source although a VM has it open; the caller has paused that VM.
    """
    aside = target.with_name(f".{target.name}.new")
    share = ["-U"] if in_use else []
    try:
        _qemu_img("copy the disk", "convert", "-q", *share, "-O", "qcow2", source, aside)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def info(path: Path) -> dict[str, Any]:
    """What qemu-img says of an image: format, virtual-size and actual-size in bytes, backing-filename …"""
    answer = _qemu_img("read the disk", "info", "-U", "--output=json", path)
    data: dict[str, Any] = json.loads(answer)
    return data


def resize(path: Path, size: int) -> None:
    """Grow an image that no VM has open to `size` bytes."""
    _qemu_img("resize the disk", "resize", "-q", path, str(size))


def _formatted(path: Path, spec: DiskSpec) -> None:
    raw = path.with_name(f"{path.name}.raw")
    try:
        with raw.open("wb") as file:
            file.truncate(spec.size)
        # No reserved blocks: the disk is the learner's alone. The inode tables are zeroed by the
        # guest in its own time, which keeps this to some 20 ms at any size.
        run_tool(
            [require("mke2fs", package="e2fsprogs"), "-q", "-t", "ext4", "-m", "0", "-L", "data", raw],
            what="put a file system on the disk",
        )
        _qemu_img("create the disk", "convert", "-q", "-f", "raw", "-O", spec.format, raw, path)
    except OSError as exc:
        raise LabkitError(f"Could not create the disk {raw}: {exc.strerror}.") from exc
    finally:
        raw.unlink(missing_ok=True)


def _qemu_img(what: str, *arguments: str | Path) -> str:
    return run_tool([require("qemu-img", package="qemu-utils"), *arguments], what=what)
