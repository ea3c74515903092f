"""Lints of the notebooks: their shape, what nbval would let pass, and what learners must not meet."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]*.ipynb"))
SANITIZE = FOLDER.parent / "tests" / "notebooks" / "sanitize.cfg"

OPENING = ["What you will be able to do", "Before you start"]
CLOSING = ["Check yourself", "Summary", "Exercises", "Where to go on"]

#: Words that a learner should find in no output: remains of an exception, of a progress bar, of a warning.
UNWANTED = re.compile(r"Traceback \(most recent|\x1b\[\d*[A-Za-z]|\r(?!\n)|Warning:|/tmp/lk-|/work/|/home/\w")


# --- The lints: each gives its complaints about one notebook --------------------------------------


def not_executed(notebook: Any) -> Iterator[str]:
    """nbval compares nothing in a cell that has no count, and says nothing of that."""
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    if counts != list(range(1, len(counts) + 1)):
        yield f"cells were not run once each, from top to bottom: {counts}"


def escapes_of_nbval(notebook: Any) -> Iterator[str]:
    """nbval takes a raises-exception that raises nothing for a success, and a skipped cell for nothing."""
    for index, cell in enumerate(notebook.cells):
        tags = set(cell.metadata.get("tags", []))
        unknown = tags - {"nbval-ignore-output"}
        if unknown:
            yield f"cell {index}: tags {unknown}"
        if re.search(r"#\s*(NBVAL|PYTEST)_", cell.source):
            yield f"cell {index}: say it by a tag, which learners do not see"


def unsuitable_outputs(notebook: Any) -> Iterator[str]:
    for index, output in outputs(notebook):
        if output.output_type == "error" or output.get("name") == "stderr":
            yield f"cell {index}: an error, or something on stderr"
        text = str(output.get("text", "")) + "".join(
            value for key, value in output.get("data", {}).items() if key.startswith("text/")
        )
        if found := UNWANTED.search(text):
            yield f"cell {index}: {found[0]!r} in its output"
        if len(socket.gethostname()) > 3 and socket.gethostname() in text:
            yield f"cell {index}: this computer's name in its output"


def clears_output(notebook: Any) -> Iterator[str]:
    for index, cell in enumerate(notebook.cells):
        if "clear_output" in cell.source and "nbval-ignore-output" not in cell.metadata.get("tags", []):
            yield f"cell {index}: clear_output in a cell that is compared"


def compares_little(notebook: Any) -> Iterator[str]:
    checked = [
        index
        for index, cell in enumerate(notebook.cells)
        if cell.get("outputs") and "nbval-ignore-output" not in cell.metadata.get("tags", [])
    ]
    if len(checked) < 3:
        yield f"only cells {checked} have an output that is compared"


def misshapen(notebook: Any) -> Iterator[str]:
    headings = [
        line.strip().removeprefix("## ")
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("## ")
    ]
    if headings[: len(OPENING)] != OPENING or headings[-len(CLOSING) :] != CLOSING:
        yield f"its sections are {headings}"
    if not notebook.cells[0].source.startswith("# "):
        yield "it begins without a title"


def hard_to_read(notebook: Any) -> Iterator[str]:
    """Pictures without a description, parts that are folded and never unfolded, links that lead nowhere."""
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "markdown":
            continue
        text = cell.source
        if text.count("<details>") != text.count("</details>") or text.count("<summary>") != text.count(
            "</summary>"
        ):
            yield f"cell {index}: a <details> or <summary> that is not closed"
        for described, target in re.findall(r"!\[(.*?)\]\((.*?)\)", text):
            if len(described) < 40:
                yield f"cell {index}: the picture {target} is not described"
        for target in re.findall(r"\]\((?!https://)(.*?)\)", text):
            if not (FOLDER / target.partition("#")[0]).exists():
                yield f"cell {index}: {target} is not there"
        levels = [len(found) for found in re.findall(r"^(#+) ", text, re.MULTILINE)]
        if any(after > before + 1 for before, after in pairwise(levels)):
            yield f"cell {index}: a level of headings is skipped"


def outputs(notebook: Any) -> Iterator[tuple[int, Any]]:
    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            yield index, output


Lint = Callable[[Any], Iterator[str]]
LINTS: list[Lint] = [
    not_executed,
    escapes_of_nbval,
    unsuitable_outputs,
    clears_output,
    compares_little,
    misshapen,
    hard_to_read,
]


@pytest.mark.parametrize("lint", LINTS, ids=lambda lint: lint.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_of_the_course_are_clean(path: Path, lint: Lint) -> None:
    assert list(lint(nbformat.read(path, as_version=4))) == []


def test_cells_have_ids_of_their_own() -> None:
    for path in NOTEBOOKS:
        ids = [cell.id for cell in nbformat.read(path, as_version=4).cells]
        assert len(set(ids)) == len(ids)


# --- The lints themselves, on notebooks that deserve a complaint -----------------------------------


def code(source: str, *, count: int | None = 1, tags: tuple[str, ...] = (), **output: Any) -> Any:
    cell = nbformat.v4.new_code_cell(source, execution_count=count, metadata={"tags": list(tags)})
    if output:
        kind = output.pop("output_type", "stream")
        cell.outputs = [nbformat.v4.new_output(kind, **output)]
    return cell


BAD: list[tuple[Lint, list[Any]]] = [
    (not_executed, [code("1", count=None)]),
    (not_executed, [code("1", count=2), code("2", count=1)]),
    (escapes_of_nbval, [code("1 / 0", tags=("raises-exception",))]),
    (escapes_of_nbval, [code("# NBVAL_SKIP\n1")]),
    (unsuitable_outputs, [code("1", name="stderr", text="DeprecationWarning: old")]),
    (unsuitable_outputs, [code("1", output_type="error", ename="E", evalue="", traceback=[])]),
    (unsuitable_outputs, [code("1", name="stdout", text="50 %\r100 %")]),
    (unsuitable_outputs, [code("1", name="stdout", text="/tmp/lk-x1/state")]),
    (clears_output, [code("clear_output()")]),
    (compares_little, [code("1", name="stdout", text="1")]),
    (misshapen, [nbformat.v4.new_markdown_cell("# T\n## Summary")]),
    (hard_to_read, [nbformat.v4.new_markdown_cell("![](images/layers.svg)")]),
    (hard_to_read, [nbformat.v4.new_markdown_cell("[next](98-not-there.ipynb)")]),
    (hard_to_read, [nbformat.v4.new_markdown_cell("<details><summary>A</summary>")]),
    (hard_to_read, [nbformat.v4.new_markdown_cell("# T\n### deep")]),
]


@pytest.mark.parametrize(
    ("lint", "cells"), BAD, ids=[f"{lint.__name__}-{i}" for i, (lint, _) in enumerate(BAD)]
)
def test_a_lint_sees_what_it_is_for(lint: Lint, cells: list[Any]) -> None:
    assert list(lint(nbformat.v4.new_notebook(cells=cells)))


# --- nbval's sanitize file -------------------------------------------------------------------------


def sanitize_problems(text: str) -> list[str]:
    """nbval reads `regex: ` and the `replace: ` right below it, at column 0; all else it passes over."""
    lines = text.splitlines()
    problems = []
    for number, line in enumerate(lines):
        before, after = lines[number - 1 : number], lines[number + 1 : number + 2]
        if re.match(r"\s*(regex|replace)\s*:", line) and not re.match(r"(regex|replace): ", line):
            problems.append(f"line {number + 1} is not read: {line}")
        if line.startswith("regex: "):
            re.compile(line.removeprefix("regex: "))
            if not (after and after[0].startswith("replace: ")):
                problems.append(f"line {number + 1} has no replacement right below it")
        if line.startswith("replace: ") and not (before and before[0].startswith("regex: ")):
            problems.append(f"line {number + 1} has no expression right above it")
    return problems


def test_nbval_reads_all_of_the_sanitize_file() -> None:
    text = SANITIZE.read_text()
    assert sanitize_problems(text) == []
    assert text.count("regex: ") >= 1


@pytest.mark.parametrize(
    "text", ["regex: a\n\nreplace: b\n", " regex: a\nreplace: b\n", "regex:a\nreplace: b\n"]
)
def test_a_malformed_sanitize_file_is_noticed(text: str) -> None:
    assert sanitize_problems(text)
