"""Partitioning a disk image with a GUID partition table, and making it bootable by BIOS, without any program.

Sectors are 512 bytes throughout.
Sources: UEFI specification 2.10, chapter 5 (GPT); GRUB 2.06, util/setup.c and grub-core/boot/i386/pc/*.S
(what grub-bios-setup writes).
"""

from __future__ import annotations

import binascii
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

SECTOR = 512
BIOS_BOOT = uuid.UUID("21686148-6449-6e6f-744e-656564454649")
EFI_SYSTEM = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")

_ENTRIES, _ENTRY_SIZE = 128, 128
_TABLE_SECTORS = _ENTRIES * _ENTRY_SIZE // SECTOR
_FIRST_USABLE = 2 + _TABLE_SECTORS
_HEADER = struct.Struct("<8s4sII4xQQQQ16sQIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")

# GRUB's boot.img and core.img: where the addresses go that only the installer knows.
_BOOT_KERNEL_SECTOR = 0x5C  # GRUB_BOOT_MACHINE_KERNEL_SECTOR, 8 bytes
_BOOT_DRIVE_CHECK = 0x66  # a jump that is replaced by two NOPs on hard disks
_BOOT_CODE_END = 0x1B8  # from here on the sector is the MBR's disk signature and partition table
_CORE_BLOCKLIST = SECTOR - 12  # GRUB_BOOT_MACHINE_LIST_SIZE before the end of core.img's first sector


@dataclass(frozen=True)
class Partition:
    """One partition: where it begins and how long it is, in sectors."""

    name: str
    type: uuid.UUID
    start: int
    length: int


def last_usable(disk_size: int) -> int:
    """The last sector that a partition may take on a disk of that many bytes."""
    return disk_size // SECTOR - 2 - _TABLE_SECTORS


def write_table(disk: BinaryIO, disk_size: int, partitions: Sequence[Partition], disk_id: uuid.UUID) -> None:
    """Write the protective MBR and both copies of the partition table.

    The partitions' own ids are derived from the disk's, so that the same call gives the same bytes.
    """
    sectors = disk_size // SECTOR
    entries = b"".join(_entry(partition, disk_id) for partition in partitions).ljust(
        _ENTRIES * _ENTRY_SIZE, b"\0"
    )
    disk.seek(0)
    disk.write(_protective_mbr(sectors))
    disk.write(_header(1, sectors - 1, 2, sectors, entries, disk_id))
    disk.write(entries)
    disk.seek((sectors - 1 - _TABLE_SECTORS) * SECTOR)
    disk.write(entries)
    disk.write(_header(sectors - 1, 1, sectors - 1 - _TABLE_SECTORS, sectors, entries, disk_id))


def install_grub(disk: BinaryIO, boot: bytes, core: bytes, partition: Partition) -> None:
    """Put GRUB for BIOS on a disk: boot.img into the MBR beside the table, core.img into its partition.

    Raises:
        ValueError: these are not GRUB's images, or core.img does not fit.
    """
    if len(boot) != SECTOR or boot[510:] != b"\x55\xaa":
        raise ValueError("boot.img is not a boot sector")
    if len(core) > partition.length * SECTOR:
        raise ValueError(f"core.img has {len(core)} bytes and the partition {partition.length * SECTOR}")
    sector = bytearray(boot)
    struct.pack_into("<Q", sector, _BOOT_KERNEL_SECTOR, partition.start)
    sector[_BOOT_DRIVE_CHECK : _BOOT_DRIVE_CHECK + 2] = b"\x90\x90"
    disk.seek(0)
    disk.write(sector[:_BOOT_CODE_END])
    # core.img's first sector loads the rest, which follows it directly.
    image = bytearray(core)
    struct.pack_into("<Q", image, _CORE_BLOCKLIST, partition.start + 1)
    disk.seek(partition.start * SECTOR)
    disk.write(image)


def _protective_mbr(sectors: int) -> bytes:
    # One partition of type EE over all of the disk, as far as 32 bits reach; its CHS fields say "beyond".
    entry = struct.pack("<B3sB3sII", 0, b"\0\x02\0", 0xEE, b"\xff\xff\xff", 1, min(sectors - 1, 0xFFFFFFFF))
    return bytes(446) + entry + bytes(48) + b"\x55\xaa"


def _header(here: int, other: int, table: int, sectors: int, entries: bytes, disk_id: uuid.UUID) -> bytes:
    last = sectors - 2 - _TABLE_SECTORS

    def pack(checksum: int) -> bytes:
        return _HEADER.pack(
            b"EFI PART",
            b"\0\0\x01\0",
            _HEADER.size,
            checksum,
            here,
            other,
            _FIRST_USABLE,
            last,
            disk_id.bytes_le,
            table,
            _ENTRIES,
            _ENTRY_SIZE,
            binascii.crc32(entries),
        )

    return pack(binascii.crc32(pack(0))).ljust(SECTOR, b"\0")


def _entry(partition: Partition, disk_id: uuid.UUID) -> bytes:
    own = uuid.uuid5(disk_id, partition.name)
    last = partition.start + partition.length - 1
    return _ENTRY.pack(
        partition.type.bytes_le, own.bytes_le, partition.start, last, 0, partition.name.encode("utf-16-le")
    )
