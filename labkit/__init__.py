"""Real machines from a notebook cell: VMs and containers for learning virtualization.

errors.py, tools.py       what can go wrong; how programs are run
paths.py, state.py        where things live; the ledger of what labkit made
owners.py, reaper.py      who a lab belongs to; what removes it when they are gone
specs.py                  pure descriptions of machines
hardware/                 what this computer says of itself
storage/                  disks
guests/                   what a VM boots
channel/                  how commands reach a guest
hypervisors/              what carries a VM: libvirt; the accelerator probe
machines/                 Machine, Host, VM
lab.py                    Lab: the scope that owns machines
doctor.py                 what this computer can do
cli/                      the command `labkit`
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from labkit import errors
    from labkit.checkup import doctor
    from labkit.lab import Lab
    from labkit.machines.host import host
    from labkit.machines.machine import Completed, Machine, echo
    from labkit.machines.vm import VM
    from labkit.specs import DiskSpec, VMSpec

__version__ = "0.1.0"

__all__ = [
    "VM",
    "Completed",
    "DiskSpec",
    "Lab",
    "Machine",
    "VMSpec",
    "__version__",
    "doctor",
    "echo",
    "errors",
    "host",
]

#: Where each public name is. They are loaded when first used: `import labkit` alone is light.
_HOMES = {
    "Completed": "labkit.machines.machine",
    "DiskSpec": "labkit.specs",
    "Lab": "labkit.lab",
    "Machine": "labkit.machines.machine",
    "VM": "labkit.machines.vm",
    "VMSpec": "labkit.specs",
    "doctor": "labkit.checkup",
    "echo": "labkit.machines.machine",
    "host": "labkit.machines.host",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("labkit.errors")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'labkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
