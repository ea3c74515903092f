"""How long a command takes on a VM that runs: p50 and p95 of `vm.run("true")`, in milliseconds."""

from __future__ import annotations

import statistics
import sys
import time

from _harness import emit, own_home, rounded, say

from labkit import Lab


def main(rounds: int = 300) -> None:
    with own_home(), Lab("bench") as lab:
        vm = lab.vm("vm").start()
        for _ in range(20):
            vm.run("true")
        samples = []
        for _ in range(rounds):
            begun = time.perf_counter()
            vm.run("true")
            samples.append(time.perf_counter() - begun)
        cuts = statistics.quantiles(samples, n=20)
        say(f"{rounds} commands")
        emit(
            "exec",
            6.0,
            value=round(statistics.median(samples) * 1000, 2),
            unit="ms",
            p95=round(cuts[18] * 1000, 2),
            samples=rounded(samples),
        )


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
