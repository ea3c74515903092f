"""Checks of the processor and of the accelerators that it makes possible."""

from __future__ import annotations

import fcntl
import grp
import os
from pathlib import Path

from labkit.checkup.programs import install_qemu, qemu_package
from labkit.checkup.report import Check
from labkit.errors import LabkitError
from labkit.hardware import cpu as hardware_cpu
from labkit.hardware import host as hardware_host
from labkit.hypervisors import accelerator
from labkit.hypervisors.accelerator import Verdict

__all__ = ["accelerator_kvm", "accelerator_tcg", "cpu_flags", "kvm_device"]

_KVM_GET_API_VERSION = 0xAE00  # linux/kvm.h


def cpu_flags(text: str | None = None) -> Check:
    """Does the processor show hardware virtualization? `text`: of a /proc/cpuinfo, this one by default."""
    cpu = hardware_cpu.cpu_flags(text)
    name = " ".join(f"{cpu.vendor} {cpu.model}".split())
    if cpu.virtualization:
        seen = f"{name}: {', '.join(filter(None, (cpu.virtualization, cpu.nested_paging)))}"
        return Check("cpu-flags", "ok", seen, "The processor can run guests' code directly.")
    if cpu.arch == "arm64":
        return Check(
            "cpu-flags",
            "ok",
            f"{name}: arm64 shows no flag for it",
            "Whether the processor can run guests directly, only booting one tells.",
        )
    seen = f"{name}: neither vmx nor svm" + (", and the flag hypervisor" if cpu.beneath_hypervisor else "")
    return Check(
        "cpu-flags",
        "info",
        seen,
        "The processor shows no hardware virtualization, so QEMU translates guests' code (TCG).",
        "Nothing has to be done. For more speed: " + expose(cpu),
    )


# By the system vendor in the DMI tables, how each hypervisor gives its guests vmx or svm.
_NESTED = {
    "innotek": "`VBoxManage modifyvm NAME --nested-hw-virt on` (VirtualBox, the machine off)",
    "VMware": 'add `vhv.enable = "TRUE"` to the machine\'s .vmx file (VMware, the machine off)',
    "Microsoft": "`Set-VMProcessor -VMName NAME -ExposeVirtualizationExtensions $true` (Hyper-V, the machine "
    "off; Azure: a size that has nested virtualization)",
    "QEMU": "`virt-xml NAME --edit --cpu host-passthrough` on the host (KVM, the machine off)",
    "Parallels": "`prlctl set NAME --nested-virt on` (Parallels, the machine off)",
    "Amazon": "use a size of machine that has it (AWS: one named .metal)",
    "Google": "`gcloud compute instances export NAME --destination vm.yaml`, add there "
    "`advancedMachineFeatures: {enableNestedVirtualization: true}`, then "
    "`gcloud compute instances update-from-file NAME --source vm.yaml`",
}


def expose(cpu: hardware_cpu.CpuFlags, vendor: str | None = None) -> str:
    """How vmx or svm could come to show on this computer."""
    if not cpu.beneath_hypervisor:
        amd = cpu.vendor == "AuthenticAMD"
        name = "SVM Mode (AMD-V)" if amd else "Intel Virtualization Technology (VT-x)"
        return f"turn on {name} in the firmware's settings (BIOS, UEFI): `systemctl reboot --firmware-setup`"
    vendor = hardware_host.system_vendor() if vendor is None else vendor
    for name, how in _NESTED.items():
        if vendor.startswith(name):
            return f"this is a virtual machine; turn on nested virtualization: {how}"
    both = f"{_NESTED['innotek']}, or {_NESTED['QEMU']}"
    return f"this is a virtual machine; turn on nested virtualization in the hypervisor beneath it: {both}"


def kvm_device(device: Path = accelerator.KVM_DEVICE, *, cpuinfo: str | None = None) -> Check:
    """Is /dev/kvm there, and may we open it? Neither proves that KVM works."""
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return Check(
            "kvm-device",
            "info",
            f"there is no {device}",
            "The kernel offers no KVM here; machines run with TCG.",
            f"Nothing has to be done. Where the processor shows vmx or svm: `{_modprobe()}`",
        )
    except PermissionError:
        return kvm_forbidden(device, cpuinfo)
    except OSError as exc:
        return Check(
            "kvm-device",
            "info",
            f"{device} cannot be opened: {exc.strerror}",
            "The device is there with no driver behind it; machines run with TCG.",
            f"Nothing has to be done. Where the processor shows vmx or svm: `{_modprobe()}`",
        )
    try:
        version = str(fcntl.ioctl(descriptor, _KVM_GET_API_VERSION))
    except OSError as exc:
        version = f"not told ({exc.strerror})"
    finally:
        os.close(descriptor)
    return Check(
        "kvm-device",
        "ok",
        f"{device} is there and opens; API version {version}",
        "This alone proves nothing; accelerator-kvm says whether KVM works.",
    )


