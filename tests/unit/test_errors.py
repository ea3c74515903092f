"""The tree of errors: as it is drawn, and each one printing what was seen and what to do."""

from __future__ import annotations

import re

import pytest

from labkit import errors
from labkit.machines.machine import Completed


def drawn() -> dict[str, str | None]:
    """Class -> base, from the tree in the module's docstring."""
    assert errors.__doc__ is not None
    tree: dict[str, str | None] = {}
    above: list[tuple[int, str]] = []
    for line in errors.__doc__.splitlines():
        match = re.match(r"^(    [│ ]*(?:[├└]── )?)([A-Z]\w+)(?:\s\s|$)", line)
        if not match:
            continue
        depth, name = len(match[1]), match[2]
        while above and above[-1][0] >= depth:
            above.pop()
        tree[name] = above[-1][1] if above else None
        above.append((depth, name))
    return tree


def classes() -> dict[str, type]:
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }


def test_the_drawn_tree_is_the_tree() -> None:
    bases = {
        name: None if name == "LabkitError" else value.__bases__[0].__name__
        for name, value in classes().items()
    }
    assert drawn() == bases


def test_every_class_is_public_and_says_what_it_means() -> None:
    assert set(errors.__all__) == set(classes())
    assert all(value.__doc__ for value in classes().values())


@pytest.mark.parametrize(("name", "kind"), [("SpecError", ValueError), ("NotFound", LookupError)])
def test_some_are_also_what_python_calls_them(name: str, kind: type) -> None:
    assert issubclass(getattr(errors, name), kind)


def test_an_error_prints_evidence_and_mend_below_its_sentence() -> None:
    error = errors.LabkitError("It broke.", evidence="first\nsecond", mend="Mend it.")
    assert str(error) == "It broke.\n  | first\n  | second\n  What to do: Mend it."


def test_an_error_without_evidence_is_its_sentence() -> None:
    assert str(errors.NotRunning("It is off.")) == "It is off."


def test_a_failed_command_shows_the_end_of_what_it_said() -> None:
    done = Completed(("sh", "-c", "x"), 3, b"out\n", b"\n".join(b"line %d" % n for n in range(50)), 0.1)
    error = errors.CommandFailed("web", done)
    assert error.completed is done
    assert "exited with 3" in error.message
    assert error.evidence.splitlines() == [f"line {n}" for n in range(40, 50)]


def test_a_tool_error_carries_the_command_and_its_exit() -> None:
    error = errors.HypervisorError("It refused.", command="virsh start x", returncode=1, evidence="no")
    assert (error.command, error.returncode) == ("virsh start x", 1)
    assert str(error) == "It refused.\n  | $ virsh start x\n  | no"
