"""The guests that labkit builds, booted for real by plain QEMU."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pytest

from labkit import guests
from labkit.channel.session import Session, connect_unix
from labkit.errors import MachineError
from labkit.guests.image import Image

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="drives the PC's devices"),
]

AGENT_PORT = "org.qemu.guest_agent.0"
OVMF = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")


class Machine:
    """One QEMU process and the sockets to it; ended with the block, whatever happens."""

    def __init__(self, image: Image, directory: Path, *extra: str, boot: Sequence[str] | None = None) -> None:
        self.directory = directory
        self._session: Session | None = None
        console = (
            f"socket,id=console,path={directory}/console,server=on,wait=off,logfile={directory}/console.log"
        )
        direct = ("-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", image.cmdline)
        argv = [
            *("qemu-system-x86_64", "-machine", "pc", "-accel", "tcg", "-nodefaults", "-no-user-config"),
            *("-display", "none", "-m", "256M"),
            *("-chardev", console, "-serial", "chardev:console"),
            *("-qmp", f"unix:{directory}/qmp,server=on,wait=off", "-device", "virtio-serial"),
            *self._port(0, "org.labkit.0"),
            *self._port(1, AGENT_PORT),
            *(direct if boot is None else boot),
            *extra,
        ]
        self.process = subprocess.Popen(argv)
        self.qmp = _Qmp(self.connect("qmp"))

    def _port(self, number: int, name: str) -> tuple[str, ...]:
        chardev = f"socket,id=port{number},path={self.directory}/port{number},server=on,wait=off"
        return ("-chardev", chardev, "-device", f"virtserialport,chardev=port{number},name={name}")

    def connect(self, name: str) -> socket.socket:
        return connect_unix(self.directory / name, time.monotonic() + 20)

    def run(self, command: str, *, timeout: float = 60) -> str:
        """A command's standard output, from a guest that need not be up yet."""
        if self._session is None:
            self._session = Session(self.connect("port0"))
            self._session.hello(time.monotonic() + 180)
        return self._session.run(["/bin/sh", "-c", command], timeout=timeout).stdout.decode()

    def wait_for(self, command: str, expected: str, *, timeout: float = 60) -> None:
        """Run a command until its output holds what is expected."""
        deadline = time.monotonic() + timeout
        while expected not in (seen := self.run(command)):
            assert time.monotonic() < deadline, f"{command!r} says {seen!r}, not {expected!r}"
            time.sleep(0.1)

    @property
    def console(self) -> str:
        return (self.directory / "console.log").read_text(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._session:
            self._session.close()
        self.qmp.close()
        self.process.kill()
        self.process.wait()


class _Qmp:
    """QEMU's monitor: commands with their answers, and the wait for an event."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        self._socket = connection
        self._file = connection.makefile("rwb")
        self._events: list[dict[str, Any]] = []
        self._file.readline()  # the greeting
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: object) -> Any:
        request = {"execute": command, "arguments": arguments}
        self._file.write(json.dumps(request).encode() + b"\n")
        self._file.flush()
        while True:
            answer = self._read()
            if "event" in answer:
                self._events.append(answer)
            else:
                assert "return" in answer, answer
                return answer["return"]

    def wait(self, event: str, *, timeout: float) -> dict[str, Any]:
        self._socket.settimeout(timeout)
        while True:
            for seen in self._events:
                if seen["event"] == event:
                    return seen
            self._events.append(self._read())

    def _read(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self._file.readline())
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._socket.close()


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short, since it holds sockets."""
    with tempfile.TemporaryDirectory(prefix="lkg-", dir="/tmp") as name:
        yield Path(name)


Boot = Callable[..., Machine]


@pytest.fixture
def boot(directory: Path) -> Iterator[Boot]:
    """Boots an image; what it booted ends with the test."""
    with contextlib.ExitStack() as stack:

        def start(image: Image, *extra: str, boot: Sequence[str] | None = None) -> Machine:
            return stack.enter_context(Machine(image, directory, *extra, boot=boot))

        yield start


@pytest.fixture(scope="module")
def pocket() -> Image:
    return guests.get("pocket")


@pytest.fixture(scope="module")
def debian() -> Image:
    return guests.get("debian")


def overlay(image: Image, directory: Path, size: str | None = None) -> tuple[str, ...]:
    """QEMU's options for a disk that is an overlay of the image's."""
    path = directory / "disk.qcow2"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(image.disk), "-F", "qcow2", str(path)]
    subprocess.run([*argv, *([size] if size else [])], check=True)
    return ("-drive", f"if=none,id=disk,file={path}", "-device", "virtio-blk-pci,drive=disk")


# --- pocket --------------------------------------------------------------------------------------


