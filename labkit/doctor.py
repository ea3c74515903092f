"""What this computer can do for the course, and how to mend what it cannot.

Each check is a function that looks at one thing and returns a `Check`; `doctor()` asks them all at
once and returns a `Report`. They change nothing: the guests that they boot are thrown away, libvirt's
daemon is labkit's own and ends by itself, and all that stays is the remembered verdict on accelerators.

A check's status is one of

    ok     nothing to do
    info   optional, or a fact to know; the course goes on without doing anything about it
    warn   the course works, slower or not all of it
    fail   machines cannot run until it is mended
"""

from __future__ import annotations

import fcntl
import html
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from labkit import paths, tools
from labkit.errors import LabkitError
from labkit.hardware import cpu as hardware_cpu
from labkit.hardware import host as hardware_host
from labkit.hypervisors import accelerator
from labkit.hypervisors.accelerator import Tier, Verdict

__all__ = ["Check", "Report", "Status", "doctor"]

Status = Literal["ok", "info", "warn", "fail"]

MiB, GiB = 1 << 20, 1 << 30

#: A notebook's machines together: four pocket VMs of 256 MiB, and JupyterLab beside them.
_MEMORY_GOOD, _MEMORY_LEAST = 2 * GiB, 512 * MiB
#: Images, their packages and the disks of a course: the full Debian alone is built in 1.5 GB.
_DISK_GOOD, _DISK_LEAST = 6 * GiB, 1 * GiB
#: Seconds until a check that does not return is given up.
_DEADLINE = 30.0
_KVM_GET_API_VERSION = 0xAE00

