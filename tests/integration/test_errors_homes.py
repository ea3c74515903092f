"""Homes and hosts that are out of the ordinary: the main job works there, or says what is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from labkit.hypervisors import daemon

pytestmark = pytest.mark.qemu

MAIN_JOB = """
import labkit
with labkit.Lab("a-lab-with-a-name-of-forty-characters-xx") as lab:
    vm = lab.vm("a-machine-with-a-name-of-forty-character").start()
    vm.run("echo kept > /data/file; sync")
    vm.snapshot("one")
    vm.run("rm /data/file")
    print(vm.revert("one").run("cat /data/file").stdout, end="")
"""


def main_job(home: Path, *before: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*before, sys.executable, "-c", MAIN_JOB],
        env={**os.environ, "LABKIT_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    subprocess.run(
        [*before, sys.executable, "-c", "from labkit.hypervisors import daemon; daemon.stop()"],
        env={**os.environ, "LABKIT_HOME": str(home), **environment},
        check=True,
    )
    # Of a long home the sockets are in /tmp, and stay there for the next time.
    where = "from labkit import paths; print(paths.runtime_dir())"
    runtime = subprocess.run(
        [sys.executable, "-c", where],
        env={**os.environ, "LABKIT_HOME": str(home)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    shutil.rmtree(runtime)
    return done


@pytest.mark.parametrize(
    ("name", "umask"), [("a b %41&x=y#?,ä'\"$(x)", "000"), ("x" * 120, "077")], ids=["strange", "long"]
)
def test_a_home_of_any_name_works_with_any_umask(labkit_home: Path, name: str, umask: str) -> None:
    done = main_job(labkit_home / name, "sh", "-c", f'umask {umask}; exec "$@"', "sh")
    assert done.stdout == "kept\n", done.stderr


def test_an_environment_without_home_and_shell_works(labkit_home: Path) -> None:
    keep = ["LABKIT_CACHE", "LABKIT_TEST_BASE"]
    bare = ["env", "-i", f"LABKIT_HOME={labkit_home}", *(f"{name}={os.environ[name]}" for name in keep)]
    done = main_job(labkit_home, *bare)
    assert done.stdout == "kept\n", done.stderr


@pytest.fixture
def no_namespaces(tmp_path: Path) -> list[str]:
    """What runs a program as root where no (further) user namespace can be made, as Docker's default seccomp
    profile has it."""
    if os.geteuid() != 0:
        pytest.skip("needs something else: only root is forbidden what it would use")
    runner = tmp_path / "runner.py"
    runner.write_text(f"CLONE_NEWUSER = 0x10000000\n{RUNNER}")
    return [sys.executable, str(runner)]


RUNNER = """
import ctypes, os, sys
made, told = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    assert ctypes.CDLL(None).unshare(CLONE_NEWUSER) == 0
    os.write(made[1], b"x")
    os.read(told[0], 1)
    os.setgid(0)
    os.setuid(0)
    open("/proc/sys/user/max_user_namespaces", "w").write("0")
    os.execvp(sys.argv[1], sys.argv[1:])
os.read(made[0], 1)
for name in ("uid_map", "gid_map"):
    open(f"/proc/{child}/{name}", "w").write("0 0 4294967295")
os.write(told[1], b"x")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_root_without_user_namespaces_works(labkit_home: Path, no_namespaces: list[str]) -> None:
    forbidden = subprocess.run(
        [*no_namespaces, "unshare", "--user", "true"], capture_output=True, check=False
    )
    assert forbidden.returncode != 0
    done = main_job(labkit_home / "home", *no_namespaces)
    assert done.stdout == "kept\n", done.stderr


def test_a_home_that_cannot_be_written_is_said(labkit_home: Path) -> None:
    (labkit_home / "file").write_text("")
    for place in (labkit_home / "file", labkit_home / "file" / "below", Path("/proc/labkit")):
        done = main_job_fails(place)
        assert "HostError" in done
        assert "LABKIT_HOME" in done


def main_job_fails(home: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", MAIN_JOB],
        env={**os.environ, "LABKIT_HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    return done.stderr


def test_a_missing_program_is_said_with_its_package(
    labkit_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from labkit import tools
    from labkit.errors import HostError

    monkeypatch.setattr(tools, "which", lambda program: None)
    with pytest.raises(HostError, match="tini is not installed") as caught:
        daemon.uri()
    assert "apt install tini" in caught.value.mend


def test_a_daemon_that_ends_at_once_is_said_with_its_log(
    labkit_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from labkit.errors import HypervisorError

    broken: Callable[[], object] = lambda: (["sh", "-c", "echo no such luck; exit 3"], {})  # noqa: E731
    monkeypatch.setattr(daemon, "_command", broken)
    with pytest.raises(HypervisorError, match="exit 3") as caught:
        daemon.uri()
    assert "no such luck" in caught.value.evidence
    assert "labkit doctor" in caught.value.mend
