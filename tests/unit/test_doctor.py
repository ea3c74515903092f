"""What each check says, from inputs made for it; the real computer is in integration/."""

from __future__ import annotations

import html
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer

import pytest

from labkit import checkup
from labkit.checkup import Check, Report, processor, programs, system
from labkit.errors import HostError
from labkit.hardware.cpu import cpu_flags
from labkit.hardware.host import Memory, Orphan
from labkit.hypervisors.accelerator import Verdict

INTEL = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: Core i7\nflags\t\t: fpu lm vmx ept\n"
AMD = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: Ryzen 7\nflags\t\t: fpu lm svm npt\n"
INTEL_OFF = INTEL.replace(" vmx ept", "")
AMD_OFF = AMD.replace(" svm npt", "")
GUEST = AMD_OFF.replace("lm", "lm hypervisor")
ARM = "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"

WORKS = Verdict(
    name="kvm", works=True, seconds=0.1, seen="the probe guest reached: all", reason="KVM booted."
)
HANGS = Verdict(name="kvm", works=False, seconds=3.0, seen="QEMU was ended after 3 s", reason="It hangs.")
GiB = 1 << 30


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


# --- processor and accelerators ------------------------------------------------------------------


def test_hardware_virtualization_is_ok_and_named() -> None:
    assert processor.cpu_flags(INTEL) == Check(
        "cpu-flags", "ok", "GenuineIntel Core i7: vmx, ept", "The processor can run guests' code directly."
    )
    assert "svm, npt" in processor.cpu_flags(AMD).seen


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        (INTEL_OFF, "turn on Intel Virtualization Technology (VT-x)"),
        (AMD_OFF, "turn on SVM Mode (AMD-V)"),
        (GUEST, "turn on nested virtualization"),
    ],
)
def test_no_flag_is_mended_where_it_is_switched(text: str, mend: str) -> None:
    check = processor.cpu_flags(text)
    assert check.status == "info"
    assert mend in check.mend


@pytest.mark.parametrize(
    ("vendor", "mend"),
    [
        ("innotek GmbH", "VBoxManage modifyvm NAME --nested-hw-virt on"),
        ("VMware, Inc.", "vhv.enable"),
        ("Microsoft Corporation", "Set-VMProcessor"),
        ("QEMU", "virt-xml NAME --edit --cpu host-passthrough"),
        ("Amazon EC2", ".metal"),
        ("Google", "enableNestedVirtualization"),
        ("", "VBoxManage modifyvm NAME --nested-hw-virt on"),
    ],
)
def test_nested_virtualization_is_mended_by_what_is_beneath(vendor: str, mend: str) -> None:
    assert mend in processor.expose(cpu_flags(GUEST), vendor)


def test_arm_shows_no_flag_and_that_is_ok() -> None:
    assert processor.cpu_flags(ARM).status == "ok"


def test_a_kvm_that_works_is_ok_with_its_evidence() -> None:
    check = processor.accelerator_kvm(WORKS)
    assert (check.status, check.seen) == ("ok", "KVM booted. The probe guest reached: all.")


