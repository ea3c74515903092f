"""What apt and dpkg say is read right, from answers that they really gave."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from labkit import progress as progress_module
from labkit.errors import HostError, ToolError
from labkit.guests import apt

pytestmark = pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt")


def test_a_line_of_uris_becomes_a_package() -> None:
    line = (
        "'http://deb.debian.org/debian/pool/main/b/busybox/busybox-static_1.35.0-4%2bb3_amd64.deb' "
        "busybox-static_1%3a1.35.0-4+b3_amd64.deb 928188 SHA256:3d3fdbe9"
    )

    package = apt._parse_uri(line)

    assert package == apt.Package(
        "busybox-static",
        "1:1.35.0-4+b3",
        "busybox-static_1%3a1.35.0-4+b3_amd64.deb",
        928188,
        "SHA256:3d3fdbe9",
    )


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that PATH begins with, for programs that stand in for apt's with recorded answers."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")
    return directory


def _stand_in(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_dependencies_include_providers_and_alternatives(program: Path) -> None:
    answer = """a
  Depends: b
 |Depends: c
  Depends: <d>
    real-d
  PreDepends: e:any
b
"""
    _stand_in(program, "apt-cache", f"cat <<'END'\n{answer}END")

    assert apt.dependencies("a", recurse=True) == {"a": ["b", "c", "real-d", "e"], "b": []}


def test_missing_lists_are_mended_by_apt_update(program: Path) -> None:
    _stand_in(program, "apt-cache", "echo 'E: No packages found' >&2; exit 100")

    with pytest.raises(HostError, match="linux-image-cloud-amd64") as caught:
        apt.dependencies("linux-image-cloud-amd64")

    assert "sudo apt update" in caught.value.mend
    assert "No packages found" in caught.value.evidence


def test_stale_lists_are_mended_by_apt_update(program: Path, tmp_path: Path) -> None:
    _stand_in(program, "apt-get", "echo 'E: Failed to fetch http://x  404  Not Found'; exit 100")
    package = apt.Package("x", "1", "x_1_amd64.deb", 1, "SHA256:0")

    with progress_module.progress("Testing") as shown, pytest.raises(ToolError) as caught:
        apt.download([package], tmp_path / "packages", shown)

    assert "404" in caught.value.evidence
    assert "sudo apt update" in caught.value.mend
    assert list((tmp_path / "packages").iterdir()) == []


def test_a_package_is_read_without_installing_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text(
        "Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.org>\nDescription: x\n"
    )
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/tool").write_text("tool")
    (root / "usr/bin/tool").chmod(0o755)
    (root / "usr/bin/link").symlink_to("tool")
    (root / "usr/share").mkdir()
    (root / "usr/share/unwanted").write_text("no")
    deb = tmp_path / "x.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", root, deb], check=True, stdout=subprocess.DEVNULL)

    found = apt.read_package(deb, lambda path: path.startswith("bin/"))

    assert found["bin/tool"] == apt.Entry(b"tool", 0o755)
    assert found["bin/link"].target == "tool"
    assert set(found) == {"bin/tool", "bin/link"}


def test_a_damaged_package_is_an_error_of_ours(tmp_path: Path) -> None:
    deb = tmp_path / "x.deb"
    deb.write_bytes(b"this is no package")

    with pytest.raises(ToolError, match=r"x\.deb cannot be read"):
        apt.read_package(deb, lambda _path: True)