def test_the_pocket_guest_answers_and_is_what_it_says(pocket: Image, boot: Boot) -> None:
    machine = boot(pocket, "-smbios", "type=1,serial=labkit:web-1")

    assert machine.run("hostname; cat /etc/hostname").split() == ["web-1", "web-1"]
    assert machine.run("cat /proc/1/comm").strip() == "init"
    for kind, where in [("devpts", "/dev/pts"), ("tmpfs", "/dev/shm"), ("cgroup2", "/sys/fs/cgroup")]:
        assert f" {where} {kind} " in machine.run("cat /proc/mounts")
    assert "127.0.0.1" in machine.run("ip -4 addr show lo")
    assert machine.run("cat /proc/sys/kernel/sysrq").strip() == "1"


def test_the_host_name_can_come_by_the_command_line(pocket: Image, boot: Boot) -> None:
    direct = ("-kernel", str(pocket.kernel), "-initrd", str(pocket.initrd))
    append = ("-append", f"{pocket.cmdline} labkit.hostname=by-cmdline")

    assert boot(pocket, boot=[*direct, *append]).run("hostname").strip() == "by-cmdline"


def test_disk_and_network_are_there_with_the_first_command(
    pocket: Image, boot: Boot, directory: Path
) -> None:
    disk = directory / "data.img"
    with disk.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", str(disk)], check=True)
    machine = boot(
        pocket,
        *("-drive", f"if=none,id=disk,file={disk},format=raw", "-device", "virtio-blk-pci,drive=disk"),
        *("-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net,romfile="),
    )

    first = machine.run("cat /proc/mounts; ls /sys/class/net")

    assert "/dev/vda /data ext4 rw" in first
    assert "eth0" in first.split()
    assert "lease of 10.0.2.15 obtained" in machine.run("udhcpc -i eth0 -n -q 2>&1")
    machine.run("echo kept >/data/file; sync")


def test_the_power_button_switches_it_off_quickly(pocket: Image, boot: Boot) -> None:
    machine = boot(pocket)
    # A press is lost that comes while it starts: what counts is that it has the button's device open.
    machine.wait_for("for p in $(pidof acpid); do ls -l /proc/$p/fd; done", "/dev/input/event1")
    began = time.monotonic()

    machine.qmp("system_powerdown")
    event = machine.qmp.wait("SHUTDOWN", timeout=20)

    assert event["data"] == {"guest": True, "reason": "guest-shutdown"}
    # Two seconds on a quiet computer; the rest is for one that other tests keep busy.
    assert time.monotonic() - began < 6


@pytest.mark.parametrize("device", ["pvpanic", "pvpanic-pci"])
def test_a_panic_is_seen_by_the_host(pocket: Image, boot: Boot, device: str) -> None:
    machine = boot(pocket, "-device", device, "-action", "panic=pause")
    machine.wait_for("lsmod", device.replace("-", "_"))

    with contextlib.suppress(MachineError):
        machine.run("echo c >/proc/sysrq-trigger", timeout=1)

    assert machine.qmp.wait("GUEST_PANICKED", timeout=20)["data"]["action"] == "pause"
    assert "Kernel panic" in machine.console or "sysrq" in machine.console


def test_the_console_is_a_shell_with_job_control(pocket: Image, boot: Boot) -> None:
    machine = boot(pocket, "-smbios", "type=1,serial=labkit:web-1")
    machine.run("true")
    with machine.connect("console") as console:
        console.setblocking(True)
        console.sendall(b"\n")
        _expect(console, "root@web-1:~#")
        console.sendall(b"sleep 1000\n")
        machine.wait_for("ps", "sleep 1000")
        console.sendall(b"\x03echo interrupted-$((6*7)); tty\n")
        said = _expect(console, "/dev/ttyS0")

    assert "interrupted-42" in said
    assert "sleep 1000" not in machine.run("ps")


def _expect(console: socket.socket, text: str, *, timeout: float = 30) -> str:
    console.settimeout(timeout)
    seen = ""
    while text not in seen:
        seen += console.recv(4096).decode(errors="replace")
    return seen


def test_the_qemu_guest_agent_serves_too(pocket: Image, boot: Boot) -> None:
    machine = boot(pocket)
    machine.run("true")
    with machine.connect("port1") as port:
        port.setblocking(True)
        port.sendall(b'{"execute": "guest-get-host-name"}\n')
        port.settimeout(30)

        assert json.loads(port.recv(4096)) == {"return": {"host-name": "pocket"}}


