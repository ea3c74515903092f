"""Each notebook says what it said when it was built: nbval, strict, cell by cell."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(1800)]


def test_outputs_are_those_of_the_notebook_also_a_second_time(
    notebook: Path, nbval: Callable[[Path], subprocess.CompletedProcess[str]]
) -> None:
    for _time in ("in a fresh home", "in the home that the first run leaves behind"):
        done = nbval(notebook)
        assert done.returncode == 0, done.stdout + done.stderr
