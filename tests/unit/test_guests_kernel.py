"""Kernels are unpacked whichever way the distribution packs them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable

import lz4.block
import pytest
import zstandard

from labkit.errors import HostError
from labkit.guests.kernel import decompress, direct_boot_kernel

SIZE_SUFFIX = b"\x10\x20\x30\x40"  # the kernel's build appends the unpacked size to the payload


def _lz4_legacy(data: bytes) -> bytes:
    out = struct.pack("<I", 0x184C2102)
    for at in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[at : at + (8 << 20)], store_size=False)
        out += struct.pack("<I", len(block)) + block
    return out


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "lz4": _lz4_legacy,
    "zstd": zstandard.compress,
}


def vmlinux(*, pvh: bool) -> bytes:
    """An ELF file with one note segment, Xen's PHYS32_ENTRY or another, and some payload."""
    note = struct.pack("<III4sI", 4, 4, 18 if pvh else 3, b"Xen\0", 0x1000000)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    program = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4)
    return header + program + note + bytes(9 << 20)  # more than one block of LZ4


def bzimage(payload: bytes) -> bytes:
    sectors, offset = 4, 0x300
    image = bytearray((sectors + 1) * 512 + offset)
    image[0x1F1] = sectors
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, offset, len(payload))
    return bytes(image) + payload + b"what follows the payload"


@pytest.mark.parametrize("form", PACKERS)
def test_the_elf_kernel_comes_out_of_a_bzimage(form: str) -> None:
    kernel = vmlinux(pvh=True)

    assert direct_boot_kernel(bzimage(PACKERS[form](kernel) + SIZE_SUFFIX), "x86_64") == kernel


def test_a_kernel_without_pvh_entry_stays_as_it_is() -> None:
    image = bzimage(gzip.compress(vmlinux(pvh=False)))

    assert direct_boot_kernel(image, "x86_64") == image


def test_an_elf_kernel_needs_no_unpacking() -> None:
    assert direct_boot_kernel(vmlinux(pvh=True), "x86_64") == vmlinux(pvh=True)


def arm64_image() -> bytes:
    return b"MZ".ljust(0x38, b"\0") + b"ARM\x64" + b"code" * 100


def _zboot(image: bytes) -> bytes:
    payload = gzip.compress(image)
    return b"MZ\0\0zimg" + struct.pack("<II", 64, len(payload)) + b"gzip".ljust(48, b"\0") + payload


@pytest.mark.parametrize("pack", [lambda image: image, gzip.compress, _zboot], ids=["plain", "gzip", "zboot"])
def test_an_arm64_image_is_found_in_each_form(pack: Callable[[bytes], bytes]) -> None:
    assert direct_boot_kernel(pack(arm64_image()), "aarch64") == arm64_image()


@pytest.mark.parametrize("form", PACKERS)
def test_a_damaged_kernel_is_an_error_of_ours(form: str) -> None:
    packed = bytearray(PACKERS[form](vmlinux(pvh=True)))
    packed[20:] = bytes(len(packed) - 20)

    with pytest.raises(HostError, match="cannot be unpacked"):
        direct_boot_kernel(bzimage(bytes(packed)), "x86_64")


def test_an_unknown_form_is_named_by_its_first_bytes() -> None:
    with pytest.raises(ValueError, match="6e6f70652121"):
        decompress(b"nope!! and more")
