"""Just enough of ELF to build guests: what libraries a program needs, what a module or kernel says of itself.

64-bit little-endian files only, which is what x86-64 and arm64 have.
Source: System V ABI, "Object Files" and "Dynamic Linking" (the same as elf(5)).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP, _PT_NOTE = 1, 2, 3, 4
_DT_NULL, _DT_NEEDED, _DT_STRTAB = 0, 1, 5
_XEN_ELFNOTE_PHYS32_ENTRY = 18  # xen/include/public/elfnote.h: the entry that PVH boot uses


class Segment(NamedTuple):
    """One program header: sizes and offsets in bytes."""

    type: int
    offset: int
    address: int
    size: int


def is_elf(data: bytes) -> bool:
    """True for a 64-bit little-endian ELF file."""
    return data[:6] == b"\x7fELF\x02\x01"


def segments(data: bytes) -> list[Segment]:
    """The program headers."""
    offset, entry_size, count = _word(data, 32), _half(data, 54), _half(data, 56)
    found = []
    for start in range(offset, offset + entry_size * count, entry_size):
        kind, _flags, where, address, _physical, size = struct.unpack_from("<IIQQQQ", data, start)
        found.append(Segment(kind, where, address, size))
    return found


def interpreter(data: bytes) -> str | None:
    """The path of the dynamic loader that a program asks for, or None where it is static."""
    for segment in segments(data):
        if segment.type == _PT_INTERP:
            return data[segment.offset : segment.offset + segment.size].rstrip(b"\0").decode()
    return None


def needed(data: bytes) -> list[str]:
    """The sonames of the libraries that a program or library needs, as `readelf -d` shows them."""
    headers = segments(data)
    entries = [
        entry for segment in headers if segment.type == _PT_DYNAMIC for entry in _dynamic(data, segment)
    ]
    strings = next((value for tag, value in entries if tag == _DT_STRTAB), None)
    if strings is None:
        return []
    base = _file_offset(headers, strings)
    return [_string(data, base + value) for tag, value in entries if tag == _DT_NEEDED]


def section(data: bytes, name: str) -> bytes:
    """The contents of a section, or b"" where there is none of that name."""
    table, entry_size, count, names_index = _word(data, 40), _half(data, 58), _half(data, 60), _half(data, 62)
    names = _word(data, table + names_index * entry_size + 24)
    for start in range(table, table + entry_size * count, entry_size):
        name_offset = struct.unpack_from("<I", data, start)[0]
        if _string(data, names + name_offset) == name:
            offset, size = _word(data, start + 24), _word(data, start + 32)
            return data[offset : offset + size]
    return b""


def has_pvh_entry(data: bytes) -> bool:
    """True where QEMU can enter this kernel by PVH (it carries Xen's PHYS32_ENTRY note)."""
    return any(
        note == (b"Xen\0", _XEN_ELFNOTE_PHYS32_ENTRY)
        for segment in segments(data)
        if segment.type == _PT_NOTE
        for note in _notes(data[segment.offset : segment.offset + segment.size])
    )


def _notes(data: bytes) -> Iterator[tuple[bytes, int]]:
    at = 0
    while at + 12 <= len(data):
        name_size, size, kind = struct.unpack_from("<III", data, at)
        yield data[at + 12 : at + 12 + name_size], kind
        at += 12 + _round_up(name_size) + _round_up(size)


def _round_up(size: int) -> int:
    return (size + 3) & ~3


def _dynamic(data: bytes, segment: Segment) -> Iterator[tuple[int, int]]:
    for tag, value in struct.iter_unpack("<QQ", data[segment.offset : segment.offset + segment.size]):
        if tag == _DT_NULL:
            return
        yield tag, value


def _file_offset(headers: list[Segment], address: int) -> int:
    for segment in headers:
        if segment.type == _PT_LOAD and segment.address <= address < segment.address + segment.size:
            return segment.offset + address - segment.address
    raise ValueError(f"address {address:#x} is in no segment of the file")


def _string(data: bytes, offset: int) -> str:
    return data[offset : data.index(b"\0", offset)].decode()


def _half(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 2], "little")


def _word(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 8], "little")
