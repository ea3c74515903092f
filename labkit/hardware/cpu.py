"""What the processor says of itself in /proc/cpuinfo: which virtualization it has, each flag in a sentence.

Linux writes there what it found by CPUID and decided to use; a flag that firmware or a hypervisor hides
is not there. The names are those of the kernel's arch/x86/include/asm/cpufeatures.h and vmxfeatures.h,
and of arch/arm64's documentation, elf_hwcaps.rst.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from labkit.errors import HostError

__all__ = ["FLAG_MEANINGS", "CpuFlags", "cpu_flags"]

CPUINFO = Path("/proc/cpuinfo")

#: Flags that have to do with virtualization, in the order in which one would tell of them.
FLAG_MEANINGS: dict[str, str] = {
    "vmx": "Intel VT-x: the processor has a guest mode, so that a guest's code runs on it directly.",
    "svm": "AMD-V (SVM): the processor has a guest mode, so that a guest's code runs on it directly.",
    "hypervisor": "Set by a hypervisor and never by a real processor: we are in a virtual machine.",
    "ept": "Intel's nested paging: the processor itself translates guest addresses twice, no shadow tables.",
    "npt": "AMD's nested paging: the processor itself translates guest addresses twice, no shadow tables.",
    "unrestricted_guest": "Intel: real mode and unpaged code run in guest mode too, nothing is emulated.",
    "vpid": "Intel: cached translations carry the guest's number, so a switch need not drop them.",
    "flushbyasid": "AMD: one guest's cached translations can be dropped and the others' kept.",
    "ept_ad": "Intel: nested page tables note which pages were used and written, which migration needs.",
    "pml": "Intel: the processor keeps a log of the pages that a guest wrote, which migration needs.",
    "tpr_shadow": "Intel: the guest's interrupt priority is kept by the processor, without an exit.",
    "flexpriority": "Intel: a guest's access to its interrupt controller's priority needs no exit.",
    "apicv": "Intel: a virtual interrupt controller in the processor; interrupts arrive without an exit.",
    "posted_intr": "Intel: an interrupt reaches a guest that runs, without a stop of it.",
    "avic": "AMD: a virtual interrupt controller in the processor; interrupts arrive without an exit.",
    "x2avic": "AMD: the virtual interrupt controller for guests with many processors.",
    "vnmi": "Non-maskable interrupts of a guest are kept by the processor.",
    "vgif": "AMD: a guest hypervisor's global interrupt flag is kept by the processor (nesting).",
    "v_vmsave_vmload": "AMD: a guest hypervisor saves and loads state without an exit (nesting).",
    "shadow_vmcs": "Intel: a guest hypervisor reads and writes its control block without exits (nesting).",
    "nrip_save": "AMD: the processor tells the hypervisor where the next instruction is.",
    "decodeassists": "AMD: the processor tells the hypervisor which instruction made the guest stop.",
    "vmcb_clean": "AMD: parts of the control block that did not change need not be loaded again.",
    "pausefilter": "AMD: a guest that spins in a waiting loop gives the processor back.",
    "ple": "Intel: a guest that spins in a waiting loop gives the processor back.",
    "preemption_timer": "Intel: the processor itself ends a guest's turn after a set time.",
    "tsc_scale": "AMD: a guest's clock can tick at another rate than the host's (migration).",
    "tsc_scaling": "Intel: a guest's clock can tick at another rate than the host's (migration).",
    "lbrv": "AMD: the record of the last branches is each guest's own.",
    "svm_lock": "AMD: firmware can lock SVM off until the next reset.",
    "vmmcall": "The guest has AMD's instruction that calls its hypervisor.",
    "sev": "AMD: a guest's memory is encrypted with a key that the hypervisor doesn't know.",
    "sev_es": "AMD: a guest's registers are encrypted too when it stops.",
    "sev_snp": "AMD: the hypervisor cannot change or swap an encrypted guest's memory unseen.",
    "tdx_guest": "Intel: we are in a guest whose memory the hypervisor cannot read.",
    "tdx_host_platform": "Intel: this host can run guests whose memory it cannot read.",
    "lm": "64-bit long mode.",
}

# "CPU implementer" in MIDR_EL1; the Arm Architecture Reference Manual and Linux' cputype.h.
_ARM_IMPLEMENTERS = {
    0x41: "ARM",
    0x42: "Broadcom",
    0x43: "Cavium",
    0x46: "Fujitsu",
    0x48: "HiSilicon",
    0x4E: "NVIDIA",
    0x50: "Applied Micro",
    0x51: "Qualcomm",
    0x53: "Samsung",
    0x61: "Apple",
    0x6D: "Microsoft",
    0xC0: "Ampere",
}


@dataclass(frozen=True, kw_only=True)
class CpuFlags:
    """The first processor's entry in /proc/cpuinfo.

    Attributes:
        vendor: as the processor signs itself, "GenuineIntel", "AuthenticAMD"; on arm64 the maker's name.
        model: its name for people; "" where there is none.
        arch: "x86" or "arm64".
        flags: all flags, those of the line "vmx flags" (Intel, since Linux 5.8) among them.
        processors: how many logical processors the system has.
    """

    vendor: str
    model: str
    arch: Literal["x86", "arm64"]
    flags: frozenset[str]
    processors: int

    @property
    def virtualization(self) -> Literal["vmx", "svm"] | None:
        """The flag of the hardware virtualization that is there, None where none shows.

        On arm64 there is no such flag: whether a kernel has EL2, the hypervisor's level, does not
        show in /proc/cpuinfo.
        """
        if "vmx" in self.flags:
            return "vmx"
        return "svm" if "svm" in self.flags else None

    @property
    def nested_paging(self) -> Literal["ept", "npt"] | None:
        """The flag of the nested paging that is there, None where none shows."""
        if "ept" in self.flags:
            return "ept"
        return "npt" if "npt" in self.flags else None

    @property
    def beneath_hypervisor(self) -> bool:
        """True where the processor is a virtual one; x86 alone tells."""
        return "hypervisor" in self.flags

    def explained(self) -> dict[str, str]:
        """The flags here that have to do with virtualization, each with a sentence."""
        return {flag: meaning for flag, meaning in FLAG_MEANINGS.items() if flag in self.flags}


def cpu_flags(text: str | None = None) -> CpuFlags:
    """The processor's flags, of this computer or of the given text of a /proc/cpuinfo.

    Raises:
        HostError: there is no /proc/cpuinfo, or it has neither `flags` nor `Features`.
    """
    if text is None:
        text = _read()
    entries = _entries(text)
    first = entries[0] if entries else {}
    if "flags" in first:
        return _x86(first, len(entries))
    if "Features" in first:
        return _arm64(first, len(entries))
    raise HostError(
        "/proc/cpuinfo tells of no processor flags.",
        evidence="\n".join(text.splitlines()[:3]),
        mend="Run on x86-64 or arm64 Linux, with /proc as the kernel gives it.",
    )


def _read() -> str:
    try:
        return CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError as exc:
        raise HostError(
            f"{CPUINFO} cannot be read: {exc.strerror}.",
            mend="`sudo mount -t proc proc /proc`; a container is started with /proc mounted",
        ) from exc


def _entries(text: str) -> list[dict[str, str]]:
    """One dictionary for each logical processor."""
    blocks = (block for block in text.split("\n\n") if block.strip())
    entries = [dict(_pairs(block)) for block in blocks]
    return [entry for entry in entries if "processor" in entry]


def _pairs(block: str) -> list[tuple[str, str]]:
    parts = (line.partition(":") for line in block.splitlines())
    return [(key.strip(), value.strip()) for key, colon, value in parts if colon]


def _x86(entry: dict[str, str], processors: int) -> CpuFlags:
    return CpuFlags(
        vendor=entry.get("vendor_id", ""),
        model=entry.get("model name", ""),
        arch="x86",
        flags=frozenset(f"{entry['flags']} {entry.get('vmx flags', '')}".split()),
        processors=processors,
    )


def _arm64(entry: dict[str, str], processors: int) -> CpuFlags:
    implementer = entry.get("CPU implementer", "")
    part = entry.get("CPU part", "")
    try:
        vendor = _ARM_IMPLEMENTERS.get(int(implementer, 16), implementer)
    except ValueError:
        vendor = implementer
    return CpuFlags(
        vendor=vendor,
        model=entry.get("model name", "") or f"part {part}" * bool(part),
        arch="arm64",
        flags=frozenset(entry["Features"].split()),
        processors=processors,
    )
