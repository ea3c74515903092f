"""The public names."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import labkit


def test_every_public_name_is_there_and_described() -> None:
    for name in labkit.__all__:
        value = getattr(labkit, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name


def test_dir_shows_the_public_names_only() -> None:
    assert dir(labkit) == sorted(labkit.__all__)


def test_every_lazy_name_is_public_and_lives_where_it_is_said_to() -> None:
    assert set(labkit._HOMES) <= set(labkit.__all__)
    for name, module in labkit._HOMES.items():
        assert getattr(importlib.import_module(module), name) is getattr(labkit, name)


def test_no_room_has_the_name_of_a_function() -> None:
    """Importing a room binds it in the package, so it would hide the function."""
    rooms = {path.stem for path in Path(labkit.__file__).parent.iterdir()}
    functions = {name for name in labkit.__all__ if not isinstance(getattr(labkit, name), ModuleType)}
    assert not rooms & functions


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Virtualbox'"):
        _ = labkit.Virtualbox


def test_the_version_is_the_projects() -> None:
    from importlib.metadata import version

    assert labkit.__version__ == version("labkit")
