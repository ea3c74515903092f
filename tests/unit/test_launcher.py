"""`./lab` on computers that it knows and does not know, with programs of the system faked by PATH."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ORDINARY = 65534  # nobody: who the launcher runs as where a test needs somebody who is not root


def _run(
    lab: Path | str, *words: str, cwd: Path | None = None, user: int | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key not in {"CI", "SUDO_USER"}}
    return subprocess.run(
        [str(lab), *words],
        cwd=cwd,
        env={**inherited, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        user=user,
    )


@pytest.fixture
def lab(repository: Path) -> Path:
    return repository / "lab"


# --- Which computer ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "named"),
    [
        ('ID=fedora\nVERSION_ID=43\nPRETTY_NAME="Fedora Linux 43"', "Fedora Linux 43"),
        ('ID=debian\nVERSION_ID=11\nPRETTY_NAME="Debian GNU/Linux 11"', "Debian GNU/Linux 11"),
        ('ID=ubuntu\nVERSION_ID="22.04"\nPRETTY_NAME="Ubuntu 22.04"', "Ubuntu 22.04"),
        ("", "does not say its name"),
    ],
)
def test_on_another_distribution_it_says_what_to_do_instead(
    lab: Path, tmp_path: Path, release: str, named: str
) -> None:
    (tmp_path / "os-release").write_text(release + "\n")
    done = _run(lab, "up", LABKIT_OS_RELEASE=str(tmp_path / "os-release"))
    assert done.returncode == 3
    assert named in done.stderr
    assert "virtual machine or container" in done.stderr
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize(("system", "advice"), [("Darwin", "UTM"), ("MINGW64_NT-10.0", "wsl --install")])
def test_on_another_system_it_says_what_to_do_instead(lab: Path, system: str, advice: str) -> None:
    done = _run(lab, "up", LABKIT_UNAME=system)
    assert done.returncode == 3
    assert advice in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_a_system_without_a_release_file_is_unknown(lab: Path, tmp_path: Path) -> None:
    done = _run(lab, "up", LABKIT_OS_RELEASE=str(tmp_path / "none"))
    assert done.returncode == 3


# --- What was asked ------------------------------------------------------------------------------


def test_help_lists_the_commands(lab: Path) -> None:
    done = _run(lab, "help")
    assert done.returncode == 0
    for command in ("up", "demo", "test", "lint", "clean", "bench", "notebooks"):
        assert f"./lab {command}" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["frobnicate"], "There is no ./lab frobnicate"),
        (["up", "--frobnicate"], "does not know --frobnicate"),
        (["up", "--port", "99999"], "from 1 to 65535"),
        (["up", "--port", "http"], "from 1 to 65535"),
        (["test", "frobnicate"], "There is no part 'frobnicate'"),
    ],
)
def test_what_it_does_not_know_ends_it_with_a_sentence(lab: Path, words: list[str], said: str) -> None:
    done = _run(lab, *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "line " not in done.stderr  # no bash error


def test_it_finds_its_parts_from_any_folder_and_through_a_link(lab: Path, tmp_path: Path) -> None:
    (tmp_path / "a folder").mkdir()
    link = tmp_path / "a folder" / "kit"
    link.symlink_to(lab)
    done = _run(link, "test", "frobnicate", cwd=tmp_path)
    assert "There is no part" in done.stderr


# --- A sandbox: the launcher's own files, and a PATH in which the system's programs are fakes ----


class Sandbox:
    """A copy of the launcher in a folder of its own, with fakes in front of the system's programs."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.root = folder / "a checkout"
        self.fakes = folder / "fakes"
        self.home = folder / "home"
        for path in (self.root, self.fakes, self.home):
            path.mkdir()
        shutil.copytree(repository / "scripts", self.root / "scripts")
        shutil.copy(repository / "lab", self.root)
        shutil.copy(repository / "pyproject.toml", self.root)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o777 if path.is_dir() else 0o755)

    def fake(self, name: str, script: str) -> None:
        path = self.fakes / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def python_that_makes_no_environment(self) -> Path:
        """Stand in for Python, far enough to see that an environment would be made; returns the calls."""
        calls = self.home / "python-calls"
        self.fake("python3", f'[[ $1 == -c ]] || {{ echo "$@" >>"{calls}"; exit 1; }}')
        return calls

    def run(self, *words: str, only_fakes: bool = False) -> subprocess.CompletedProcess[str]:
        path = str(self.fakes) if only_fakes else f"{self.fakes}:/usr/bin:/bin"
        return _run(
            self.root / "lab",
            *words,
            user=ORDINARY if os.geteuid() == 0 else None,
            PATH=path,
            HOME=str(self.home),
            LABKIT_HOME=str(self.home / "kit"),
            LABKIT_PYTHON=str(self.fakes / "python3"),
        )


@pytest.fixture
def sandbox(repository: Path) -> Iterator[Sandbox]:
    # Not in tmp_path, which another user may not enter.
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/lk-sandbox-XXXXXX"], text=True).strip())
    yield Sandbox(folder, repository)
    shutil.rmtree(folder)


NOTHING_INSTALLED = "exit 1"
ALL_INSTALLED = 'for word; do [[ $word == -* || $word == *{* ]] || echo "ii $word"; done'