def kvm_forbidden(device: Path, cpuinfo: str | None = None) -> Check:
    """The device is there, and this user may not open it."""
    seen = device.stat()
    mode = f"mode {seen.st_mode & 0o7777:04o}, group {_group(seen.st_gid)}"
    evidence = f"{device} is there, and this user may not open it ({mode})"
    if not _should_work(device, cpuinfo):
        return Check(
            "kvm-device",
            "info",
            evidence,
            "The processor shows no hardware virtualization, so little is lost; machines run with TCG.",
            f"Nothing has to be done. To see what it can do: {join_kvm(device)}",
        )
    return Check(
        "kvm-device",
        "warn",
        evidence,
        "If KVM works here, machines could be much faster than with TCG.",
        join_kvm(device),
    )


def join_kvm(device: Path) -> str:
    """How this user gets the permission to open the device."""
    mode = device.stat()
    if mode.st_mode & 0o060 == 0o060 and mode.st_gid != 0:
        return f"`sudo usermod -aG {_group(mode.st_gid)} $USER`, then log out and in again"
    # No group may open it (often so in virtual machines made without udev).
    return (
        f"`sudo groupadd -f kvm; sudo chgrp kvm {device}; sudo chmod 660 {device}; "
        "sudo usermod -aG kvm $USER`, then log out and in again"
    )


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _modprobe(text: str | None = None) -> str:
    try:
        vendor = hardware_cpu.cpu_flags(text).vendor
    except LabkitError:
        vendor = ""
    module = {"GenuineIntel": "kvm_intel", "AuthenticAMD": "kvm_amd", "HygonGenuine": "kvm_amd"}.get(
        vendor, "kvm"
    )
    return f"sudo modprobe {module}"


def accelerator_kvm(
    verdict: Verdict, *, device: Path = accelerator.KVM_DEVICE, cpuinfo: str | None = None
) -> Check:
    """Does a guest run under KVM? Judged by booting one."""
    if verdict.works:
        return Check(
            "accelerator-kvm", "ok", _told(verdict), "Machines run at nearly the processor's own speed."
        )
    tried = accelerator.qemu_program() is not None
    return Check(
        "accelerator-kvm",
        "warn" if _should_work(device, cpuinfo) else "info",
        _told(verdict),
        "Machines run with TCG instead: everything in the course works, slower."
        if tried
        else "Without QEMU it could not be tried.",
        _mend_kvm(device, cpuinfo),
    )


def _should_work(device: Path, cpuinfo: str | None) -> bool:
    try:
        cpu = hardware_cpu.cpu_flags(cpuinfo)
    except LabkitError:
        return False
    return cpu.virtualization is not None or (cpu.arch == "arm64" and device.exists())


def _mend_kvm(device: Path, cpuinfo: str | None) -> str:
    if accelerator.qemu_program() is None:
        return install_qemu()
    try:
        cpu = hardware_cpu.cpu_flags(cpuinfo)
    except LabkitError as exc:
        return f"Nothing has to be done. {exc.mend}"
    if cpu.virtualization is None and cpu.arch == "x86":
        return "Nothing has to be done. For more speed: " + expose(cpu)
    if not device.exists():
        return f'`{_modprobe(cpuinfo)}`. If it says "disabled by bios" or "not supported": {expose(cpu)}'
    if not os.access(device, os.R_OK | os.W_OK):
        return join_kvm(device)
    module = _modprobe(cpuinfo).split()[-1]
    return (
        f"Stop what else uses hardware virtualization (VirtualBox, VMware), then "
        f"`sudo modprobe -r {module} && sudo modprobe {module}`, then `labkit doctor --refresh`. "
        "`sudo dmesg | grep -i kvm` tells more"
    )


def accelerator_tcg(verdict: Verdict) -> Check:
    """Does a guest run under TCG? Judged by booting one."""
    if verdict.works:
        return Check(
            "accelerator-tcg",
            "ok",
            _told(verdict),
            "QEMU can translate guests' code: machines run on any processor.",
        )
    missing = accelerator.qemu_program() is None
    return Check(
        "accelerator-tcg",
        "fail",
        _told(verdict),
        "QEMU cannot run a guest by translating its code.",
        install_qemu() if missing else f"`sudo apt install --reinstall {qemu_package()}`",
    )


def _told(verdict: Verdict) -> str:
    if verdict.seen == verdict.reason:  # no guest was booted
        return verdict.reason
    return f"{verdict.reason} {verdict.seen[:1].upper()}{verdict.seen[1:].rstrip('.')}."
