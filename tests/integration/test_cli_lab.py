"""The command `labkit` over machines: JSON alone on stdout, exits, and names that are not there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from labkit import VM, Lab

pytestmark = pytest.mark.qemu
LABKIT = str(Path(sys.executable).with_name("labkit"))
Program = Callable[..., subprocess.Popen[str]]


def labkit(*words: str, stdin: Any = subprocess.DEVNULL, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [LABKIT, *words], stdin=stdin, capture_output=True, text=True, timeout=120, **options
    )
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("cli", keep=True) as lab:
        yield lab


@pytest.fixture(scope="module")
def vm(lab: Lab) -> VM:
    return lab.vm("web").start()


def test_ls_lists_what_is_there(vm: VM, lab: Lab) -> None:
    lab.vm("db")
    done = labkit("ls", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    things = [thing for thing in json.loads(done.stdout) if thing["lab"] == "cli"]
    assert [{key: thing[key] for key in ("lab", "kind", "name", "state")} for thing in things] == [
        {"lab": "cli", "kind": "vm", "name": "db", "state": "off"},
        {"lab": "cli", "kind": "vm", "name": "web", "state": "running"},
    ]
    plain = labkit("ls")
    assert re.search(r"cli +vm +web +running", plain.stdout)
    lab["db"].delete()


def test_ls_of_nothing_is_an_empty_list(labkit_home: Path) -> None:
    assert json.loads(labkit("ls", "--json").stdout) == []
    done = labkit("ls")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "Nothing is there.\n")
    assert not (labkit_home / "run" / "libvirt").exists()  # and no daemon was started for it


def test_ls_without_a_daemon_says_unknown(labkit_home: Path, tmp_path: Path) -> None:
    """One that cannot start: its programs are not to be found."""
    with Lab("lost", keep=True) as lab:
        lab.vm("web")
        from labkit.hypervisors import daemon

        daemon.stop()
        code = (
            "import json, labkit.tools; labkit.tools._SBIN = (); labkit.tools.which = lambda name: None\n"
            "from labkit.cli import main; main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "ls", "--json"],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": str(tmp_path)},
        )
        assert [thing["state"] for thing in json.loads(done.stdout)] == ["unknown"], done.stderr
        assert "tini" in done.stderr
        assert "Traceback" not in done.stderr
    daemon.stop()


def test_run_gives_output_and_exit_of_the_command(vm: VM) -> None:
    done = labkit("run", "web", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
    assert labkit("run", "cli/web", "printf", "%s|", "a b", "-x").stdout == "a b|-x|"
    assert labkit("run", "web", "--", "ls", "-d", "/data").stdout == "/data\n"


def test_run_takes_a_pipe_or_a_file(vm: VM, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("from a file\n")
    with (tmp_path / "in").open() as file:
        assert labkit("run", "web", "cat", stdin=file).stdout == "from a file\n"
    done = subprocess.run([LABKIT, "run", "web", "cat"], input="by a pipe\n", capture_output=True, text=True)
    assert done.stdout == "by a pipe\n"
    slow = f"(sleep 1; echo late) | {LABKIT} run --stdin web cat"
    assert subprocess.run(slow, shell=True, capture_output=True, text=True).stdout == "late\n"


def test_run_does_not_wait_for_an_open_and_silent_input(vm: VM) -> None:
    read, write = os.pipe()
    try:
        assert labkit("run", "web", "cat; echo done", stdin=read).stdout == "done\n"
    finally:
        os.close(read)
        os.close(write)


def test_run_misses_its_deadline(vm: VM) -> None:
    done = labkit("run", "--timeout", "1", "web", "echo begun; sleep 60")
    assert (done.returncode, done.stdout) == (1, "begun\n")
    assert "took longer than 1 s" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["run", "nobody", "true"], 1, "labkit ls"),
        (["run", "nolab/web", "true"], 1, "There is no lab named nolab"),
        (["run", "cli/nobody", "true"], 1, "machines: web"),
        (["run", "../x/web", "true"], 2, "cannot be the name of a lab"),
        (["run", "web"], 2, "Missing argument"),
        (["run", "web", ""], 2, "no command"),
        (["run", "--timeout", "-1", "web", "true"], 2, "no time"),
        (["run", "--timeout", "soon", "web", "true"], 2, "--timeout"),
        (["screenshot", "nobody"], 1, "no machine named nobody"),
        (["console", "web"], 1, "needs a terminal"),
        (["clean", "nolab"], 1, "There is no lab named nolab"),
        (["clean", "../x"], 2, "cannot be the name of a lab"),
        (["images", "build", "pokcet"], 1, "Did you mean 'pocket'"),
        (["dance"], 2, "No such command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_said_on_stderr_with_an_exit(vm: VM, words: list[str], code: int, text: str) -> None:
    done = labkit(*words)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert text in re.sub(r"[\s│]+", " ", done.stderr)


def test_a_name_that_two_labs_have_must_be_told_apart(vm: VM) -> None:
    with Lab("other", keep=True) as other:
        other.vm("web")
        done = labkit("run", "web", "true")
        assert done.returncode == 2
        assert "cli/web, other/web" in done.stderr


def test_screenshot_writes_a_png_and_prints_where(vm: VM, tmp_path: Path) -> None:
    done = labkit("screenshot", "web", cwd=tmp_path)
    assert done.stdout == "web.png\n"
    assert (tmp_path / "web.png").read_bytes().startswith(b"\x89PNG")
    assert labkit("screenshot", "web", "--to", str(tmp_path / "a.png")).stdout == f"{tmp_path}/a.png\n"
    done = labkit("screenshot", "web", "--to", "/no/such/a.png")
    assert done.returncode == 1
    assert "/no/such/a.png" in done.stderr


def test_the_uri_is_one_that_virsh_takes(vm: VM) -> None:
    uri = labkit("uri").stdout.strip()
    done = subprocess.run(["virsh", "-c", uri, "list", "--name"], capture_output=True, text=True, check=True)
    assert "labkit.cli.web" in done.stdout.split()


def test_images_are_listed() -> None:
    done = labkit("images", "list", "--json")
    assert done.stderr == ""
    images = {image["name"]: image for image in json.loads(done.stdout)}
    assert images["pocket"]["cached"] is True
    assert "pocket" in labkit("images", "list").stdout


def test_clean_keeps_what_is_in_use_unless_told_otherwise(program: Program, labkit_home: Path) -> None:
    owner = program("labkit.Lab('used').vm('web')")
    done = labkit("clean")
    assert (done.returncode, done.stdout) == (0, "")
    assert f"kept used: in use by process {owner.pid}" in done.stderr
    assert labkit("clean", "used").returncode == 1
    assert [thing["name"] for thing in json.loads(labkit("ls", "--json").stdout)] == ["web"]
    assert labkit("clean", "used", "--all").stdout == "removed used\n"
    assert json.loads(labkit("ls", "--json").stdout) == []
    labkit("clean")


def test_clean_of_nothing_is_fine(labkit_home: Path) -> None:
    done = labkit("clean")
    assert (done.returncode, done.stdout) == (0, "")


def test_a_reader_that_has_seen_enough_is_no_error(vm: VM) -> None:
    done = subprocess.run(f"{LABKIT} ls --json | head -c 1", shell=True, capture_output=True, text=True)
    assert done.stdout == "["
    assert done.stderr == ""


def test_the_demo_shows_every_step_with_its_effect(labkit_home: Path) -> None:
    done = labkit("demo", "--json")
    story = json.loads(done.stdout)
    assert done.returncode == 0, story
    assert story["ok"] is True
    names = ["create", "run", "write", "snapshot", "damage", "revert", "clone", "destroy"]
    assert [step["name"] for step in story["steps"]] == names
    assert all(step["ok"] and step["seconds"] >= 0 for step in story["steps"])
    assert json.loads(labkit("ls", "--json").stdout) == []
    labkit("clean")


@pytest.mark.smoke
def test_help_names_every_command() -> None:
    text = labkit("--help").stdout
    for command in ("doctor", "demo", "ls", "clean", "uri", "run", "console", "screenshot", "images"):
        assert command in text
