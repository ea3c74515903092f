"""What ELF files say, compared with what the tools of the system say of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from labkit.guests import apt, elf
from labkit.guests.pocket import libraries

SHELL = Path("/bin/bash").resolve()


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs the program readelf")
def test_needed_libraries_are_those_that_readelf_shows() -> None:
    shown = subprocess.run(["readelf", "-d", SHELL], capture_output=True, text=True, check=True).stdout

    assert elf.needed(SHELL.read_bytes()) == re.findall(r"\(NEEDED\).*\[(.+)\]", shown)


def test_a_program_names_its_loader() -> None:
    loader = elf.interpreter(SHELL.read_bytes())

    assert loader is not None
    assert Path(loader).exists()


def test_libraries_are_followed_through_links_and_through_each_other() -> None:
    program = SHELL.read_bytes()
    loader = elf.interpreter(program)
    assert loader is not None
    available = {}
    for path in map(Path, re.findall(r"(/\S+)", _ldd(SHELL))):
        available[f"lib/real/{path.resolve().name}.real"] = apt.Entry(path.read_bytes(), 0o755)
        available[f"lib/{path.name}"] = apt.Entry(b"", 0o777, f"real/{path.resolve().name}.real")

    found = libraries(program, available)

    assert set(elf.needed(program)) <= {Path(path).name for path in found}
    assert found[loader.lstrip("/")] == Path(loader).read_bytes()


def _ldd(program: Path) -> str:
    return subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
