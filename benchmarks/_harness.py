"""What the benchmarks share: progress on stderr, one JSON object on stdout, and who measured it."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from labkit import paths
from labkit.hypervisors import accelerator, libvirt


def say(text: str) -> None:
    """Progress, for the person who waits."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def own_home() -> Iterator[None]:
    """A kit of the benchmark's own, so that it meets no lab of the user's; images come from the cache."""
    cache = paths.cache_dir()
    with tempfile.TemporaryDirectory(prefix="lk-bench-", dir="/tmp") as home:
        before = dict(os.environ)
        os.environ.update(LABKIT_HOME=home, LABKIT_CACHE=str(cache))
        try:
            yield
        finally:
            from labkit.lab import clean

            clean(in_use=True)
            os.environ.clear()
            os.environ.update(before)


def host() -> dict[str, Any]:
    """What the figures were taken on."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(": ")[2]
            break
    libvirt_version, qemu_version = libvirt.connect().version()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "accelerator": accelerator.best(),
        "libvirt": libvirt_version,
        "qemu": qemu_version,
        "load": round(os.getloadavg()[0], 2),
    }


def report_ratio(name: str, ours: Sequence[float], base: Sequence[float], *, bound: float) -> None:
    """Print a ratio of medians, with its 95 % bootstrap interval, and all samples in seconds."""
    ratio = statistics.median(ours) / statistics.median(base)
    generator = random.Random(0)

    def resampled() -> float:
        return statistics.median(generator.choices(ours, k=len(ours))) / statistics.median(
            generator.choices(base, k=len(base))
        )

    drawn = sorted(resampled() for _ in range(2000))
    emit(
        name,
        bound,
        ratio=round(ratio, 3),
        interval=[round(drawn[49], 3), round(drawn[1949], 3)],
        samples={"ours": rounded(ours), "base": rounded(base)},
    )


def emit(name: str, bound: float, **figures: Any) -> None:
    """Print the one JSON object of a benchmark."""
    print(json.dumps({"name": name, **figures, "bound": bound, "host": host()}, indent=1))


def rounded(samples: Sequence[float]) -> list[float]:
    """Samples in seconds, to a tenth of a millisecond."""
    return [round(sample, 4) for sample in samples]
