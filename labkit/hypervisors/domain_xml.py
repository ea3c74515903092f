"""libvirt's description of a VM, built element by element from a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lxml import etree

from labkit.errors import HostError, SpecError
from labkit.hypervisors.hypervisor import PORTS, Plan

#: The namespace of labkit's label in a domain's metadata.
NAMESPACE = "https://labkit.invalid/xmlns/label/1"

#: The seed's place is behind all the disks that a machine may have.
_SEED_TARGET = "vdz"

_UEFI = {
    "x86_64": (
        ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"),
        ("/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"),
    ),
    "aarch64": (("/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"),),
}


def build(plan: Plan) -> str:
    """The domain's XML.

    Raises:
        SpecError: the image cannot do what the spec asks for.
        HostError: the UEFI firmware is not installed.
    """
    spec, image = plan.spec, plan.image
    domain = etree.Element("domain", type="kvm" if plan.accelerator == "kvm" else "qemu")
    _add(domain, "name", plan.domain)
    _add(domain, "uuid", plan.uuid)
    _label(domain, plan.lab, spec.name)
    _add(domain, "memory", str(spec.max_memory or spec.memory), unit="b")
    _add(domain, "currentMemory", str(spec.memory), unit="b")
    _add(domain, "vcpu", str(spec.max_cpus or spec.cpus), current=str(spec.cpus))
    _sysinfo(domain, spec.name)
    _os(domain, plan)
    features = _add(domain, "features")
    _add(features, "acpi")
    if image.arch == "x86_64":
        _add(features, "apic")
    _cpu(domain, plan)
    _add(domain, "clock", offset="utc")
    _add(domain, "on_poweroff", "destroy")
    _add(domain, "on_reboot", "restart")
    # A crashed guest is kept as it is, so that people can look at it and labkit can say so.
    _add(domain, "on_crash", "preserve")
    _devices(domain, plan)
    return etree.tostring(domain, pretty_print=True, encoding="unicode")


def label_of(xml: str) -> str | None:
    """The lab whose label a domain carries; None where it is not labkit's."""
    found = etree.fromstring(xml).find(f"metadata/{{{NAMESPACE}}}label")
    return None if found is None else found.get("lab")


def _add(parent: Any, tag: str, text: str | None = None, **attributes: str) -> Any:
    element = etree.SubElement(parent, tag, attributes)
    element.text = text
    return element


def _label(domain: Any, lab: str, machine: str) -> None:
    metadata = _add(domain, "metadata")
    etree.SubElement(
        metadata,
        f"{{{NAMESPACE}}}label",
        {"lab": lab, "machine": machine},
        nsmap={"labkit": NAMESPACE},
    )


def _sysinfo(domain: Any, name: str) -> None:
    """The guest learns its host name from the firmware's tables, whichever way it boots."""
    sysinfo = _add(domain, "sysinfo", type="smbios")
    _add(_add(sysinfo, "system"), "entry", f"labkit:{name}", name="serial")


def _os(domain: Any, plan: Plan) -> None:
    spec, image = plan.spec, plan.image
    if spec.boot not in image.boots:
        ways = " or ".join(image.boots)
        raise SpecError(f"The image {image.name} boots by {ways} only.", mend=f'Say boot="{image.boots[0]}".')
    boot = _add(domain, "os")
    _add(boot, "type", "hvm", arch=image.arch, machine=spec.machine)
    if spec.firmware == "uefi":
        if spec.firmware not in image.firmware:
            raise SpecError(f"The image {image.name} does not boot by UEFI.", mend='Say firmware="bios".')
        code, variables = _uefi(image.arch)
        _add(boot, "loader", code, readonly="yes", type="pflash")
        _add(boot, "nvram", plan.variables, template=variables)
    if spec.boot == "kernel":
        _add(boot, "kernel", plan.kernel)
        if plan.initrd:
            _add(boot, "initrd", plan.initrd)
        _add(boot, "cmdline", image.cmdline)
    _add(boot, "smbios", mode="sysinfo")


def _uefi(arch: str) -> tuple[str, str]:
    for code, variables in _UEFI.get(arch, ()):
        if Path(code).exists() and Path(variables).exists():
            return code, variables
    package = "ovmf" if arch == "x86_64" else "qemu-efi-aarch64"
    raise HostError("The UEFI firmware is not installed.", mend=f"sudo apt install {package}")


def _cpu(domain: Any, plan: Plan) -> None:
    model = plan.spec.cpu
    if model:
        cpu = _add(domain, "cpu", mode="custom", match="exact", check="none")
        _add(cpu, "model", model, fallback="forbid")
    elif plan.accelerator == "kvm":
        _add(domain, "cpu", mode="host-passthrough", check="none", migratable="on")
    else:
        _add(domain, "cpu", mode="maximum", check="none")


def _devices(domain: Any, plan: Plan) -> None:
    devices = _add(domain, "devices")
    for index, (path, disk) in enumerate(zip(plan.disks, plan.spec.disks, strict=True)):
        element = _add(devices, "disk", type="file", device="disk")
        # queues: QEMU's default is one for each CPU that it starts with, and a snapshot that was taken with
        # CPUs plugged in later would not load.
        _add(element, "driver", name="qemu", type=disk.format, discard="unmap", queues="1")
        _add(element, "source", file=path)
        _add(element, "target", dev=disk_target(index), bus="virtio")
    if plan.seed:
        # A virtio disk rather than a CD: clouds' kernels may have no driver for IDE or SATA.
        element = _add(devices, "disk", type="file", device="disk")
        _add(element, "driver", name="qemu", type="raw")
        _add(element, "source", file=plan.seed)
        _add(element, "target", dev=_SEED_TARGET, bus="virtio")
        _add(element, "readonly")
    serial = _add(devices, "serial", type="pty")
    _add(serial, "log", file=plan.console_log, append="off")
    _add(serial, "target", port="0")
    # libvirt adds a USB controller otherwise; each PCI device costs a tenth of a second of an emulated boot.
    _add(devices, "controller", type="usb", index="0", model="none")
    _add(devices, "controller", type="virtio-serial", index="0", ports=str(PORTS + 2))
    for port in range(PORTS):
        _channel(devices, port + 1, f"org.labkit.{port}", plan.sockets and plan.sockets / f"{port}.sock")
    _channel(devices, PORTS + 1, "org.qemu.guest_agent.0", plan.sockets and plan.sockets / "agent.sock")
    _add(_add(devices, "video"), "model", type="vga" if plan.image.arch == "x86_64" else "virtio")
    # Without autodeflate, though a guest that is squeezed too hard dies then: with it Linux would hide from
    # its people (free, MemTotal) that it has less. Lab's resize keeps within bounds.
    _add(devices, "memballoon", model="virtio")
    _add(_add(devices, "rng", model="virtio"), "backend", "/dev/urandom", model="random")
    if plan.image.arch == "x86_64":
        _add(devices, "panic", model="isa")


def _channel(devices: Any, port: int, name: str, path: Path | None) -> None:
    channel = _add(devices, "channel", type="unix")
    if path:
        _add(channel, "source", mode="bind", path=str(path))
    _add(channel, "target", type="virtio", name=name)
    _add(channel, "address", type="virtio-serial", controller="0", bus="0", port=str(port))


def disk_target(index: int) -> str:
    """The guest's name of a virtio disk: 0 is vda."""
    return f"vd{chr(ord('a') + index)}"
