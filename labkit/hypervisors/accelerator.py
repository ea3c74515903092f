"""Which accelerator can carry a virtual machine on this computer: KVM, TCG or none.

Each is judged by booting a guest with it (`labkit.hypervisors.probe`), since nothing less proves
anything: there are hosts where `/dev/kvm` exists, opens, answers with the right version and even runs
real-mode code, while a 64-bit kernel never gets anywhere. The verdict is remembered until the host
reboots, QEMU changes, or what this user may do with `/dev/kvm` changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import resource
import signal
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from labkit import paths, tools
from labkit.errors import HostError
from labkit.hypervisors.probe import PROBES, Probe

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Tier", "Verdict", "accelerators", "best", "qemu_program", "tier"]

Tier = Literal["kvm", "tcg", "none"]

KVM_DEVICE = Path("/dev/kvm")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

#: Seconds until TCG is called dead. It takes 0.1 s on an idle computer; nothing but load slows it.
_TCG_DEADLINE = 30.0
#: KVM's deadline is this many times what TCG needed a moment before, so that a busy computer gets more
#: time: a KVM that works is never slower than TCG, one that does not is slower by two orders of magnitude.
_KVM_PER_TCG = 10
_KVM_DEADLINE = (3.0, 30.0)
#: Seconds of CPU time after which the kernel ends a probe whose parent died without a chance to.
_CPU_LIMIT = 60
_STDERR_LINES = 4


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of booting the probe guest with one accelerator.

    Attributes:
        name: "kvm" or "tcg".
        works: True where the guest ran to its end and computed the right answer.
        seconds: wall time of the attempt, QEMU's own start included; 0.0 where there was none.
        seen: the evidence: how far the guest came, how QEMU ended and what it said.
        reason: a sentence for people that says why it works or does not.
    """

    name: str
    works: bool
    seconds: float
    seen: str
    reason: str


def accelerators(*, refresh: bool = False) -> dict[str, Verdict]:
    """The verdict on each accelerator, by name: "kvm" and "tcg".

    The first call on a host takes some 0.2 s where KVM works or fails at once, and at most the
    deadline (3 s, on a busy computer up to 30 s) where it hangs. Later ones, of other processes too,
    read a file in labkit's state directory.

    Arguments:
        refresh: boot the guests again, whatever is remembered.
    """
    return remembered(Surroundings.of_this_host(), refresh=refresh)


def best(*, refresh: bool = False) -> Literal["kvm", "tcg"] | None:
    """The fastest accelerator that works: "kvm", "tcg", or None where no guest can run."""
    verdicts = accelerators(refresh=refresh)
    if verdicts["kvm"].works:
        return "kvm"
    return "tcg" if verdicts["tcg"].works else None


def tier() -> Tier:
    """What this computer can do, in one word: "kvm", "tcg" (slower) or "none"."""
    return best() or "none"


def qemu_program(arch: str | None = None) -> str | None:
    """The full path of the QEMU that emulates this computer's own architecture; None if absent.

    Arguments:
        arch: QEMU's name of another architecture, such as "aarch64".
    """
    return tools.which(f"qemu-system-{arch or host_arch()}")


