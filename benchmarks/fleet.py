"""Eight VMs started at one time until all are ready, over one VM's start times 8 divided by the cores."""

from __future__ import annotations

import os
import sys
import time

from _harness import own_home, report_ratio, say

from labkit import Lab

COUNT = 8


def start(lab: Lab, count: int) -> float:
    vms = [lab.vm(f"vm{number}") for number in range(count)]
    begun = time.perf_counter()
    lab.start(*vms)
    seconds = time.perf_counter() - begun
    for vm in vms:
        vm.delete()
    return seconds


def main(rounds: int = 5) -> None:
    cores = os.cpu_count() or 1
    together, alone = [], []
    with own_home(), Lab("bench") as lab:
        start(lab, 1)
        for number in range(1, rounds + 1):
            alone.append(start(lab, 1) * COUNT / cores)
            together.append(start(lab, COUNT))
            say(f"{number}/{rounds}: {COUNT} VMs {together[-1]:.2f} s, to be held against {alone[-1]:.2f} s")
        report_ratio("fleet", together, alone, bound=1.1)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
