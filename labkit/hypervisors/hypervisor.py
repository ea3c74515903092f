"""What carries a VM: the small protocol that the `VM` class speaks to a hypervisor."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from labkit.guests.image import Image
from labkit.specs import VMSpec
from labkit.storage.files import Files

#: What a VM is doing, in the words of the field.
State = Literal["off", "running", "paused", "crashed", "saved", "missing"]

#: How many channel ports a VM has: as many commands can run on it at one time.
PORTS = 4


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a hypervisor is told about a VM. Paths are as the hypervisor sees them.

    Attributes:
        uuid, domain: its identity and its name at the hypervisor.
        lab: the lab that it belongs to, kept as a label.
        spec: what was asked for, every default filled in.
        image: what it boots.
        accelerator: "kvm" or "tcg".
        kernel, initrd: for direct kernel boot; None where it boots from its disk.
        disks: the image files, in the spec's order.
        seed: an ISO with cloud-init's data, or None.
        console_log: where all that the serial console prints is kept.
        variables: where UEFI keeps its variables.
        sockets: a directory of this host for its channel sockets, with a short path and mode 0700; None
            lets the hypervisor choose, and the channel is reached through libvirt.
    """

    uuid: str
    domain: str
    lab: str
    spec: VMSpec
    image: Image
    accelerator: Literal["kvm", "tcg"]
    kernel: str | None
    initrd: str | None
    disks: tuple[str, ...]
    seed: str | None
    console_log: str
    variables: str
    sockets: Path | None


@dataclass(frozen=True)
class SnapshotInfo:
    """A snapshot: its name, its parent's (None at the root), when, whether it holds memory, and a note."""

    name: str
    parent: str | None
    created: float
    memory: bool
    current: bool
    note: str = ""


class Hypervisor(Protocol):
    """A hypervisor, on this host or another. Machines are named by UUID; every call may raise
    HypervisorError, and NotFound where there is no such machine."""

    uri: str
    #: True for labkit's own daemon, which sees this host's files and sockets as the user does.
    own: bool

    def define(self, plan: Plan) -> None:
        """Make the machine known, switched off."""
        ...

    def state(self, uuid: str) -> State:
        """What it is doing; "missing" where the hypervisor does not know it."""
        ...

    def start(self, uuid: str, *, paused: bool = False) -> None:
        """Switch it on."""
        ...

    def press_power(self, uuid: str) -> None:
        """Ask the guest to shut down, by the power button."""
        ...

    def destroy(self, uuid: str) -> None:
        """Pull the plug; nothing where it is off."""
        ...

    def suspend(self, uuid: str) -> None:
        """Stop its virtual CPUs."""
        ...

    def resume(self, uuid: str) -> None:
        """Let its virtual CPUs go on; nothing where they do."""
        ...

    def why_paused(self, uuid: str) -> str:
        """What made the hypervisor pause it, as a clause; "" where somebody asked for it."""
        ...

    def reset(self, uuid: str) -> None:
        """Press the reset button."""
        ...

    def remove(self, uuid: str, lab: str) -> None:
        """Destroy it and forget it with its snapshots, if it carries this lab's label."""
        ...

    def screenshot(self, uuid: str) -> tuple[str, bytes]:
        """What its screen shows: the picture's MIME type and its bytes."""
        ...

    def xml(self, uuid: str) -> str:
        """The hypervisor's own description of it."""
        ...

    def files(self, uuid: str, directory: Path) -> Files:
        """The machine's files; `directory` is its place on this host, where they may be kept."""
        ...

    def best_accelerator(self) -> Literal["kvm", "tcg"] | None:
        """What runs guests fastest there; None where nothing does."""
        ...

    def open_port(self, uuid: str, port: int, deadline: float) -> socket.socket:
        """A stream to one of its channel ports (`deadline` on time.monotonic's clock)."""
        ...

    def agent_call(self, uuid: str, command: str, timeout: float) -> str:
        """One call of the QEMU guest agent: JSON to JSON."""
        ...

    def open_console(self, uuid: str) -> socket.socket:
        """A stream to its serial console."""
        ...

    def set_memory(self, uuid: str, size: int) -> None:
        """Resize its memory (bytes), running or not, up to its maximum."""
        ...

    def set_cpus(self, uuid: str, count: int) -> None:
        """Give it more or fewer virtual CPUs, up to its maximum; fewer from its next start on."""
        ...

    def resize_disk(self, uuid: str, index: int, size: int) -> None:
        """Grow a disk (bytes) of a running machine."""
        ...

    def snapshot(self, uuid: str, name: str, note: str) -> None:
        """Keep its state: memory, where it runs, and disks."""
        ...

    def revert(self, uuid: str, name: str) -> None:
        """Bring a snapshot's state back."""
        ...

    def delete_snapshot(self, uuid: str, name: str) -> None:
        """Forget a snapshot; its children go to its parent."""
        ...

    def snapshots(self, uuid: str) -> Sequence[SnapshotInfo]:
        """All its snapshots, parents before children."""
        ...
