"""The pocket guest: a distribution's kernel and a system of busybox, all of it in memory, built in seconds.

Made from packages that are downloaded and read, never installed, so it needs no root. The guest answers over
labkit's own channel (port org.labkit.0) and, where the machine has its port, through qemu-guest-agent too.
The files of its system are in `files/pocket-*`.

arm64 takes the same path with other package names; that was written from the documents and not run.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from labkit import paths
from labkit.errors import HostError
from labkit.guests import apt, data, elf
from labkit.guests.agent_build import AGENT_SOURCE, SCREEN_SOURCE, build_agent, build_program
from labkit.guests.cpio import Archive
from labkit.guests.image import Image
from labkit.guests.initramfs import CONSOLES, add_busybox, add_modules, command_line
from labkit.guests.kernel import direct_boot_kernel
from labkit.guests.store import fingerprint
from labkit.progress import Progress

MiB = 1 << 20

NAME = "pocket"
WHAT = "a small Linux in memory (kernel and busybox), up in seconds"

_HERE = Path(__file__).parent
_SOURCES = (
    *("pocket.py", "agent_build.py", "apt.py", "cpio.py", "data.py", "elf.py", "image.py", "initramfs.py"),
    *("kernel.py", "modules.py", "process.py"),
)
# Taken when they are loaded: a process that goes on while labkit is upgraded builds by what it has in memory.
_CODE = fingerprint(_HERE / name for name in _SOURCES)

#: Loaded before the guest answers, beside the drivers of the virtio devices that are there. pvpanic_mmio
#: drives its ISA form too; the PCI form waits, as switching on a PCI device costs 0.1 s under TCG.
EARLY_MODULES = ("virtio_pci", "virtio_console", "pvpanic_mmio")
_EARLY_DRIVERS = ("virtio_net", "virtio_blk", "virtio_scsi", "sd_mod")
#: Loaded right after it.
LATE_MODULES = ("pvpanic_pci", "virtio_rng", "virtio_balloon", "button", "evdev", "gpio_keys", "loop")

_METAPACKAGES = {
    ("debian", "amd64"): "linux-image-cloud-amd64",
    ("debian", "arm64"): "linux-image-cloud-arm64",
    ("ubuntu", "amd64"): "linux-image-virtual",
    ("ubuntu", "arm64"): "linux-image-virtual",
}
_AGENT_PROGRAM = "sbin/qemu-ga"
# Where packages keep shared libraries, "usr/" removed: multiarch directories and the loader's own.
_LIBRARY = re.compile(r"lib(64)?/([^/]+/)?[^/]+\.so(\.[0-9.]+)?")


@dataclass(frozen=True)
class Plan:
    """What a pocket guest will be made from.

    Attributes:
        arch: QEMU's name of the architecture.
        release: the kernel's, as `uname -r` says it.
        packages: the packages by their part: "kernel", "busybox", "agent" and its "libraries".
    """

    arch: str
    release: str
    kernel: tuple[apt.Package, ...]
    busybox: apt.Package
    agent: apt.Package
    libraries: tuple[apt.Package, ...]

    @property
    def packages(self) -> tuple[apt.Package, ...]:
        return (*self.kernel, self.busybox, self.agent, *self.libraries)

    @property
    def inputs(self) -> dict[str, str]:
        return {package.name: package.version for package in self.packages}


def recipe() -> str:
    """The fingerprint of everything in labkit that decides how a pocket guest is made."""
    files = sorted(data.FILES.glob("pocket-*"))
    return fingerprint([AGENT_SOURCE, SCREEN_SOURCE, *files], _CODE)


def plan() -> Plan:
    """Which package versions a pocket guest is made from today, by apt's lists on this computer.

    Raises:
        HostError: this is no Debian or Ubuntu, or apt's lists lack the packages.
    """
    distribution, arch = apt.distribution(), apt.architecture()
    kernel_names = _kernel_packages(_METAPACKAGES[distribution.id, arch])
    library_names = _library_packages("qemu-guest-agent")
    found = apt.candidates([*kernel_names, "busybox-static", "qemu-guest-agent", *library_names])
    count = len(kernel_names)
    return Plan(
        arch=apt.QEMU_ARCH[arch],
        release=kernel_names[0].removeprefix("linux-image-"),
        kernel=tuple(found[:count]),
        busybox=found[count],
        agent=found[count + 1],
        libraries=tuple(found[count + 2 :]),
    )


def build(directory: Path, plan: Plan, progress: Progress) -> Image:
    """Make the guest's files in a directory.

    Raises:
        HostError: there is no C compiler.
        ToolError: a package could not be had, or a program failed.
    """
    debs = apt.download(plan.packages, paths.cache_dir() / "packages", progress)
    progress.step("unpacking the kernel")
    kernel = _read_all((debs[package.name] for package in plan.kernel), _is_kernel_file)
    release = _release(kernel)
    (directory / "kernel").write_bytes(direct_boot_kernel(kernel[f"boot/vmlinuz-{release}"].data, plan.arch))
    progress.step("packing the initramfs")
    archive = Archive()
    _add_system(archive, CONSOLES[plan.arch])
    add_busybox(archive, debs[plan.busybox.name])
    base = f"lib/modules/{release}/"
    files = {path.removeprefix(base): entry.data for path, entry in kernel.items() if path.startswith(base)}
    names = (*EARLY_MODULES, *_EARLY_DRIVERS, *LATE_MODULES, *data.words("pocket-modules"))
    add_modules(archive, release, files, names)
    archive.file("sbin/labkit-agent", build_agent(), 0o755)
    if plan.arch == "x86_64":
        archive.file("sbin/labkit-screen", build_program(SCREEN_SOURCE), 0o755)
    _add_guest_agent(archive, plan, debs)
    (directory / "initrd").write_bytes(archive.to_bytes())
    return Image(
        name=NAME,
        version=f"linux {plan.kernel[0].version}, busybox {plan.busybox.version}",
        arch=plan.arch,
        kernel=directory / "kernel",
        initrd=directory / "initrd",
        cmdline=command_line(plan.arch),
        console=CONSOLES[plan.arch],
        memory=128 * MiB,
        disk_size=0,
        up=60.0,
    )


def _kernel_packages(metapackage: str) -> list[str]:
    """The package with the kernel, and the one with its modules where that is another (Ubuntu)."""
    image = next(
        (name for name in apt.dependencies(metapackage)[metapackage] if re.match(r"linux-image-\d", name)),
        None,
    )
    if image is None:
        raise HostError(
            f"The package {metapackage} does not say which kernel it stands for.", mend="sudo apt update"
        )
    modules = [name for name in apt.dependencies(image)[image] if re.match(r"linux-modules-\d", name)]
    return [image, *modules]


def _library_packages(package: str) -> list[str]:
    """Packages that may hold libraries that a program needs: what it depends on, and what those do."""
    graph = apt.dependencies(package, recurse=True)
    names: dict[str, None] = {}
    level = [package]
    for _depth in range(3):
        level = [name for parent in level for name in graph.get(parent, []) if _may_hold_libraries(name)]
        names.update(dict.fromkeys(level))
    return list(names)


def _may_hold_libraries(name: str) -> bool:
    return "lib" in name and "perl" not in name and not name.endswith(("-dev", "-data", "-common", "-bin"))


def _is_kernel_file(path: str) -> bool:
    return path.startswith(("boot/vmlinuz-", "lib/modules/"))


def _read_all(debs: Iterable[Path], wanted: Callable[[str], bool]) -> dict[str, apt.Entry]:
    entries: dict[str, apt.Entry] = {}
    for deb in debs:
        entries.update(apt.read_package(deb, wanted))
    return entries


def _release(kernel: Mapping[str, apt.Entry]) -> str:
    return next(path for path in kernel if path.startswith("boot/vmlinuz-")).removeprefix("boot/vmlinuz-")


def _add_system(archive: Archive, console: str) -> None:
    for path in (
        "dev",
        "proc",
        "sys",
        "run",
        "data",
        "mnt",
        "var/log",
        "var/lib",
        "usr/local/bin",
        "etc/network",
    ):
        archive.directory(path)
    archive.directory("root", 0o700)
    archive.directory("tmp", 0o1777)
    archive.directory("var/tmp", 0o1777)
    archive.symlink("var/run", "/run")
    archive.symlink("etc/mtab", "/proc/self/mounts")
    for path, name, mode in _SYSTEM_FILES:
        archive.file(path, data.text(name).replace("@CONSOLE@", console), mode)
    for path, text in _SMALL_FILES.items():
        archive.file(path, text)
    archive.file(
        "etc/shadow", "root::20000:0:99999:7:::\n", 0o600
    )  # no password: whoever has the console has it all


_SYSTEM_FILES = (
    ("init", "pocket-init", 0o755),
    ("etc/fstab", "pocket-fstab", 0o644),
    ("etc/inittab", "pocket-inittab", 0o644),
    ("etc/profile", "pocket-profile", 0o644),
    ("etc/motd", "pocket-motd", 0o644),
    ("etc/labkit/late", "pocket-late", 0o755),
    ("etc/labkit/shutdown", "pocket-shutdown", 0o755),
    ("etc/labkit/on-uevent", "pocket-on-uevent", 0o755),
    ("usr/share/udhcpc/default.script", "pocket-udhcpc", 0o755),
    ("etc/udhcpc/default.script", "pocket-udhcpc", 0o755),
    ("etc/acpi/PWRF/00000080", "pocket-power-button", 0o755),
)
_SMALL_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    # What mount tries where no type is given; the kernel loads their modules when it is asked for them.
    "etc/filesystems": "ext4\nvfat\niso9660\nsquashfs\n",
    "etc/nsswitch.conf": "hosts: files dns\n",
    "etc/os-release": 'NAME="labkit pocket"\nID=labkit-pocket\nPRETTY_NAME="labkit pocket guest"\n',
    "etc/labkit/early-modules": "\n".join(EARLY_MODULES) + "\n",
    "etc/labkit/late-modules": "\n".join(LATE_MODULES) + "\n",
}


def _add_guest_agent(archive: Archive, plan: Plan, debs: Mapping[str, Path]) -> None:
    program = apt.read_package(debs[plan.agent.name], lambda path: path == _AGENT_PROGRAM)[
        _AGENT_PROGRAM
    ].data
    available = _read_all(
        (debs[package.name] for package in plan.libraries), lambda path: bool(_LIBRARY.fullmatch(path))
    )
    archive.file("usr/sbin/qemu-ga", program, 0o755)
    for path, library in libraries(program, available).items():
        archive.file(path, library, 0o755)


def libraries(program: bytes, available: Mapping[str, apt.Entry]) -> dict[str, bytes]:
    """The shared libraries that a program needs, and its loader: path in the guest -> contents.

    Arguments:
        program: an ELF file.
        available: the files and links of the packages that may hold them.

    Raises:
        HostError: none of the packages has one that is needed.
    """
    # A file goes before a link of the same name: /lib64/ld-linux-x86-64.so.2 is only a link to the loader.
    by_name = {
        posixpath.basename(path): path
        for path, _entry in sorted(available.items(), key=lambda item: item[1].target is None)
    }
    found: dict[str, bytes] = {}
    queue = [program]
    loader = elf.interpreter(program)
    while queue:
        for soname in elf.needed(queue.pop()):
            path = f"lib/{soname}"
            if path in found or (loader and soname == posixpath.basename(loader)):
                continue
            found[path] = _resolve(soname, by_name, available)
            queue.append(found[path])
    if loader:
        found[loader.removeprefix("/")] = _resolve(posixpath.basename(loader), by_name, available)
    return found


def _resolve(soname: str, by_name: Mapping[str, str], available: Mapping[str, apt.Entry]) -> bytes:
    """A library's contents, its link (libx.so.1 -> libx.so.1.2.3) followed within the packages."""
    name = soname
    for _hop in range(4):
        if name not in by_name:
            break
        entry = available[by_name[name]]
        if entry.target is None:
            return entry.data
        name = posixpath.basename(entry.target)
    raise HostError(
        f"The library {soname}, which qemu-guest-agent needs, is in none of the packages that it depends on.",
        mend="Report this with the name and version of your distribution.",
    )
