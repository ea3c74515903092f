"""Flags of processors that people have, as their /proc/cpuinfo gives them (shortened to facts)."""

from __future__ import annotations

import pytest

from labkit.errors import HostError
from labkit.hardware import cpu

SSE = "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2"

LAPTOP_INTEL = f"""\
processor	: 0
vendor_id	: GenuineIntel
cpu family	: 6
model		: 142
model name	: Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz
flags		: {SSE} ss ht tm pbe syscall nx pdpe1gb rdtscp lm constant_tsc art pni vmx smx est ssse3 \
pti tpr_shadow flexpriority ept vpid ept_ad fsgsbase tsc_adjust bmi1 avx2 smep bmi2 erms invpcid
vmx flags	: vnmi preemption_timer invvpid ept_x_only ept_ad ept_1gb flexpriority tsc_offset vtpr mtf \
vapic ept vpid unrestricted_guest ple shadow_vmcs pml ept_mode_based_exec
bugs		: cpu_meltdown spectre_v1 spectre_v2

processor	: 1
vendor_id	: GenuineIntel
model name	: Intel(R) Core(TM) i7-8650U CPU @ 1.90GHz
flags		: {SSE} lm vmx ept

"""

OLD_XEON = f"""\
processor	: 0
vendor_id	: GenuineIntel
model name	: Intel(R) Xeon(R) CPU           E5345  @ 2.33GHz
flags		: {SSE} ss ht tm pbe syscall lm constant_tsc pebs bts pni dtes64 monitor ds_cpl vmx est tm2 \
ssse3 cx16 xtpr pdcm dca lahf_lm tpr_shadow
"""

RYZEN = f"""\
processor	: 0
vendor_id	: AuthenticAMD
cpu family	: 25
model name	: AMD Ryzen 7 5800X 8-Core Processor
flags		: {SSE} ht syscall nx mmxext fxsr_opt pdpe1gb rdtscp lm constant_tsc rep_good nopl svm \
extapic cr8_legacy abm sse4a npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists \
pausefilter pfthreshold avic v_vmsave_vmload vgif v_spec_ctrl umip
TLB size	: 2560 4K pages
"""

CLOUD_AMD = f"""\
processor	: 0
vendor_id	: AuthenticAMD
model name	: AMD EPYC
flags		: {SSE} ht syscall nx lm pni x2apic hypervisor lahf_lm cmp_legacy cr8_legacy abm topoext vmmcall
"""

NESTED_INTEL = f"""\
processor	: 0
vendor_id	: GenuineIntel
model name	: Intel(R) Xeon(R) Platinum 8370C CPU @ 2.80GHz
flags		: {SSE} syscall nx lm pni vmx ssse3 hypervisor lahf_lm ept vpid ept_ad
"""

QEMU_TCG = f"""\
processor	: 0
vendor_id	: AuthenticAMD
model name	: QEMU TCG CPU version 2.5+
flags		: {SSE} syscall nx lm pni hypervisor lahf_lm svm abm sse4a npt vgif
"""

GRAVITON = """\
processor	: 0
BogoMIPS	: 243.75
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x3
CPU part	: 0xd0c
CPU revision	: 1

processor	: 1
Features	: fp asimd
CPU implementer	: 0x41
CPU part	: 0xd0c

"""

RASPBERRY = """\
processor	: 0
model name	: ARMv8 Processor rev 3 (v8l)
BogoMIPS	: 108.00
Features	: fp asimd evtstrm crc32 cpuid
CPU implementer	: 0x41
CPU part	: 0xd08

Revision	: c03114
Model		: Raspberry Pi 4 Model B Rev 1.4
"""


@pytest.mark.parametrize(
    ("text", "vendor", "virtualization", "nested_paging", "beneath"),
    [
        (LAPTOP_INTEL, "GenuineIntel", "vmx", "ept", False),
        (OLD_XEON, "GenuineIntel", "vmx", None, False),
        (RYZEN, "AuthenticAMD", "svm", "npt", False),
        (CLOUD_AMD, "AuthenticAMD", None, None, True),
        (NESTED_INTEL, "GenuineIntel", "vmx", "ept", True),
        (QEMU_TCG, "AuthenticAMD", "svm", "npt", True),
        (GRAVITON, "ARM", None, None, False),
    ],
)
def test_each_processor_shows_what_it_has(
    text: str, vendor: str, virtualization: str | None, nested_paging: str | None, beneath: bool
) -> None:
    found = cpu.cpu_flags(text)
    assert (vendor, virtualization, nested_paging, beneath) == (
        found.vendor,
        found.virtualization,
        found.nested_paging,
        found.beneath_hypervisor,
    )


def test_logical_processors_are_counted() -> None:
    assert cpu.cpu_flags(LAPTOP_INTEL).processors == 2
    assert cpu.cpu_flags(GRAVITON).processors == 2


def test_the_line_vmx_flags_counts_too() -> None:
    assert {"unrestricted_guest", "shadow_vmcs"} <= cpu.cpu_flags(LAPTOP_INTEL).flags


def test_a_word_that_holds_a_flags_name_is_not_the_flag() -> None:
    assert cpu.cpu_flags(CLOUD_AMD.replace("vmmcall", "novmx xsvm")).virtualization is None


def test_flags_are_explained_in_one_sentence_each() -> None:
    explained = cpu.cpu_flags(RYZEN).explained()
    assert list(explained)[:2] == ["svm", "npt"]
    assert all(sentence.endswith(".") and len(sentence) < 110 for sentence in cpu.FLAG_MEANINGS.values())


def test_arm_models_have_the_name_or_the_part() -> None:
    assert cpu.cpu_flags(GRAVITON).model == "part 0xd0c"
    assert cpu.cpu_flags(RASPBERRY).model == "ARMv8 Processor rev 3 (v8l)"
    assert cpu.cpu_flags(RASPBERRY).processors == 1


@pytest.mark.parametrize("text", ["", "garbage", "processor\t: 0\nisa\t: rv64imafdc\n"])
def test_a_text_without_flags_is_a_host_error(text: str) -> None:
    with pytest.raises(HostError, match="no processor flags"):
        cpu.cpu_flags(text)


def test_a_missing_file_is_a_host_error(monkeypatch: pytest.MonkeyPatch, tmp_path: cpu.Path) -> None:
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    with pytest.raises(HostError, match="cannot be read"):
        cpu.cpu_flags()


def test_this_computers_own_flags_can_be_read() -> None:
    assert cpu.cpu_flags().flags
