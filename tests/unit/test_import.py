"""`import labkit` is light."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"libvirt", "libvirtmod", "docker", "matplotlib", "pandas", "numpy", "ipywidgets", "IPython"} | {
    *("pydantic", "lxml", "psutil", "rich", "typer", "PIL", "httpx", "jupyter_client")
}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_import_loads_nothing_heavy() -> None:
    loaded = python("import labkit, sys; print(*sys.modules)").split()
    assert not [name for name in loaded if name.partition(".")[0] in HEAVY]


def test_import_takes_at_most_150_ms() -> None:
    code = "import time; t = time.perf_counter(); import labkit; print(time.perf_counter() - t)"
    assert min(float(python(code)) for _ in range(5)) <= 0.150


def test_looking_at_the_names_loads_nothing_heavy() -> None:
    loaded = python("import labkit, sys; dir(labkit); labkit.errors; print(*sys.modules)").split()
    assert not [name for name in loaded if name.partition(".")[0] in HEAVY]


def test_a_star_import_gives_the_public_names() -> None:
    assert python("from labkit import *; print(Lab.__name__, host().name)").split() == ["Lab", "host"]
