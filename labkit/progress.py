"""Showing that long work goes on: a bar on a terminal or in a notebook, plain lines elsewhere.

All of it goes to stderr, and nothing is shown for work that ends within two seconds, so that
standard output stays the result's alone. `LABKIT_PROGRESS=off` silences it (checked notebooks do that:
nbval takes whatever appears on stderr for a difference).

    with progress("Building the pocket guest", total=28_000_000) as p:
        p.step("downloading")
        p.update(4096)
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = ["Progress", "Unit", "progress"]

Unit = Literal["bytes", "steps"]

#: Seconds of work before anything is shown.
PATIENCE = 2.0
_LINE_EVERY = 5.0


class _View(Protocol):
    """Where progress is drawn: `draw` is called with every change, `close` once at the end."""

    def draw(self, done: int, total: int | None, step: str) -> None: ...

    def close(self, *, ok: bool) -> None: ...


class Progress:
    """The handle of one piece of work. Safe to use from several threads.

    Attributes:
        title: what is being done, for people.
        total: how much there is to do in `unit`s, or None where that is unknown.
        done: how much of it is done.
    """

    def __init__(self, title: str, total: int | None, unit: Unit, stream: TextIO | None) -> None:
        self.title = title
        self.total = total
        self.unit: Unit = unit
        self.done = 0
        self._step = ""
        self._stream = stream
        self._view: _View | None = None
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def update(self, n: int = 1) -> None:
        """Count `n` more bytes or steps as done."""
        with self._lock:
            self.done += n
            self._draw()

    def step(self, text: str, *, total: int | None = None) -> None:
        """Say what is being done now; a `total` begins a new count."""
        with self._lock:
            self._step = text
            if total is not None:
                self.total, self.done = total, 0
            self._draw()

    def _draw(self) -> None:
        if self._view:
            self._view.draw(self.done, self.total, self._step)

    def _start(self) -> None:
        if self._stream is None:
            return
        # A timer rather than a look at the clock in update(): work that says nothing is shown too.
        self._timer = threading.Timer(PATIENCE, self._show, args=(self._stream,))
        self._timer.daemon = True
        self._timer.start()

    def _show(self, stream: TextIO) -> None:
        with self._lock:
            if self._timer is None:  # it ended while the timer fired
                return
            self._view = _Bar(self, stream) if _wants_bar(stream) else _Lines(self, stream)
            self._draw()

    def _stop(self, *, ok: bool) -> None:
        with self._lock:
            if self._timer:
                self._timer.cancel()
            self._timer = None
            if self._view:
                self._view.close(ok=ok)
            self._view = None


@contextmanager
def progress(title: str, total: int | None = None, unit: Unit = "bytes") -> Iterator[Progress]:
    """Show that a piece of work goes on while the block runs.

    Arguments:
        title: what is done, for people: "Building the pocket guest".
        total: how much there is to do, or None where that is unknown.
        unit: what is counted.
    """
    silent = os.environ.get("LABKIT_PROGRESS") == "off" or sys.stderr is None
    handle = Progress(title, total, unit, None if silent else sys.stderr)
    handle._start()
    try:
        yield handle
    except BaseException:
        handle._stop(ok=False)
        raise
    handle._stop(ok=True)


def _wants_bar(stream: TextIO) -> bool:
    # A notebook's stderr is no terminal and keeps every redrawn line, so it gets plain lines like a log file.
    return stream.isatty() and os.environ.get("TERM") != "dumb"


class _Lines:
    """A line when work begins to be long, one for each step, one now and then, and one at the end."""

    def __init__(self, handle: Progress, stream: TextIO) -> None:
        self._title, self._unit, self._stream = handle.title, handle.unit, stream
        self._began = time.monotonic() - PATIENCE
        self._last_step: str | None = None
        self._last_line = 0.0

    def draw(self, done: int, total: int | None, step: str) -> None:
        now = time.monotonic()
        if step == self._last_step and now - self._last_line < _LINE_EVERY:
            return
        self._last_step, self._last_line = step, now
        parts = [part for part in (step, _amount(done, total, self._unit)) if part]
        self._say(f"{self._title}: {', '.join(parts)}" if parts else f"{self._title} …")

    def close(self, *, ok: bool) -> None:
        self._say(f"{self._title}: {'done' if ok else 'failed'} after {time.monotonic() - self._began:.0f} s")

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)


def _amount(done: int, total: int | None, unit: Unit) -> str:
    if not done and not total:
        return ""
    if unit == "steps":
        return f"{done} of {total}" if total else f"{done}"
    return f"{done / 1e6:.0f} of {total / 1e6:.0f} MB" if total else f"{done / 1e6:.0f} MB"


class _Bar:
    """A bar that leaves nothing behind on the terminal when it ends."""

    def __init__(self, handle: Progress, stream: TextIO) -> None:
        self._title = handle.title
        self._bar = _rich_bar(handle.unit, stream)
        self._task = self._bar.add_task(self._title, total=handle.total)
        self._bar.start()

    def draw(self, done: int, total: int | None, step: str) -> None:
        description = f"{self._title}: {step}" if step else self._title
        self._bar.update(self._task, completed=done, total=total, description=description)

    def close(self, *, ok: bool) -> None:
        self._bar.stop()


def _rich_bar(unit: Unit, stream: TextIO) -> RichProgress:
    from rich import progress as rich_progress  # only now: most work ends before it is needed
    from rich.console import Console

    counts = rich_progress.DownloadColumn() if unit == "bytes" else rich_progress.MofNCompleteColumn()
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", markup=False),
        rich_progress.BarColumn(),
        counts,
        rich_progress.TimeElapsedColumn(),
        console=Console(file=stream),
        transient=True,
    )
