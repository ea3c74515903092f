"""What a guest image is: the files that a VM boots, and what the VM needs to be told about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

#: How commands reach a guest: our own channel, the QEMU guest agent, or not at all (console only).
ChannelKind = Literal["labkit", "agent", "none"]


@dataclass(frozen=True, kw_only=True)
class Image:
    """The files of one guest image, ready on this computer.

    Attributes:
        name: as in `VMSpec.image`.
        version: what it was made from, for people ("linux 6.1.176-1, busybox 1.35.0-4").
        arch: QEMU's name of the architecture: "x86_64", "aarch64".
        kernel, initrd, cmdline: for direct kernel boot; None/"" where the image boots from its disk only.
        disk: a qcow2 that each VM's first disk is an overlay of; None where the system is in the initrd.
        console: the guest's serial console device, "ttyS0" or "ttyAMA0".
        channel: how commands reach it.
        memory: the least memory that it runs well with, in bytes, used where the spec names none.
        disk_size: the size of the VM's first disk in bytes, used where the spec names none.
        boots: the ways in which it can boot, the default first.
        firmware: the firmware that it can boot its disk with, the default first.
        cloud_init: True where a cloud-init seed must be attached on first boot.
        up: seconds in which it should be up under TCG on a slow computer (a deadline, not a promise).
    """

    name: str
    version: str
    arch: str
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    disk: Path | None = None
    console: str = "ttyS0"
    channel: ChannelKind = "labkit"
    memory: int
    disk_size: int
    boots: tuple[Literal["kernel", "disk"], ...] = ("kernel",)
    firmware: tuple[Literal["bios", "uefi"], ...] = ("bios",)
    cloud_init: bool = False
    up: float = 60.0