def test_a_kvm_that_should_work_and_does_not_is_a_warning(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    check = processor.accelerator_kvm(HANGS, device=device, cpuinfo=INTEL)
    assert check.status == "warn"
    assert "`sudo modprobe kvm_intel`" in check.mend
    device.touch()
    check = processor.accelerator_kvm(HANGS, device=device, cpuinfo=AMD)
    assert "sudo modprobe -r kvm_amd" in check.mend


def test_a_kvm_that_cannot_work_is_for_information(tmp_path: Path) -> None:
    check = processor.accelerator_kvm(HANGS, device=tmp_path / "kvm", cpuinfo=GUEST)
    assert check.status == "info"
    assert check.mend.startswith("Nothing has to be done.")


def test_an_accelerator_that_was_not_tried_says_so_once() -> None:
    not_tried = Verdict(
        name="tcg", works=False, seconds=0, seen="QEMU is not there.", reason="QEMU is not there."
    )
    check = processor.accelerator_tcg(not_tried)
    assert (check.status, check.seen) == ("fail", "QEMU is not there.")


def test_no_kvm_device_is_for_information(tmp_path: Path) -> None:
    check = processor.kvm_device(tmp_path / "kvm")
    assert (check.status, check.seen) == ("info", f"there is no {tmp_path}/kvm")
    assert "sudo modprobe kvm" in check.mend


def test_a_device_that_opens_proves_nothing(tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()
    check = processor.kvm_device(tmp_path / "kvm")
    assert check.status == "ok"
    assert "proves nothing" in check.meaning
    assert "not told" in check.seen


@pytest.mark.parametrize(
    ("mode", "gid", "mend"),
    [
        (0o660, 1, "`sudo usermod -aG daemon $USER`, then log out and in again"),
        (0o600, 0, "sudo chgrp kvm"),
        (0o660, 0, "sudo chgrp kvm"),  # nobody should be told to join the group root
    ],
)
def test_joining_the_devices_group_mends_a_missing_permission(
    mode: int, gid: int, mend: str, tmp_path: Path
) -> None:
    device = tmp_path / "kvm"
    device.touch()
    if os.geteuid() != 0:
        pytest.skip("needs root: gives the file to another group")
    os.chown(device, -1, gid)
    device.chmod(mode)
    assert mend in processor.join_kvm(device)


@pytest.mark.parametrize(("text", "status"), [(INTEL, "warn"), (GUEST, "info"), (ARM, "warn")])
def test_a_missing_permission_matters_where_kvm_could_work(text: str, status: str, tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch()
    check = processor.kvm_forbidden(device, text)
    assert check.status == status
    assert "sudo usermod -aG" in check.mend


# --- programs ------------------------------------------------------------------------------------


def test_qemus_version_is_seen(tmp_path: Path) -> None:
    fake = script(tmp_path / "qemu", "echo 'QEMU emulator version 9.9 (Debian)'; echo more")
    check = programs.qemu(fake)
    if check.status == "ok":  # else qemu-img is missing
        assert check.seen == f"{fake}, 9.9 (Debian)"


def test_missing_programs_are_mended_by_their_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("labkit.tools.which", lambda program: None)
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    assert "sudo apt install --no-install-recommends qemu-system-" in programs.qemu().mend
    assert programs.virtualbox().status == "info"
    assert "sudo apt install docker.io" in programs.docker([f"unix://{tmp_path}/none"]).mend
    assert "sudo apt install util-linux" in system.user_namespaces().mend


def test_virtualbox_without_its_driver_is_for_information(tmp_path: Path) -> None:
    fake = script(tmp_path / "VBoxManage", "echo 'WARNING: no module'; echo 7.2.22r1")
    check = programs.virtualbox(tmp_path / "vboxdrv", fake)
    assert (check.status, check.seen) == ("info", f"{fake} 7.2.22r1; there is no {tmp_path}/vboxdrv")
    assert "sudo modprobe vboxdrv" in check.mend
    (tmp_path / "vboxdrv").touch()
    assert programs.virtualbox(tmp_path / "vboxdrv", fake).status == "ok"


class _Version(BaseHTTPRequestHandler):
    """Answers as Docker's `GET /version` does (Engine API 1.43)."""

    def do_GET(self) -> None:  # the library's name
        body = json.dumps(
            {
                "Version": "20.10.24",
                "ApiVersion": "1.43",
                "MinAPIVersion": "1.12",
                "Platform": {"Name": "Engine"},
            }
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Path]:
    """A socket where something speaks Docker's protocol."""
    path = tmp_path / "docker.sock"
    with ThreadingUnixStreamServer(str(path), _Version) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield path
        server.shutdown()
        thread.join()


def test_a_docker_daemon_that_answers_is_ok(daemon: Path) -> None:
    check = programs.docker([f"unix://{daemon}"])
    assert (check.status, check.seen) == ("ok", f"Engine 20.10.24 answers at unix://{daemon}")


def test_the_first_daemon_that_answers_is_taken(daemon: Path, tmp_path: Path) -> None:
    urls = [f"unix://{tmp_path}/none", f"unix://{daemon}"]
    assert programs.docker(urls).status == "ok"


def test_a_dead_docker_socket_is_said(tmp_path: Path) -> None:
    (tmp_path / "docker.sock").touch()
    check = programs.docker([f"unix://{tmp_path}/docker.sock"])
    assert check.status == "info"
    assert check.seen.startswith(f"no answer at unix://{tmp_path}/docker.sock")
    assert check.mend.startswith("Optional: ")


def test_docker_is_looked_for_in_all_the_usual_places() -> None:
    places = programs.docker_urls({"XDG_RUNTIME_DIR": "/run/user/7", "HOME": "/home/u"})
    assert places[:2] == ["unix:///var/run/docker.sock", "unix:///run/user/7/docker.sock"]
    assert "unix:///run/user/7/podman/podman.sock" in places
    assert programs.docker_urls({"DOCKER_HOST": "tcp://127.0.0.1:1"}) == [""]


def test_a_docker_host_that_is_dead_is_mended_by_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:1")
    check = programs.docker()
    assert check.seen.startswith("no answer at tcp://127.0.0.1:1")
    assert "`unset DOCKER_HOST`" in check.mend


@pytest.mark.parametrize(
    ("module", "mend"), [("libvirt", "libvirt-dev pkg-config gcc python3-dev`, then "), ("lxml", "lxml")]
)
def test_a_missing_binding_is_mended_and_no_traceback(
    module: str, mend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("labkit.hypervisors.libvirt", "labkit.hypervisors.domain_xml"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("labkit.hypervisors.libvirt", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    check = programs.libvirt_daemon()
    assert check.status == "fail"
    assert mend in check.mend


# --- the system ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("available", "limit", "status"),
    [(8 * GiB, None, "ok"), (1 * GiB, None, "warn"), (GiB // 4, None, "fail"), (8 * GiB, GiB, "warn")],
)
def test_memory_is_judged_by_what_machines_need(available: int, limit: int | None, status: str) -> None:
    check = system.memory(Memory(total=16 * GiB, available=available, limit=limit))
    assert check.status == status
    assert ("docker run --memory" in check.mend) == (limit is not None)


@pytest.mark.parametrize(("free", "status"), [(20 * GiB, "ok"), (2 * GiB, "warn"), (GiB // 2, "fail")])
def test_disk_is_judged_by_the_fuller_place(free: int, status: str) -> None:
    places = {"images": Path("/a"), "disks": Path("/b")}
    check = system.disk(places, free=lambda place: free if place == Path("/b") else 100 * GiB)
    assert check.status == status
    assert "100.0 GiB free for images in /a" in check.seen
    assert ("LABKIT_HOME" in check.mend) == (status != "ok")


def test_orphans_that_stay_are_mended_by_tini(monkeypatch: pytest.MonkeyPatch) -> None:
    stays = Orphan("sh", reaped=False, seconds=0.8)
    monkeypatch.setattr("labkit.tools.which", lambda program: None)
    check = system.pid1_reaping(stays)
    assert (check.status, check.seen) == ("warn", "sh left an orphan unreaped for 0.8 s")
    assert "`sudo apt install tini`" in check.mend
    monkeypatch.setattr("labkit.tools.which", lambda program: f"/usr/bin/{program}")
    assert system.pid1_reaping(stays).status == "info"
    assert system.pid1_reaping(Orphan("init", reaped=True, seconds=0.001)).status == "ok"


def test_python_is_judged_by_version_and_environment() -> None:
    assert system.python((3, 10)).status == "fail"
    assert system.python((3, 13), in_venv=False).status == "info"
    assert system.python((3, 13), in_venv=True).status == "ok"


def test_what_jupyter_lacks_is_named() -> None:
    check = system.jupyter(("json_of_tomorrow", "pytest"))
    assert (check.status, check.seen) == ("warn", "not installed: json_of_tomorrow")
    assert "json_of_tomorrow" in check.mend


def test_pip_is_not_let_loose_on_the_systems_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.setattr(sys, "prefix", "/home/u/.venv")
    assert programs.pip_install("x") == f"`{sys.executable} -m pip install x`; or `./lab up`"
    monkeypatch.setattr(sys, "prefix", "/usr")
    assert "pip install" not in programs.pip_install("x")


@pytest.mark.parametrize(
    ("setting", "value", "mend"),
    [
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "kernel.apparmor_restrict_unprivileged_userns=0",
        ),
        ("kernel/unprivileged_userns_clone", "0", "kernel.unprivileged_userns_clone=1"),
        ("user/max_user_namespaces", "0", "user.max_user_namespaces=15000"),
        (None, "", "seccomp=unconfined"),
    ],
)
def test_forbidden_namespaces_are_mended_by_what_forbids_them(
    setting: str | None, value: str, mend: str, tmp_path: Path
) -> None:
    if setting:
        (tmp_path / setting).parent.mkdir(parents=True)
        (tmp_path / setting).write_text(f"{value}\n")
    refuse = ["sh", "-c", "echo 'unshare failed: Operation not permitted' >&2; exit 1"]
    check = system.user_namespaces(refuse, sysctl=tmp_path)
    assert check.status == "warn"
    assert check.seen.startswith("unshare failed: Operation not permitted")
    assert mend in check.mend


def test_a_container_is_told_by_its_signs() -> None:
    assert system.container([]).status == "ok"
    check = system.container(["/.dockerenv exists"])
    assert (check.status, check.seen) == ("info", "/.dockerenv exists")


# --- the report ----------------------------------------------------------------------------------

NASTY = Check("disk", "fail", "<script>alert(1)</script> & `x", "it's <b>bad</b>", "`rm <file>` & go")


def report(*checks: Check) -> Report:
    return Report(tier="tcg", checks=checks, seconds=0.5)


def test_plain_data_has_the_settled_shape() -> None:
    assert report(NASTY).as_dict() == {
        "tier": "tcg",
        "checks": [
            {
                "id": "disk",
                "status": "fail",
                "seen": NASTY.seen,
                "meaning": NASTY.meaning,
                "mend": NASTY.mend,
            }
        ],
    }


def test_html_escapes_what_was_seen() -> None:
    shown = report(NASTY)._repr_html_()
    assert "<script>" not in shown
    assert "<b>bad" not in shown
    assert "<code>rm &lt;file&gt;</code> &amp; go" in shown


def test_text_and_html_say_the_same() -> None:
    found = report(NASTY, Check("qemu", "ok", "QEMU 7", "QEMU is installed."))
    text = " ".join(str(found).split())
    shown = html.unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", found._repr_html_(), flags=re.DOTALL))
    for words in ("All of the course works", "QEMU is installed.", "QEMU 7", "✗", "fail", "1 ok", "1 failed"):
        assert words in text
        assert words in " ".join(shown.replace("\xa0", " ").split())


def test_no_line_of_the_text_is_long() -> None:
    long = Check("x", "warn", "word " * 100, "word " * 100, "word " * 100)
    assert max(len(line) for line in str(report(long)).splitlines()) <= 100


def test_a_report_is_found_in_by_id_and_says_whether_all_is_well() -> None:
    good = Check("qemu", "ok", "", "")
    assert report(good)["qemu"] is good
    assert report(good).ok
    assert not report(good, NASTY).ok
    with pytest.raises(KeyError):
        report(good)["docker"]


def test_a_check_that_raises_is_a_fail_with_evidence() -> None:
    check = checkup.failed("disk", OSError(5, "Input/output error"))
    assert (check.status, check.seen) == ("fail", "OSError: [Errno 5] Input/output error")
    ours = checkup.failed("disk", HostError("No room.", evidence="0 bytes", mend="`rm -r x`"))
    assert (ours.seen, ours.mend) == ("No room. / 0 bytes", "`rm -r x`")
