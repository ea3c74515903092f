"""The partition table that we write is one that others read."""

from __future__ import annotations

import binascii
import io
import struct
import uuid

import pytest

from labkit.guests import gpt

SIZE = 64 << 20
DISK = uuid.UUID(int=7)
PARTITIONS = (
    gpt.Partition("bios", gpt.BIOS_BOOT, 2048, 2048),
    gpt.Partition("root", gpt.LINUX, 4096, 100_000),
)


def _disk() -> io.BytesIO:
    disk = io.BytesIO(bytes(SIZE))
    gpt.write_table(disk, SIZE, PARTITIONS, DISK)
    return disk


def _header(data: bytes, lba: int) -> tuple[object, ...]:
    return struct.unpack_from("<8sIIIIQQQQ16sQIII", data, lba * 512)


@pytest.mark.parametrize(("lba", "other"), [(1, SIZE // 512 - 1), (SIZE // 512 - 1, 1)])
def test_both_headers_have_right_checksums_and_know_each_other(lba: int, other: int) -> None:
    data = _disk().getvalue()
    fields = _header(data, lba)
    raw = bytearray(data[lba * 512 : lba * 512 + 92])
    raw[16:20] = bytes(4)
    table = int(str(fields[10])) * 512

    assert fields[0] == b"EFI PART"
    assert fields[3] == binascii.crc32(raw)
    assert (fields[5], fields[6]) == (lba, other)
    assert fields[13] == binascii.crc32(data[table : table + 128 * 128])


def test_partitions_are_where_they_should_be() -> None:
    data = _disk().getvalue()

    for number, partition in enumerate(PARTITIONS):
        kind, _own, first, last, _flags, name = struct.unpack_from("<16s16sQQQ72s", data, 1024 + number * 128)
        assert uuid.UUID(bytes_le=kind) == partition.type
        assert (first, last) == (partition.start, partition.start + partition.length - 1)
        assert name.decode("utf-16-le").rstrip("\0") == partition.name


def test_grub_finds_its_core_and_leaves_the_partition_table_alone() -> None:
    disk = _disk()
    before = disk.getvalue()
    boot = bytes(510) + b"\x55\xaa"
    core = bytes(range(256)) * 8

    gpt.install_grub(disk, boot, core, PARTITIONS[0])

    after = disk.getvalue()
    assert struct.unpack_from("<Q", after, 0x5C) == (2048,)
    assert after[0x1B8:512] == before[0x1B8:512]
    assert after[512 : 34 * 512] == before[512 : 34 * 512]
    start = 2048 * 512
    assert struct.unpack_from("<Q", after, start + 500) == (2049,)
    assert after[start + 512 : start + 2048] == core[512:]


def test_a_core_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="partition"):
        gpt.install_grub(_disk(), bytes(510) + b"\x55\xaa", bytes(2 << 20), PARTITIONS[0])
