"""What the integration tests share: waiting for a condition, and programs that own labs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

Eventually = Callable[..., Any]


@pytest.fixture(scope="session")
def eventually() -> Eventually:
    """`eventually(condition, within=10)`: what the condition gives as soon as it is true."""

    def wait(condition: Callable[[], Any], *, within: float = 10) -> Any:
        deadline = time.monotonic() + within
        while True:
            value = condition()
            if value:
                return value
            if time.monotonic() > deadline:
                pytest.fail(f"not within {within:g} s: {condition.__name__}", pytrace=False)
            time.sleep(0.05)

    return wait


@pytest.fixture
def program(
    kill_at_end: Callable[[subprocess.Popen[Any]], subprocess.Popen[Any]],
) -> Callable[[str], subprocess.Popen[str]]:
    """`program(code)`: a Python process of its own; returns when it has printed its first line, "ready".

    Further lines are its standard output's; it ends when its standard input does.
    """

    def start(code: str, **options: Any) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import sys, labkit\n{code}\nprint('ready', flush=True)\nsys.stdin.read()",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **options,
        )
        kill_at_end(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == "ready\n", line
        return process

    return start
