"""Checks of the system around labkit: memory, disk, Python, process 1, namespaces, containers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from labkit import paths, tools
from labkit.checkup.programs import pip_install
from labkit.checkup.report import Check
from labkit.hardware import host as hardware_host

__all__ = [
    "container",
    "disk",
    "jupyter",
    "memory",
    "pid1_reaping",
    "python",
    "user_namespaces",
]

MiB, GiB = 1 << 20, 1 << 30

#: A notebook's machines together: four pocket VMs of 256 MiB, and JupyterLab beside them.
_MEMORY_GOOD, _MEMORY_LEAST = 2 * GiB, 512 * MiB
#: Images, their packages and the disks of a course: the full Debian alone is built in 1.5 GB.
_DISK_GOOD, _DISK_LEAST = 6 * GiB, 1 * GiB


def pid1_reaping(orphan: hardware_host.Orphan | None = None) -> Check:
    """Are orphaned processes reaped promptly? libvirtd waits for its own. Measured by making one."""
    orphan = orphan or hardware_host.make_orphan()
    reaper = orphan.reaper or "process 1"
    if orphan.reaped:
        return Check(
            "pid1-reaping",
            "ok",
            f"{reaper} reaped an orphan in {orphan.seconds * 1000:.0f} ms",
            "Programs that wait for orphans, libvirt's daemon among them, are not held up.",
        )
    seen = f"{reaper} left an orphan unreaped for {orphan.seconds:.1f} s"
    in_future = "in a container of your own, start it with an init: `docker run --init …`"
    if tools.which("tini"):
        return Check(
            "pid1-reaping",
            "info",
            f"{seen}; tini is installed",
            "libvirt's daemon would be held up by seconds; labkit runs it below tini, so it isn't.",
            f"Nothing has to be done; {in_future}",
        )
    return Check(
        "pid1-reaping",
        "warn",
        seen,
        "Every call of libvirt may take 10 seconds, since it waits for what is left of processes.",
        f"`sudo apt install tini`; {in_future}",
    )


def memory(found: hardware_host.Memory | None = None) -> Check:
    """Is there memory for the course's machines?"""
    found = found or hardware_host.memory()
    limit = " (a control group sets the limit)" if found.limit == found.usable else ""
    seen = f"{found.usable / GiB:.1f} GiB available{limit} of {found.total / GiB:.1f} GiB"
    if found.usable >= _MEMORY_GOOD:
        machines = (found.usable - 512 * MiB) // (256 * MiB)
        return Check(
            "memory", "ok", seen, f"Enough for about {machines} small machines (256 MiB each) at once."
        )
    return Check(
        "memory",
        "warn" if found.usable >= _MEMORY_LEAST else "fail",
        seen,
        "Notebooks with several machines need 2 GiB; one small machine needs 256 MiB.",
        "Close other programs and `labkit clean` machines that are no longer used"
        + ("; give the container more memory: `docker run --memory 4g …`" if limit else "")
        + ". `ps -eo rss,comm --sort -rss | head` shows what takes most",
    )


def disk(places: Mapping[str, Path] | None = None, *, free: Callable[[Path], int] | None = None) -> Check:
    """Is there room where images and machines' disks go?

    Arguments:
        places: what is kept there, and where; labkit's cache and state directories by default.
        free: asked for the free bytes at a path, in place of the file system.
    """
    places = places or {"images": paths.cache_dir(), "disks": paths.state_dir()}
    room = {place: free(place) if free else shutil.disk_usage(place).free for place in places.values()}
    least = min(room.values())
    seen = "; ".join(
        f"{room[place] / GiB:.1f} GiB free for {what} in {place}" for what, place in places.items()
    )
    if least >= _DISK_GOOD:
        return Check("disk", "ok", seen, "Enough for all of the course's images and disks.")
    return Check(
        "disk",
        "warn" if least >= _DISK_LEAST else "fail",
        seen,
        "The small image fits into 100 MB; the full systems and their disks need some 6 GB.",
        "Free some: `sudo apt clean`, `labkit clean`; or `export LABKIT_HOME=/path/on/a/larger/disk` "
        "before labkit starts",
    )


