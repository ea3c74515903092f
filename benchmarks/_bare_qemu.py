"""The same guest under QEMU alone: the floor that labkit's own figures are held against."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from labkit import guests
from labkit.channel.session import Session, connect_unix
from labkit.hypervisors.hypervisor import PORTS
from labkit.specs import DiskSpec
from labkit.storage import qemu_img
from labkit.tools import require


def command(directory: Path, *, memory: int, disk: Path) -> list[str]:
    """QEMU's arguments for the pocket guest with the devices that labkit gives it."""
    image = guests.get("pocket")
    words = [
        require("qemu-system-x86_64", package="qemu-system-x86"),
        *("-machine", "pc", "-accel", "tcg", "-cpu", "max", "-nodefaults", "-display", "none"),
        *("-m", str(memory >> 20), "-smp", "1,maxcpus=4"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", image.cmdline),
        *("-smbios", "type=1,serial=labkit:bare"),
        *("-drive", f"file={disk},if=none,id=d0,format=qcow2,discard=unmap"),
        *("-device", "virtio-blk-pci,drive=d0", "-device", "VGA", "-device", "virtio-balloon-pci"),
        *("-object", "rng-random,id=r0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=r0"),
        *("-device", "pvpanic", "-chardev", f"file,id=s0,path={directory}/console.log"),
        *("-device", "isa-serial,chardev=s0", "-device", "virtio-serial-pci"),
    ]
    names = [*(f"org.labkit.{port}" for port in range(PORTS)), "org.qemu.guest_agent.0"]
    for number, name in enumerate(names):
        words += [
            *("-chardev", f"socket,id=c{number},path={directory}/{number}.sock,server=on,wait=off"),
            *("-device", f"virtserialport,chardev=c{number},name={name}"),
        ]
    return words


def boot(memory: int) -> float:
    """Seconds from starting QEMU to the first command's answer on the channel; the guest is then ended."""
    with tempfile.TemporaryDirectory(prefix="lk-bare-", dir="/tmp") as name:
        directory = Path(name)
        disk = directory / "disk.qcow2"
        qemu_img.create(disk, DiskSpec(size=1 << 30, filesystem="ext4"))
        argv = command(directory, memory=memory, disk=disk)
        begun = time.perf_counter()
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process:
            try:
                deadline = time.monotonic() + 60
                with connect_unix(directory / "0.sock", deadline) as connection:
                    session = Session(connection)
                    session.hello(deadline)
                    session.run(["true"])
                    seconds = time.perf_counter() - begun
            finally:
                process.kill()
        shutil.rmtree(directory, ignore_errors=True)
    return seconds
