"""Progress is shown for long work only, on stderr only, in the form that fits where stderr goes."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from labkit import progress as module
from labkit.progress import progress


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    monkeypatch.delenv("LABKIT_PROGRESS", raising=False)


def _work(steps: Callable[[module.Progress], None] = lambda _p: None) -> None:
    with progress("Building", total=2_000_000) as shown:
        _until_shown(shown)
        shown.update(1_000_000)
        steps(shown)


def _until_shown(shown: module.Progress) -> None:
    """Wait for the timer that ends the time of patience, not for an amount of time."""
    timer = shown._timer
    if isinstance(timer, threading.Timer):
        timer.join(10)


def test_short_work_shows_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with progress("Building") as shown:
        shown.step("first")
        shown.update(5)

    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("impatient")
def test_long_work_is_told_in_lines_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    _work(lambda shown: shown.step("unpacking"))

    out, err = capfd.readouterr()
    assert out == ""
    assert "Building: unpacking, 1 of 2 MB" in err.splitlines()
    assert "done after" in err.splitlines()[-1]
    assert "\r" not in err
    assert "\x1b" not in err


@pytest.mark.usefixtures("impatient")
def test_a_failure_is_told_as_one(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(_shown: module.Progress) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        _work(fail)

    assert "failed after" in capfd.readouterr().err


@pytest.mark.usefixtures("impatient")
def test_it_can_be_silenced(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKIT_PROGRESS", "off")

    _work()

    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("impatient")
def test_steps_are_counted_as_such(capfd: pytest.CaptureFixture[str]) -> None:
    with progress("Starting", total=8, unit="steps") as shown:
        _until_shown(shown)
        shown.update(3)
        shown.step("web-3")

    assert "Starting: web-3, 3 of 8" in capfd.readouterr().err


def test_a_new_total_begins_a_new_count() -> None:
    with progress("Building", total=10) as shown:
        shown.update(10)
        shown.step("downloading", total=500)

    assert (shown.done, shown.total) == (0, 500)


def test_a_terminal_gets_a_bar_that_leaves_nothing_behind() -> None:
    script = (
        "import labkit.progress as m\n"
        "m.PATIENCE = 0.0\n"
        "with m.progress('Building', total=100) as p:\n"
        "    p._timer.join(10) if p._timer else None\n"
        "    p.update(50)\n"
        "print('result')\n"
    )
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    environment.pop("LABKIT_PROGRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=theirs, env=environment, check=True
    )
    os.close(theirs)
    drawn = os.read(ours, 65536).decode()
    os.close(ours)

    assert done.stdout == b"result\n"
    assert "Building" in drawn
    assert drawn.rstrip().endswith("\x1b[2K")  # the last thing drawn wipes the line


def test_rich_is_loaded_only_when_a_bar_is_drawn() -> None:
    script = "import sys, labkit.progress; sys.exit('rich' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
