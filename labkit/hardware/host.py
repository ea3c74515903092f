"""What this computer has: memory, whether it is a container, whether orphans are reaped.

Facts only, each measured when it is asked for; what they mean for the course, the doctor says.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from labkit.errors import HostError

__all__ = ["Memory", "Orphan", "container_signs", "make_orphan", "memory", "system_vendor"]

MOUNT_PROC = "`sudo mount -t proc proc /proc`; a container is started with /proc mounted"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Main memory, in bytes.

    Attributes:
        total, available: as /proc/meminfo says (MemTotal, MemAvailable).
        limit: what a cgroup leaves to us, None where it sets no limit.
    """

    total: int
    available: int
    limit: int | None = None

    @property
    def usable(self) -> int:
        """What new machines can take: the least of what the computer has and what the cgroup leaves."""
        return self.available if self.limit is None else min(self.available, self.limit)


def memory(root: Path = Path("/")) -> Memory:
    """The memory of this computer, or of the one whose /proc and /sys are below `root`.

    Raises:
        HostError: there is no /proc/meminfo.
    """
    pairs: list[tuple[str, str]] = re.findall(r"^(\w+):\s+(\d+) kB", _proc(root, "meminfo"), re.MULTILINE)
    fields = {key: int(value) * 1024 for key, value in pairs}
    return Memory(
        total=fields["MemTotal"],
        available=fields.get("MemAvailable", fields["MemFree"]),
        limit=_cgroup_leaves(root, fields["MemTotal"]),
    )


def _proc(root: Path, name: str) -> str:
    if text := _text(root / "proc" / name):
        return text
    raise HostError(f"/proc/{name} cannot be read.", mend=MOUNT_PROC)


def _cgroup_leaves(root: Path, total: int) -> int | None:
    # A container sees its own group at the top of the hierarchy; version 2 first, then version 1.
    top = root / "sys/fs/cgroup"
    for limit_file, usage_file in (
        (top / "memory.max", top / "memory.current"),
        (top / "memory/memory.limit_in_bytes", top / "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, usage = int(limit_file.read_text("ascii")), int(usage_file.read_text("ascii"))
        except (OSError, ValueError):  # absent, or "max"
            continue
        return max(limit - usage, 0) if limit < total else None
    return None


def container_signs(root: Path = Path("/"), *, environ: dict[str, str] | None = None) -> list[str]:
    """What tells that we are in a container; empty where nothing does.

    The signs are those that `systemd-detect-virt --container` looks for, and the group names that
    Docker, Podman, LXC and Kubernetes give.
    """
    signs = [f"{name} exists" for name in ("/.dockerenv", "/run/.containerenv") if (root / name[1:]).exists()]
    if kind := (os.environ if environ is None else environ).get("container"):
        signs.append(f"the variable container is {kind!r}")
    group = _text(root / "proc/1/cgroup")
    signs += [
        f"process 1 is in a control group of {name}"
        for name in ("docker", "libpod", "lxc", "kubepods")
        if re.search(rf"[/:-]{name}", group)
    ]
    if kind := _text(root / "run/systemd/container").strip():
        signs.append(f"/run/systemd/container says {kind!r}")
    return signs


def system_vendor(root: Path = Path("/")) -> str:
    """Who made the system, by its DMI tables: "LENOVO", in a virtual machine "QEMU"; "" if untold."""
    return _text(root / "sys/class/dmi/id/sys_vendor").strip()


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@dataclass(frozen=True)
class Orphan:
    """What became of a process whose parent had ended.

    Attributes:
        reaper: name of the process that inherited it, "" where it was gone before one could look.
        reaped: True where it was reaped before the deadline.
        seconds: until it was reaped, or the deadline.
    """

    reaper: str
    reaped: bool
    seconds: float


def make_orphan(deadline: float = 0.8) -> Orphan:
    """Make a process that ends after its parent did, and see how soon it is reaped.

    Where process 1 (or a subreaper) is no real init, what is left of orphans (zombies) stays, and
    programs that wait for them, libvirtd among them, take seconds for what takes milliseconds.

    Arguments:
        deadline: seconds to wait.

    Raises:
        HostError: there is no /proc to see it in.
    """
    _proc(Path("/"), "self/status")
    # The shell reports its child's pid and ends; the child ends when it reads the end of its input,
    # which is ours to close, so it always outlives its parent.
    with subprocess.Popen(
        ["/bin/sh", "-c", "exec 3<&0; (read -r _ <&3; exit 0) >/dev/null 2>&1 & echo $!"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as shell:
        assert shell.stdin
        assert shell.stdout
        pid = int(shell.stdout.read())
        shell.wait()
        reaper = _name_of_parent(pid)
        start = time.monotonic()
        shell.stdin.close()
        while still_there := Path(f"/proc/{pid}").exists():
            if time.monotonic() - start > deadline:
                break
            time.sleep(0.002)  # the kernel tells nobody but the parent that a zombie is gone
        return Orphan(reaper, not still_there, time.monotonic() - start)


def _name_of_parent(pid: int) -> str:
    match = re.search(r"^PPid:\s+(\d+)", _text(Path(f"/proc/{pid}/status")), re.MULTILINE)
    return _text(Path(f"/proc/{match[1]}/comm")).strip() if match else ""
