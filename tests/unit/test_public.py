"""The public names."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

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


def test_a_room_does_not_hide_the_function_of_its_name() -> None:
    code = "import labkit.doctor, labkit; from labkit.doctor import doctor; assert labkit.doctor is doctor"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Virtualbox'"):
        _ = labkit.Virtualbox


def test_the_version_is_the_projects() -> None:
    from importlib.metadata import version

    assert labkit.__version__ == version("labkit")
