"""The probe guest: the smallest machine code that proves that an accelerator can carry a real system.

One for each architecture: its source is `ARCH.S`, its bytes are `ARCH.hex`, so that no assembler is
needed to run it. It is a firmware image, so that nothing runs but what is under test. What it says is
one letter for each stage that it reached, then what it computed, in hexadecimal.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

#: The turns of the loop in kernel mode and in user mode, as in the sources.
KERNEL_TURNS, USER_TURNS = 5_000_000, 1_000_000

#: `answer()`, computed once; a test computes it again.
ANSWER = "591c3e2d42bcebdf"

_IMAGE_SIZE = 0x10000
_RESET_VECTOR = 0xFFF0  # where an x86 processor begins: 16 bytes before the image's end


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The probe guest of one architecture.

    Attributes:
        arch: QEMU's name of it.
        stages: what each letter that the guest prints means, in the order in which they come.
        machine: the arguments that give QEMU the machine; a chardev named "console" takes the output.
        exit_status: QEMU's, where the guest came to its end.
    """

    arch: str
    stages: Mapping[str, str]
    machine: tuple[str, ...]
    exit_status: int

    def code(self) -> bytes:
        """The machine code, which starts at its first byte."""
        return bytes.fromhex(resources.files(__name__).joinpath(f"{self.arch}.hex").read_text("ascii"))

    def image(self) -> bytes:
        """A firmware image of 64 KiB (QEMU's `-bios`)."""
        image = self.code().ljust(_IMAGE_SIZE, b"\0")
        if self.arch == "x86_64":
            jump_to_start = b"\xe9" + (-(_RESET_VECTOR + 3) & 0xFFFF).to_bytes(2, "little")
            image = image[:_RESET_VECTOR] + jump_to_start.ljust(_IMAGE_SIZE - _RESET_VECTOR, b"\0")
        return image

    def reached(self, console: str) -> list[str]:
        """The stages that the console's text tells of, by name, in order."""
        names = []
        for said, (letter, name) in zip(console, self.stages.items(), strict=False):
            if said != letter:
                break
            names.append(name)
        return names

    def finished(self, console: str) -> bool:
        """True where the guest went through all stages and computed the right answer."""
        return console.strip() == "".join(self.stages) + ANSWER


_LAST_STAGES = {
    "F": "a page fault handled",
    "T": "timer ticks",
    "K": "kernel-mode work",
    "U": "user-mode work",
}

#: By QEMU's name of the architecture.
PROBES = {
    "x86_64": Probe(
        arch="x86_64",
        stages={"R": "real mode", "P": "protected mode", "L": "64-bit long mode", **_LAST_STAGES},
        machine=(
            *("-machine", "pc"),
            *("-device", "isa-debugcon,iobase=0xe9,chardev=console"),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=1"),
        ),
        exit_status=33,  # (0x10 << 1) | 1
    ),
    "aarch64": Probe(
        arch="aarch64",
        stages={"L": "64-bit code", "M": "paging", **_LAST_STAGES},
        # Under KVM the host's interrupt controller sets the version; "max" takes it.
        machine=("-machine", "virt,gic-version=max", "-serial", "chardev:console"),
        exit_status=0,
    ),
}


def answer(kernel_turns: int = KERNEL_TURNS, user_turns: int = USER_TURNS) -> str:
    """What the guests print last, computed in Python: 16 hexadecimal digits. Takes about a second."""
    value, mask = 1, (1 << 64) - 1
    for turns in (kernel_turns, user_turns):
        for count in range(turns, 0, -1):
            value = (value * 0x9E3779B97F4A7C15) & mask
            value = ((value << 23 | value >> 41) & mask) ^ count
    return f"{value:016x}"
