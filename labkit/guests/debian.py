"""The debian guest: a full Debian with systemd on a disk of its own, made from packages by mmdebstrap.

It boots from its disk like any computer (GRUB, by BIOS and by UEFI), and quickly by direct kernel with a slim
initramfs of ours. Neither root nor loop devices are needed: mmdebstrap works in a user namespace where there
is no root, mke2fs fills the file system from a directory, and the partition table and bootloader are written
by `gpt.py`. What is in the system beside Debian's packages is in `files/debian-root`.

arm64 takes the same path (UEFI only); that was written from the documents and not run.
"""

from __future__ import annotations

import os
import shlex
import tarfile
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from labkit import paths
from labkit.guests import apt, data, gpt
from labkit.guests.agent_build import AGENT_SOURCE, build_agent
from labkit.guests.cpio import Archive
from labkit.guests.image import Image
from labkit.guests.initramfs import CONSOLES, add_busybox, add_modules, command_line
from labkit.guests.kernel import direct_boot_kernel
from labkit.guests.process import run_watched
from labkit.guests.store import fingerprint
from labkit.progress import Progress
from labkit.tools import require, run_tool, which

MiB, GiB = 1 << 20, 1 << 30

NAME = "debian"
WHAT = "a full Debian with systemd on a disk, booting by BIOS, UEFI or directly"

DISK_SIZE = 4 * GiB
_ESP_SIZE = 16 * MiB
_FALLBACK_SUITE = "bookworm"

_HERE = Path(__file__).parent
_ROOT_FILES = data.FILES / "debian-root"
_SOURCES = (
    *("debian.py", "agent_build.py", "apt.py", "cpio.py", "data.py", "elf.py", "gpt.py", "image.py"),
    *("initramfs.py", "kernel.py", "modules.py", "process.py"),
)
_CODE = fingerprint(_HERE / name for name in _SOURCES)  # as pocket's
#: What is run or read while the guest is made, beside what goes into it as it is.
_INPUTS = ("debian-packages", "debian-setup", "debian-initrd-init")

_ARCH_PACKAGES = {
    "amd64": ["linux-image-cloud-amd64", "grub-pc-bin", "grub-efi-amd64-bin", "grub-common"],
    "arm64": ["linux-image-cloud-arm64", "grub-efi-arm64-bin", "grub-common"],
}
#: Not unpacked into the guest: nobody reads them there, and they are a third of a small system.
_EXCLUDED = [f"/usr/share/{name}/*" for name in ("man", "doc", "info", "locale", "lintian")]

_INITRD_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "pvpanic_mmio")
_INITRD_ON_DEMAND = ("ext4", "virtio_scsi", "sd_mod", "ata_piix", "ahci", "nvme")


@dataclass(frozen=True)
class Plan:
    """What a debian guest will be made from.

    Attributes:
        arch: dpkg's name of the architecture.
        suite: Debian's release, by its code name.
        sources: lines for sources.list.
        busybox: the package of the slim initramfs.
        versions: of the packages that matter, where this computer's apt knows them.
    """

    arch: str
    suite: str
    sources: tuple[str, ...]
    busybox: apt.Package
    versions: tuple[tuple[str, str], ...]

    @property
    def inputs(self) -> dict[str, str]:
        """What tells one build from another: the suite and package versions."""
        return {"suite": self.suite, self.busybox.name: self.busybox.version, **dict(self.versions)}


def recipe() -> str:
    """The fingerprint of everything in labkit that decides how a debian guest is made."""
    files = [data.FILES / name for name in _INPUTS] + _root_files()
    return fingerprint([AGENT_SOURCE, *files], _CODE)


def plan() -> Plan:
    """Which suite and versions a debian guest is made from today, by apt's lists on this computer.

    Raises:
        HostError: this is no Debian or Ubuntu, or apt's lists lack the packages.
    """
    here, arch = apt.distribution(), apt.architecture()
    (busybox,) = apt.candidates(["busybox-static"])
    if here.id != "debian" or not here.codename:
        return Plan(arch, _FALLBACK_SUITE, _default_sources(_FALLBACK_SUITE), busybox, ())
    watched = [kernel_package(arch), "systemd", "qemu-guest-agent", "libc6", "openssh-server"]
    versions = tuple((package.name, package.version) for package in apt.candidates(watched))
    return Plan(
        arch, here.codename, apt.sources(here.codename) or _default_sources(here.codename), busybox, versions
    )


def kernel_package(arch: str) -> str:
    """The package that stands for the guest's kernel."""
    return _ARCH_PACKAGES[arch][0]


def _default_sources(suite: str) -> tuple[str, ...]:
    mirror = os.environ.get("LABKIT_DEBIAN_MIRROR", "http://deb.debian.org/debian")
    security = os.environ.get("LABKIT_DEBIAN_SECURITY_MIRROR", "http://deb.debian.org/debian-security")
    return (
        f"deb {mirror} {suite} main",
        f"deb {mirror} {suite}-updates main",
        f"deb {security} {suite}-security main",
    )


