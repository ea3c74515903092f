"""The verdict and its memory, with a program in QEMU's place; real guests are in integration/."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from labkit.hypervisors import accelerator, probe
from labkit.hypervisors.accelerator import Surroundings, Verdict, boot_probe, remembered
from labkit.hypervisors.probe import PROBES
from labkit.hypervisors.probe.__main__ import as_hex, assemble

GUEST = PROBES["x86_64"]
RIGHT = "".join(GUEST.stages) + probe.ANSWER


class FakeQemu:
    """A program that counts its calls, and does for each accelerator what a script says."""

    def __init__(self, directory: Path) -> None:
        self.program = directory / "qemu-system-fake"
        self._calls = directory / "calls"
        self.does(tcg=f"printf '{RIGHT}\\n'; exit 33", kvm="echo 'no KVM here' >&2; exit 1")

    def does(self, *, tcg: str = "exit 1", kvm: str = "exit 1") -> None:
        self.program.write_text(
            f'#!/bin/sh\necho >>{self._calls}\ncase "$*" in *"-accel kvm"*) {kvm};; *) {tcg};; esac\n'
        )
        self.program.chmod(0o755)

    @property
    def calls(self) -> int:
        return len(self._calls.read_text()) if self._calls.exists() else 0


@pytest.fixture
def qemu(tmp_path: Path) -> FakeQemu:
    return FakeQemu(tmp_path)


@pytest.fixture
def look(qemu: FakeQemu, tmp_path: Path) -> Callable[[], Surroundings]:
    """Look at the surroundings: a fake QEMU, /dev/kvm and boot id, of x86-64 whatever we run on."""
    kvm, boot = tmp_path / "kvm", tmp_path / "boot_id"
    kvm.touch(0o600)
    boot.write_text("7a1e\n")

    def of_now() -> Surroundings:
        seen = Surroundings.of_this_host(qemu=str(qemu.program), kvm_device=kvm, boot_id=boot)
        return dataclasses.replace(seen, arch="x86_64")

    return of_now


# --- the verdict ---------------------------------------------------------------------------------


def test_the_right_answer_is_a_yes_and_all_else_a_no_with_evidence(
    look: Callable[[], Surroundings], qemu: FakeQemu
) -> None:
    verdicts = accelerator.judge(look())
    assert verdicts["tcg"].works
    assert not verdicts["kvm"].works
    assert "no KVM here" in verdicts["kvm"].seen
    assert "could not start" in verdicts["kvm"].reason


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("printf RP; exit 0", "crashed after protected mode"),
        (f"printf '{RIGHT}'; exit 0", "computes wrongly"),
        (f"printf '{''.join(GUEST.stages)}0123456789abcdef'; exit 33", "computes wrongly"),
        (f"printf '{RIGHT}'; kill -ABRT $$", "computes wrongly"),
        ("printf 'RPLFT'; exec sleep 1000", "hangs: it reached timer ticks, and nothing more in 2 s"),
        ("exec sleep 1000", "hangs: it did nothing in 2 s"),
    ],
)
def test_a_guest_that_does_not_come_to_its_end_is_told_apart(
    script: str, reason: str, qemu: FakeQemu
) -> None:
    qemu.does(kvm=script)
    verdict = boot_probe(str(qemu.program), "kvm", guest=GUEST, deadline=2)
    assert not verdict.works
    assert reason in verdict.reason


def test_a_deadline_is_kept(qemu: FakeQemu) -> None:
    qemu.does(kvm="exec sleep 1000")
    verdict = boot_probe(str(qemu.program), "kvm", guest=GUEST, deadline=0.2)
    assert 0.2 <= verdict.seconds < 5


def test_a_qemu_that_cannot_be_run_is_a_no(tmp_path: Path) -> None:
    broken = tmp_path / "qemu"
    broken.write_bytes(b"\x7fELF but not really")
    broken.chmod(0o755)
    assert not boot_probe(str(broken), "tcg", guest=GUEST, deadline=5).works


def test_no_qemu_and_an_unknown_architecture_are_said(look: Callable[[], Surroundings]) -> None:
    absent = accelerator.judge(dataclasses.replace(look(), qemu=None))
    assert absent["tcg"].reason == "qemu-system-x86_64 is not installed."
    unknown = accelerator.judge(dataclasses.replace(look(), arch="riscv64"))
    assert "no probe guest for riscv64" in unknown["kvm"].reason


@pytest.mark.parametrize(
    ("tcg_seconds", "deadline"),
    [(0.1, 3.0), (1.0, 10.0), (9.0, 30.0)],
)
def test_a_busy_computer_gives_kvm_more_time(tcg_seconds: float, deadline: float) -> None:
    tcg = Verdict(name="tcg", works=True, seconds=tcg_seconds, seen="", reason="")
    assert accelerator.kvm_deadline(tcg) == deadline


# --- the memory ----------------------------------------------------------------------------------


def test_the_second_call_boots_nothing(
    look: Callable[[], Surroundings], qemu: FakeQemu, tmp_path: Path
) -> None:
    file = tmp_path / "accelerator.json"
    first = remembered(look(), file=file)
    assert remembered(look(), file=file) == first
    assert qemu.calls == 2


def test_refresh_boots_again(look: Callable[[], Surroundings], qemu: FakeQemu, tmp_path: Path) -> None:
    file = tmp_path / "accelerator.json"
    remembered(look(), file=file)
    remembered(look(), file=file, refresh=True)
    assert qemu.calls == 4


CHANGES: dict[str, Callable[[Path], object]] = {
    "the host booted": lambda root: (root / "boot_id").write_text("7a1f\n"),
    "QEMU's file is newer": lambda root: os.utime(root / "qemu-system-fake", (1, 1)),
    "QEMU's file is longer": lambda root: (root / "qemu-system-fake").open("a").write("\n"),
    "/dev/kvm has another mode": lambda root: (root / "kvm").chmod(0o666),
    "/dev/kvm is gone": lambda root: (root / "kvm").unlink(),
    "/dev/kvm is another file": lambda root: (
        (root / "new").touch(0o600),
        (root / "new").replace(root / "kvm"),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_surroundings_boots_again(
    change: str, look: Callable[[], Surroundings], qemu: FakeQemu, tmp_path: Path
) -> None:
    file = tmp_path / "accelerator.json"
    remembered(look(), file=file)
    CHANGES[change](tmp_path)
    remembered(look(), file=file)
    assert qemu.calls == 4


@pytest.mark.parametrize(
    "other", [{"uid": 12345}, {"groups": (12345,)}, {"probe": "another"}, {"arch": "aarch64"}]
)
def test_another_user_or_probe_boots_again(
    other: dict[str, object], look: Callable[[], Surroundings], qemu: FakeQemu, tmp_path: Path
) -> None:
    file = tmp_path / "accelerator.json"
    remembered(look(), file=file)
    remembered(dataclasses.replace(look(), **other), file=file)  # type: ignore[arg-type]
    assert qemu.calls == 4


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{",
        b'{"surroundings": null}',
        b'{"surroundings": @, "verdicts": {}}',
        b'{"surroundings": @, "verdicts": {"kvm": {"name": "kvm"}, "tcg": 1}}',
        b'{"surroundings": @, "verdicts": []}',
    ],
)
def test_a_damaged_memory_boots_again_and_is_mended(
    damage: bytes, look: Callable[[], Surroundings], qemu: FakeQemu, tmp_path: Path
) -> None:
    file = tmp_path / "accelerator.json"
    remembered(look(), file=file)
    surroundings = json.dumps(json.loads(file.read_bytes())["surroundings"]).encode()
    file.write_bytes(damage.replace(b"@", surroundings))
    remembered(look(), file=file)
    remembered(look(), file=file)
    assert qemu.calls == 4


def test_where_the_boot_cannot_be_told_nothing_is_remembered(
    look: Callable[[], Surroundings], qemu: FakeQemu, tmp_path: Path
) -> None:
    (tmp_path / "boot_id").unlink()
    remembered(look(), file=tmp_path / "accelerator.json")
    assert not (tmp_path / "accelerator.json").exists()


def test_a_place_that_cannot_be_written_is_no_error(look: Callable[[], Surroundings]) -> None:
    assert remembered(look(), file=Path("/proc/accelerator.json"))["tcg"].works


def test_the_memory_is_written_in_one_piece(look: Callable[[], Surroundings], tmp_path: Path) -> None:
    file = tmp_path / "state" / "accelerator.json"
    file.parent.mkdir()
    remembered(look(), file=file)
    assert os.listdir(file.parent) == ["accelerator.json"]


# --- nothing stays behind ------------------------------------------------------------------------

SCRIPT = """
import sys
from labkit.hypervisors.accelerator import boot_probe
from labkit.hypervisors.probe import PROBES
boot_probe(sys.argv[1], "kvm", guest=PROBES["x86_64"], deadline=1000)
"""


@pytest.fixture
def probing(
    qemu: FakeQemu, tmp_path: Path, kill_at_end: Callable[[subprocess.Popen[bytes]], subprocess.Popen[bytes]]
) -> tuple[subprocess.Popen[bytes], int]:
    """A process that waits for a QEMU that hangs, and a pidfd of that QEMU."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    qemu.does(kvm=f"echo $$ >{pipe}; exec sleep 1000")
    process = kill_at_end(
        subprocess.Popen([sys.executable, "-c", SCRIPT, str(qemu.program)], stderr=subprocess.DEVNULL)
    )
    return process, os.pidfd_open(int(pipe.read_text()))


