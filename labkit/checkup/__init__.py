"""What this computer can do for the course, and how to mend what it cannot.

    report.py       Check and Report, and how they show themselves
    processor.py    checks of the processor and the accelerators
    programs.py     checks of QEMU, libvirt, Docker, VirtualBox
    system.py       checks of memory, disk, Python, process 1, namespaces

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

import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from labkit.checkup import processor, programs, system
from labkit.checkup.report import Check, Report, Status
from labkit.errors import LabkitError
from labkit.hypervisors import accelerator
from labkit.hypervisors.accelerator import Tier, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Check", "Report", "Status", "doctor"]

#: Seconds until a check that does not return is given up.
_DEADLINE = 30.0

_CHECKS: dict[str, Callable[[], Check]] = {
    "cpu-flags": processor.cpu_flags,
    "kvm-device": processor.kvm_device,
    "qemu": programs.qemu,
    "libvirt": programs.libvirt_daemon,
    "pid1-reaping": system.pid1_reaping,
    "memory": system.memory,
    "disk": system.disk,
    "python": system.python,
    "jupyter": system.jupyter,
    "docker": programs.docker,
    "virtualbox": programs.virtualbox,
    "user-namespaces": system.user_namespaces,
    "container": system.container,
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
            "accelerator-kvm": partial(processor.accelerator_kvm, verdicts["kvm"]),
            "accelerator-tcg": partial(processor.accelerator_tcg, verdicts["tcg"]),
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