def test_processors_and_memory_that_are_plugged_in_come_online(pocket: Image, boot: Boot) -> None:
    machine = boot(pocket, "-smp", "1,maxcpus=2", "-m", "256M,slots=2,maxmem=1G")
    before = int(machine.run("grep MemTotal /proc/meminfo").split()[1])

    machine.qmp(
        "device_add", driver="qemu64-x86_64-cpu", id="cpu1", **{"socket-id": 0, "core-id": 1, "thread-id": 0}
    )
    machine.qmp("object-add", **{"qom-type": "memory-backend-ram", "id": "more", "size": 128 << 20})
    machine.qmp("device_add", driver="pc-dimm", id="dimm", memdev="more")

    machine.wait_for("nproc", "2")
    deadline = time.monotonic() + 30
    while int(machine.run("grep MemTotal /proc/meminfo").split()[1]) < before + 120_000:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_modules_can_be_loaded_at_run_time(pocket: Image, boot: Boot) -> None:
    machine = boot(pocket)

    assert (
        machine.run("modprobe -a bridge tun overlay vfat squashfs isofs 8021q && echo loaded").strip()
        == "loaded"
    )


def test_a_file_system_is_mounted_without_loading_its_module_first(pocket: Image, boot: Boot) -> None:
    machine = boot(pocket)
    machine.wait_for("lsmod", "loop")
    make = "dd if=/dev/zero of=/tmp/f bs=1M count=8 2>/dev/null; mkdosfs /tmp/f"

    assert machine.run(f"{make}; mount -o loop /tmp/f /mnt && echo mounted").strip() == "mounted"


# --- debian --------------------------------------------------------------------------------------


def _checks_of_a_whole_system(machine: Machine) -> None:
    assert machine.run("hostname").strip() == "deb-1"
    assert machine.run("cat /proc/1/comm").strip() == "systemd"
    assert machine.run("systemctl is-system-running --wait", timeout=170).strip() == "running"
    assert machine.run("ls /etc/ssh/ssh_host_* 2>/dev/null") == ""
    assert len(machine.run("cat /etc/machine-id").strip()) == 32


SERIAL = ("-m", "512M", "-smp", "2", "-smbios", "type=1,serial=labkit:deb-1")


@pytest.mark.timeout(600)
def test_debian_boots_directly_and_takes_the_whole_of_a_larger_disk(
    debian: Image, boot: Boot, directory: Path
) -> None:
    machine = boot(debian, *SERIAL, *overlay(debian, directory, "6G"), "-device", "pvpanic")

    _checks_of_a_whole_system(machine)
    assert int(machine.run("df --output=size -B1M /").split()[1]) > 5500
    machine.qmp("system_powerdown")
    assert machine.qmp.wait("SHUTDOWN", timeout=60)["data"]["reason"] == "guest-shutdown"


@pytest.mark.timeout(600)
def test_debian_boots_from_its_disk_by_bios(debian: Image, boot: Boot, directory: Path) -> None:
    machine = boot(debian, *SERIAL, *overlay(debian, directory), boot=[])

    _checks_of_a_whole_system(machine)
    assert machine.run("test -d /sys/firmware/efi || echo bios").strip() == "bios"


@pytest.mark.timeout(600)
@pytest.mark.skipif(not OVMF.exists(), reason="needs the package ovmf")
def test_debian_boots_from_its_disk_by_uefi(debian: Image, boot: Boot, directory: Path) -> None:
    shutil.copy(OVMF.with_name("OVMF_VARS_4M.fd"), directory / "vars.fd")
    firmware = (
        *("-drive", f"if=pflash,format=raw,readonly=on,file={OVMF}"),
        *("-drive", f"if=pflash,format=raw,file={directory}/vars.fd"),
    )
    machine = boot(debian, *SERIAL, *overlay(debian, directory), boot=firmware)

    _checks_of_a_whole_system(machine)
    assert machine.run("test -d /sys/firmware/efi && echo uefi").strip() == "uefi"


# --- the cache -----------------------------------------------------------------------------------


def test_a_cached_image_is_had_in_milliseconds_and_runs_no_program(pocket: Image) -> None:
    script = (
        "import subprocess, time\n"
        "from labkit import guests\n"
        "def refuse(*args, **kw): raise AssertionError(args)\n"
        "subprocess.Popen = subprocess.run = refuse\n"
        "best = 1\n"
        "for _ in range(5):\n"
        "    began = time.perf_counter(); guests.get('pocket')\n"
        "    best = min(best, time.perf_counter() - began)\n"
        "print(best)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert float(done.stdout) < 0.010


def test_the_same_packages_give_the_same_pocket_guest(
    pocket: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = Path(os.environ["LABKIT_CACHE"]) / "packages"
    shutil.copytree(packages, tmp_path / "packages")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))

    again = guests.get("pocket")

    for mine, theirs in ((again.kernel, pocket.kernel), (again.initrd, pocket.initrd)):
        assert mine is not None
        assert theirs is not None
        assert mine.read_bytes() == theirs.read_bytes()


def test_refreshing_what_is_up_to_date_builds_nothing(pocket: Image) -> None:
    assert guests.get("pocket", refresh=True) == pocket