def test_without_sudo_it_says_what_the_administrator_has_to_install(sandbox: Sandbox) -> None:
    needed = "bash cat cut date dirname dpkg env find flock grep head mkdir mktemp readlink rm sed sha256sum"
    for name in (*needed.split(), "sort", "stat", "tail", "tr", "uname", "xargs"):
        if found := shutil.which(name):
            (sandbox.fakes / name).symlink_to(found)
    sandbox.fake("dpkg-query", NOTHING_INSTALLED)
    sandbox.fake("apt-get", "exit 0")
    done = sandbox.run("up", "--no-server", only_fakes=True)
    assert done.returncode == 1, done.stderr
    assert "takes root or sudo" in done.stderr
    assert "apt-get install --no-install-recommends" in done.stderr
    assert " libvirt-daemon " in done.stderr


def test_sudo_is_called_once_and_only_for_what_is_missing(sandbox: Sandbox) -> None:
    calls = sandbox.home / "calls"
    sandbox.fake("dpkg-query", ALL_INSTALLED + " | grep -v -e tini -e uidmap")
    sandbox.fake("sudo", f'echo "$@" >>"{calls}"')
    sandbox.python_that_makes_no_environment()
    sandbox.run("up", "--no-server")
    (call,) = calls.read_text().splitlines()
    assert call.endswith("install-packages tini uidmap")


def test_sudo_is_not_called_when_all_is_there(sandbox: Sandbox) -> None:
    calls = sandbox.home / "calls"
    if not any(Path("/var/lib/apt/lists").glob("*_Packages*")):
        pytest.skip("this system has no package lists, so they would be fetched")
    sandbox.fake("dpkg-query", ALL_INSTALLED)
    sandbox.fake("sudo", f'echo "$@" >>"{calls}"')
    sandbox.python_that_makes_no_environment()
    done = sandbox.run("test", "unit")
    assert not calls.exists(), done.stderr


def test_a_failed_step_names_itself_its_command_its_last_lines_and_the_remedy(sandbox: Sandbox) -> None:
    sandbox.fake("dpkg-query", NOTHING_INSTALLED)
    sandbox.fake("sudo", "echo 'E: Unable to fetch some archives'; exit 100")
    done = sandbox.run("up", "--no-server")
    assert done.returncode == 1
    for part in ("system packages", "install-packages", "E: Unable to fetch", "status 100", "What to do: "):
        assert part in done.stderr
    log = Path(done.stderr.split("full log: ")[1].strip())
    assert "E: Unable to fetch" in log.read_text()


def test_stdout_is_left_to_results(sandbox: Sandbox) -> None:
    sandbox.fake("dpkg-query", NOTHING_INSTALLED)
    sandbox.fake("sudo", "echo noise; exit 100")
    assert sandbox.run("demo", "--json").stdout == ""


def test_a_moved_checkout_gets_a_new_environment(sandbox: Sandbox) -> None:
    sandbox.fake("dpkg-query", ALL_INSTALLED)
    sandbox.fake("sudo", "exit 0")
    calls = sandbox.python_that_makes_no_environment()
    programs = sandbox.root / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to("/usr/bin/python3")
    (programs / "pip").write_text("#!/somewhere/else/.venv/bin/python\n")
    if os.geteuid() == 0:
        for path in (sandbox.root / ".venv", programs):
            os.chown(path, ORDINARY, ORDINARY)
    done = sandbox.run("test", "unit")
    assert calls.read_text().startswith("-m venv "), done.stderr
    assert "python3-venv" in done.stderr  # the remedy, since this Python makes none


def test_an_environment_of_somebody_else_is_left_alone(sandbox: Sandbox) -> None:
    if os.geteuid() != 0:
        pytest.skip("takes root to make a folder of another user's")
    sandbox.fake("dpkg-query", ALL_INSTALLED)
    sandbox.fake("sudo", "exit 0")
    (sandbox.root / ".venv").mkdir()
    done = sandbox.run("test", "unit")
    assert done.returncode == 1
    assert "belongs to another user" in done.stderr


# --- Parts of it, one at a time ------------------------------------------------------------------


@pytest.fixture
def part(repository: Path) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Run a snippet with the launcher's functions at hand."""

    def run(snippet: str) -> subprocess.CompletedProcess[str]:
        sources = "\n".join(
            f"source '{repository}/scripts/{name}.sh'" for name in ("say", "system", "python", "server")
        )
        text = f"set -euo pipefail\nroot='{repository}'\n{sources}\npython=python3\n{snippet}\n"
        return subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60)

    return run


@pytest.mark.skipif(not shutil.which("dpkg-query"), reason="not a Debian system")
def test_missing_packages_are_told_from_installed_ones(
    part: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    assert part("missing_of bash no-such-package dpkg").stdout.split() == ["no-such-package"]


def test_a_taken_port_that_was_asked_for_is_refused(
    part: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = part(f"choose_port {taken.getsockname()[1]}")
    assert done.returncode == 1
    assert "is taken" in done.stderr
    assert "What to do" in done.stderr


def test_a_taken_default_port_is_passed_over_and_said(
    part: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = part("port_is_free() { (($1 > 8889)); }\nchoose_port ''\necho $port")
    assert done.stdout.strip() == "8890"
    assert "Port 8888 is taken" in done.stderr


def test_a_long_step_shows_that_it_goes_on(part: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = part("log=$(mktemp); step 'a long one' 'nothing' sleep 2.8; rm $log")
    lines = done.stderr.splitlines()
    assert "a long one (2 s so far)" in lines[0]
    assert lines[1].split()[1:4] == ["a", "long", "one"]


def test_a_python_that_is_too_old_is_not_taken(part: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert part("new_enough /bin/false && echo yes || echo no").stdout == "no\n"
