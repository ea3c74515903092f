"""The main job without a browser: a VM's whole life, each effect seen from inside the guest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from labkit import state
from labkit.errors import LabkitError
from labkit.lab import Lab

_FILE = "/data/diary.txt"
_TEXT = "written before the damage"


@dataclass(frozen=True)
class Step:
    """One step of the demonstration: whether its effect was seen, in how many seconds, and what was seen."""

    name: str
    ok: bool
    seconds: float
    seen: str

    def as_dict(self) -> dict[str, object]:
        """As JSON has it."""
        return {"name": self.name, "ok": self.ok, "seconds": round(self.seconds, 3), "seen": self.seen}

    def __str__(self) -> str:
        return f"{'✓' if self.ok else '✗'} {self.name:<10} {self.seconds:6.2f} s  {self.seen}"


def run_demo(tell: Callable[[Step], None] = lambda step: None) -> list[Step]:
    """Go through the steps, calling `tell` after each; stops at the first that failed."""
    steps: list[Step] = []
    begun = time.perf_counter()
    # The name has the process in it, so that two people's demonstrations do not meet.
    with Lab(f"demo-{os.getpid()}") as lab:
        for name, check in _story(lab):
            try:
                ok, seen = check()
            except LabkitError as exc:
                ok, seen = False, str(exc)
            now = time.perf_counter()
            step = Step(name, ok, now - begun, seen)
            begun = now
            steps.append(step)
            tell(step)
            if not ok:
                return steps
    gone = lab.name not in state.lab_names()
    steps.append(Step("destroy", gone, time.perf_counter() - begun, "all gone" if gone else "still listed"))
    tell(steps[-1])
    return steps


def _story(lab: Lab) -> Iterator[tuple[str, Callable[[], tuple[bool, str]]]]:
    """The steps, each with what makes it and says whether its effect was seen in the guest."""

    def create() -> tuple[bool, str]:
        vm = lab.vm("web")
        vm.start()
        return vm.state == "running", f"{vm.spec.describe()}, under {vm.accelerator.upper()}"

    def run() -> tuple[bool, str]:
        said = lab["web"].run("hostname; uname -sr").stdout.split("\n")
        return said[0] == "web" and said[1].startswith("Linux"), " ".join(said).strip()

    def write() -> tuple[bool, str]:
        lab["web"].run(["tee", _FILE], input=_TEXT)
        read = lab["web"].run(["cat", _FILE]).stdout
        return read == _TEXT, f"{_FILE}: {read}"

    def snapshot() -> tuple[bool, str]:
        lab["web"].snapshot("before")
        # The guest's own clock of its life shows that it ran on.
        return lab["web"].run("cat /proc/uptime").ok, "snapshot 'before', with memory"

    def damage() -> tuple[bool, str]:
        lab["web"].run(f"rm {_FILE}; hostname broken")
        gone = not lab["web"].run(["test", "-e", _FILE], check=False).ok
        name = lab["web"].run("hostname").stdout.strip()
        return gone and name == "broken", f"{_FILE} is {'gone' if gone else 'there'}, host name {name}"

    def revert() -> tuple[bool, str]:
        lab["web"].revert("before")
        read = lab["web"].run(["cat", _FILE], check=False).stdout
        name = lab["web"].run("hostname").stdout.strip()
        return read == _TEXT and name == "web", f"{_FILE}: {read}; host name {name}"

    def clone() -> tuple[bool, str]:
        copy = lab["web"].clone("copy").start()
        name, read = copy.run(f"hostname; cat {_FILE}").stdout.split("\n")
        copy.run(["rm", _FILE])
        untouched = lab["web"].run(["test", "-e", _FILE], check=False).ok
        return name == "copy" and read == _TEXT and untouched, f"host name {name}, {_FILE}: {read}"

    yield from {
        "create": create,
        "run": run,
        "write": write,
        "snapshot": snapshot,
        "damage": damage,
        "revert": revert,
        "clone": clone,
    }.items()
