"""Assemble the probe guests: `python -m labkit.hypervisors.probe` rewrites each .hex from its .S.

For those who change a probe; needs GNU binutils for x86 and for arm64 (Debian: `binutils`,
`binutils-aarch64-linux-gnu`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from labkit.tools import require, run_tool

_HERE = Path(__file__).parent
_BYTES_A_LINE = 24
#: Prefix and Debian package of each architecture's binutils, and the options that `as` and `ld` take.
_TOOLS = {
    "x86_64": ("", "binutils", ["--32"], ["-m", "elf_i386"]),
    "aarch64": ("aarch64-linux-gnu-", "binutils-aarch64-linux-gnu", [], []),
}


def assemble(arch: str) -> bytes:
    """The machine code of an architecture's probe, linked to run at its own offset 0."""
    prefix, package, as_options, ld_options = _TOOLS[arch]

    def run(tool: str, *argv: str | Path) -> None:
        run_tool([require(prefix + tool, package=package), *argv], what=f"assemble the probe for {arch}")

    with tempfile.TemporaryDirectory() as name:
        thing, linked, flat = (Path(name, part) for part in ("probe.o", "probe.elf", "probe.bin"))
        run("as", *as_options, _HERE / f"{arch}.S", "-o", thing)
        run("ld", *ld_options, "-Ttext", "0", "-e", "0", thing, "-o", linked)
        run("objcopy", "-O", "binary", "-j", ".text", linked, flat)
        return flat.read_bytes()


def as_hex(code: bytes) -> str:
    """Bytes as lines of hexadecimal pairs."""
    starts = range(0, len(code), _BYTES_A_LINE)
    return "".join(code[start : start + _BYTES_A_LINE].hex(" ") + "\n" for start in starts)


if __name__ == "__main__":
    for arch in _TOOLS:
        (_HERE / f"{arch}.hex").write_text(as_hex(assemble(arch)), encoding="ascii")