def python(version: tuple[int, int] | None = None, *, in_venv: bool | None = None) -> Check:
    """Is this a Python that labkit runs with, in an environment of its own?"""
    version = version or (sys.version_info.major, sys.version_info.minor)
    in_venv = sys.prefix != sys.base_prefix if in_venv is None else in_venv
    seen = f"Python {'.'.join(map(str, version))} at {sys.executable}"
    if version < (3, 11):
        return Check(
            "python",
            "fail",
            seen,
            "labkit needs Python 3.11 or later.",
            "`./lab up` on Debian 12 or Ubuntu 24.04, or later",
        )
    if not in_venv:
        return Check(
            "python",
            "info",
            f"{seen}, in no virtual environment",
            "labkit works; its packages and the system's can get in each other's way.",
            "`./lab up` makes an environment, `.venv/bin/python` is its Python",
        )
    return Check("python", "ok", f"{seen}, in a virtual environment", "labkit runs with it.")


def jupyter(modules: Sequence[str] = ("jupyterlab", "ipykernel", "ipywidgets")) -> Check:
    """Is JupyterLab installed, with what the course's widgets need?"""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        return Check(
            "jupyter",
            "warn",
            f"not installed: {', '.join(missing)}",
            "labkit works in scripts and terminals; the notebooks need JupyterLab.",
            pip_install(" ".join(missing)),
        )
    seen = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in modules)
    return Check("jupyter", "ok", seen, "The course's notebooks can be opened here.")


def user_namespaces(command: Sequence[str] | None = None, *, sysctl: Path = Path("/proc/sys")) -> Check:
    """May this user make a user namespace? Tried by making one.

    Arguments:
        command: run instead of `unshare`.
        sysctl: where the kernel's settings are read, to say which of them forbids it.
    """
    unshare = tools.which("unshare")
    if command is None and unshare is None:
        return Check(
            "user-namespaces",
            "warn",
            "the program unshare is not installed",
            "Whether sandboxes for exercises can be made, was not found out.",
            "`sudo apt install util-linux`",
        )
    argv = list(command or (unshare or "", "--user", "--map-root-user", "true"))
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10, check=False
    )
    if done.returncode == 0:
        return Check(
            "user-namespaces",
            "ok",
            "a user namespace could be made",
            "Exercises can be checked in a sandbox, and containers made by hand.",
        )
    reason, mend = _namespace_mend(sysctl)
    needed = "; as root, labkit's libvirt daemon needs one too" if os.geteuid() == 0 else ""
    return Check(
        "user-namespaces",
        "warn",
        f"{(done.stderr.strip() or f'exit {done.returncode}').splitlines()[-1]}{reason}",
        f"Sandboxes for exercises and containers made by hand need a user namespace{needed}.",
        mend,
    )


def _namespace_mend(sysctl: Path) -> tuple[str, str]:
    for name, forbids, allows in (
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
        ("kernel/unprivileged_userns_clone", "0", "1"),
        ("user/max_user_namespaces", "0", "15000"),
    ):
        try:
            value = (sysctl / name).read_text("ascii").strip()
        except OSError:
            continue
        if value == forbids:
            key = name.replace("/", ".")
            kept = f"echo {key}={allows} | sudo tee /etc/sysctl.d/60-labkit.conf"
            return (
                f" ({key} is {value})",
                f"`sudo sysctl -w {key}={allows}`; to keep it after a reboot: `{kept}`",
            )
    return "", (
        "In a container, its seccomp profile forbids it: start it with "
        "`docker run --security-opt seccomp=unconfined …`. A chroot cannot have one; elsewhere, ask "
        "whoever runs the computer"
    )


def container(signs: Sequence[str] | None = None) -> Check:
    """Are we inside a container?"""
    signs = hardware_host.container_signs() if signs is None else signs
    if not signs:
        return Check(
            "container",
            "ok",
            "no sign of a container",
            "labkit runs on the system itself, or in a whole virtual machine.",
        )
    return Check(
        "container",
        "info",
        "; ".join(signs),
        "This looks like a container: devices, control groups and namespaces may be missing.",
        "Nothing has to be done. For KVM, if the host has it, start the container with "
        "`docker run --init --device /dev/kvm …`",
    )
