"""What `import labkit` costs over an interpreter that imports nothing, in milliseconds."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from _harness import emit, rounded, say

#: Nothing of these may be loaded by `import labkit` alone.
HEAVY = (
    "libvirt",
    "docker",
    "matplotlib",
    "pandas",
    "ipywidgets",
    "pydantic",
    "lxml",
    "psutil",
    "rich",
    "typer",
)


def run(code: str) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begun


def main(rounds: int = 20) -> None:
    check = f"import labkit, sys; assert not {set(HEAVY)!r} & set(sys.modules), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", check], check=True)
    samples = []
    for _ in range(rounds):
        nothing = run("pass")
        samples.append(run("import labkit") - nothing)
    say(f"{rounds} interpreters")
    value = statistics.median(samples) * 1000
    emit("importing", 150.0, value=round(value, 1), unit="ms", samples=rounded(samples))


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
