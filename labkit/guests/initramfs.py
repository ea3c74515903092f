"""What every initramfs of ours is made of: busybox with its links, and modules with depmod's tables."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from labkit.guests import apt
from labkit.guests.cpio import Archive
from labkit.guests.modules import ModuleTree, modules_alias, modules_dep
from labkit.tools import run_tool

#: A guest's serial console, by QEMU's name of the architecture.
CONSOLES = {"x86_64": "ttyS0", "aarch64": "ttyAMA0"}


def command_line(arch: str) -> str:
    """The kernel's parameters: a console on the serial port, added memory brought online, a quick boot."""
    words = [
        f"console={CONSOLES[arch]}",
        "quiet",
        "panic=0",  # stay where the kernel died, so that the host sees a crash rather than a reboot
        "memhp_default_state=online",
        # Measured under TCG, CPU time to the first answer: 2.09 s, 1.70 s without the ciphers' self-tests,
        # 1.64 s when locks are not patched out on one CPU either. What else is recommended for quick boots
        # (tsc=reliable, no_timer_check, mitigations=off, i8042.*, rcu_expedited) changed nothing.
        "cryptomgr.notests",
        "noreplace-smp",
        # Room to plug memory in makes the kernel set 64 MiB aside for bounce buffers; 2048 slabs are 4 MiB.
        "swiotlb=2048",
    ]
    return " ".join(words)


def add_busybox(archive: Archive, deb: Path) -> None:
    """Add busybox and a link for each of its applets."""
    program = apt.read_package(deb, lambda path: path == "bin/busybox")["bin/busybox"].data
    archive.file("bin/busybox", program, 0o755)
    for path in _applets(program):
        if path not in archive:
            archive.symlink(path, "/bin/busybox")


def _applets(program: bytes) -> list[str]:
    """Where busybox wants its applets' links, as `busybox --list-full` says it."""
    with tempfile.TemporaryDirectory(prefix="labkit-busybox-") as directory:
        path = Path(directory) / "busybox"
        path.write_bytes(program)
        path.chmod(0o755)
        return run_tool([path, "--list-full"], what="ask busybox for its applets").split()


def add_modules(archive: Archive, release: str, files: Mapping[str, bytes], names: Iterable[str]) -> None:
    """Add the named modules, what they depend on, and the tables that modprobe reads.

    Arguments:
        release: the kernel's, as `uname -r` says it.
        files: all that the kernel has below lib/modules/RELEASE: path below it -> contents.
        names: modules; those that this kernel does not have are left out.
    """
    base = f"lib/modules/{release}/"
    modules = ModuleTree(files).load_order(names)
    for module in modules:
        archive.file(base + module.path, module.data)
    archive.file(base + "modules.dep", modules_dep(modules))
    archive.file(base + "modules.alias", modules_alias(modules))
    for name in ("modules.builtin", "modules.order"):
        if name in files:
            archive.file(base + name, files[name])