def host_arch() -> str:
    """QEMU's name of this computer's architecture: "x86_64", "aarch64"."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


# ------------------------------------------------------------------ the memory


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """All that a verdict depends on; when any of it changes, the probe is booted again.

    Attributes:
        boot: the kernel's id of this boot; "" where it cannot be read, and then nothing is remembered.
        arch: QEMU's name of the architecture.
        qemu: QEMU's path (None if absent) and, of the file behind it, size and time of change in ns.
        uid, groups: whose verdict it is: a user who joins the group "kvm" gets a new one.
        kvm: mode, owner, group, inode and device number of `/dev/kvm`, and whether this process may
            open it; None if absent.
        probe: a digest of the probe guest.
    """

    boot: str
    arch: str
    qemu: str | None
    qemu_size: int
    qemu_mtime: int
    uid: int
    groups: tuple[int, ...]
    kvm: tuple[int, ...] | None
    probe: str

    @classmethod
    def of_this_host(
        cls, *, qemu: str | None = None, kvm_device: Path = KVM_DEVICE, boot_id: Path = BOOT_ID
    ) -> Surroundings:
        """Look at this computer; the arguments replace what is looked at."""
        arch = host_arch()
        guest = PROBES.get(arch)
        program = qemu or qemu_program(arch)
        size, mtime = _file_version(program)
        return cls(
            boot=_read(boot_id),
            arch=arch,
            qemu=program,
            qemu_size=size,
            qemu_mtime=mtime,
            uid=os.geteuid(),
            groups=tuple(sorted({os.getegid(), *os.getgroups()})),
            kvm=_kvm_state(kvm_device),
            probe=hashlib.sha256(guest.image()).hexdigest()[:16] if guest else "",
        )


def remembered(
    surroundings: Surroundings, *, refresh: bool = False, file: Path | None = None
) -> dict[str, Verdict]:
    """The verdicts for these surroundings, from the file if it has them, else from booting the probe.

    Two processes that do this at once both boot it, and either's file is as good as the other's.

    Arguments:
        file: where they are remembered; `accelerator.json` in labkit's state directory by default.
    """
    file = file or _memory_file()
    key = json.loads(json.dumps(asdict(surroundings)))  # tuples become lists, as they come back from a file
    known = None if refresh else _recall(file, key)
    if known is None:
        known = judge(surroundings)
        if surroundings.boot:
            _remember(file, key, known)
    return known


def _memory_file() -> Path | None:
    # A computer where labkit can keep nothing can still be told what it can do.
    try:
        return paths.state_dir() / "accelerator.json"
    except HostError:
        return None


def _recall(file: Path | None, key: object) -> dict[str, Verdict] | None:
    try:
        kept = json.loads(file.read_bytes()) if file else {}
        if kept["surroundings"] != key:
            return None
        verdicts = {name: Verdict(**fields) for name, fields in kept["verdicts"].items()}
        return {name: verdicts[name] for name in ("kvm", "tcg")}
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return None  # absent or damaged: the probe says it again


def _remember(file: Path | None, key: object, verdicts: Mapping[str, Verdict]) -> None:
    if file is None:
        return
    kept = {"surroundings": key, "verdicts": {name: asdict(verdict) for name, verdict in verdicts.items()}}
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(dir=file.parent) as directory:
        new = Path(directory, file.name)
        new.write_text(json.dumps(kept, indent=2), encoding="utf-8")
        new.replace(file)  # so that nobody ever reads half of it


def _file_version(program: str | None) -> tuple[int, int]:
    if program is None:
        return 0, 0
    try:
        seen = Path(program).stat()
    except OSError:
        return 0, 0
    return seen.st_size, seen.st_mtime_ns


def _kvm_state(device: Path) -> tuple[int, ...] | None:
    try:
        seen = device.stat()
    except OSError:
        return None
    allowed = os.access(device, os.R_OK | os.W_OK)
    return seen.st_mode, seen.st_uid, seen.st_gid, seen.st_ino, seen.st_rdev, int(allowed)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


# ------------------------------------------------------------------ the probe


def judge(surroundings: Surroundings) -> dict[str, Verdict]:
    """Boot the probe guest with each accelerator, TCG first, since it measures how busy the computer is."""
    guest = PROBES.get(surroundings.arch)
    if guest is None:
        return _not_tried(f"labkit has no probe guest for {surroundings.arch}.")
    if surroundings.qemu is None:
        return _not_tried(f"qemu-system-{surroundings.arch} is not installed.")
    tcg = boot_probe(surroundings.qemu, "tcg", guest=guest, deadline=_TCG_DEADLINE)
    kvm = boot_probe(surroundings.qemu, "kvm", guest=guest, deadline=kvm_deadline(tcg))
    return {"kvm": kvm, "tcg": tcg}


def _not_tried(why: str) -> dict[str, Verdict]:
    return {
        name: Verdict(name=name, works=False, seconds=0.0, seen=why, reason=why) for name in ("kvm", "tcg")
    }


def kvm_deadline(tcg: Verdict) -> float:
    """Seconds that KVM gets, by how long TCG took."""
    least, most = _KVM_DEADLINE
    return min(max(least, _KVM_PER_TCG * tcg.seconds), most) if tcg.works else most / 3


def boot_probe(
    qemu: str, name: Literal["kvm", "tcg"], *, guest: Probe, deadline: float, cpu: str = "max"
) -> Verdict:
    """Boot the probe guest once; QEMU is gone when this returns or raises.

    Arguments:
        qemu: QEMU's path.
        guest: the probe for the architecture that this QEMU emulates.
        deadline: seconds of wall time.
        cpu: QEMU's CPU model. "max" is the host's own CPU under KVM, as labkit's machines have it.
    """
    with tempfile.TemporaryDirectory(prefix="labkit-probe-") as directory:
        firmware = Path(directory, "probe.bin")
        firmware.write_bytes(guest.image())
        argv = [
            *_dying_with_us(),
            *(qemu, "-accel", name, "-cpu", cpu, "-m", "16", "-bios", str(firmware)),
            *("-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"),
            *("-chardev", "stdio,id=console,signal=off"),
            *guest.machine,
        ]
        return _verdict(name, guest, _run(argv, directory, deadline), deadline)


@dataclass(frozen=True)
class _Run:
    console: str
    stderr: str
    returncode: int | None  # None: it was ended at the deadline
    seconds: float


def _run(argv: list[str], directory: str, deadline: float) -> _Run:
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            argv,
            cwd=directory,  # a core file, where there is one, goes when the directory goes
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
    except OSError as exc:
        return _Run("", str(exc), 127, time.monotonic() - start)
    with process:
        try:
            _limit(process.pid)
            stdout, stderr = process.communicate(timeout=deadline)
            returncode: int | None = process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            stdout, stderr = process.communicate()
            returncode = None
        finally:
            process.kill()  # on a KeyboardInterrupt too; `with` then reaps it
    seconds = time.monotonic() - start
    return _Run(stdout.decode("ascii", "replace"), stderr.decode(errors="replace"), returncode, seconds)


def _dying_with_us() -> list[str]:
    # So that a probe that hangs does not outlive a parent that is killed.
    setpriv = tools.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


def _limit(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        resource.prlimit(pid, resource.RLIMIT_CPU, (_CPU_LIMIT, _CPU_LIMIT))
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))  # QEMU aborts where KVM lies to it


def _verdict(name: str, guest: Probe, run: _Run, deadline: float) -> Verdict:
    works = run.returncode == guest.exit_status and guest.finished(run.console)
    return Verdict(
        name=name,
        works=works,
        seconds=round(run.seconds, 3),
        seen=_evidence(guest, run, deadline),
        reason=_reason(name, guest, run, deadline, works=works),
    )


def _evidence(guest: Probe, run: _Run, deadline: float) -> str:
    stages = guest.reached(run.console)
    parts = [f"the probe guest reached: {', '.join(stages)}" if stages else "the probe guest said nothing"]
    if guest.finished(run.console) and run.returncode == guest.exit_status:
        return f"{parts[0]}, the right answer"
    parts.append(_exit(run.returncode, deadline))
    lines = run.stderr.strip().splitlines()
    if lines and run.returncode is not None:
        parts.append("it said: " + " / ".join(lines[-_STDERR_LINES:]))
    return "; ".join(parts)


def _exit(returncode: int | None, deadline: float) -> str:
    if returncode is None:
        return f"QEMU was ended after {deadline:.3g} s"
    if returncode < 0:
        return f"QEMU died of signal {-returncode} ({signal.strsignal(-returncode)})"
    return f"QEMU exited with {returncode}"


def _reason(name: str, guest: Probe, run: _Run, deadline: float, *, works: bool) -> str:
    label = name.upper()
    stages = guest.reached(run.console)
    if works:
        return f"{label} booted a 64-bit guest in {run.seconds:.2f} s."
    if run.returncode is None:
        last = f"it reached {stages[-1]}, and nothing more" if stages else "it did nothing"
        return f"A guest under {label} hangs: {last} in {deadline:.3g} s."
    if not stages:
        return f"QEMU could not start a guest with {label}."
    if len(stages) == len(guest.stages):
        return f"A guest under {label} computes wrongly."
    return f"A guest under {label} crashed after {stages[-1]}."
