"""What all tests share: what they need of the machine, a kit of their own, and nothing left behind.

A test says what it needs by a mark (`qemu`, `docker`, `vbox`, `browser`, `distros`). Where the need is
missing the test is skipped, and a closing section says so; in CI (`CI=true`) it fails instead, so that
nothing is skipped silently there.

Each session (and each of its parallel workers) has its own LABKIT_HOME, short and private, and shares
the user's LABKIT_CACHE, so that guest images are built once. At its end no process of it may be alive.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import platformdirs
import pytest

IN_CI = os.environ.get("CI", "").lower() in {"1", "true"}
SOAK = bool(os.environ.get("LABKIT_SOAK"))
GRACE = 15.0  # seconds for what a killed owner left to be reaped

# --- Needs: each probe returns why the need is missing, or nothing ------------------------------


def _program(*names: str, package: str) -> str | None:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    for name in names:
        if shutil.which(name, path=path):
            return None
    return f"{' or '.join(names)} is not installed (apt install {package})"


def _qemu() -> str | None:
    arch = {"arm64": "aarch64"}.get(platform.machine(), platform.machine())
    package = {"aarch64": "qemu-system-arm"}.get(arch, "qemu-system-x86")
    return (
        _program(f"qemu-system-{arch}", package=package)
        or _program("qemu-img", package="qemu-utils")
        or _program("libvirtd", package="libvirt-daemon")
    )


def _docker() -> str | None:
    import docker

    url = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    try:
        client = docker.from_env(timeout=10)
        client.ping()
    except Exception as exc:  # noqa: BLE001  # whatever it is, it is the reason to show
        return f"no daemon answers at {url} ({str(exc).splitlines()[0][:120]})"
    client.close()
    return None


def _vbox() -> str | None:
    return _program("VBoxManage", package="virtualbox")


def _browser() -> str | None:
    return _program("chromium", "google-chrome", package="chromium") or _program(
        "chromedriver", package="chromium-driver"
    )


def _distros() -> str | None:
    if os.geteuid() != 0:
        return "making and entering root file systems takes root"
    return _program("mmdebstrap", package="mmdebstrap")


PROBES: dict[str, Callable[[], str | None]] = {
    "qemu": _qemu,
    "docker": _docker,
    "vbox": _vbox,
    "browser": _browser,
    "distros": _distros,
}


@functools.cache
def missing(need: str) -> str | None:
    return PROBES[need]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for need in PROBES:
        if item.get_closest_marker(need) is None:
            continue
        if reason := missing(need):
            if IN_CI:
                pytest.fail(f"in CI nothing may be missing, and this needs {need}: {reason}", pytrace=False)
            pytest.skip(f"needs {need}: {reason}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what runs only when it is asked for."""
    asked = {"soak": SOAK, "distros": bool(os.environ.get("LABKIT_DISTROS"))}
    left_out = [
        item for item in items for mark, on in asked.items() if not on and item.get_closest_marker(mark)
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


# --- A kit of the session's own ------------------------------------------------------------------


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell starts what it puts in the background so, and children inherit it; tests that interrupt
        # a program need one that can be interrupted.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if _is_worker(config):
        home = Path(os.environ["LABKIT_TEST_BASE"]) / config.workerinput["workerid"]  # type: ignore[attr-defined]
        home.mkdir(mode=0o700, exist_ok=True)
    else:
        cache = os.environ.get("LABKIT_CACHE")
        if not cache:
            own = os.environ.get("LABKIT_HOME")
            cache = os.path.join(own, "cache") if own else str(platformdirs.user_cache_path("labkit"))
        os.environ["LABKIT_CACHE"] = cache
        # Short, and in /tmp whatever TMPDIR says: a unix socket's path holds 107 bytes.
        home = Path(tempfile.mkdtemp(prefix="lk-", dir="/tmp"))
        os.environ["LABKIT_TEST_BASE"] = str(home)
    os.environ["LABKIT_HOME"] = str(home)
    os.environ.setdefault("PYTHONHASHSEED", "0")
    _hypothesis()


def _hypothesis() -> None:
    try:
        from hypothesis import settings
    except ImportError:  # a distribution's root without the test group's optional part
        return
    # The same examples in every run; ./lab test soak looks for new ones.
    settings.register_profile("repeatable", derandomize=True, max_examples=60, deadline=None, database=None)
    settings.register_profile("soak", max_examples=2000, deadline=None, print_blob=True)
    settings.load_profile("soak" if SOAK else "repeatable")


def _processes_of(base: str) -> dict[int, str]:
    """Processes that have this session's directory in their environment or command line."""
    needle = base.encode()
    kin = {os.getpid(), os.getppid()}
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in kin:
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            if not command:  # a zombie: dead, and its parent's to collect
                continue
            environment = (entry / "environ").read_bytes()
        except OSError:  # gone, or not ours
            continue
        if needle in environment or needle in command:
            found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


def _is_idle_daemon(command: str) -> bool:
    return "libvirtd --timeout" in command


def _remove(base: str) -> None:
    def retry(function: Callable[..., Any], path: str, _: object) -> None:
        Path(path).parent.chmod(stat.S_IRWXU)
        function(path)

    with Path("/proc/self/mounts").open() as mounts:
        if any(f" {base}/" in line for line in mounts):
            return  # never remove through a mount
    shutil.rmtree(base, **({"onexc": retry} if sys.version_info >= (3, 12) else {"onerror": retry}))


PROBLEMS: list[str] = []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _is_worker(session.config):
        return
    base = os.environ["LABKIT_TEST_BASE"]
    deadline = time.monotonic() + GRACE
    while not all(map(_is_idle_daemon, _processes_of(base).values())) and time.monotonic() < deadline:
        time.sleep(0.1)
    # labkit's private daemon ends by itself half a minute after its last use; it is spared the wait.
    for pid, command in _processes_of(base).items():
        if _is_idle_daemon(command):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)
    deadline = max(deadline, time.monotonic() + 5)
    while (alive := _processes_of(base)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid, command in alive.items():
        PROBLEMS.append(f"process {pid} outlived the tests: {command[:300]}")
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    if alive:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    deadline = time.monotonic() + 5
    while _processes_of(base) and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        _remove(base)
    except OSError as exc:
        PROBLEMS.append(f"{base} could not be removed: {exc}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


# --- What is said at the end ---------------------------------------------------------------------


def _not_run(reporter: Any) -> list[tuple[str, str, int]]:
    counts: Counter[tuple[str, str]] = Counter()
    for report in reporter.stats.get("skipped", []):
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        text = text.removeprefix("Skipped: ")
        need, found, reason = text.removeprefix("needs ").partition(": ")
        if text.startswith("needs ") and found:
            counts[need, reason] += 1
        else:
            counts["", text] += 1
    return [(need, reason, count) for (need, reason), count in sorted(counts.items())]


def _sentence(need: str, reason: str, count: int) -> str:
    if not need:
        return f"{count} {'test' if count == 1 else 'tests'}: {reason}"
    return f"{count} {'test needs' if count == 1 else 'tests need'} {need}: {reason}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if _is_worker(config):
        return
    not_run = _not_run(terminalreporter)
    if not_run:
        terminalreporter.section("not run on this machine")
        for need, reason, count in not_run:
            terminalreporter.line(_sentence(need, reason, count))
    if PROBLEMS:
        terminalreporter.section("left behind")
        for problem in PROBLEMS:
            terminalreporter.line(problem)
    if results := os.environ.get("LABKIT_TEST_RESULTS"):
        kinds = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")
        outcomes = {kind: len(terminalreporter.stats.get(kind, [])) for kind in kinds}
        entry = {
            "part": os.environ.get("LABKIT_TEST_PART", "tests"),
            "outcomes": outcomes,
            "not_run": not_run,
            "problems": PROBLEMS,
        }
        with Path(results).open("a") as file:
            file.write(json.dumps(entry) + "\n")


# --- Fixtures for everyone -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def repeats() -> Callable[[int, int], int]:
    """`repeats(few, many)`: how often to repeat an experiment, `many` only in `./lab test soak`."""
    return lambda few, many: many if SOAK else few


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's top folder."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def labkit_home(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh LABKIT_HOME for one test, short enough for sockets; the image cache stays the user's."""
    path = Path(tempfile.mkdtemp(prefix="t", dir=os.environ["LABKIT_HOME"]))
    monkeypatch.setenv("LABKIT_HOME", str(path))
    return path


@pytest.fixture
def kill_at_end() -> Iterator[Callable[[subprocess.Popen[Any]], subprocess.Popen[Any]]]:
    """Register a process that must not outlive the test."""
    started: list[subprocess.Popen[Any]] = []

    def register(process: subprocess.Popen[Any]) -> subprocess.Popen[Any]:
        started.append(process)
        return process

    yield register
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()
