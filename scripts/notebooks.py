"""Build the course: notebooks/NN-slug.ipynb, executed, from notebooks/source/NN-slug.py (py:percent text).

    scripts/notebooks.py [NAME...] [--check] [--force] [--jobs N]

Without names, all of the course; a name is a slug or the beginning of one ("03"). Only what is out of step is
built: a notebook keeps its source's SHA-256 in `metadata.labkit.source_sha256`, and that alone decides, never
the outputs, since each computer has its own. `--check` builds nothing and fails where one is out of step.

A notebook is executed from top to bottom in a fresh kernel, with a labkit home of its own, and written only
when all of it ran: no error, nothing on stderr. What would stay in it of one computer or one minute is taken
out: ids come from the cells' contents, metadata is a constant, times of execution are not recorded, and
directories of the build computer are written as a learner's would be (`~/.cache/labkit`).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"

#: Seconds for one cell. The slowest boots a few machines under TCG.
CELL_TIMEOUT = 300
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {
        "codemirror_mode": {"name": "ipython", "version": 3},
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "nbconvert_exporter": "python",
        "pygments_lexer": "ipython3",
    },
}


class BuildError(Exception):
    """A notebook could not be built; says which cell, and why."""


@dataclass(frozen=True)
class Lesson:
    """One notebook of the course, by its slug: "03-your-first-vm"."""

    slug: str
    folder: Path = FOLDER

    @property
    def source(self) -> Path:
        return self.folder / "source" / f"{self.slug}.py"

    @property
    def notebook(self) -> Path:
        return self.folder / f"{self.slug}.ipynb"

    def sha256(self) -> str:
        return hashlib.sha256(self.source.read_bytes()).hexdigest()

    def problem(self) -> str:
        """Why the notebook is out of step with its source; "" where it is in step."""
        if not self.source.exists():
            return "has no source"
        if not self.notebook.exists():
            return "has not been built"
        built = nbformat.read(self.notebook, as_version=4)
        if built.metadata.get("labkit", {}).get("source_sha256") != self.sha256():
            return "is older than its source"
        if _cells(built) != _cells(read_source(self)):
            return "was edited by hand: edit its source instead"
        return ""


def lessons(folder: Path = FOLDER) -> list[Lesson]:
    """All notebooks of the course, in its order, those without a source among them."""
    slugs = {path.stem for path in (folder / "source").glob("[0-9]*.py")}
    slugs |= {path.stem for path in folder.glob("[0-9]*.ipynb")}
    return [Lesson(slug, folder) for slug in sorted(slugs)]


def read_source(lesson: Lesson) -> Any:
    """The notebook that the source describes, not executed: ids and metadata as they will be written."""
    notebook = jupytext.read(lesson.source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict({**METADATA, "labkit": {"source_sha256": lesson.sha256()}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: Counter[tuple[str, str]] = Counter()
    for cell in notebook.cells:
        content = (cell.cell_type, cell.source)
        seen[content] += 1
        # By content, not position: a cell that is put in between leaves all the others' ids alone.
        cell.id = hashlib.sha256(repr((*content, seen[content])).encode()).hexdigest()[:12]
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": sorted(tags)} if tags else {})
    return notebook


def _cells(notebook: Any) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


# --- Execution -----------------------------------------------------------------------------------


def build(lesson: Lesson) -> float:
    """Execute a source and write the notebook; returns the seconds that it took.

    Raises:
        BuildError: a cell failed, ran too long, or said something on stderr.
    """
    notebook = read_source(lesson)
    begun = time.monotonic()
    with Home() as home:
        execute(notebook, home, lesson.folder)
        clean(notebook, home.replacements())
    complaints = list(complaints_about(notebook))
    if complaints:
        raise BuildError("\n".join(complaints))
    nbformat.validate(notebook)
    text = nbformat.writes(notebook, version=4) + "\n"
    aside = lesson.notebook.with_name(f".{lesson.notebook.name}.new")
    aside.write_text(text, encoding="utf-8")
    aside.replace(lesson.notebook)
    return time.monotonic() - begun


def execute(notebook: Any, home: Home, folder: Path) -> None:
    """Run all cells in a fresh kernel, in place.

    Raises:
        BuildError: one failed, or the kernel died.
    """
    client = NotebookClient(
        notebook,
        # By unix sockets in a private directory: what goes over loopback, other users could listen to.
        km=AsyncKernelManager(
            kernel_name="python3", transport="ipc", connection_file=str(home.path / "kernel.json")
        ),
        timeout=CELL_TIMEOUT,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        client.execute(env=home.environment, cleanup_kc=True)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as exc:
        raise BuildError(_plain(str(exc))) from exc


class Home:
    """A labkit home for one execution, gone afterwards with all that was made in it."""

    def __enter__(self) -> Home:
        # Short, and in /tmp whatever TMPDIR says: a unix socket's path holds 107 bytes.
        self.path = Path(tempfile.mkdtemp(prefix="lk-", dir="/tmp"))
        programs = sysconfig.get_path("scripts")
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([programs, os.environ.get("PATH", os.defpath)]),
            "LABKIT_HOME": str(self.path),
            "LABKIT_CACHE": str(_cache()),
            "LABKIT_PROGRESS": "off",
        }
        self.environment.pop("LABKIT_URI", None)
        return self

    def __exit__(self, *_: object) -> None:
        labkit = Path(sysconfig.get_path("scripts")) / "labkit"
        subprocess.run(
            [labkit, "clean", "--all"], env=self.environment, capture_output=True, check=False, timeout=60
        )
        self._wait_for_reaper()
        shutil.rmtree(self.path, ignore_errors=True)

    def _wait_for_reaper(self) -> None:
        """It ends some seconds after the last lab; while it lives it would make the directory anew."""
        lock = self.path / "run" / "reaper.lock"
        deadline = time.monotonic() + 15
        while lock.exists() and time.monotonic() < deadline:
            with lock.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    time.sleep(0.05)

    def replacements(self) -> list[tuple[str, str]]:
        """Directories of this computer, and what stands for them in a notebook; longer ones first."""
        pairs = {
            str(self.path / "state"): "~/.local/state/labkit",
            str(self.path / "run"): "/run/user/1000/labkit",
            str(self.path): "~/.local/share/labkit",
            str(_cache()): "~/.cache/labkit",
            str(ROOT): "~/labkit",
            str(Path.home()): "~",
        }
        return sorted(pairs.items(), key=lambda pair: -len(pair[0]))


def _cache() -> Path:
    from labkit import paths

    return paths.cache_dir()


# --- What is written -----------------------------------------------------------------------------

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def clean(notebook: Any, replacements: Sequence[tuple[str, str]]) -> None:
    """Take out of an executed notebook what is of one computer or one run."""
    wanted = notebook.metadata["labkit"]
    notebook.metadata = nbformat.from_dict({**METADATA, "labkit": wanted})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if "text" in output:
                output["text"] = _neutral(output["text"], replacements)
            for kind, value in output.get("data", {}).items():
                if isinstance(value, str) and not kind.startswith("image/"):
                    output["data"][kind] = _neutral(value, replacements)


def _neutral(text: str, replacements: Sequence[tuple[str, str]]) -> str:
    text = _ESCAPES.sub("", text)  # a terminal's control codes, which a page cannot show
    for path, stand_in in replacements:
        text = re.sub(rf"(?<![\w.-]){re.escape(path)}(?![\w-])", stand_in, text)
    return text


def complaints_about(notebook: Any) -> Iterable[str]:
    """What an executed notebook has in its outputs and must not have."""
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                yield f"cell {number} ends with {output.ename}"
            if output.get("name") == "stderr":
                yield f"cell {number} says on stderr: {output.text.strip()}"


def _plain(text: str) -> str:
    return _ESCAPES.sub("", text)


# --- The command ---------------------------------------------------------------------------------


def chosen(names: Sequence[str]) -> list[Lesson]:
    """The lessons of these names; all where there is none."""
    everything = lessons()
    if not names:
        return everything
    found = []
    for name in names:
        wanted = Path(name).name.removesuffix(".py").removesuffix(".ipynb")
        matching = [lesson for lesson in everything if lesson.slug.startswith(wanted)]
        if not matching:
            there = ", ".join(lesson.slug for lesson in everything)
            raise SystemExit(f"There is no notebook {name}. There are: {there}")
        found += matching
    return list(dict.fromkeys(found))


def check(wanted: Sequence[Lesson]) -> int:
    """Say which are out of step; the exit status."""
    problems = {lesson.slug: problem for lesson in wanted if (problem := lesson.problem())}
    for slug, problem in problems.items():
        print(f"notebooks/{slug}.ipynb {problem}")
    if problems:
        print(f"Mend it: ./lab notebooks {' '.join(problems)}")
    return 1 if problems else 0


def build_all(wanted: Sequence[Lesson], *, force: bool, jobs: int) -> int:
    """Build those that are out of step; the exit status."""
    stale = [lesson for lesson in wanted if lesson.source.exists() and (force or lesson.problem())]
    for lesson in wanted:
        if lesson not in stale:
            print(f"  {lesson.slug}  {lesson.problem() or 'in step'}")
    failed = 0
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        futures = {lesson: pool.submit(build, lesson) for lesson in stale}
        for lesson, future in futures.items():
            try:
                print(f"✓ {lesson.slug}  built in {future.result():.0f} s", flush=True)
            except BuildError as exc:
                failed += 1
                print(f"✗ {lesson.slug}  was left as it is\n{_indented(str(exc))}", flush=True)
    return 1 if failed else 0


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="./lab notebooks", description=__doc__.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="such as 03 or 03-your-first-vm; all where none"
    )
    parser.add_argument("--check", action="store_true", help="build nothing; fail where one is out of step")
    parser.add_argument("--force", action="store_true", help="build also what is in step")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many at one time")
    options = parser.parse_args(arguments)
    wanted = chosen(options.names)
    return check(wanted) if options.check else build_all(wanted, force=options.force, jobs=options.jobs)


if __name__ == "__main__":
    sys.exit(main())
