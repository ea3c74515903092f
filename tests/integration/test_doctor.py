"""The doctor on this computer: real guests, the real daemon, and computers that lack things."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from labkit import checkup
from labkit.checkup import Check, doctor
from labkit.hypervisors import accelerator

pytestmark = [pytest.mark.qemu, pytest.mark.usefixtures("kit")]

IDS = [
    *("accelerator-kvm", "accelerator-tcg", "cpu-flags", "kvm-device", "qemu", "libvirt", "memory", "disk"),
    *("pid1-reaping", "user-namespaces", "python", "jupyter", "docker", "virtualbox", "container"),
]
PRINT = "import json, labkit; print(json.dumps(labkit.doctor().as_dict()))"


@pytest.fixture
def kit(labkit_home: Path) -> Iterator[Path]:
    """A kit of the test's own, whose daemon ends with it."""
    from labkit.hypervisors import daemon

    yield labkit_home
    daemon.stop()


@pytest.mark.smoke
def test_every_check_is_made_and_each_that_is_not_ok_has_a_mend() -> None:
    report = doctor()
    assert [check.id for check in report.checks] == IDS
    assert {check.status for check in report.checks} <= {"ok", "info", "warn", "fail"}
    assert all(check.seen and check.meaning for check in report.checks)
    assert all(bool(check.mend) == (check.status != "ok") for check in report.checks)
    assert report.tier in {"kvm", "tcg"}
    assert report["libvirt"].status == "ok"


def test_the_tier_is_what_the_rest_of_labkit_uses() -> None:
    report = doctor()
    assert report.tier == accelerator.tier() == (accelerator.best() or "none")
    assert json.loads(json.dumps(report.as_dict()))["tier"] == report.tier


def test_the_first_time_and_later_ones_are_quick() -> None:
    first = doctor().seconds
    later = min(doctor().seconds for _ in range(3))
    assert first < 8
    assert later < 1.5


def test_a_check_that_raises_or_hangs_does_not_sink_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()

    def broken() -> Check:
        raise ZeroDivisionError("division by zero")

    def hangs() -> Check:
        never.wait()
        raise AssertionError

    monkeypatch.setattr(checkup, "_DEADLINE", 2.0)
    monkeypatch.setitem(checkup._CHECKS, "disk", broken)
    monkeypatch.setitem(checkup._CHECKS, "docker", hangs)
    report = doctor()
    never.set()
    assert (report["disk"].status, report["disk"].seen) == ("fail", "ZeroDivisionError: division by zero")
    assert (report["docker"].status, report["docker"].seen) == ("fail", "TimeoutError: no answer in 2 s")
    assert report["qemu"].status == "ok"


def test_nothing_is_left_but_the_verdict(kit: Path) -> None:
    doctor()
    kept = {path.name for path in (kit / "state").iterdir()}
    assert "accelerator.json" in kept
    assert kept <= {"accelerator.json", "libvirt", "libvirtd.log", "libvirtd.lock"}  # the daemon's own
    assert _guests_of(kit) == []


def _guests_of(kit: Path) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environ = (entry.parent / "environ").read_bytes()
        except OSError:
            continue
        if command.startswith(("qemu", "/usr/bin/qemu")) and os.fsencode(kit) in environ:
            found.append(command)
    return found


def test_without_programs_checks_fail_with_their_mends(tmp_path: Path) -> None:
    """As on a computer where none of QEMU, libvirt and Docker was ever installed."""
    code = f"""
import shutil, sys
from labkit import tools
tools._SBIN = ()
sys.modules["libvirt"] = None
sys.modules["docker"] = None
{PRINT}
"""
    report = _run([sys.executable, "-c", code], PATH=str(tmp_path), LABKIT_HOME=str(tmp_path / "kit"))
    by_id = {check["id"]: check for check in report["checks"]}
    assert report["tier"] == "none"
    for id in ("accelerator-tcg", "qemu"):
        assert by_id[id]["status"] == "fail"
        assert "sudo apt install" in by_id[id]["mend"]
    assert "libvirt-python" in by_id["libvirt"]["mend"]
    assert by_id["docker"]["status"] == by_id["virtualbox"]["status"] == "info"
    assert not any("Error" in check["seen"] for check in report["checks"] if check["id"] != "libvirt")


def _run(argv: list[str], **environ: str) -> Any:
    done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, **environ}, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: becomes another user")
def test_as_an_ordinary_user(repository: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    home = Path(tempfile.mkdtemp(prefix="lk-", dir="/tmp"))  # the session's own is root's alone
    os.chown(home, nobody.pw_uid, nobody.pw_gid)
    become = ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
    code = f"{PRINT}; from labkit.hypervisors import daemon; daemon.stop()"
    try:
        report = _run(
            [*become, sys.executable, "-c", code],
            LABKIT_HOME=str(home),
            LABKIT_CACHE=str(home / "cache"),
            HOME=str(home),
            PYTHONPATH=str(repository),
        )
    finally:
        shutil.rmtree(home)
    by_id = {check["id"]: check for check in report["checks"]}
    assert report["tier"] in {"kvm", "tcg"}
    assert by_id["libvirt"]["status"] == "ok"
    device = accelerator.KVM_DEVICE
    if device.exists() and not device.stat().st_mode & 0o006:
        assert by_id["kvm-device"]["status"] != "ok"
        assert "usermod -aG" in by_id["kvm-device"]["mend"]


def test_html_is_whole() -> None:
    shown = doctor()._repr_html_().replace("&nbsp;", " ")
    ElementTree.fromstring(f"<all>{shown}</all>")
