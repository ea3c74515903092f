"""Eight VMs started at one time until all are ready, over one VM's start times 8 divided by the cores."""

from __future__ import annotations

import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from _bare_qemu import boot
from _harness import emit, own_home, rounded, say

from labkit import Lab

COUNT = 8
MEMORY = 128 << 20


def start(lab: Lab, count: int) -> float:
    vms = [lab.vm(f"vm{number}") for number in range(count)]
    begun = time.perf_counter()
    lab.start(*vms)
    seconds = time.perf_counter() - begun
    for vm in vms:
        vm.delete()
    return seconds


def bare(count: int) -> float:
    """The same number of guests under QEMU alone: what this host's cores can do at all."""
    begun = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(boot, [MEMORY] * count))
    return time.perf_counter() - begun


def main(rounds: int = 5) -> None:
    share = COUNT / (os.cpu_count() or 1)
    taken: dict[str, list[float]] = {"together": [], "alone": [], "bare": [], "bare_alone": []}
    with own_home(), Lab("bench") as lab:
        start(lab, 1)
        for number in range(1, rounds + 1):
            taken["alone"].append(start(lab, 1) * share)
            taken["together"].append(start(lab, COUNT))
            taken["bare_alone"].append(bare(1) * share)
            taken["bare"].append(bare(COUNT))
            say(
                f"{number}/{rounds}: {COUNT} VMs {taken['together'][-1]:.2f} s "
                f"against {taken['alone'][-1]:.2f} s; "
                f"QEMU alone {taken['bare'][-1]:.2f} s against {taken['bare_alone'][-1]:.2f} s"
            )
        emit(
            "fleet",
            1.1,
            ratio=ratio(taken["together"], taken["alone"]),
            # Above 1, the cores of this host do not add up, and no fleet on it can come to 1.
            qemu_alone=ratio(taken["bare"], taken["bare_alone"]),
            samples={key: rounded(values) for key, values in taken.items()},
        )


def ratio(over: list[float], under: list[float]) -> float:
    return round(statistics.median(over) / statistics.median(under), 3)


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
