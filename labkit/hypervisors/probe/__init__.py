"""The probe guest: the smallest machine code that proves that an accelerator can carry a real system.

Its source is `x86_64.S`, its bytes are `x86_64.hex`, so that no assembler is needed to run it. What it
says on QEMU's debug console is one letter for each stage that it reached, then a number in hexadecimal.
"""

from __future__ import annotations

from importlib import resources

#: What each letter on the debug console means, in the order in which they come.
STAGES = {
    "R": "real mode",
    "P": "protected mode",
    "L": "64-bit long mode",
    "F": "a page fault handled",
    "T": "timer interrupts",
    "K": "kernel-mode work",
    "U": "user-mode work",
}

#: The turns of the loop in ring 0 and in ring 3, as in the source.
KERNEL_TURNS, USER_TURNS = 5_000_000, 1_000_000

#: `answer()`, computed once; a test computes it again.
ANSWER = "591c3e2d42bcebdf"

#: QEMU's exit status where the guest came to its end: (0x10 << 1) | 1.
EXIT_STATUS = 33

_IMAGE_SIZE = 0x10000
_RESET_VECTOR = 0xFFF0


def code() -> bytes:
    """The probe's machine code for x86-64, which starts at its first byte in real mode."""
    return bytes.fromhex(resources.files(__name__).joinpath("x86_64.hex").read_text("ascii"))


def image() -> bytes:
    """A firmware image of 64 KiB (QEMU's `-bios`): the code, and at the reset vector a jump to it."""
    jump_to_start = b"\xe9" + (-(_RESET_VECTOR + 3) & 0xFFFF).to_bytes(2, "little")
    return (code().ljust(_RESET_VECTOR, b"\xf4") + jump_to_start).ljust(_IMAGE_SIZE, b"\xf4")


def answer(kernel_turns: int = KERNEL_TURNS, user_turns: int = USER_TURNS) -> str:
    """What the guest prints last, computed in Python: 16 hexadecimal digits. Takes about a second."""
    value, mask = 1, (1 << 64) - 1
    for turns in (kernel_turns, user_turns):
        for count in range(turns, 0, -1):
            value = (value * 0x9E3779B97F4A7C15) & mask
            value = ((value << 23 | value >> 41) & mask) ^ count
    return f"{value:016x}"


def reached(console: str) -> list[str]:
    """The stages that a debug console's text tells of, by name, in order."""
    names = []
    for said, (letter, name) in zip(console, STAGES.items(), strict=False):
        if said != letter:
            break
        names.append(name)
    return names


def finished(console: str) -> bool:
    """True where the guest went through all stages and computed the right answer."""
    return console == "".join(STAGES) + ANSWER
