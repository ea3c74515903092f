"""A virtual machine: a handle on something that exists at a hypervisor."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import socket
import tempfile
import threading
import time
import uuid as uuids
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import psutil

from labkit import guests, paths, state
from labkit.channel.pool import Pool
from labkit.channel.qga import AgentChannel
from labkit.errors import (
    BootTimeout,
    CommandTimeout,
    Conflict,
    GuestCrashed,
    HostError,
    NotFound,
    NotRunning,
    SpecError,
)
from labkit.guests import cloud
from labkit.guests.image import Image
from labkit.hypervisors import accelerator
from labkit.hypervisors.connections import connect
from labkit.hypervisors.hypervisor import PORTS, Hypervisor, Plan, SnapshotInfo, State
from labkit.machines.base import BaseMachine
from labkit.machines.machine import Completed, OnOutput
from labkit.machines.screenshot import Screenshot
from labkit.specs import VMSpec, check_name, format_size, load_vm, parse_size
from labkit.state import Entry
from labkit.storage.files import Files

_pools: dict[str, Pool] = {}
_pools_lock = threading.Lock()


def _after_fork_in_child() -> None:
    global _pools_lock  # noqa: PLW0603  # another thread of the parent may have held it
    _pools_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)

#: The short names of a VM's files beside its disks.
_CONSOLE_LOG = "console.log"
_MAKE_AGAIN = "Make it again: lab.vm(…)"
_SEED = "seed.iso"

_STOP_TIMEOUT = 30.0
#: Seconds after which the power button is pressed again: a guest that is still booting does not hear it.
_PRESS_AGAIN = 2.0
#: Seconds for which a command goes on waiting for a machine that is paused: a snapshot pauses it too.
_PAUSE_PATIENCE = 2.0
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


class VM(BaseMachine):
    """A virtual machine of a lab; `Lab.vm` makes it or finds it.

    It holds nothing that must be closed: the machine is the hypervisor's, and goes with its lab.
    """

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        #: Since when it has been seen paused, and when last.
        self._paused: tuple[float, float] | None = None

    # What it is

    @property
    def name(self) -> str:
        return self._entry.name

    @property
    def lab(self) -> str:
        """The name of the lab that it belongs to."""
        return self._entry.lab

    @property
    def uuid(self) -> str:
        """Its identity at the hypervisor."""
        return self._entry.uuid

    @property
    def domain(self) -> str:
        """Its name at the hypervisor, as `virsh list` shows it."""
        return str(self._entry.data["domain"])

    @property
    def spec(self) -> VMSpec:
        """What was asked for, changed by what `resize` did since."""
        return load_vm({**self._entry.data["spec"], **self._entry.data.get("resized", {})})

    @property
    def asked(self) -> VMSpec:
        """What was asked for when it was made."""
        return load_vm(self._entry.data["spec"])

    @property
    def patience(self) -> float:
        """Seconds within which its image should be up on a slow computer."""
        return self._image.up

    @property
    def state(self) -> State:
        """What it is doing: "off", "running", "paused", "crashed" or "saved"."""
        return self._hypervisor.state(self.uuid)

    @property
    def accelerator(self) -> Literal["kvm", "tcg"]:
        """What runs its instructions: "kvm", or "tcg" where they are emulated."""
        return "kvm" if 'type="kvm"' in self.xml().partition(">")[0].replace("'", '"') else "tcg"

    @property
    def pid(self) -> int | None:
        """The process on this host that is the machine (QEMU); None where it is off or on another host."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if self.uuid in words and "-uuid" in words:
                return int(process.pid)
        return None

    def xml(self) -> str:
        """The hypervisor's own description of it (libvirt's domain XML)."""
        return self._hypervisor.xml(self.uuid)

    def __repr__(self) -> str:
        return f"<VM {self.spec.describe()} ({self.state})>"

    # Its life

    def start(self, *, timeout: float | None = None) -> Self:
        """Switch it on and wait until it takes commands; nothing where it is on already.

        Arguments:
            timeout: seconds until it must be up; by default what its image needs on a slow computer.

        Raises:
            BootTimeout: it was not up by then; it is left running, to be looked at.
            GuestCrashed: its kernel panicked on the way up.
            NotFound: it was deleted.
        """
        self._check_there()
        with state.lock_file(self._entry.directory / "power.lock"):  # two may start it at one time
            match self.state:
                case "running":
                    pass
                case "paused":
                    self._hypervisor.resume(self.uuid)
                case "crashed":
                    self._hypervisor.destroy(self.uuid)
                    self._boot()
                case _:
                    self._boot()
        self._wait_ready(self._image.up if timeout is None else timeout)
        return self

    def stop(self, *, timeout: float = _STOP_TIMEOUT) -> Self:
        """Switch it off: ask the guest by the power button, wait, and pull the plug at the deadline."""
        if self.state == "paused":
            self._hypervisor.resume(self.uuid)
        deadline = time.monotonic() + timeout
        while self.state == "running" and (now := time.monotonic()) < deadline:
            with contextlib.suppress(NotRunning):
                self._hypervisor.press_power(self.uuid)
            self._wait_while("running", min(deadline, now + _PRESS_AGAIN))
        return self.destroy()

    def destroy(self) -> Self:
        """Pull the plug: what the guest had not written to its disks is lost."""
        self._hypervisor.destroy(self.uuid)
        self._disconnect()
        return self

    def pause(self) -> Self:
        """Stop its virtual CPUs; memory stays as it is."""
        self._hypervisor.suspend(self.uuid)
        return self

    def resume(self) -> Self:
        """Let a paused machine go on; nothing where it runs."""
        self._hypervisor.resume(self.uuid)
        return self

    def reset(self, *, timeout: float | None = None) -> Self:
        """Press the reset button, and wait until it takes commands again."""
        self._hypervisor.reset(self.uuid)
        self._hypervisor.resume(self.uuid)  # it may have been paused, or stopped by a panic
        self._disconnect()
        self._wait_ready(self._image.up if timeout is None else timeout)
        return self

    def delete(self) -> None:
        """Remove it for good, with its disks, snapshots and logs; nothing where that was done."""
        if self._entry.current():
            with state.locked(self.lab):
                self.remove()

    # What it does

    def _execute(
        self,
        argv: tuple[str, ...],
        *,
        input: bytes | BinaryIO | None,
        timeout: float | None,
        cwd: str | None,
        env: Mapping[str, str],
        on_output: OnOutput | None,
        keep: bool,
    ) -> Completed:
        channel = self._channel()
        try:
            result = channel.run(
                argv, input=input, timeout=timeout, cwd=cwd, env=env, on_output=on_output, keep=keep
            )
        except CommandTimeout as exc:
            exc.evidence = exc.evidence or self._console_tail()
            raise
        return Completed(argv, result.returncode, result.stdout, result.stderr, result.seconds)

    @property
    def console_log(self) -> str:
        """What its serial console printed since it was switched on last, without terminal controls."""
        return _CONTROL.sub("", self._files.read(_CONSOLE_LOG).decode(errors="replace"))

    def open_console(self) -> socket.socket:
        """A stream to its serial console; whoever had one before loses it.

        Raises:
            NotRunning: it is off.
        """
        return self._hypervisor.open_console(self.uuid)

    def screenshot(self) -> Screenshot:
        """What its screen shows now.

        Raises:
            NotRunning: it is off.
        """
        _, data = self._hypervisor.screenshot(self.uuid)
        return Screenshot(self.name, data)

    # Its size

    def resize(self, *, memory: str | int | None = None, cpus: int | None = None) -> Self:
        """Give it more or less memory or CPUs, while it runs or off.

        A running guest gives memory back when its balloon driver gets to it. CPUs that are taken away
        stay in a running machine, switched off by its guest, until its next start. Both can grow up to
        the `max_memory` and `max_cpus` that the machine was made with.

        Raises:
            SpecError: it is more than the machine's maximum, or less memory than its guest can live with.
        """
        self._check_there()
        before = self.spec
        changes: dict[str, Any] = {}
        if memory is not None:
            # Kept, since by default it is what the machine began with.
            changes["max_memory"] = before.max_memory or before.memory
            changes["memory"] = parse_size(memory)
            self._check_most("memory", changes["memory"], changes["max_memory"], format_size)
            self._check_least(changes["memory"])
        if cpus is not None:
            changes["cpus"] = cpus
            if isinstance(cpus, int):
                self._check_most("cpus", cpus, before.max_cpus or before.cpus, str)
        wanted = load_vm({**before.model_dump(), **changes})
        if memory is not None:
            self._hypervisor.set_memory(self.uuid, wanted.memory)
        if cpus is not None:
            self._hypervisor.set_cpus(self.uuid, wanted.cpus)
            if self.state == "running":
                self.run(["/bin/sh", "-c", _USE_CPUS, "cpus", str(wanted.cpus)])
        self._update(resized={**self._check_there().data.get("resized", {}), **changes})
        return self

    def resize_disk(self, size: str | int, *, disk: int = 0) -> Self:
        """Grow a disk, while the machine runs or off; the guest's file system is the guest's to grow.

        Arguments:
            size: the new size, bytes or text.
            disk: which one, counted from 0.

        Raises:
            SpecError: there is no such disk, or it would shrink.
        """
        self._check_there()
        wanted = parse_size(size)
        disks = self._disks()
        if not 0 <= disk < len(disks):
            raise SpecError(f"{self.name} has no disk {disk}.", mend=f"It has {len(disks)}, counted from 0.")
        files = self._files
        now = files.size(disks[disk])
        if wanted < now:
            raise SpecError(
                f"The disk has {format_size(now)} and cannot shrink to {format_size(wanted)}.",
                mend="Shrinking would cut off data. Make a smaller disk and copy the files.",
            )
        if self.state in ("running", "paused", "crashed"):
            self._hypervisor.resize_disk(self.uuid, disk, wanted)
        else:
            files.resize(disks[disk], wanted)
        return self

    # Its past

    def snapshot(self, name: str, *, note: str = "") -> SnapshotInfo:
        """Keep its state under a name: disks, and memory where it runs.

        Raises:
            Conflict: it has a snapshot of that name.
        """
        check_name(name, "snapshot")
        if any(snapshot.name == name for snapshot in self.snapshots):
            raise Conflict(
                f"{self.name} has a snapshot named {name} already.",
                mend=f'Revert to it, give another name, or delete it: .delete_snapshot("{name}")',
            )
        self._hypervisor.snapshot(self.uuid, name, note)
        return self._snapshot(name)

    def revert(self, name: str) -> Self:
        """Bring a snapshot's state back; what happened since is lost.

        A machine that ran when the snapshot was taken runs on from that instant.
        """
        self._snapshot(name)
        self._hypervisor.revert(self.uuid, name)
        self._disconnect()
        if self.state == "running":
            self._wait_ready(self._image.up)
            self._refresh_guest()
        return self

    def delete_snapshot(self, name: str) -> None:
        """Forget a snapshot; snapshots that came after it stay."""
        self._snapshot(name)
        self._hypervisor.delete_snapshot(self.uuid, name)

    @property
    def snapshots(self) -> list[SnapshotInfo]:
        """All its snapshots, parents before children."""
        return list(self._hypervisor.snapshots(self.uuid))

    def clone(self, name: str) -> VM:
        """Make a machine of its own from this one's disks as they are now, or return the one that is there.

        It is made switched off. A running machine is paused while its disks are copied. The clone has its
        own identity (UUID and host name) and shares nothing with this machine.

        Raises:
            Conflict: the lab has a machine of that name that is no clone of this one.
        """
        check_name(name)
        self._check_there()
        spec = load_vm({**self.spec.model_dump(), "name": name})
        with state.locked(self.lab):
            if there := state.lab(self.lab).find("vm", name):
                if there.data.get("cloned_from") == self.uuid:
                    return VM(there)
                raise Conflict(
                    f"The lab {self.lab} has a machine named {name} already, no clone of {self.name}.",
                    mend="Give the clone another name.",
                )
            clone = VM(new_entry(self.lab, spec, self._entry.uri, cloned_from=self.uuid).save())
            try:
                with self.frozen() as disks:
                    for name, disk in zip(clone._disks(), disks, strict=True):
                        clone._files.copy(name, disk)
                clone.make()
            except BaseException:
                clone.remove()
                raise
        return clone

    # How it is done

    @property
    def _hypervisor(self) -> Hypervisor:
        return connect(self._entry.uri)

    @property
    def _image(self) -> Image:
        return guests.get(self._entry.data["spec"]["image"])

    @property
    def _files(self) -> Files:
        return self._hypervisor.files(self.uuid, self._entry.directory)

    def _disks(self) -> tuple[str, ...]:
        return tuple(f"disk{index}.{disk.format}" for index, disk in enumerate(self.spec.disks))

    def _plan(self) -> Plan:
        spec, image, files = self.spec, self._image, self._files
        direct = spec.boot == "kernel"
        return Plan(
            uuid=self.uuid,
            domain=self.domain,
            lab=self.lab,
            spec=spec,
            image=image,
            accelerator=self._choose_accelerator(),
            kernel=files.shared(image.kernel) if direct and image.kernel else None,
            initrd=files.shared(image.initrd) if direct and image.initrd else None,
            disks=tuple(files.path(disk) for disk in self._disks()),
            seed=files.path(_SEED) if image.cloud_init else None,
            console_log=files.path(_CONSOLE_LOG),
            variables=files.path("uefi-variables.fd"),
            sockets=self._sockets if self._hypervisor.own else None,
        )

    def _choose_accelerator(self) -> Literal["kvm", "tcg"]:
        wanted = self.spec.accelerator
        if wanted == "tcg":
            return "tcg"
        best = self._hypervisor.best_accelerator()
        if best is None or (wanted == "kvm" and best != "kvm"):
            verdict = accelerator.accelerators()["kvm" if wanted == "kvm" else "tcg"]
            raise HostError(
                f"{'KVM' if wanted == 'kvm' else 'QEMU'} does not work on this computer.",
                evidence=verdict.seen,
                mend="Run labkit doctor, which says how to get it.",
            )
        return best

    @property
    def _sockets(self) -> Path:
        return _sockets_of(self.uuid)

    def make(self) -> None:
        """Make its files and tell the hypervisor; done again, it completes what was begun."""
        image, files = self._image, self._files
        for index, (name, disk) in enumerate(zip(self._disks(), self.spec.disks, strict=True)):
            if files.exists(name):
                continue
            if index == 0 and image.disk:
                files.overlay(name, image.disk, disk.size)
            else:
                files.create(name, disk)
        if image.cloud_init and not files.exists(_SEED):
            with tempfile.TemporaryDirectory(prefix="labkit-") as directory:
                seed = Path(directory) / _SEED
                cloud.seed_iso(seed, hostname=self.name, instance_id=self.uuid)
                files.keep(_SEED, seed)
        self._define()

    def _define(self) -> None:
        self._hypervisor.define(self._plan())

    def _boot(self) -> None:
        # Defined anew each time: the image may have been rebuilt and the accelerator decided anew
        # since (the host rebooted, QEMU was updated).
        if self.state != "saved":
            self._define()
        self._sockets.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._disconnect()
        self._hypervisor.start(self.uuid)

    def remove(self) -> None:
        """Remove it from the hypervisor and the ledger; the caller holds the lab's lock."""
        self._hypervisor.remove(self.uuid, self.lab)
        self._files.remove(last=self._is_last())
        self._disconnect()
        with _pools_lock:
            _pools.pop(self.uuid, None)
        remove_sockets(self.uuid)
        self._entry.forget()

    def _is_last(self) -> bool:
        """Whether no other machine of this kit is at the same hypervisor, where that is not labkit's own."""
        if not self._entry.uri:
            return False  # nothing is shared there, so the ledger need not be read
        # Labs may go meanwhile, by other processes.
        records = (record for lab in state.lab_names() if (record := state.peek(lab)))
        entries = (entry for record in records for entry in record.entries("vm"))
        return not any(entry.uri == self._entry.uri and entry.uuid != self.uuid for entry in entries)

    def _update(self, **data: Any) -> None:
        with state.locked(self.lab):
            entry = self._check_there()
            self._entry = dataclasses.replace(entry, data={**entry.data, **data}).save()

    def _check_there(self) -> Entry:
        """Its entry as the ledger has it now; raises where it was deleted."""
        entry = self._entry.current()
        if entry is None:
            raise self._gone()
        return entry

    def _gone(self) -> NotFound:
        return NotFound(f"There is no machine {self.name} in the lab {self.lab} any more.", mend=_MAKE_AGAIN)

    def _check_least(self, memory: int) -> None:
        """A guest whose memory is taken away below what it needs panics."""
        least = min(self._image.memory, self.asked.memory)
        if memory < least:
            raise SpecError(
                f"{self.name} cannot live with {format_size(memory)} of memory.",
                mend=f"Leave it {format_size(least)} at least.",
            )

    def _check_most(self, what: str, wanted: int, most: int, shown: Callable[[int], str]) -> None:
        if wanted > most:
            raise SpecError(
                f"{self.name} was made for at most {shown(most)} ({what}), not {shown(wanted)}.",
                mend=f"Make it with max_{what}=… to leave room.",
            )

    # Its channel

    def _connected(self) -> Pool:
        """The connections to its channel, which all handles of this process share."""
        with _pools_lock:
            if self.uuid not in _pools:
                _pools[self.uuid] = Pool(self._open_port, PORTS, self._sockets, self._check)
            return _pools[self.uuid]

    def _open_port(self, port: int, deadline: float) -> socket.socket:
        try:
            return self._hypervisor.open_port(self.uuid, port, deadline)
        except NotRunning:
            self._check()  # says it better, where it knows
            raise

    def _channel(self) -> Pool | AgentChannel:
        """The way by which commands reach it.

        Raises:
            NotRunning: nothing in its image answers.
        """
        match self._image.channel:
            case "labkit":
                return self._connected()
            case "agent":
                return self._agent()
            case "none":
                raise NotRunning(
                    f"Nothing in the image {self._image.name} takes commands from the host.",
                    mend=f"Log in at its console: labkit console {self.lab}/{self.name}",
                )

    def _agent(self) -> AgentChannel:
        return AgentChannel(
            lambda command, timeout: self._hypervisor.agent_call(self.uuid, command, timeout),
            check=self._check,
        )

    def _disconnect(self) -> None:
        with _pools_lock:
            pool = _pools.get(self.uuid)
        if pool:
            pool.reset()

    def _check(self) -> None:
        """Raise what keeps the machine from answering, if anything does."""
        match self.state:
            case "running":
                return
            case "paused":
                self._check_pause()
            case "crashed":
                raise GuestCrashed(
                    f"The kernel of {self.name} panicked.",
                    evidence=self._last_words(),
                    mend="Start it again with .start(), or go back with .revert(SNAPSHOT).",
                )
            case "missing":
                raise self._gone()
            case _:
                raise NotRunning(
                    f"{self.name} is off.", evidence=self._console_tail(), mend="Start it: .start()"
                )

    def _check_pause(self) -> None:
        """Raise where it is paused for good: by the hypervisor, or for longer than a snapshot takes."""
        if why := self._hypervisor.why_paused(self.uuid):
            raise NotRunning(
                f"{self.name} was paused by the hypervisor, since {why}.",
                mend="Mend that (make room on the disk of labkit's state, say), then let it go on: .resume()",
            )
        now = time.monotonic()
        since, last = self._paused or (now, now)
        if now - last > 1:  # another pause than the one that was seen then
            since = now
        self._paused = (since, now)
        if now - since >= _PAUSE_PATIENCE:
            raise NotRunning(f"{self.name} is paused.", mend="Let it go on: .resume()")

    def _console_tail(self, lines: int = 8) -> str:
        return "\n".join(self.console_log.rstrip().splitlines()[-lines:])

    def _last_words(self, lines: int = 12) -> str:
        """What the kernel said when it panicked; the reason comes first, then a long dump."""
        said = self.console_log.rstrip().splitlines()
        at = [number for number, line in enumerate(said) if "Kernel panic" in line]
        return "\n".join(said[max(0, at[-1] - 2) :][:lines] if at else said[-lines:])

    def _wait_ready(self, timeout: float) -> None:
        if self._image.channel == "none":
            return  # nobody in it can say that it is up
        deadline = time.monotonic() + timeout
        channel = self._channel()
        try:
            channel.hello(deadline)
        except CommandTimeout as exc:
            self._check()
            raise BootTimeout(
                f"{self.name} was not up within {timeout:g} s.",
                evidence=self._console_tail() or "(its serial console printed nothing)",
                mend="It is left running: look at .console_log and .screenshot(), or wait longer with "
                ".start(timeout=SECONDS).",
            ) from exc

    def _wait_while(self, state: State, deadline: float) -> None:
        while self.state == state and time.monotonic() < deadline:
            time.sleep(0.02)

    def _refresh_guest(self) -> None:
        """After time travel: the guest's clock is set and its random numbers are made to differ."""
        if self._image.channel == "labkit":
            self._connected().refresh(os.urandom(64), time.time_ns())

    @contextlib.contextmanager
    def frozen(self) -> Iterator[list[str]]:
        """The paths of its disks as they are at this instant, whole and unchanging within the block.

        Readers of a running machine's disks take `qemu-img`'s -U. The order is the spec's.
        """
        with self._still():
            yield [self._files.path(disk) for disk in self._disks()]

    @contextlib.contextmanager
    def _still(self) -> Iterator[None]:
        """Hold the machine still with its disks written out."""
        if self.state != "running":
            yield
            return
        self.run(["sync"])
        self._hypervisor.suspend(self.uuid)
        try:
            yield
        finally:
            self._hypervisor.resume(self.uuid)

    def _snapshot(self, name: str) -> SnapshotInfo:
        there = self.snapshots
        for snapshot in there:
            if snapshot.name == name:
                return snapshot
        names = ", ".join(snapshot.name for snapshot in there) or "none"
        raise NotFound(f"{self.name} has no snapshot named {name}.", evidence=f"snapshots: {names}")


