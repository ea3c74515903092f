"""A lab: the scope that owns machines and networks, and takes them with it when it ends."""

from __future__ import annotations

import html
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Self

import psutil

from labkit import guests, owners, reaper, state
from labkit.errors import Conflict, LabkitError, NotFound, SpecError
from labkit.hypervisors import daemon, libvirt
from labkit.hypervisors.connections import connect
from labkit.machines.vm import VM, new_entry, remove_sockets
from labkit.specs import DiskSpec, VMSpec, check_name, format_size

_log = logging.getLogger(__name__)

#: How many machines are started or removed at one time.
_AT_ONCE = 16
#: How many CPUs a machine can be resized to where nothing else is said; a free place costs nothing.
_MAX_CPUS = 4
#: Stands for an image's usual memory, in bytes, while a request is looked through.
_MEMORY = 256 << 20
#: The disk of a machine whose system is in memory, in bytes; it holds files and snapshots.
_DISK = 1 << 30


class Lab:
    """A lab of machines, by name.

    Where a lab of this name is there and its owner is gone (or is this very notebook, its kernel
    restarted), the lab is taken up again with its machines. It ends by `close`, by leaving a `with`
    block, or some seconds after its owner has gone.

    Arguments:
        name: letters, digits and hyphens.
        uri: the libvirt URI to make machines at; by default LABKIT_URI, and without that labkit's own
            daemon, which needs no rights and no configuration.
        keep: True keeps the lab when this program ends, until `close` or `labkit clean`.

    Raises:
        LabInUse: another living program or notebook holds it.
        SpecError: the name cannot be a lab's.
    """

    def __init__(self, name: str, *, uri: str | None = None, keep: bool = False) -> None:
        self.name = check_name(name, "lab")
        self.uri = os.environ.get("LABKIT_URI", "") if uri is None else uri
        self._open = True
        self._pid = os.getpid()
        owner = owners.explicit() if keep else owners.current()
        self._owner = state.claim(name, owner).owner
        if owner.kind != "explicit":
            reaper.ensure()

    @classmethod
    def attach(cls, name: str) -> Lab:
        """A handle on a lab that there is, without becoming its owner.

        Raises:
            NotFound: there is no lab of that name.
        """
        record = state.lab(name)
        lab = cls.__new__(cls)
        lab.name, lab.uri, lab._open = name, os.environ.get("LABKIT_URI", ""), True
        lab._pid, lab._owner = os.getpid(), record.owner
        return lab

    def vm(
        self,
        name: str,
        *,
        image: str = "pocket",
        memory: str | int | None = None,
        cpus: int = 1,
        disk: str | int | DiskSpec | None = None,
        disks: Sequence[DiskSpec] = (),
        networks: Sequence[str] = (),
        boot: Literal["kernel", "disk"] | None = None,
        firmware: Literal["bios", "uefi"] = "bios",
        accelerator: Literal["auto", "kvm", "tcg"] = "auto",
        max_memory: str | int | None = None,
        max_cpus: int | None = None,
        machine: Literal["pc", "q35", "virt"] | None = None,
        cpu: str | None = None,
    ) -> VM:
        """Make a VM, switched off, or return the one of this name that is there.

        Arguments:
            name: letters, digits and hyphens; the guest's host name.
            image: what it boots; `labkit images` lists what there is.
            memory: bytes or text such as "256 MiB"; the image's usual size where None.
            cpus: virtual CPUs.
            disk: the size of the first disk, or its DiskSpec; the image's usual size where None.
            disks: further disks.
            networks: names of this lab's networks, one network card each.
            boot: "kernel" enters the image's kernel directly, "disk" goes through its bootloader.
            firmware: "bios" or "uefi".
            accelerator: "auto", or the one that must be used.
            max_memory, max_cpus: how far `resize` may go; by default the memory that it starts with,
                and 4 CPUs.
            machine: QEMU's machine type.
            cpu: QEMU's CPU model.

        Raises:
            SpecError: something of it makes no sense, or is more than this computer has.
            NotFound: there is no such image or network.
            Conflict: a VM of this name is there and differs; the error says in what.
        """
        self._check_open()
        if self._owner.kind != "explicit":
            reaper.ensure()  # somebody may have killed it since
        asked: dict[str, Any] = {
            "name": name,
            "image": image,
            "cpus": cpus,
            "disks": disks,
            "networks": networks,
            "firmware": firmware,
            "accelerator": accelerator,
        }
        optional = {
            "memory": memory,
            "max_memory": max_memory,
            "max_cpus": max_cpus,
            "boot": boot,
            "machine": machine,
            "cpu": cpu,
        }
        asked |= {field: value for field, value in optional.items() if value is not None}
        first = disk if disk is None or isinstance(disk, DiskSpec) else _disk(disk)
        # Looked through before the image is made, which may take a while.
        draft = VMSpec(**{"memory": asked.get("max_memory", _MEMORY), **asked})
        self._check_networks(draft)
        kind = guests.get(draft.image)
        usual = {
            "memory": kind.memory,
            "max_cpus": max(draft.cpus, _MAX_CPUS),
            "boot": kind.boots[0],
            "machine": "virt" if kind.arch == "aarch64" else "pc",
        }
        first = first or _disk(kind.disk_size or _DISK)
        if kind.disk is None and not isinstance(disk, DiskSpec):
            first = first.model_copy(update={"filesystem": "ext4"})
        spec = VMSpec(**{**usual, **asked, "disks": (first, *draft.disks)})
        self._check_fits(spec)
        return self._get_or_make(spec)

    @property
    def vms(self) -> dict[str, VM]:
        """The lab's VMs, by name."""
        return {entry.name: VM(entry) for entry in state.lab(self.name).entries("vm")}

    def __getitem__(self, name: str) -> VM:
        there = self.vms
        if name not in there:
            raise NotFound(
                f"The lab {self.name} has no machine named {name}.",
                evidence=f"machines: {', '.join(there) or 'none'}",
            )
        return there[name]

    def __iter__(self) -> Iterator[VM]:
        return iter(self.vms.values())

    def start(self, *vms: VM, timeout: float | None = None) -> list[VM]:
        """Start several VMs at one time (all of the lab's where none are named), and wait for all.

        The deadline of each grows with the number that share this computer's cores.
        """
        chosen = list(vms) or list(self)
        crowd = max(1.0, len(chosen) / (os.cpu_count() or 1))
        return _all(chosen, lambda vm: vm.start(timeout=timeout or vm.patience * crowd))

    def close(self) -> None:
        """Remove the lab with everything in it; nothing where it is gone already, or another's by now."""
        self._open = False
        remove(self.name, only_of=self._owner)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # The child of a fork that leaves the block, say by sys.exit, does not end its parent's lab.
        if os.getpid() == self._pid:
            self.close()

    def __repr__(self) -> str:
        if self.name not in state.lab_names():
            return f"<Lab {self.name}: closed>"
        lines = [f"  {vm.spec.describe()} ({vm.state})" for vm in self]
        return "\n".join([f"<Lab {self.name}: {len(lines)} machines>", *lines])

    def _repr_html_(self) -> str:
        if self.name not in state.lab_names():
            return f"<p>Lab <b>{html.escape(self.name)}</b> is closed.</p>"
        rows = "".join(
            "<tr>"
            + "".join(
                f'<td style="text-align:left">{html.escape(str(cell))}</td>'
                for cell in (vm.name, vm.state, vm.spec.describe().partition(": ")[2])
            )
            + "</tr>"
            for vm in self
        )
        heads = "".join(
            f'<th style="text-align:left">{head}</th>' for head in ("machine", "state", "made of")
        )
        return (
            f"<table><caption>Lab <b>{html.escape(self.name)}</b></caption>"
            f"<thead><tr>{heads}</tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )

    def _get_or_make(self, spec: VMSpec) -> VM:
        with state.locked(self.name):
            entry = state.lab(self.name).find("vm", spec.name)
            if entry is None:
                connect(self.uri)  # nothing is written down that could not be made
                entry = new_entry(self.name, spec, self.uri).save()
                made = VM(entry)
                try:
                    made.make()
                except BaseException:
                    made.remove()
                    raise
                return made
            vm = VM(entry)
            self._check_same(vm, spec)
            if vm.state == "missing":
                vm.make()
            return vm

    def _check_same(self, vm: VM, spec: VMSpec) -> None:
        differences = spec.differences(vm.asked)
        if differences:
            raise Conflict(
                f"The lab {self.name} has a machine named {spec.name}, and it was made differently.",
                evidence="\n".join(
                    f"{field}: it has {_shown(theirs)}, you ask for {_shown(mine)}"
                    for field, (mine, theirs) in differences.items()
                ),
                mend=f'Give another name, or remove it first: lab["{spec.name}"].delete()',
            )

    def _check_networks(self, spec: VMSpec) -> None:
        there = [entry.name for entry in state.lab(self.name).entries("network")]
        for name in spec.networks:
            if name not in there:
                raise NotFound(
                    f"The lab {self.name} has no network named {name}.",
                    evidence=f"networks: {', '.join(there) or 'none'}",
                )

    def _check_fits(self, spec: VMSpec) -> None:
        total = psutil.virtual_memory().total
        most = max(spec.memory, spec.max_memory or 0)
        if not self.uri and most > total:
            raise SpecError(
                f"{format_size(most)} of memory is more than this computer has.",
                evidence=f"memory of this computer: {format_size(total)}",
                mend="Ask for less.",
            )

    def _check_open(self) -> None:
        if not self._open:
            raise LabkitError(
                f"The lab {self.name} is closed.", mend=f'Open it anew: lab = labkit.Lab("{self.name}")'
            )


def remove(name: str, *, only_of: owners.Owner | None = None) -> None:
    """Remove a lab with everything in it; nothing where there is none.

    Arguments:
        only_of: leave it alone if it belongs to another owner by now.
    """
    if state.peek(name) is None:  # and no lock file is made for it
        return
    with state.locked(name):
        record = state.peek(name)
        if record is None or (only_of and record.owner != only_of):
            return
        _all([VM(entry) for entry in record.entries("vm")], VM.remove)
        if state.unreadable(name):
            _remove_strays(name)
        state.forget_lab(name)


def _remove_strays(name: str | None = None) -> list[str]:
    """Remove the machines that carry the label of this lab (of any, where None) and that the ledger has
    lost, at labkit's own daemon, where nobody else makes such; returns their names there."""
    hypervisor = libvirt.connect()
    known = {entry.uuid for lab in state.lab_names() for entry in _entries(lab)}
    removed = []
    for uuid, domain, lab in hypervisor.labelled():
        if uuid not in known and name in (None, lab):
            hypervisor.remove(uuid, lab)
            remove_sockets(uuid)
            removed.append(domain)
    return removed


def _entries(lab: str) -> list[state.Entry]:
    record = state.peek(lab)
    return record.entries("vm") if record else []


@dataclass(frozen=True)
class Cleaned:
    """What `clean` did: the labs that it removed, and those that it kept with the owner that uses each."""

    removed: list[str]
    kept: dict[str, str]


def clean(names: Sequence[str] | None = None, *, in_use: bool = False) -> Cleaned:
    """Remove labs, all where none is named.

    Arguments:
        in_use: also those of living programs and notebooks.

    Raises:
        NotFound: there is no lab of a name that was given.
    """
    done = Cleaned([], {})
    records = (
        [state.lab(name) for name in names] if names else [state.lab(name) for name in state.lab_names()]
    )
    for record in records:
        if record.owner.kind != "explicit" and record.owner.alive() and not in_use:
            done.kept[record.name] = record.owner.describe()
        else:
            remove(record.name)
            done.removed.append(record.name)
    if not names:
        done.removed.extend(_remove_strays())
        done.removed.extend(state.forget_strays())
    if not state.lab_names():
        daemon.stop()
    return done


def inventory() -> list[dict[str, str]]:
    """All that labkit made and that is there: `lab`, `kind`, `name` and `state` of each.

    The state is "unknown" where the hypervisor cannot be reached.
    """
    records = [record for record in map(state.peek, state.lab_names()) if record]
    if any(record.owner.kind != "explicit" for record in records):
        reaper.ensure()  # it may have been killed since
    unreachable: set[str] = set()
    return [
        {
            "lab": entry.lab,
            "kind": entry.kind,
            "name": entry.name,
            "state": _state_of(entry, unreachable),
        }
        for record in records
        for entry in record.entries("vm")
    ]


def _state_of(entry: state.Entry, unreachable: set[str]) -> str:
    if entry.uri in unreachable:
        return "unknown"
    try:
        return VM(entry).state
    except LabkitError as exc:
        _log.warning("%s", exc)
        unreachable.add(entry.uri)
        return "unknown"


def _disk(size: Any) -> DiskSpec:
    return DiskSpec(size=size)


def _all(vms: Iterable[VM], do: Callable[[VM], Any]) -> list[Any]:
    """Do it to all at one time; the first error is raised when all are done."""
    with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
        futures = [pool.submit(do, vm) for vm in vms]
    return [future.result() for future in futures]


def _shown(value: object) -> str:
    return format_size(value) if isinstance(value, int) and value >= 1 << 20 else repr(value)
