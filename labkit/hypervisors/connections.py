"""Which hypervisor a machine's URI means; nothing of one is loaded before it is needed."""

from __future__ import annotations

from labkit.hypervisors.hypervisor import Hypervisor

__all__ = ["connect"]


def connect(uri: str = "") -> Hypervisor:
    """The hypervisor at a URI: labkit's own libvirt daemon where it is empty, else a libvirt URI.

    Raises:
        HypervisorError: it cannot be reached.
        HostError: this computer lacks what it takes.
    """
    from labkit.hypervisors import libvirt

    return libvirt.connect(uri)
