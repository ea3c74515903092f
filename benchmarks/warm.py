"""A start from a saved state (a snapshot with memory) to the first answer, over a cold boot of QEMU alone."""

from __future__ import annotations

import sys
import time

from _bare_qemu import boot
from _harness import own_home, report_ratio, say

from labkit import Lab

MEMORY = 128 << 20


def main(rounds: int = 10) -> None:
    warm, cold = [], []
    with own_home(), Lab("bench") as lab:
        vm = lab.vm("vm", memory=MEMORY, accelerator="tcg").start()
        vm.snapshot("ready")
        boot(MEMORY)
        for number in range(1, rounds + 1):
            cold.append(boot(MEMORY))
            vm.destroy()
            begun = time.perf_counter()
            vm.revert("ready")
            vm.run("true")
            warm.append(time.perf_counter() - begun)
            say(f"{number}/{rounds}: warm {warm[-1]:.2f} s, cold {cold[-1]:.2f} s")
        report_ratio("warm", warm, cold, bound=0.5)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
