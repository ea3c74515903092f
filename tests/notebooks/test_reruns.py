"""Learners run cells twice, go back, begin again and lose their kernel: none of it gives an error."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(1800)]


def test_three_times_from_the_top_and_then_back_and_forth(
    notebook: Path, open_session: Callable[[Path], Any], repeats: Callable[[int, int], int]
) -> None:
    with open_session(notebook) as session:
        closing = [index for index in session.cells if ".close()" in session.source(index)]
        before_closing = [index for index in session.cells if not closing or index < closing[0]]
        # Half of it, and then a change of mind, with the lab still there.
        session.run(*session.cells[: len(session.cells) // 2])
        # Everything, each cell twice; a lab that was closed is opened anew by what follows.
        session.run(*(index for index in session.cells for _twice in range(2)))
        session.run(*before_closing)
        chance = random.Random(notebook.stem)  # the same order in every run
        for _round in range(repeats(1, 5)):
            session.run(*chance.sample(before_closing, len(before_closing)))


def test_after_a_killed_kernel(notebook: Path, open_session: Callable[[Path], Any]) -> None:
    with open_session(notebook) as session:
        session.run(*session.cells[: len(session.cells) * 2 // 3])
        session.kill()
    with open_session(notebook) as session:  # at once: sooner than what is left could be cleared away
        session.run(*session.cells)
