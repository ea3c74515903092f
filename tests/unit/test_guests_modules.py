"""Modules come in the order in which they can be loaded, with the tables that modprobe reads."""

from __future__ import annotations

import gzip
import lzma
import struct

import pytest
import zstandard

from labkit.guests.modules import ModuleTree, module_name, modules_alias, modules_dep


def module(*fields: str) -> bytes:
    """An ELF file with a .modinfo section of these fields, and no more than that takes."""
    info = b"".join(field.encode() + b"\0" for field in fields)
    names = b"\0.modinfo\0.shstrtab\0"
    table = 64 + len(info) + len(names)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    section = struct.Struct("<IIQQQQIIQQ")
    sections = section.pack(*[0] * 10)
    sections += section.pack(1, 1, 0, 0, 64, len(info), 0, 0, 1, 0)
    sections += section.pack(10, 3, 0, 0, 64 + len(info), len(names), 0, 0, 1, 0)
    return header + info + names + sections


FILES = {
    "kernel/net/virtio_net.ko": module("depends=virtio,net_failover", "alias=virtio:d00000001v*"),
    "kernel/net/net_failover.ko.xz": lzma.compress(module("depends=failover")),
    "kernel/net/failover.ko.zst": zstandard.compress(module("depends=")),
    "kernel/virtio/virtio.ko.gz": gzip.compress(module("depends=virtio_ring")),
    "kernel/virtio/virtio-ring.ko": module("depends="),
    "kernel/other/unwanted.ko": module("depends="),
    "modules.builtin": b"kernel/fs/ext4/ext4.ko\n",
}


def test_each_module_comes_after_what_it_needs() -> None:
    order = [found.name for found in ModuleTree(FILES).load_order(["virtio_net"])]

    assert order == ["virtio_ring", "virtio", "failover", "net_failover", "virtio_net"]


def test_modules_are_unpacked_and_lose_the_suffix() -> None:
    found = {m.name: m for m in ModuleTree(FILES).load_order(["net_failover"])}

    assert found["net_failover"].path == "kernel/net/net_failover.ko"
    assert found["net_failover"].data == module("depends=failover")


def test_a_module_that_this_kernel_has_built_in_is_left_out() -> None:
    assert [m.name for m in ModuleTree(FILES).load_order(["ext4", "failover"])] == ["failover"]


def test_hyphens_and_underscores_are_the_same() -> None:
    assert "virtio-ring" in ModuleTree(FILES)
    assert module_name("kernel/a/virtio-ring.ko.zst") == "virtio_ring"


def test_modules_dep_names_what_is_loaded_first_last() -> None:
    text = modules_dep(ModuleTree(FILES).load_order(["virtio_net"]))

    line = next(line for line in text.splitlines() if line.startswith("kernel/net/virtio_net.ko:"))
    needed = [module_name(path) for path in line.partition(": ")[2].split()]
    assert sorted(needed) == ["failover", "net_failover", "virtio", "virtio_ring"]
    assert needed.index("failover") > needed.index("net_failover")
    assert needed.index("virtio_ring") > needed.index("virtio")


def test_modules_alias_says_which_module_serves_a_device() -> None:
    assert (
        modules_alias(ModuleTree(FILES).load_order(["virtio_net"])) == "alias virtio:d00000001v* virtio_net\n"
    )


@pytest.mark.parametrize("names", [[], ["nothing-of-that-name"]])
def test_no_modules_are_no_error(names: list[str]) -> None:
    assert ModuleTree(FILES).load_order(names) == []
