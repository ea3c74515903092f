"""Guests that hang, panic, switch themselves off or fill their disks; hosts that do."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from labkit import VM, Lab
from labkit.errors import (
    CommandFailed,
    CommandTimeout,
    GuestCrashed,
    HostError,
    HypervisorError,
    LabkitError,
    MachineError,
    NotFound,
    NotRunning,
)

pytestmark = pytest.mark.qemu
Eventually = Callable[..., Any]

PANIC = "echo c > /proc/sysrq-trigger; sleep 60"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("trouble") as lab:
        yield lab


@pytest.fixture
def vm(lab: Lab) -> VM:
    return lab.vm("web").start()


def qemu(vm: VM) -> psutil.Process:
    (process,) = [
        each
        for each in psutil.process_iter(["cmdline"])
        if each.info["cmdline"] and f"guest={vm.domain}" in " ".join(each.info["cmdline"])
        if os.environ["LABKIT_HOME"] in " ".join(each.info["cmdline"])
    ]
    return process


def test_a_panic_ends_the_command_within_seconds_and_says_why(vm: VM) -> None:
    start = time.monotonic()
    with pytest.raises(GuestCrashed, match="The kernel of web panicked") as caught:
        vm.run(PANIC)
    assert time.monotonic() - start < 10
    assert "Kernel panic - not syncing: sysrq triggered crash" in caught.value.evidence
    assert vm.state == "crashed"
    start = time.monotonic()
    with pytest.raises(GuestCrashed, match="Kernel panic"):  # … and the next command's, and a file's
        vm.run("true")
    with pytest.raises(GuestCrashed):
        vm.put(b"x", "/tmp/x")
    assert time.monotonic() - start < 10
    assert vm.start().run("echo back").stdout == "back\n"


def test_a_panic_in_the_background_is_said_by_the_next_command(vm: VM, eventually: Eventually) -> None:
    vm.run("(sleep 0.5; echo c > /proc/sysrq-trigger) > /dev/null 2>&1 &")
    eventually(lambda: vm.state == "crashed")
    with pytest.raises(GuestCrashed):
        vm.run("true")


def test_reset_brings_a_crashed_machine_back(vm: VM) -> None:
    with pytest.raises(GuestCrashed):
        vm.run(PANIC)
    assert vm.reset().run("echo back").stdout == "back\n"


def test_a_crashed_machine_can_be_stopped_and_looked_at(vm: VM) -> None:
    with pytest.raises(GuestCrashed):
        vm.run(PANIC)
    assert vm.screenshot().png
    assert vm.stop().state == "off"


def test_a_guest_that_switches_itself_off_is_reported_as_that(vm: VM) -> None:
    start = time.monotonic()
    with pytest.raises(NotRunning, match="web is off"):
        vm.run("poweroff; sleep 60")
    assert time.monotonic() - start < 30
    assert vm.state == "off"


def test_a_guest_that_restarts_itself_takes_commands_again(vm: VM) -> None:
    with pytest.raises(NotRunning):
        vm.run("reboot; sleep 60", timeout=60)
    assert vm.run("echo back", timeout=60).stdout == "back\n"


def test_pulling_the_plug_on_qemu_is_noticed_and_synced_data_survives(vm: VM, eventually: Eventually) -> None:
    vm.run("echo kept > /data/file; sync")
    process = qemu(vm)
    said: list[BaseException] = []

    def work() -> None:
        try:
            vm.run("echo up > /tmp/up; sleep 60")
        except MachineError as exc:
            said.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    eventually(lambda: vm.run("cat /tmp/up", check=False).ok)
    start = time.monotonic()
    process.kill()
    thread.join()
    assert time.monotonic() - start < 10
    assert isinstance(said[0], NotRunning)
    eventually(lambda: vm.state == "off")
    assert vm.start().run("cat /data/file").stdout == "kept\n"


def test_a_guest_that_hangs_ends_the_command_at_its_deadline(vm: VM) -> None:
    """Its agent is stopped from inside, as a guest that is stuck looks from outside."""
    start = time.monotonic()
    with pytest.raises(CommandTimeout) as caught:
        vm.run("echo begun; kill -STOP $(pidof labkit-agent); sleep 60", timeout=4)
    assert time.monotonic() - start < 10
    assert caught.value.stdout == b"begun\n"
    assert "did not answer" in caught.value.message
    with pytest.raises(CommandTimeout):
        vm.run("true", timeout=2)
    assert vm.reset().run("echo back").stdout == "back\n"


def test_a_stopped_qemu_ends_the_command_at_its_deadline(vm: VM) -> None:
    """Nothing answers, the hypervisor's monitor neither."""
    process = qemu(vm)
    process.suspend()
    start = time.monotonic()
    try:
        with pytest.raises((CommandTimeout, NotRunning)):
            vm.run("true", timeout=3)
    finally:
        process.resume()
    assert time.monotonic() - start < 30
    assert vm.run("echo back").stdout == "back\n"


def test_a_guest_that_does_not_come_up_is_left_to_be_looked_at(lab: Lab) -> None:
    vm = lab.vm("slow")
    with pytest.raises(LabkitError, match=r"was not up within 0\.1 s") as caught:
        vm.start(timeout=0.1)
    assert "start(timeout=" in caught.value.mend
    assert vm.state == "running"
    assert vm.start().run("echo up").stdout == "up\n"
    vm.delete()


