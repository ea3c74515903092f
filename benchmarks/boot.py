"""A cold start by labkit to the first command's answer, over QEMU alone with the same guest and devices."""

from __future__ import annotations

import sys
import time

from _bare_qemu import boot
from _harness import own_home, report_ratio, say

from labkit import Lab

MEMORY = 128 << 20


def ours(lab: Lab, number: int) -> float:
    begun = time.perf_counter()
    vm = lab.vm(f"vm{number}", memory=MEMORY, accelerator="tcg").start()
    vm.run("true")
    seconds = time.perf_counter() - begun
    vm.delete()
    return seconds


def main(rounds: int = 10) -> None:
    taken: dict[str, list[float]] = {"ours": [], "base": []}
    with own_home(), Lab("bench") as lab:
        # The first of each warms caches (libvirt's of QEMU's abilities, the page cache) and is not counted.
        boot(MEMORY)
        ours(lab, 0)
        for number in range(1, rounds + 1):
            taken["base"].append(boot(MEMORY))
            taken["ours"].append(ours(lab, number))
            say(f"{number}/{rounds}: labkit {taken['ours'][-1]:.2f} s, QEMU alone {taken['base'][-1]:.2f} s")
        report_ratio("boot", taken["ours"], taken["base"], bound=1.25)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
