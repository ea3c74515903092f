"""The builder of notebooks, tried on small ones, and the course's own: each in step with its source."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

SOURCE = """\
# %% [markdown]
# # A title

# %%
print("from here:", __import__("os").getcwd())

# %% tags=["nbval-ignore-output"]
import os

print(os.environ["LABKIT_HOME"] + "/state/labs")

# %%
2 + 2

# %%
2 + 2
"""


@pytest.fixture(scope="module")
def builder(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks_builder", repository / "scripts/notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lesson(builder: ModuleType, tmp_path: Path) -> Any:
    (tmp_path / "source").mkdir()
    made = builder.Lesson("90-small", tmp_path)
    made.source.write_text(SOURCE)
    return made


def test_every_notebook_of_the_course_is_in_step_with_its_source(builder: ModuleType) -> None:
    lessons = builder.lessons()
    assert lessons
    problems = {lesson.slug: problem for lesson in lessons if (problem := lesson.problem())}
    assert problems == {}, "./lab notebooks builds them"


def test_a_built_notebook_is_executed_and_holds_its_sources_hash(builder: ModuleType, lesson: Any) -> None:
    builder.build(lesson)
    built = nbformat.read(lesson.notebook, as_version=4)
    code = [cell for cell in built.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [1, 2, 3, 4]
    assert code[2].outputs[0].data["text/plain"] == "4"
    assert built.metadata.kernelspec.name == "python3"
    assert built.metadata.labkit.source_sha256 == lesson.sha256()
    assert lesson.problem() == ""


def test_two_builds_give_the_same_bytes(builder: ModuleType, lesson: Any) -> None:
    builder.build(lesson)
    first = lesson.notebook.read_bytes()
    builder.build(lesson)
    assert lesson.notebook.read_bytes() == first


def test_nothing_of_the_build_computer_stays(builder: ModuleType, lesson: Any) -> None:
    builder.build(lesson)
    built = nbformat.read(lesson.notebook, as_version=4)
    assert "~/.local/state/labkit/labs\n" in [
        output.text for cell in built.cells for output in cell.get("outputs", []) if "text" in output
    ]
    assert "/tmp/lk-" not in lesson.notebook.read_text()
    assert all("execution" not in cell.metadata for cell in built.cells)


def test_ids_come_from_contents_so_an_inserted_cell_leaves_the_others_alone(
    builder: ModuleType, lesson: Any
) -> None:
    before = [cell.id for cell in builder.read_source(lesson).cells]
    lesson.source.write_text(SOURCE.replace("# %%\n2 + 2", "# %%\nnew = 1\n\n# %%\n2 + 2", 1))
    after = [cell.id for cell in builder.read_source(lesson).cells]
    assert [id for id in after if id in before] == before
    assert len(set(after)) == len(after) == len(before) + 1


@pytest.mark.parametrize(
    ("cell", "complaint"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import sys; print('warning: old', file=sys.stderr)", "says on stderr: warning: old"),
    ],
)
def test_a_cell_that_fails_or_complains_stops_the_build_and_keeps_the_old_notebook(
    builder: ModuleType, lesson: Any, cell: str, complaint: str
) -> None:
    lesson.notebook.write_text("as it was")
    lesson.source.write_text(f"# %%\n{cell}\n")
    with pytest.raises(builder.BuildError, match=complaint):
        builder.build(lesson)
    assert lesson.notebook.read_text() == "as it was"


def test_check_tells_what_is_out_of_step(
    builder: ModuleType, lesson: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert builder.check([lesson]) == 1
    assert "has not been built" in capsys.readouterr().out
    notebook = builder.read_source(lesson)
    nbformat.write(notebook, lesson.notebook)
    assert builder.check([lesson]) == 0

    notebook.cells[0].source = "# Another title"
    nbformat.write(notebook, lesson.notebook)
    assert "was edited by hand" in lesson.problem()

    lesson.source.write_text(SOURCE + "# a change\n")
    assert "is older than its source" in lesson.problem()

    lesson.source.unlink()
    assert "has no source" in lesson.problem()


def test_outputs_of_another_computer_are_in_step_all_the_same(builder: ModuleType, lesson: Any) -> None:
    nbformat.write(builder.read_source(lesson), lesson.notebook)
    data = json.loads(lesson.notebook.read_text())
    data["cells"][1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "from elsewhere"}]
    lesson.notebook.write_text(json.dumps(data))
    assert lesson.problem() == ""


def test_lessons_are_chosen_by_the_beginning_of_their_names(builder: ModuleType) -> None:
    everything = builder.lessons()
    assert builder.chosen([]) == everything
    assert [lesson.slug for lesson in builder.chosen(["00", "00-start-here"])] == ["00-start-here"]
    assert [lesson.slug for lesson in builder.chosen(["notebooks/source/03-your-first-vm.py"])] == [
        "03-your-first-vm"
    ]
    with pytest.raises(SystemExit, match="There is no notebook 77"):
        builder.chosen(["77"])
