"""The probe guest boots for real, and its verdict is the one that a real kernel gives."""

from __future__ import annotations

import os
import selectors
import subprocess
import threading
import time
from pathlib import Path
from typing import Literal

import pytest

import labkit.guests
from labkit.hypervisors import accelerator
from labkit.hypervisors.accelerator import Verdict, boot_probe
from labkit.hypervisors.probe import PROBES

pytestmark = pytest.mark.qemu

GUEST = PROBES[accelerator.host_arch()]


def boot(name: Literal["kvm", "tcg"], cpu: str = "max") -> Verdict:
    qemu = accelerator.qemu_program()
    assert qemu
    return boot_probe(qemu, name, guest=GUEST, deadline=3, cpu=cpu)


@pytest.mark.smoke
def test_tcg_runs_the_probe_through_all_stages() -> None:
    verdict = boot("tcg")
    assert verdict.works, verdict
    assert verdict.seen.endswith(f"{', '.join(GUEST.stages.values())}, the right answer")
    assert verdict.seconds < 5


@pytest.mark.usefixtures("labkit_home")
def test_the_verdicts_are_had_within_the_deadlines() -> None:
    start = time.monotonic()
    verdicts = accelerator.accelerators()
    assert time.monotonic() - start < 5
    start = time.monotonic()
    assert accelerator.accelerators() == verdicts
    assert time.monotonic() - start < 0.1


@pytest.mark.usefixtures("labkit_home")
def test_refresh_gives_a_verdict_of_its_own() -> None:
    first = accelerator.accelerators()
    again = accelerator.accelerators(refresh=True)
    assert [verdict.works for verdict in first.values()] == [verdict.works for verdict in again.values()]


def test_two_at_once_are_harmless(labkit_home: Path) -> None:
    found: list[dict[str, Verdict]] = []
    threads = [threading.Thread(target=lambda: found.append(accelerator.accelerators())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verdicts["tcg"].works for verdicts in found] == [True, True]
    assert os.listdir(labkit_home / "state") == ["accelerator.json"]


@pytest.mark.skipif(accelerator.host_arch() != "x86_64", reason="qemu64 is an x86 processor")
def test_a_cpu_without_long_mode_is_seen_through() -> None:
    """Success in real and protected mode alone must not count."""
    verdict = boot("tcg", cpu="pentium3")
    assert not verdict.works
    assert "protected mode" in verdict.seen
    assert "long mode" not in verdict.seen


@pytest.mark.parametrize("arch", [arch for arch in PROBES if arch != accelerator.host_arch()])
def test_other_architectures_probes_run_under_tcg(arch: str) -> None:
    qemu = accelerator.qemu_program(arch)
    if qemu is None:
        pytest.skip(f"something else: qemu-system-{arch} is not installed")
    verdict = boot_probe(qemu, "tcg", guest=PROBES[arch], deadline=20)
    assert verdict.works, verdict


def kernel_comes_up(name: str, cpu: str, deadline: float) -> bool:
    """True where the pocket guest's kernel says "Linux version" in time."""
    image = labkit.guests.get("pocket")
    qemu = accelerator.qemu_program()
    assert qemu
    machine = "pc" if image.arch == "x86_64" else "virt,gic-version=max"
    process = subprocess.Popen(
        [
            *(qemu, "-machine", machine, "-accel", name, "-cpu", cpu, "-m", "256", "-display", "none"),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-serial", "stdio"),
            *("-kernel", str(image.kernel), "-append", f"console={image.console} panic=-1"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        return said(process, b"Linux version", deadline)
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[bytes], words: bytes, deadline: float) -> bool:
    assert process.stdout
    heard, until = b"", time.monotonic() + deadline
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while words not in heard and (left := until - time.monotonic()) > 0:
            if selector.select(left):
                more = os.read(process.stdout.fileno(), 65536)
                if not more:
                    break
                heard += more
    return words in heard


@pytest.mark.parametrize("cpu", ["max", "qemu64"])
def test_the_verdict_on_kvm_is_a_real_kernels(cpu: str) -> None:
    """With a plain CPU too, where a KVM that interprets ring 0 gets as far as the timer."""
    if cpu == "qemu64" and accelerator.host_arch() != "x86_64":
        pytest.skip("qemu64 is an x86 processor")
    assert boot("kvm", cpu).works == kernel_comes_up("kvm", cpu, deadline=8)


def test_the_verdict_on_tcg_is_a_real_kernels() -> None:
    assert boot("tcg").works == kernel_comes_up("tcg", "max", deadline=60)
