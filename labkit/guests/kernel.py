"""Unpacking distribution kernels to what QEMU enters fastest.

On x86-64 that is the ELF `vmlinux` inside the bzImage, entered by PVH: no real mode, no decompression in the
guest (1.65 s against 2.2 s to userland under TCG). On arm64 it is the plain `Image`; that half was written
from the documents and tried on synthetic payloads only, no arm64 machine was at hand.

Sources: Documentation/x86/boot.rst (`setup_sects`, `payload_offset`), Documentation/arm64/booting.rst, and
drivers/firmware/efi/libstub/zboot-header.S in the kernel.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib

from labkit.errors import HostError
from labkit.guests import elf

_LZ4_LEGACY_MAGIC = 0x184C2102
_LZ4_LEGACY_BLOCK = 8 << 20


def direct_boot_kernel(packed: bytes, arch: str) -> bytes:
    """The kernel as QEMU's `-kernel` starts it fastest.

    Arguments:
        packed: the distribution's /boot/vmlinuz.
        arch: "x86_64" or "aarch64".

    Raises:
        HostError: this is not a kernel that we know how to unpack.
    """
    try:
        return _unpack_x86(packed) if arch == "x86_64" else _unpack_arm64(packed)
    except (ValueError, struct.error, zlib.error, lzma.LZMAError, EOFError, OSError) as exc:
        raise HostError(
            f"The {arch} kernel from the distribution's package cannot be unpacked: {exc}.",
            mend="Report this with the name and version of your distribution.",
        ) from exc


def _unpack_x86(packed: bytes) -> bytes:
    if elf.is_elf(packed):
        return packed
    if packed[0x202:0x206] != b"HdrS":
        raise ValueError("it has no boot header")
    sectors = packed[0x1F1] or 4  # 0 means 4, for historical reasons
    offset, length = struct.unpack_from("<II", packed, 0x248)
    start = (sectors + 1) * 512 + offset
    kernel = decompress(packed[start : start + length])
    if not elf.is_elf(kernel):
        raise ValueError("its payload is no ELF file")
    # A kernel without PVH entry (CONFIG_PVH=n) still boots as the bzImage that it was.
    return kernel if elf.has_pvh_entry(kernel) else packed


def _unpack_arm64(packed: bytes) -> bytes:
    if packed[4:8] == b"zimg":  # EFI zboot: the payload's place follows the magic
        offset, size = struct.unpack_from("<II", packed, 8)
        packed = packed[offset : offset + size]
    image = packed if _is_arm64_image(packed) else decompress(packed)
    if not _is_arm64_image(image):
        raise ValueError("there is no arm64 Image in it")
    return image


def _is_arm64_image(data: bytes) -> bool:
    return data[0x38:0x3C] == b"ARM\x64"


def decompress(data: bytes) -> bytes:
    """The contents of a compressed stream, its form told by its first bytes; what follows it is ignored.

    Raises:
        ValueError: the form is unknown or the data is damaged.
    """
    for magic, unpack in _FORMATS.items():
        if data.startswith(magic):
            return unpack(data)
    raise ValueError(f"it is compressed in an unknown way (it begins with {data[:6].hex()})")


def _gzip(data: bytes) -> bytes:
    return zlib.decompressobj(wbits=31).decompress(data)


def _xz(data: bytes) -> bytes:
    return lzma.LZMADecompressor(format=lzma.FORMAT_AUTO).decompress(data)


def _bzip2(data: bytes) -> bytes:
    return bz2.BZ2Decompressor().decompress(data)


def _zstd(data: bytes) -> bytes:
    import zstandard  # here, so that naming an image does not load it

    try:
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj().decompress(data)
    except zstandard.ZstdError as exc:
        raise ValueError(str(exc)) from exc


def _lz4(data: bytes) -> bytes:
    """LZ4's legacy frame, which the kernel uses: blocks of at most 8 MiB, each after its compressed size.

    Source: lz4_Frame_format.md, "Legacy frame". The kernel's build appends the unpacked size, 4 bytes, which
    looks like the size of one more block: it ends the stream.
    """
    import lz4.block

    out = bytearray()
    at = 4
    while at + 4 < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        at += 4
        if size == _LZ4_LEGACY_MAGIC:  # another frame begins
            continue
        if at + size > len(data):
            break
        try:
            out += lz4.block.decompress(data[at : at + size], uncompressed_size=_LZ4_LEGACY_BLOCK)
        except lz4.block.LZ4BlockError as exc:
            raise ValueError(f"damaged LZ4 block: {exc}") from exc
        at += size
    return bytes(out)


_FORMATS = {
    b"\x1f\x8b": _gzip,
    b"\xfd7zXZ\0": _xz,
    b"\x5d\0\0": _xz,  # the older "lzma alone" form
    b"BZh": _bzip2,
    b"\x02\x21\x4c\x18": _lz4,
    b"\x28\xb5\x2f\xfd": _zstd,
}
