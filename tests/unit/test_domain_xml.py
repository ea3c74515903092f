"""The domain's XML: built by element, so that no name gets out of its place."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from labkit import DiskSpec, VMSpec
from labkit.errors import SpecError
from labkit.guests.image import Image
from labkit.hypervisors import domain_xml
from labkit.hypervisors.hypervisor import PORTS, Plan

HOSTILE = "</domain>\"'&<![CDATA[x]]>,id=evil"


def plan(**changes: Any) -> Plan:
    spec = changes.pop("spec", VMSpec(name="web", disks=[DiskSpec(size="1 GiB")]))
    image = Image(
        name="pocket",
        version="1",
        arch=changes.pop("arch", "x86_64"),
        kernel=Path("/k"),
        cmdline=changes.pop("cmdline", "console=ttyS0"),
        memory=1 << 27,
        disk_size=0,
        firmware=("bios", "uefi"),
    )
    fields: dict[str, Any] = {
        "uuid": str(uuid.UUID(int=1)),
        "domain": "labkit.a.web",
        "lab": "a",
        "spec": spec,
        "image": image,
        "accelerator": "tcg",
        "kernel": "/k",
        "initrd": "/i",
        "disks": tuple(f"/d/disk{n}.qcow2" for n, _ in enumerate(spec.disks)),
        "seed": None,
        "console_log": "/d/console.log",
        "variables": "/d/vars",
        "sockets": Path("/s"),
    }
    return Plan(**fields | changes)


def tree(**changes: Any) -> Any:
    return etree.fromstring(domain_xml.build(plan(**changes)))


def test_every_text_of_a_plan_stays_in_its_place() -> None:
    names = ("domain", "lab", "kernel", "initrd", "console_log")
    hostile = {name: f"{HOSTILE}{name}" for name in names}
    root = tree(**hostile, cmdline=HOSTILE, disks=(HOSTILE,), sockets=Path("/s") / HOSTILE.replace("/", "|"))
    assert root.findtext("name") == hostile["domain"]
    assert root.findtext("os/kernel") == hostile["kernel"]
    assert root.findtext("os/initrd") == hostile["initrd"]
    assert root.findtext("os/cmdline") == HOSTILE
    assert root.find("devices/disk/source").get("file") == HOSTILE
    assert root.find("devices/serial/log").get("file") == hostile["console_log"]
    assert domain_xml.label_of(domain_xml.build(plan(**hostile))) == hostile["lab"]
    assert [child.tag for child in root] == [child.tag for child in tree()]


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=50))
def test_a_label_comes_back_as_it_was(lab: str) -> None:
    assert domain_xml.label_of(domain_xml.build(plan(lab=lab))) == lab


def test_a_domain_of_another_has_no_label() -> None:
    assert domain_xml.label_of("<domain><name>labkit.a.web</name></domain>") is None
    other = '<domain><metadata><label xmlns="https://example.org" lab="a"/></metadata></domain>'
    assert domain_xml.label_of(other) is None


def test_sizes_and_counts_are_the_specs() -> None:
    root = tree(spec=VMSpec(name="web", memory="256 MiB", max_memory="1 GiB", cpus=2, max_cpus=4))
    assert (root.findtext("memory"), root.find("memory").get("unit")) == (str(1 << 30), "b")
    assert root.findtext("currentMemory") == str(256 << 20)
    assert (root.findtext("vcpu"), root.find("vcpu").get("current")) == ("4", "2")


@pytest.mark.parametrize(("accelerator", "kind"), [("kvm", "kvm"), ("tcg", "qemu")])
def test_the_accelerator_is_the_domains_type(accelerator: str, kind: str) -> None:
    assert tree(accelerator=accelerator).get("type") == kind


def test_disks_are_numbered_in_order() -> None:
    disks = [DiskSpec(size="1 GiB"), DiskSpec(size="1 GiB", format="raw"), DiskSpec(size="2 GiB")]
    root = tree(spec=VMSpec(name="web", disks=disks))
    assert [disk.get("dev") for disk in root.iterfind("devices/disk/target")] == ["vda", "vdb", "vdc"]
    assert [each.get("type") for each in root.iterfind("devices/disk/driver")] == ["qcow2", "raw", "qcow2"]


def test_a_snapshot_with_more_cpus_than_at_the_start_can_be_loaded() -> None:
    """The number of a disk's queues must not hang on the CPUs."""
    assert tree().find("devices/disk/driver").get("queues") == "1"


def test_every_command_port_has_its_socket_and_number() -> None:
    channels = tree().findall("devices/channel")
    assert [each.find("target").get("name") for each in channels] == [
        *(f"org.labkit.{port}" for port in range(PORTS)),
        "org.qemu.guest_agent.0",
    ]
    assert len({each.find("source").get("path") for each in channels}) == PORTS + 1
    assert [each.find("address").get("port") for each in channels] == [str(n + 1) for n in range(PORTS + 1)]


def test_elsewhere_the_hypervisor_chooses_the_sockets() -> None:
    assert all(each.find("source") is None for each in tree(sockets=None).findall("devices/channel"))


def test_nothing_listens_on_a_network() -> None:
    root = tree()
    assert not root.findall("devices/graphics")
    assert not root.findall("devices/interface")
    assert {each.get("type") for each in root.findall("devices/channel")} == {"unix"}
    assert {each.get("type") for each in root.findall("devices/serial")} == {"pty"}


def test_a_way_to_boot_that_the_image_has_not_is_a_spec_error() -> None:
    with pytest.raises(SpecError, match="boots by kernel only") as caught:
        tree(spec=VMSpec(name="web", boot="disk"))
    assert 'boot="kernel"' in caught.value.mend


def test_the_guest_is_told_its_name() -> None:
    assert tree().findtext("sysinfo/system/entry") == "labkit:web"


def test_a_seed_is_a_read_only_disk_behind_the_machines_own() -> None:
    disks = tree(seed="/d/seed.iso").findall("devices/disk")
    assert [disk.find("target").get("dev") for disk in disks] == ["vda", "vdz"]
    assert disks[1].find("source").get("file") == "/d/seed.iso"
    assert disks[1].find("readonly") is not None