_SYMBOLS: dict[Status, str] = {"ok": "✓", "info": "·", "warn": "!", "fail": "✗"}
_TIERS: dict[Tier, str] = {
    "kvm": "Machines run with KVM: the processor runs them directly, at nearly full speed.",
    "tcg": "Machines run with TCG: QEMU translates their code. All of the course works, slower.",
    "none": "No machine can run here yet: mend what has failed below.",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        id: its name, which does not change: "accelerator-kvm".
        status: "ok", "info", "warn" or "fail"; see the module's docstring.
        seen: the evidence.
        meaning: what that means for the course, in a sentence.
        mend: what to do, commands in backticks; "" where the status is "ok".
    """

    id: str
    status: Status
    seen: str
    meaning: str
    mend: str = ""

    def as_dict(self) -> dict[str, str]:
        """The fields as plain data."""
        return {
            "id": self.id,
            "status": self.status,
            "seen": self.seen,
            "meaning": self.meaning,
            "mend": self.mend,
        }


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the doctor found; shows itself in notebooks and terminals.

    Attributes:
        tier: "kvm", "tcg" or "none": what machines can run with.
        checks: in the order in which one would read them.
        seconds: how long it took.
    """

    tier: Tier
    checks: tuple[Check, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """True where nothing failed."""
        return all(check.status != "fail" for check in self.checks)

    def __getitem__(self, id: str) -> Check:
        for check in self.checks:
            if check.id == id:
                return check
        raise KeyError(id)

    def as_dict(self) -> dict[str, Any]:
        """`{"tier", "checks": [{"id", "status", "seen", "meaning", "mend"}]}`."""
        return {"tier": self.tier, "checks": [check.as_dict() for check in self.checks]}

    def __str__(self) -> str:
        lines = [_TIERS[self.tier], ""]
        for check in self.checks:
            lines += _as_text(check)
        return "\n".join([*lines, "", _summary(self.checks)])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # IPython's protocol
        printer.text(str(self))

    def _repr_html_(self) -> str:
        rows = "".join(_as_row(check) for check in self.checks)
        return (
            f"<style>{_CSS}</style><div class='labkit-doctor'>"
            f"<p><strong>{_rich(_TIERS[self.tier])}</strong></p>"
            "<table><thead><tr><th>check</th><th>status</th><th>what was seen, and what it means</th></tr>"
            f"</thead><tbody>{rows}</tbody></table><p>{_rich(_summary(self.checks))}</p></div>"
        )


def doctor(*, refresh: bool = False) -> Report:
    """Look at all that labkit needs of this computer.

    The first time on a host it boots a tiny guest with each accelerator, which takes up to some
    seconds where one hangs; later it takes about a second.

    Arguments:
        refresh: forget the verdict on the accelerators, and boot the guests again.
    """
    start = time.monotonic()
    others = _Together(_CHECKS)
    # In this thread, so that a KeyboardInterrupt ends the guests that it boots.
    verdicts = _verdicts(refresh=refresh)
    accelerators = _Together(
        {
            "accelerator-kvm": partial(accelerator_kvm, verdicts["kvm"]),
            "accelerator-tcg": partial(accelerator_tcg, verdicts["tcg"]),
        }
    )
    found = accelerators.results() | others.results()
    checks = tuple(found[id] for id in _ORDER)
    return Report(tier=_tier(verdicts), checks=checks, seconds=time.monotonic() - start)


def _verdicts(*, refresh: bool) -> Mapping[str, Verdict]:
    try:
        return accelerator.accelerators(refresh=refresh)
    except Exception as exc:  # noqa: BLE001  # whatever it is, the report says it
        why = f"the probe itself failed: {type(exc).__name__}: {exc}"
        return {
            name: Verdict(name=name, works=False, seconds=0.0, seen=why, reason=why)
            for name in ("kvm", "tcg")
        }


def _tier(verdicts: Mapping[str, Verdict]) -> Tier:
    if verdicts["kvm"].works:
        return "kvm"
    return "tcg" if verdicts["tcg"].works else "none"


class _Together:
    """Checks that run at the same time, each in a thread that holds nobody up."""

    def __init__(self, checks: Mapping[str, Callable[[], Check]]) -> None:
        self._found: dict[str, Check] = {}
        self._until = time.monotonic() + _DEADLINE
        self._threads = {
            id: threading.Thread(target=self._run, args=(id, check), name=f"doctor-{id}", daemon=True)
            for id, check in checks.items()
        }
        for thread in self._threads.values():
            thread.start()

    def _run(self, id: str, check: Callable[[], Check]) -> None:
        try:
            self._found[id] = check()
        except Exception as exc:  # noqa: BLE001  # no check's failure may sink the report
            self._found[id] = failed(id, exc)

    def results(self) -> dict[str, Check]:
        """What each found, by id; a check that hangs counts as failed."""
        for id, thread in self._threads.items():
            thread.join(max(0.0, self._until - time.monotonic()))
            if thread.is_alive():
                self._found.setdefault(id, failed(id, TimeoutError(f"no answer in {_DEADLINE:g} s")))
        return {id: self._found[id] for id in self._threads}


def failed(id: str, exc: Exception) -> Check:
    """The check that raised, or did not end."""
    evidence = f"{type(exc).__name__}: {exc}"
    mend = f"Please report it with this text; `labkit doctor --json` prints it. ({evidence})"
    if isinstance(exc, LabkitError):
        evidence = " / ".join(part for part in (exc.message, *exc.evidence.splitlines()) if part)
        mend = exc.mend or mend
    return Check(
        id=id,
        status="fail",
        seen=evidence,
        meaning="This check could not be made, so what it looks at may not work.",
        mend=mend,
    )


# ------------------------------------------------------------------ processor and accelerators


def cpu_flags(text: str | None = None) -> Check:
    """Does the processor show hardware virtualization? `text`: of a /proc/cpuinfo, this one by default."""
    cpu = hardware_cpu.cpu_flags(text)
    name = " ".join(f"{cpu.vendor} {cpu.model}".split())
    if cpu.virtualization:
        seen = f"{name}: {', '.join(filter(None, (cpu.virtualization, cpu.nested_paging)))}"
        return Check("cpu-flags", "ok", seen, "The processor can run guests' code directly.")
    if cpu.arch == "arm64":
        return Check(
            "cpu-flags",
            "ok",
            f"{name}: arm64 shows no flag for it",
            "Whether the processor can run guests directly, only booting one tells.",
        )
    seen = f"{name}: neither vmx nor svm" + (", and the flag hypervisor" if cpu.beneath_hypervisor else "")
    return Check(
        "cpu-flags",
        "info",
        seen,
        "The processor shows no hardware virtualization, so QEMU translates guests' code (TCG).",
        "Nothing has to be done. For more speed: " + _expose(cpu),
    )


# By the system vendor in the DMI tables, how each hypervisor gives its guests vmx or svm.
_NESTED = {
    "innotek": "`VBoxManage modifyvm NAME --nested-hw-virt on` (VirtualBox, the machine off)",
    "VMware": 'add `vhv.enable = "TRUE"` to the machine\'s .vmx file (VMware, the machine off)',
    "Microsoft": "`Set-VMProcessor -VMName NAME -ExposeVirtualizationExtensions $true` (Hyper-V, the machine "
    "off; Azure: a size that has nested virtualization)",
    "QEMU": "`virt-xml NAME --edit --cpu host-passthrough` on the host (KVM, the machine off)",
    "Parallels": "`prlctl set NAME --nested-virt on` (Parallels, the machine off)",
    "Amazon": "use a size of machine that has it (AWS: one named .metal)",
    "Google": "`gcloud compute instances export NAME --destination vm.yaml`, add there "
    "`advancedMachineFeatures: {enableNestedVirtualization: true}`, then "
    "`gcloud compute instances update-from-file NAME --source vm.yaml`",
}


def _expose(cpu: hardware_cpu.CpuFlags, vendor: str | None = None) -> str:
    """How vmx or svm could come to show on this computer."""
    if not cpu.beneath_hypervisor:
        amd = cpu.vendor == "AuthenticAMD"
        name = "SVM Mode (AMD-V)" if amd else "Intel Virtualization Technology (VT-x)"
        return f"turn on {name} in the firmware's settings (BIOS, UEFI): `systemctl reboot --firmware-setup`"
    vendor = hardware_host.system_vendor() if vendor is None else vendor
    for name, how in _NESTED.items():
        if vendor.startswith(name):
            return f"this is a virtual machine; turn on nested virtualization: {how}"
    return (
        "this is a virtual machine; turn on nested virtualization in the hypervisor beneath it, which does "
        f"not tell its name. VirtualBox: {_NESTED['innotek']}; KVM: {_NESTED['QEMU']}"
    )


def kvm_device(device: Path = accelerator.KVM_DEVICE) -> Check:
    """Is /dev/kvm there, and may we open it? Neither proves that KVM works."""
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return Check(
            "kvm-device",
            "info",
            f"there is no {device}",
            "The kernel offers no KVM here; machines run with TCG.",
            f"Nothing has to be done. Where the processor shows vmx or svm: `{_modprobe()}`",
        )
    except PermissionError:
        return _kvm_forbidden(device)
    except OSError as exc:
        return Check(
            "kvm-device",
            "info",
            f"{device} cannot be opened: {exc.strerror}",
            "The device is there with no driver behind it; machines run with TCG.",
            f"Nothing has to be done. Where the processor shows vmx or svm: `{_modprobe()}`",
        )
    try:
        version = str(fcntl.ioctl(descriptor, _KVM_GET_API_VERSION))
    except OSError as exc:
        version = f"not told ({exc.strerror})"
    finally:
        os.close(descriptor)
    return Check(
        "kvm-device",
        "ok",
        f"{device} is there and opens; API version {version}",
        "This alone proves nothing; accelerator-kvm says whether KVM works.",
    )


def _kvm_forbidden(device: Path) -> Check:
    seen = device.stat()
    return Check(
        "kvm-device",
        "warn",
        f"{device} is there, and this user may not open it (mode {seen.st_mode & 0o7777:04o}, "
        f"group {_group(seen.st_gid)})",
        "If KVM works here, machines could be much faster than with TCG.",
        _join_kvm(device),
    )


def _join_kvm(device: Path) -> str:
    mode = device.stat()
    if mode.st_mode & 0o060 == 0o060 and mode.st_gid != 0:
        return f"`sudo usermod -aG {_group(mode.st_gid)} $USER`, then log out and in again"
    # No group may open it (often so in virtual machines made without udev).
    return (
        f"`sudo groupadd -f kvm; sudo chgrp kvm {device}; sudo chmod 660 {device}; "
        "sudo usermod -aG kvm $USER`, then log out and in again"
    )


def _group(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _modprobe(text: str | None = None) -> str:
    try:
        vendor = hardware_cpu.cpu_flags(text).vendor
    except LabkitError:
        vendor = ""
    module = {"GenuineIntel": "kvm_intel", "AuthenticAMD": "kvm_amd", "HygonGenuine": "kvm_amd"}.get(
        vendor, "kvm"
    )
    return f"sudo modprobe {module}"


def accelerator_kvm(
    verdict: Verdict, *, device: Path = accelerator.KVM_DEVICE, cpuinfo: str | None = None
) -> Check:
    """Does a guest run under KVM? Judged by booting one."""
    if verdict.works:
        return Check(
            "accelerator-kvm", "ok", _told(verdict), "Machines run at nearly the processor's own speed."
        )
    return Check(
        "accelerator-kvm",
        "warn" if _should_work(cpuinfo) else "info",
        _told(verdict),
        "Machines run with TCG instead: everything in the course works, slower.",
        _mend_kvm(device, cpuinfo),
    )


def _should_work(cpuinfo: str | None) -> bool:
    try:
        return hardware_cpu.cpu_flags(cpuinfo).virtualization is not None
    except LabkitError:
        return False


def _mend_kvm(device: Path, cpuinfo: str | None) -> str:
    if accelerator.qemu_program() is None:
        return _install_qemu()
    try:
        cpu = hardware_cpu.cpu_flags(cpuinfo)
    except LabkitError as exc:
        return f"Nothing has to be done. {exc.mend}"
    if cpu.virtualization is None and cpu.arch == "x86":
        return "Nothing has to be done. For more speed: " + _expose(cpu)
    if not device.exists():
        return f'`{_modprobe(cpuinfo)}`. If it says "disabled by bios" or "not supported": {_expose(cpu)}'
    if not os.access(device, os.R_OK | os.W_OK):
        return _join_kvm(device)
    module = _modprobe(cpuinfo).split()[-1]
    return (
        f"Stop what else uses hardware virtualization (VirtualBox, VMware), then "
        f"`sudo modprobe -r {module} && sudo modprobe {module}`, then `labkit doctor --refresh`. "
        "`sudo dmesg | grep -i kvm` tells more"
    )


def accelerator_tcg(verdict: Verdict) -> Check:
    """Does a guest run under TCG? Judged by booting one."""
    if verdict.works:
        return Check(
            "accelerator-tcg",
            "ok",
            _told(verdict),
            "QEMU can translate guests' code: machines run on any processor.",
        )
    missing = accelerator.qemu_program() is None
    return Check(
        "accelerator-tcg",
        "fail",
        _told(verdict),
        "QEMU cannot run a guest by translating its code.",
        _install_qemu() if missing else f"`sudo apt install --reinstall {_qemu_package()}`",
    )


def _told(verdict: Verdict) -> str:
    if verdict.seen == verdict.reason:  # no guest was booted
        return verdict.reason
    return f"{verdict.reason} {verdict.seen[:1].upper()}{verdict.seen[1:].rstrip('.')}."


# ------------------------------------------------------------------ programs


def qemu(program: str | None = None) -> Check:
    """Is QEMU there, and which version? `program`: its path, looked for by default."""
    program = program or accelerator.qemu_program()
    tool = tools.which("qemu-img")
    if program is None or tool is None:
        name = "qemu-img" if program else f"qemu-system-{accelerator.host_arch()}"
        return Check(
            "qemu",
            "fail",
            f"{name} is not installed",
            "QEMU runs the course's virtual machines; without it there are none.",
            _install_qemu(),
        )
    output = tools.run_tool([program, "--version"], what="ask QEMU for its version", timeout=15)
    version = output.splitlines()[0].removeprefix("QEMU emulator version ")
    return Check("qemu", "ok", f"{program}, {version}", "QEMU is installed.")


def _qemu_package() -> str:
    return "qemu-system-x86" if accelerator.host_arch() == "x86_64" else "qemu-system-arm"


def _install_qemu() -> str:
    return f"`sudo apt install --no-install-recommends {_qemu_package()} qemu-utils`"


def libvirt_daemon() -> Check:
    """Is libvirt's binding there, does a daemon answer, and which version is it?"""
    try:
        from labkit.hypervisors import libvirt
    except ImportError as exc:
        return _no_binding(exc)
    try:
        connection = libvirt.connect()
        library, hypervisor = connection.version()
        where = connection.uri or "labkit's own daemon"
    except LabkitError as exc:
        return Check(
            "libvirt",
            "fail",
            " / ".join((exc.message, *exc.evidence.splitlines())),
            "libvirt manages the course's virtual machines; without it there are none.",
            _mend_libvirt(exc),
        )
    return Check(
        "libvirt",
        "ok",
        f"libvirt {library} with QEMU {hypervisor} answers at {where}",
        "libvirt manages virtual machines here.",
    )


_INSTALL_LIBVIRT = (
    "`sudo apt install --no-install-recommends libvirt-daemon libvirt-daemon-driver-qemu tini`; or `./lab up`"
)


def _no_binding(exc: ImportError) -> Check:
    if "libvirt" in (exc.name or "") or "libvirt" in str(exc):
        # The binding is compiled against the system's library, whichever that is.
        build = "`sudo apt install libvirt-dev pkg-config gcc python3-dev`"
        mend = f"{build}, then `{sys.executable} -m pip install libvirt-python`; or `./lab up`"
    else:
        mend = f"`{sys.executable} -m pip install {exc.name or 'labkit'}`; or `./lab up`"
    return Check(
        "libvirt",
        "fail",
        f"the Python module cannot be imported: {exc}",
        "labkit speaks to libvirt by it, and libvirt manages the course's virtual machines.",
        mend,
    )


def _mend_libvirt(exc: LabkitError) -> str:
    if tools.which("libvirtd") is None or tools.which("tini") is None:
        return _INSTALL_LIBVIRT
    if os.environ.get("LABKIT_URI"):
        return "`virsh -c $LABKIT_URI list` says more; or `unset LABKIT_URI`, which uses labkit's own daemon"
    return exc.mend or _INSTALL_LIBVIRT


def docker(sockets: Sequence[str] | None = None) -> Check:
    """Does a Docker or Podman daemon answer? Starts none.

    Arguments:
        sockets: URLs to try in turn; DOCKER_HOST and the usual places by default.
    """
    try:
        import docker as sdk
    except ImportError as exc:
        return Check(
            "docker",
            "info",
            f"the Python module cannot be imported: {exc}",
            "Containers beside virtual machines are optional; the rest of the course works.",
            f"Optional: `{sys.executable} -m pip install docker`; or `./lab up`",
        )
    tried = []
    for url in docker_urls() if sockets is None else sockets:
        path = Path(url.removeprefix("unix://"))
        if url.startswith("unix://") and not path.exists():
            continue
        try:
            client = sdk.DockerClient(base_url=url, timeout=5) if url else sdk.from_env(timeout=5)
            try:
                told = client.version()
            finally:
                client.close()
        except Exception as exc:  # noqa: BLE001  # the SDK lets many kinds through
            tried.append((url, exc))
            continue
        name = told.get("Platform", {}).get("Name") or told.get("Components", [{}])[0].get("Name", "Engine")
        return Check(
            "docker",
            "ok",
            f"{name} {told.get('Version', '')} answers at {url or os.environ.get('DOCKER_HOST')}",
            "The chapters on containers can be done here.",
        )
    return _no_docker(tried)


def docker_urls(environ: Mapping[str, str] | None = None) -> list[str]:
    """Where a daemon may answer; "" stands for what DOCKER_HOST and its like say."""
    environ = os.environ if environ is None else environ
    if environ.get("DOCKER_HOST"):
        return [""]
    runtime = environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")
    home = environ.get("HOME", "/nonexistent")
    places = [
        "/var/run/docker.sock",
        f"{runtime}/docker.sock",
        f"{home}/.docker/run/docker.sock",
        f"{home}/.docker/desktop/docker.sock",
        f"{runtime}/podman/podman.sock",
        "/run/podman/podman.sock",
    ]
    return [f"unix://{place}" for place in places]


def _no_docker(tried: Sequence[tuple[str, Exception]]) -> Check:
    meaning = "Containers beside virtual machines are optional; the rest of the course works."
    denied = [url for url, exc in tried if "Permission denied" in str(exc)]
    if denied:
        return Check(
            "docker",
            "info",
            f"a daemon is there ({denied[0]}), and this user may not speak to it",
            meaning,
            "Optional: `sudo usermod -aG docker $USER`, then log out and in again (it makes that user "
            "as powerful as root)",
        )
    if tried:
        url, exc = tried[0]
        seen = f"no answer at {url or os.environ.get('DOCKER_HOST')}: {exc}"
    else:
        seen = "no daemon's socket is there"
    return Check("docker", "info", seen, meaning, f"Optional: {_start_docker()}")


def _start_docker() -> str:
    if os.environ.get("DOCKER_HOST"):
        return "`unset DOCKER_HOST`, which asks for a daemon on this computer; or start the one that it names"
    if tools.which("dockerd"):
        systemd = Path("/run/systemd/system").exists()
        return (
            "`sudo systemctl start docker`"
            if systemd
            else "`sudo sh -c 'dockerd >/var/log/dockerd.log 2>&1 &'`"
        )
    if tools.which("podman"):
        return "`systemctl --user start podman.socket`"
    return "`sudo apt install docker.io` (not beside docker-ce)"


def virtualbox(driver: Path = Path("/dev/vboxdrv"), program: str | None = None) -> Check:
    """Is VirtualBox there, and its kernel driver?"""
    program = program or tools.which("VBoxManage")
    if program is None:
        return Check(
            "virtualbox",
            "info",
            "VBoxManage is not installed",
            "VirtualBox beside QEMU is optional; the rest of the course works.",
            "Optional: `sudo apt install virtualbox` (Ubuntu), or the package for this system from "
            "https://www.virtualbox.org/wiki/Linux_Downloads",
        )
    output = tools.run_tool([program, "--version"], what="ask VirtualBox for its version", timeout=15)
    version = output.strip().splitlines()[-1] if output.strip() else "of an unknown version"
    if driver.exists():
        return Check(
            "virtualbox",
            "ok",
            f"{program} {version}; {driver} is there",
            "Virtual machines can be made and started with VirtualBox too.",
        )
    return Check(
        "virtualbox",
        "info",
        f"{program} {version}; there is no {driver}",
        "VirtualBox can make, clone and export machines here, and start none.",
        "Optional: `sudo modprobe vboxdrv`; if there is no such module: "
        "`sudo apt install virtualbox-dkms linux-headers-$(uname -r)`, or with Oracle's package "
        "`sudo /sbin/vboxconfig`",
    )


# ------------------------------------------------------------------ the system


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


def disk(places: Mapping[str, Path] | None = None) -> Check:
    """Is there room where images and machines' disks go?

    Arguments:
        places: what is kept there, and where; labkit's cache and state directories by default.
    """
    places = places or {"images": paths.cache_dir(), "disks": paths.state_dir()}
    free = {place: shutil.disk_usage(place).free for place in places.values()}
    least = min(free.values())
    seen = "; ".join(
        f"{free[place] / GiB:.1f} GiB free for {what} in {place}" for what, place in places.items()
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
            f"`{sys.executable} -m pip install {' '.join(missing)}`; or `./lab up`",
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
        "`docker run --security-opt seccomp=unconfined …`. Elsewhere, ask whoever runs the computer"
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


_CHECKS: dict[str, Callable[[], Check]] = {
    "cpu-flags": cpu_flags,
    "kvm-device": kvm_device,
    "qemu": qemu,
    "libvirt": libvirt_daemon,
    "pid1-reaping": pid1_reaping,
    "memory": memory,
    "disk": disk,
    "python": python,
    "jupyter": jupyter,
    "docker": docker,
    "virtualbox": virtualbox,
    "user-namespaces": user_namespaces,
    "container": container,
}
_ORDER = [
    "accelerator-kvm",
    "accelerator-tcg",
    "cpu-flags",
    "kvm-device",
    "qemu",
    "libvirt",
    "memory",
    "disk",
    "pid1-reaping",
    "user-namespaces",
    "python",
    "jupyter",
    "docker",
    "virtualbox",
    "container",
]


# ------------------------------------------------------------------ showing it


def _summary(checks: Sequence[Check]) -> str:
    count = {status: sum(check.status == status for check in checks) for status in _SYMBOLS}
    return (
        f"{count['ok']} ok, {count['info']} to know or optional, {count['warn']} with a warning, "
        f"{count['fail']} failed."
    )


def _as_text(check: Check) -> list[str]:
    indent = " " * 8
    wrap = partial(textwrap.wrap, width=100, subsequent_indent=indent, break_long_words=False)
    wrap = partial(wrap, break_on_hyphens=False)
    lines = [f"{_SYMBOLS[check.status]} {check.status:<4}  {check.id}"]
    lines += wrap(check.seen, initial_indent=indent)
    lines += wrap(check.meaning, initial_indent=indent)
    if check.mend:
        lines += wrap(f"→ {check.mend}", initial_indent=indent, subsequent_indent=indent + "  ")
    return lines


def _as_row(check: Check) -> str:
    mend = f"<div class='mend'>→ {_rich(check.mend)}</div>" if check.mend else ""
    return (
        f"<tr class='{check.status}'><td class='id'>{html.escape(check.id)}</td>"
        f"<td class='status'><span>{_SYMBOLS[check.status]}&nbsp;{check.status}</span></td>"
        f"<td><div>{_rich(check.meaning)}</div><div class='seen'>{_rich(check.seen)}</div>{mend}</td></tr>"
    )


def _rich(text: str) -> str:
    """Text as HTML, what stands in backticks as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a backtick without its fellow is just a character
        return html.escape(text)
    return "".join(
        f"<code>{html.escape(part)}</code>" if index % 2 else html.escape(part)
        for index, part in enumerate(parts)
    )


# No colour is fixed against the page: text keeps the theme's, tints are transparent. Status is a word.
_CSS = """
.labkit-doctor table { border-collapse: collapse; width: 100%; max-width: 62em; font-size: 0.95em; }
.labkit-doctor th, .labkit-doctor td { text-align: left !important; vertical-align: top;
  padding: 0.5em 0.8em; white-space: normal; border-bottom: 1px solid rgba(128, 128, 128, 0.3); }
.labkit-doctor thead th { font-weight: 600; border-bottom-width: 2px; }
.labkit-doctor tbody tr { background: none !important; }
.labkit-doctor .id { font-weight: 600; white-space: nowrap; }
.labkit-doctor .status { white-space: nowrap; }
.labkit-doctor .status span { display: inline-block; min-width: 3.6em; padding: 0.05em 0.5em;
  border-radius: 0.3em; border: 1px solid rgba(128, 128, 128, 0.5); }
.labkit-doctor .ok span { background: rgba(46, 160, 67, 0.18); border-color: rgba(46, 160, 67, 0.7); }
.labkit-doctor .warn span { background: rgba(210, 153, 34, 0.22); border-color: rgba(210, 153, 34, 0.9); }
.labkit-doctor .fail span { background: rgba(218, 54, 51, 0.22); border-color: rgba(218, 54, 51, 0.9); }
.labkit-doctor .seen { opacity: 0.75; font-size: 0.92em; margin-top: 0.15em; overflow-wrap: anywhere; }
.labkit-doctor .mend { margin-top: 0.35em; }
.labkit-doctor code { padding: 0.05em 0.3em; border-radius: 0.25em; background: rgba(128, 128, 128, 0.18);
  color: inherit; overflow-wrap: anywhere; }
"""


class _CallableModule(types.ModuleType):
    """`import labkit.doctor` binds this module over the function of the same name; both can be called."""

    def __call__(self, *, refresh: bool = False) -> Report:
        return doctor(refresh=refresh)


sys.modules[__name__].__class__ = _CallableModule
