"""Facts of the host, from trees of /proc and /sys made for the tests, and orphans of our own."""

from __future__ import annotations

from pathlib import Path

import pytest

from labkit.errors import HostError
from labkit.hardware import host

MiB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A computer with 8 GiB, 4 GiB of them available."""
    put(tmp_path / "proc/meminfo", "MemTotal: 8388608 kB\nMemFree: 1048576 kB\nMemAvailable: 4194304 kB\n")
    return tmp_path


def put(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_memory_is_what_meminfo_says(root: Path) -> None:
    assert host.memory(root) == host.Memory(total=8192 * MiB, available=4096 * MiB)
    assert host.memory(root).usable == 4096 * MiB


def test_no_meminfo_is_a_host_error(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="/proc/meminfo"):
        host.memory(tmp_path)


@pytest.mark.parametrize(
    ("limit_file", "usage_file"),
    [
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ],
)
def test_a_control_groups_limit_counts(limit_file: str, usage_file: str, root: Path) -> None:
    put(root / "sys/fs/cgroup" / limit_file, f"{512 * MiB}\n")
    put(root / "sys/fs/cgroup" / usage_file, f"{112 * MiB}\n")
    assert host.memory(root).usable == 400 * MiB


def test_no_limit_in_either_version_is_none(root: Path) -> None:
    put(root / "sys/fs/cgroup/memory.max", "max\n")
    put(root / "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    put(root / "sys/fs/cgroup/memory/memory.usage_in_bytes", "1\n")
    assert host.memory(root).limit is None


@pytest.mark.parametrize(
    ("file", "text", "sign"),
    [
        (".dockerenv", "", "/.dockerenv exists"),
        ("run/.containerenv", "", "/run/.containerenv exists"),
        ("proc/1/cgroup", "4:memory:/docker/3fa9\n", "process 1 is in a control group of docker"),
        ("proc/1/cgroup", "0::/kubepods/pod7\n", "process 1 is in a control group of kubepods"),
        ("run/systemd/container", "lxc\n", "/run/systemd/container says 'lxc'"),
    ],
)
def test_a_container_is_told_by(file: str, text: str, sign: str, root: Path) -> None:
    put(root / file, text)
    assert host.container_signs(root, environ={}) == [sign]


def test_a_variable_tells_too_and_nothing_is_no_sign(root: Path) -> None:
    put(root / "proc/1/cgroup", "0::/init.scope\n")
    assert host.container_signs(root, environ={}) == []
    assert host.container_signs(root, environ={"container": "podman"}) == [
        "the variable container is 'podman'"
    ]


def test_the_system_vendor_is_read_where_there_is_one(root: Path) -> None:
    assert host.system_vendor(root) == ""
    put(root / "sys/class/dmi/id/sys_vendor", "QEMU\n")
    assert host.system_vendor(root) == "QEMU"


def test_an_orphan_is_watched_until_it_is_reaped_or_the_deadline() -> None:
    orphan = host.make_orphan(0.3)
    assert orphan.reaper
    assert orphan.seconds < 0.3 if orphan.reaped else orphan.seconds >= 0.3
