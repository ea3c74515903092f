"""The files of a VM at a hypervisor that is not labkit's own: volumes of a libvirt storage pool.

libvirt carries them there, so the hypervisor may be the system's (whose QEMU cannot read a user's home)
or another computer's. Every volume's name begins with "labkit-" and the VM's or the kit's identity.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import libvirt
from lxml import etree

from labkit import paths
from labkit.errors import HostError, HypervisorError
from labkit.specs import DiskSpec
from labkit.storage import qemu_img

#: The pools that are looked for, LABKIT_POOL before them.
_POOLS = ("labkit", "default")
_CHUNK = 1 << 20


class PoolFiles:
    """The volumes of one VM."""

    def __init__(self, connection: Any, uri: str, uuid: str) -> None:
        self._connection = connection
        self._uri = uri
        self._prefix = f"labkit-{uuid}-"

    @functools.cached_property
    def _pool(self) -> Any:
        return _pool(self._connection, self._uri)

    def path(self, name: str) -> str:
        target = etree.fromstring(self._pool.XMLDesc()).findtext("target/path")
        return f"{target}/{self._prefix}{name}"

    def exists(self, name: str) -> bool:
        return self._volume(self._prefix + name) is not None

    def create(self, name: str, spec: DiskSpec) -> None:
        with tempfile.TemporaryDirectory(prefix="labkit-") as directory:
            disk = Path(directory) / name
            qemu_img.create(disk, spec)
            self._upload(self._prefix + name, disk)

    def overlay(self, name: str, base: Path, size: int) -> None:
        volume = _described(self._prefix + name, "qcow2", size)
        backing = etree.SubElement(volume, "backingStore")
        etree.SubElement(backing, "path").text = self.shared(base)
        etree.SubElement(backing, "format", type="qcow2")
        self._pool.createXML(_text(volume))

    def copy(self, name: str, source: str) -> None:
        volume = self._connection.storageVolLookupByPath(source)
        wanted = _described(self._prefix + name, "qcow2", volume.info()[1])
        self._pool.createXMLFrom(_text(wanted), volume)

    def keep(self, name: str, content: Path) -> str:
        if not self.exists(name):
            self._upload(self._prefix + name, content)
        return self.path(name)

    def shared(self, file: Path) -> str:
        """One volume for all VMs of this kit: its name holds the kit and the file's path, which an image
        never changes."""
        name = f"{_kit()}{hashlib.sha256(os.fsencode(file)).hexdigest()[:16]}-{file.name}"
        volume = self._volume(name) or self._upload(name, file)
        path: str = volume.path()
        return path

    def size(self, name: str) -> int:
        volume = self._volume(self._prefix + name)
        if volume is None:
            raise HypervisorError(f"The disk {name} is not in the pool {self._pool.name()} any more.")
        return int(volume.info()[1])

    def resize(self, name: str, size: int) -> None:
        volume = self._volume(self._prefix + name)
        if volume is not None:
            volume.resize(size)

    def read(self, name: str) -> bytes:
        # The hypervisor wrote it without the pool's knowledge, so the pool looks anew.
        self._pool.refresh()
        volume = self._volume(self._prefix + name)
        if volume is None:
            return b""
        pieces = bytearray()
        stream = self._connection.newStream()
        volume.download(stream, 0, 0)
        stream.recvAll(lambda _stream, data, _opaque: pieces.extend(data), None)
        stream.finish()
        return bytes(pieces)

    def remove(self, *, last: bool) -> None:
        try:
            self._pool.refresh()
        except HostError:
            return  # without a pool nothing was made
        self._delete(self._prefix)
        if last:
            self._delete(_kit())

    def _delete(self, prefix: str) -> None:
        for volume in self._pool.listAllVolumes():
            if volume.name().startswith(prefix):
                volume.delete()

    def _volume(self, name: str) -> Any:
        with contextlib.suppress(libvirt.libvirtError):
            return self._pool.storageVolLookupByName(name)
        return None

    def _upload(self, name: str, source: Path) -> Any:
        """Bring a host file there whole; a volume that arrived in part is removed."""
        size = source.stat().st_size
        volume = self._pool.createXML(_text(_described(name, "raw", size)))
        try:
            stream = self._connection.newStream()
            volume.upload(stream, 0, size)
            with source.open("rb") as file:
                stream.sendAll(lambda _stream, count, opened: opened.read(min(count, _CHUNK)), file)
            stream.finish()
        except BaseException:
            volume.delete()
            raise
        return volume


def _kit() -> str:
    """What the names of this kit's shared volumes begin with."""
    identity = f"{os.uname().nodename}:{os.getuid()}:{paths.state_dir()}"
    return f"labkit-kit-{hashlib.sha256(identity.encode()).hexdigest()[:12]}-"


def _pool(connection: Any, uri: str) -> Any:
    named = os.environ.get("LABKIT_POOL")
    for name in (named,) if named else _POOLS:
        with contextlib.suppress(libvirt.libvirtError):
            pool = connection.storagePoolLookupByName(name)
            if pool.isActive():
                return pool
    raise HostError(
        f"The hypervisor at {uri} has no storage pool for labkit's disks.",
        evidence=f"looked for: {named or ', '.join(_POOLS)}",
        mend=f"Make one there: virsh -c {uri} pool-create-as labkit dir --target DIRECTORY"
        "   (or name another by LABKIT_POOL)",
    )


def _described(name: str, form: str, size: int) -> Any:
    volume = etree.Element("volume")
    etree.SubElement(volume, "name").text = name
    etree.SubElement(volume, "capacity", unit="bytes").text = str(size)
    if form == "qcow2":
        etree.SubElement(volume, "allocation").text = "0"
    target = etree.SubElement(volume, "target")
    etree.SubElement(target, "format", type=form)
    return volume


def _text(element: Any) -> str:
    return str(etree.tostring(element, encoding="unicode"))
