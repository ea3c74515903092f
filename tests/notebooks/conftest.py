"""What the tests of notebooks share: the course's notebooks, and kernels to run them in.

Each test has a labkit home of its own, in which nothing is left of another.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
#: Seconds for one cell; the slowest boot some machines under TCG, on a computer with other work to do.
CELL_TIMEOUT = 180


def _builder() -> ModuleType:
    """scripts/notebooks.py, which is a program and in no package."""
    spec = importlib.util.spec_from_file_location("notebooks_builder", ROOT / "scripts" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their names
    spec.loader.exec_module(module)
    return module


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "notebook" in metafunc.fixturenames:
        paths = [lesson.notebook for lesson in _builder().lessons()]
        metafunc.parametrize("notebook", paths, ids=[path.stem for path in paths])


@pytest.fixture
def environment(labkit_home: Path) -> dict[str, str]:
    """What a kernel finds as `./lab up` gives it: labkit among the programs, and nothing on stderr."""
    programs = sysconfig.get_path("scripts")
    path = os.pathsep.join([programs, os.environ.get("PATH", os.defpath)])
    return {**os.environ, "PATH": path, "LABKIT_PROGRESS": "off", "LABKIT_HOME": str(labkit_home)}


@pytest.fixture
def nbval(environment: dict[str, str]) -> Callable[[Path], subprocess.CompletedProcess[str]]:
    """`nbval(notebook)`: validate it in a pytest of its own, so that a dying kernel takes nothing along."""

    def validate(notebook: Path) -> subprocess.CompletedProcess[str]:
        command = [
            *(sys.executable, "-m", "pytest", "--nbval", str(notebook)),
            *("--nbval-sanitize-with", str(Path(__file__).with_name("sanitize.cfg"))),
            *("--nbval-cell-timeout", str(CELL_TIMEOUT), "--nbval-kernel-startup-timeout", "120"),
            *("--timeout", "0", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "--color=no", "--tb=short"),
        ]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)

    return validate


class Session:
    """A kernel with one notebook open in it, its cells run as a learner runs them: any, in any order."""

    def __init__(self, client: NotebookClient) -> None:
        self._client = client
        self.cells = [
            index
            for index, cell in enumerate(client.nb.cells)
            if cell.cell_type == "code" and cell.source.strip()
        ]

    def run(self, *indices: int) -> None:
        """Run these cells; an error in one is an error here, with the cell's traceback."""
        for index in indices:
            self._client.execute_cell(self._client.nb.cells[index], index)

    def source(self, index: int) -> str:
        """The code of a cell."""
        text: str = self._client.nb.cells[index].source
        return text

    def kill(self) -> None:
        """End the kernel as the kernel's own end would: without a chance to tidy up."""
        os.kill(self._client.km.provisioner.process.pid, signal.SIGKILL)


@pytest.fixture
def open_session(environment: dict[str, str]) -> Callable[[Path], AbstractContextManager[Session]]:
    """`with open_session(notebook) as session`: a fresh kernel, always in this test's labkit home."""

    @contextmanager
    def opened(notebook: Path) -> Iterator[Session]:
        client = NotebookClient(
            nbformat.read(notebook, as_version=4),
            km=AsyncKernelManager(
                kernel_name="python3",
                transport="ipc",
                connection_file=f"{environment['LABKIT_HOME']}/kernel.json",
            ),
            timeout=CELL_TIMEOUT,
            resources={"metadata": {"path": str(notebook.parent)}},
        )
        with client.setup_kernel(env=environment, cleanup_kc=True):
            yield Session(client)

    return opened
