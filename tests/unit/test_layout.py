"""The project's own shape: layers, marks, what a wheel holds, what the launcher's lists say."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text())


def test_imports_run_one_way(repository: Path) -> None:
    program = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([program, "--no-cache"], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_need_has_a_mark_and_a_probe(
    project: dict[str, Any], pytestconfig: pytest.Config, repository: Path
) -> None:
    spec = importlib.util.spec_from_file_location("the_conftest", repository / "tests/conftest.py")
    assert spec is not None
    assert spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    marks = {line.partition(":")[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]}
    assert set(conftest.PROBES) == marks - {"soak", "smoke"}


def test_a_wheel_holds_every_file_of_the_package(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(path.relative_to(repository))
        for path in (repository / "labkit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    assert expected - inside == set()


def test_only_known_files_are_programs(repository: Path) -> None:
    for name in ("lab", ".ci/run", "scripts/install-packages"):
        path = repository / name
        assert os.access(path, os.X_OK), name
        assert path.read_text().startswith("#!"), name


def test_the_list_of_system_packages_is_well_formed(repository: Path) -> None:
    lines = (repository / "scripts/packages.txt").read_text().splitlines()
    rows = [line.split(None, 3) for line in lines if line.strip() and not line.startswith("#")]
    seen = set()
    for group, architecture, name, *_ in rows:
        assert architecture in {"any", "amd64", "arm64"}
        assert re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", name)
        assert (group, architecture, name) not in seen, "listed twice"
        seen.add((group, architecture, name))


def test_no_container_engine_is_among_what_up_installs(repository: Path) -> None:
    text = (repository / "scripts/packages.txt").read_text()
    base = [line.split()[2] for line in text.splitlines() if line.startswith("base ")]
    assert not {"docker.io", "docker-ce", "podman", "containerd", "libvirt-daemon-system"} & set(base)


def test_every_notice_of_the_licence_is_there(repository: Path) -> None:
    assert "Apache License" in (repository / "LICENSE").read_text()


def _imported(package: Path) -> set[str]:
    """The top names of all modules that the package imports, wherever in a file it does."""
    names: set[str] = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return names


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_whatever_the_package_imports_is_declared(project: dict[str, Any], repository: Path) -> None:
    declared = {_normal(re.split(r"[<>=!~;\[ ]", entry)[0]) for entry in project["project"]["dependencies"]}
    providers = importlib.metadata.packages_distributions()
    undeclared = {
        name
        for name in _imported(repository / "labkit") - set(sys.stdlib_module_names) - {"labkit"}
        if not declared & {_normal(provider) for provider in providers.get(name, [])}
    }
    assert undeclared == set()