#: Lets the guest work with so many of its CPUs. One that was plugged in takes a while to appear, and waits
#: to be told to work where no udev does that.
_USE_CPUS = """
tries=0
until [ "$(nproc)" = "$1" ]; do
    used=1
    for cpu in /sys/devices/system/cpu/cpu[1-9]*/online; do
        [ -e "$cpu" ] || continue
        used=$((used + 1))
        [ $used -le "$1" ] && wanted=1 || wanted=0
        [ "$(cat "$cpu")" = $wanted ] || echo $wanted > "$cpu"
    done
    tries=$((tries + 1))
    [ $tries -lt 100 ] || { echo "the guest works with $(nproc) CPUs, not with $1" >&2; exit 1; }
    [ "$(nproc)" = "$1" ] || sleep 0.1
done
"""


def _sockets_of(uuid: str) -> Path:
    return paths.runtime_dir() / "vm" / uuid[:8]


def remove_sockets(uuid: str) -> None:
    """Remove the directory of a machine's sockets; to be done after the machine is gone."""
    shutil.rmtree(_sockets_of(uuid), ignore_errors=True)


def new_entry(lab: str, spec: VMSpec, uri: str, *, cloned_from: str | None = None) -> state.Entry:
    """The ledger's entry of a machine that is to be made.

    `cloned_from` is the UUID of the machine whose clone it is.
    """
    identity = str(uuids.uuid4())
    # A hypervisor that is shared with others may have a lab of that name already.
    domain = f"labkit.{lab}.{spec.name}" if not uri else f"labkit.{lab}.{spec.name}.{identity[:8]}"
    return Entry(
        lab=lab,
        kind="vm",
        name=spec.name,
        uuid=identity,
        uri=uri,
        data={"domain": domain, "spec": spec.model_dump(mode="json"), "cloned_from": cloned_from},
    )