def test_a_guest_fills_its_disk(lab: Lab) -> None:
    vm = lab.vm("small", disk="16 MiB").start()
    with pytest.raises(CommandFailed, match="No space left on device"):
        vm.run("dd if=/dev/zero of=/data/big bs=1M count=64")
    assert vm.run("rm /data/big; echo ok > /data/small; cat /data/small").stdout == "ok\n"
    vm.delete()


def test_a_disk_image_that_is_gone_is_said(lab: Lab) -> None:
    vm = lab.vm("torn")
    next(vm._entry.directory.glob("disk0*")).unlink()
    with pytest.raises(LabkitError, match=r"disk0\.qcow2"):
        vm.start()
    vm.delete()


@pytest.mark.parametrize("verb", ["delete", "close"])
def test_a_machine_that_is_removed_ends_its_commands(verb: str, eventually: Eventually) -> None:
    with Lab("removed") as lab:
        vm = lab.vm("web").start()
        said: list[BaseException] = []

        def work() -> None:
            try:
                vm.run("echo up > /tmp/up; sleep 60")
            except LabkitError as exc:
                said.append(exc)

        thread = threading.Thread(target=work)
        thread.start()
        eventually(lambda: vm.run("cat /tmp/up", check=False).ok)
        start = time.monotonic()
        vm.delete() if verb == "delete" else lab.close()
        thread.join()
        assert time.monotonic() - start < 10
        assert isinstance(said[0], NotRunning | NotFound)


# The host's own disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs something else: mounting a small file system takes root")
    place = Path(os.environ["LABKIT_HOME"]) / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m,mode=0700", "labkit-test", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)
    place.rmdir()


FULL_HOST = """if True:
    import os, sys, time, labkit
    from labkit.errors import *
    with labkit.Lab("full") as lab:
        vm = lab.vm("web").start()
        vm.run("echo kept > /data/kept; sync")
        try:
            vm.run("dd if=/dev/urandom of=/data/big bs=1M count=64; sync", timeout=120)
            sys.exit("the disk is not full")
        except NotRunning as exc:
            assert "the host's disk is full" in exc.message, exc
            assert ".resume()" in exc.mend, exc
        assert vm.state == "paused"
        try:
            for n in range(99):  # whatever is left
                lab.vm(f"more{n}")
            sys.exit("all fitted")
        except (HostError, ToolError, HypervisorError) as exc:
            assert "No space left" in str(exc), exc
        before = sorted(lab.vms)
        os.remove(os.environ["BALLAST"])
        vm.resume()
        assert vm.run("cat /data/kept", timeout=60).stdout == "kept\\n"
        left = [name for name in os.listdir(vm._entry.directory.parent) if name.startswith("vm-")]
        assert sorted(left) == [f"vm-{name}" for name in before], (left, before)
    print("done")
"""


def test_a_full_disk_of_the_host_pauses_the_machine_and_is_said(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(20 << 20))
    done = subprocess.run(
        [sys.executable, "-c", FULL_HOST],
        env={**os.environ, "LABKIT_HOME": str(small_disk), "BALLAST": str(ballast)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.stdout == "done\n", done.stdout + done.stderr
    stop_daemon(small_disk)


def stop_daemon(home: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", "from labkit.hypervisors import daemon; daemon.stop()"],
        env={**os.environ, "LABKIT_HOME": str(home)},
        check=True,
    )


def test_a_ledger_that_cannot_be_written_is_a_host_error(small_disk: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("LABKIT_HOME", str(small_disk))
    with (small_disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 12)):
            pass
    with pytest.raises(HostError) as caught:
        Lab("full")
    assert caught.value.mend


# libvirt's daemon


def daemon_pid() -> int:
    from labkit.hypervisors import daemon

    pid = daemon._pid()
    assert pid
    return pid


def test_a_killed_daemon_is_started_again_and_finds_the_machine(vm: VM, eventually: Eventually) -> None:
    before = vm.run("cat /proc/sys/kernel/random/boot_id").stdout
    killed = daemon_pid()
    os.kill(killed, signal.SIGKILL)
    assert vm.run("echo still").stdout == "still\n"
    assert vm.state == "running"
    assert daemon_pid() != killed
    assert vm.run("cat /proc/sys/kernel/random/boot_id").stdout == before
    vm.snapshot("after")
    vm.revert("after")
    vm.delete_snapshot("after")


def test_a_daemon_killed_during_a_command_does_not_end_it(vm: VM) -> None:
    killed = []

    def on_output(_: Any, data: bytes) -> None:
        if data == b"one\n":
            killed.append(daemon_pid())
            os.kill(killed[0], signal.SIGKILL)

    assert vm.run("echo one; sleep 2; echo two", on_output=on_output).stdout == "one\ntwo\n"
    assert killed


@pytest.mark.soak
def test_a_daemon_killed_while_machines_start_costs_no_machine(lab: Lab, eventually: Eventually) -> None:
    vms = [lab.vm(f"many{n}") for n in range(3)]
    killer = threading.Timer(0.4, lambda: os.kill(daemon_pid(), signal.SIGKILL))
    killer.start()
    for vm in vms:
        with contextlib.suppress(HypervisorError):  # it was in the middle of this one
            vm.start()
    killer.join()
    for vm in vms:
        eventually(lambda vm=vm: vm.start().run("echo up").ok)
        vm.delete()
