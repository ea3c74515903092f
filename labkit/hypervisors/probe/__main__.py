"""Assemble the probe guest: `python -m labkit.hypervisors.probe` rewrites x86_64.hex from x86_64.S.

For those who change the probe; needs GNU binutils for x86 (Debian: `binutils`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from labkit.tools import require, run_tool

_HERE = Path(__file__).parent
_BYTES_A_LINE = 24


def assemble(source: Path = _HERE / "x86_64.S") -> bytes:
    """The machine code of an assembler source that is linked to run at its own offset 0."""
    with tempfile.TemporaryDirectory() as name:
        thing, flat = Path(name, "probe.o"), Path(name, "probe.bin")
        run_tool([require("as", package="binutils"), "--32", source, "-o", thing], what="assemble the probe")
        link = [require("ld", package="binutils"), "-m", "elf_i386", "--oformat", "binary"]
        run_tool([*link, "-Ttext", "0", "-e", "0", thing, "-o", flat], what="link the probe")
        return flat.read_bytes()


def as_hex(code: bytes) -> str:
    """Bytes as lines of hexadecimal pairs."""
    starts = range(0, len(code), _BYTES_A_LINE)
    return "".join(code[start : start + _BYTES_A_LINE].hex(" ") + "\n" for start in starts)


if __name__ == "__main__":
    (_HERE / "x86_64.hex").write_text(as_hex(assemble()), encoding="ascii")