def build(directory: Path, plan: Plan, progress: Progress) -> Image:
    """Make the guest's disk, and its kernel and initramfs for direct boot, in a directory.

    Raises:
        HostError: a program is missing, or user namespaces are forbidden here.
        ToolError: a program failed.
    """
    arch = apt.QEMU_ARCH[plan.arch]
    root_id = uuid.uuid4()
    busybox = apt.download([plan.busybox], paths.cache_dir() / "packages", progress)[plan.busybox.name]
    with tempfile.TemporaryDirectory(prefix="work-", dir=directory) as name:
        work = Path(name)
        progress.step(f"installing Debian {plan.suite} (about a minute)")
        tree = _bootstrap(work, plan, root_id)
        progress.step("making the disk")
        boot = _read_boot_files(tree)
        release = _make_direct_boot(directory, arch, boot, busybox)
        _make_disk(directory / "disk.qcow2", work, tree, root_id, boot)
    return Image(
        name=NAME,
        version=f"Debian {plan.suite}, linux {release}",
        arch=arch,
        kernel=directory / "kernel",
        initrd=directory / "initrd",
        cmdline=f"root=UUID={root_id} rw {command_line(arch)}",
        disk=directory / "disk.qcow2",
        console=CONSOLES[arch],
        memory=512 * MiB,
        disk_size=DISK_SIZE,
        boots=("kernel", "disk"),
        firmware=("bios", "uefi") if arch == "x86_64" else ("uefi",),
        up=180.0,
    )


def _bootstrap(work: Path, plan: Plan, root_id: uuid.UUID) -> Path:
    """Let mmdebstrap make the system; returns it as a tar archive.

    A tar archive rather than a directory, since only root could make one with the right owners.
    """
    overlay, tree = work / "overlay.tar", work / "root.tar"
    values = {
        "@UUID@": str(root_id),
        "@CONSOLE@": CONSOLES[apt.QEMU_ARCH[plan.arch]],
        "@ARCH@": apt.QEMU_ARCH[plan.arch],
        "@ESP_SIZE@": str(_ESP_SIZE),
    }
    overlay.write_bytes(_overlay(values))
    argv = [
        require("mmdebstrap", package="mmdebstrap"),
        f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
        "--variant=minbase",
        "--format=tar",
        f"--architectures={plan.arch}",
        f"--include={','.join(data.words('debian-packages') + _ARCH_PACKAGES[plan.arch])}",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in _EXCLUDED),
        "--skip=cleanup/reproducible",  # it would have systemd reset our choice of services at the first boot
        # The initramfs is made once, at the end, with our settings in place.
        f"--extract-hook=tar-in {shlex.quote(str(overlay))} /",
        '--essential-hook=ln -sf /bin/true "$1/usr/local/sbin/update-initramfs"',
        '--customize-hook=rm "$1/usr/local/sbin/update-initramfs"',
        f"--customize-hook=tar-in {shlex.quote(str(overlay))} /",
        '--customize-hook=chroot "$1" sh /usr/lib/labkit/setup',
        '--customize-hook=rm "$1/usr/lib/labkit/setup"',
        plan.suite,
        str(tree),
        *plan.sources,
    ]
    run_watched(
        argv,
        what="install Debian into the guest",
        log=work / "mmdebstrap.log",
        env={"TMPDIR": "/var/tmp"},  # /tmp is often kept in memory, and this takes a gigabyte
        mend=_bootstrap_mend(),
    )
    return tree


def _bootstrap_mend() -> str:
    if os.geteuid() == 0:
        return "See whether the mirrors in apt's sources can be reached: sudo apt update"
    if which("newuidmap") is None:
        return "sudo apt install uidmap   (it lets you have user ids of your own in a namespace)"
    return (
        "See whether the mirrors can be reached (sudo apt update) and user namespaces are allowed "
        "(unshare --user true); without them, use Debian or Ubuntu as root once."
    )


def _overlay(values: Mapping[str, str]) -> bytes:
    """Our files for the guest, as a tar archive that belongs to root."""
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for path in _root_files():
            _add(archive, str(path.relative_to(_ROOT_FILES)), path.read_text(), values)
        _add(archive, "usr/lib/labkit/setup", data.text("debian-setup"), values)
        _add_bytes(archive, "usr/local/sbin/labkit-agent", build_agent(), 0o755)
    return out.getvalue()


def _root_files() -> list[Path]:
    return sorted(path for path in _ROOT_FILES.rglob("*") if path.is_file())


def _add(archive: tarfile.TarFile, path: str, text: str, values: Mapping[str, str]) -> None:
    for key, value in values.items():
        text = text.replace(key, value)
    _add_bytes(archive, path, text.encode(), 0o755 if text.startswith("#!") else 0o644)