def ends(pidfd: int) -> bool:
    """True when the process ended, in ten seconds at most; the descriptor is closed."""
    try:
        return bool(select.select([pidfd], [], [], 10)[0])
    finally:
        os.close(pidfd)


def test_an_interrupt_ends_and_reaps_qemu(probing: tuple[subprocess.Popen[bytes], int]) -> None:
    process, child = probing
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT
    assert ends(child)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv ends QEMU with its parent")
def test_qemu_does_not_outlive_a_killed_parent(probing: tuple[subprocess.Popen[bytes], int]) -> None:
    process, child = probing
    process.kill()
    assert ends(child)


def test_the_probes_directory_is_removed(
    qemu: FakeQemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    boot_probe(str(qemu.program), "tcg", guest=GUEST, deadline=5)
    assert os.listdir(tmp_path / "tmp") == []


# --- the probe guest's bytes ---------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "tool"), [("x86_64", "as"), ("aarch64", "aarch64-linux-gnu-as")])
def test_the_bytes_are_what_the_source_says(arch: str, tool: str) -> None:
    if shutil.which(tool) is None or (arch == "x86_64" and accelerator.host_arch() != "x86_64"):
        pytest.skip(f"needs {tool}, an assembler for {arch}")
    assert as_hex(assemble(arch)) == as_hex(PROBES[arch].code())


def test_the_answer_is_what_the_loops_compute() -> None:
    assert probe.answer() == probe.ANSWER


def test_the_x86_image_jumps_from_the_reset_vector_to_its_start() -> None:
    image = GUEST.image()
    opcode, distance = image[0xFFF0], int.from_bytes(image[0xFFF1:0xFFF3], "little")
    assert (len(image), opcode, (0xFFF3 + distance) & 0xFFFF) == (0x10000, 0xE9, 0)


def test_stages_are_read_up_to_the_first_that_is_missing() -> None:
    assert GUEST.reached("RPx") == ["real mode", "protected mode"]
    assert GUEST.reached("") == []
    assert GUEST.reached("L") == []
    assert len(GUEST.reached(RIGHT)) == len(GUEST.stages)
    assert not GUEST.finished(RIGHT[:-1])


def test_importing_it_is_light() -> None:
    start = time.monotonic()
    code = "import sys, labkit.hypervisors.accelerator; print({'libvirt', 'lxml', 'docker'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert time.monotonic() - start < 10
