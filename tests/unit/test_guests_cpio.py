"""The initramfs archive that we write is one that cpio reads, and always the same."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from labkit.guests.cpio import Archive


def _archive() -> Archive:
    archive = Archive()
    archive.file("init", "#!/bin/sh\n", 0o755)
    archive.file("etc/odd-size", b"12345")
    archive.symlink("bin/sh", "/bin/busybox")
    archive.directory("root", 0o700)
    return archive


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs the program cpio")
def test_cpio_unpacks_what_was_packed(tmp_path: Path) -> None:
    subprocess.run(["cpio", "-id", "--quiet"], input=_archive().to_bytes(), cwd=tmp_path, check=True)

    assert (tmp_path / "init").read_text() == "#!/bin/sh\n"
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "etc/odd-size").read_bytes() == b"12345"
    assert (tmp_path / "bin/sh").readlink() == Path("/bin/busybox")
    assert (tmp_path / "root").stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs the program cpio")
def test_parents_stand_before_what_is_in_them() -> None:
    listed = subprocess.run(
        ["cpio", "-it", "--quiet"], input=_archive().to_bytes(), capture_output=True, text=False, check=True
    ).stdout.decode()

    assert listed.split() == ["bin", "bin/sh", "etc", "etc/odd-size", "init", "root"]


def test_the_same_files_give_the_same_bytes_in_any_order() -> None:
    other = Archive()
    other.directory("root", 0o700)
    other.symlink("bin/sh", "/bin/busybox")
    other.file("etc/odd-size", b"12345")
    other.file("init", "#!/bin/sh\n", 0o755)

    assert other.to_bytes() == _archive().to_bytes()


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside", "a/../../b"])
def test_a_path_outside_the_root_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not a path below"):
        Archive().file(path, b"")