def _add_bytes(archive: tarfile.TarFile, path: str, data: bytes, mode: int) -> None:
    member = tarfile.TarInfo(path)
    member.size, member.mode = len(data), mode
    archive.addfile(member, BytesIO(data))


def _read_boot_files(tree: Path) -> dict[str, bytes]:
    """The kernel, its modules and the bootloaders: path without a leading slash or "usr/" -> contents."""
    found: dict[str, bytes] = {}
    with tarfile.open(tree) as archive:
        for member in archive:
            path = member.name.removeprefix("./").removeprefix("usr/")
            if path.startswith(("boot/vmlinuz-", "boot/labkit/", "lib/modules/")) and member.isfile():
                file = archive.extractfile(member)
                assert file is not None  # it is a regular file
                found[path] = file.read()
    return found


def _make_direct_boot(directory: Path, arch: str, boot: Mapping[str, bytes], busybox: Path) -> str:
    """Write the unpacked kernel and the slim initramfs; returns the kernel's release."""
    packed = next(path for path in boot if path.startswith("boot/vmlinuz-"))
    release = packed.removeprefix("boot/vmlinuz-")
    (directory / "kernel").write_bytes(direct_boot_kernel(boot[packed], arch))
    archive = Archive()
    for path in ("dev", "proc", "sys", "root", "tmp"):
        archive.directory(path)
    archive.file("init", data.text("debian-initrd-init"), 0o755)
    archive.file("etc/labkit/early-modules", "\n".join(_INITRD_MODULES) + "\n")
    add_busybox(archive, busybox)
    base = f"lib/modules/{release}/"
    files = {path.removeprefix(base): data for path, data in boot.items() if path.startswith(base)}
    add_modules(archive, release, files, (*_INITRD_MODULES, *_INITRD_ON_DEMAND))
    (directory / "initrd").write_bytes(archive.to_bytes())
    return release


def _make_disk(disk: Path, work: Path, tree: Path, root_id: uuid.UUID, boot: Mapping[str, bytes]) -> None:
    """Put partition table, bootloaders and root file system on a qcow2."""
    raw = work / "disk.raw"
    bios, esp, root = _partitions()
    with raw.open("wb") as file:
        file.truncate(DISK_SIZE)
        gpt.write_table(file, DISK_SIZE, (bios, esp, root), root_id)
        if core := boot.get("boot/labkit/core.img"):
            gpt.install_grub(file, boot["boot/labkit/boot.img"], core, bios)
        file.seek(esp.start * gpt.SECTOR)
        file.write(boot["boot/labkit/esp.img"])
    _fill_root(raw, work, tree, root, root_id)
    convert = [require("qemu-img", package="qemu-utils"), "convert", "-O", "qcow2", str(raw), str(disk)]
    run_tool(convert, what="write the guest's disk")


def _partitions() -> tuple[gpt.Partition, gpt.Partition, gpt.Partition]:
    """GRUB's, the EFI system partition, and the root file system, which is last so that it can grow."""
    step = MiB // gpt.SECTOR
    esp_length = _ESP_SIZE // gpt.SECTOR
    root_start = 2 * step + esp_length
    root_length = (gpt.last_usable(DISK_SIZE) + 1 - root_start) // step * step
    return (
        gpt.Partition("bios", gpt.BIOS_BOOT, step, step),
        gpt.Partition("efi", gpt.EFI_SYSTEM, 2 * step, esp_length),
        gpt.Partition("root", gpt.LINUX, root_start, root_length),
    )


def _fill_root(raw: Path, work: Path, tree: Path, partition: gpt.Partition, root_id: uuid.UUID) -> None:
    """Make the root file system inside the disk image from the tar archive."""
    extended = (
        f"offset={partition.start * gpt.SECTOR},lazy_itable_init=1,assume_storage_prezeroed=1,root_owner=0:0"
    )
    mke2fs = [
        *(
            require("mke2fs", package="e2fsprogs"),
            "-q",
            "-F",
            "-t",
            "ext4",
            "-L",
            "labkit-root",
            "-U",
            str(root_id),
        ),
        *("-O", "^metadata_csum_seed,^orphan_file"),  # GRUB 2.06 cannot read a file system with these
        *("-E", extended, "-d", "root", str(raw), f"{partition.length // 2}k"),
    ]
    untar = "mkdir root && tar -xf root.tar -C root --exclude=./dev/* --exclude=./boot/labkit"
    script = f"{untar} && {shlex.join(mke2fs)}"
    # fakeroot lets mke2fs see the owners that tar could not set.
    prefix = [] if os.geteuid() == 0 else [require("fakeroot", package="fakeroot"), "--"]
    run_watched(
        [*prefix, "/bin/sh", "-c", script],
        what="make the guest's file system",
        log=work / "mke2fs.log",
        cwd=work,
    )
