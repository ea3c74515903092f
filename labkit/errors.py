"""What can go wrong, named by what it means to the caller.

    LabkitError
    ├── SpecError            what was asked for makes no sense (also a ValueError)
    ├── NotFound             no such lab, machine, snapshot or image (also a LookupError)
    ├── Conflict             something of that name exists and differs, or is in use
    │   └── LabInUse         another living owner holds the lab
    ├── HostError            this computer lacks something; `mend` says how to get it
    ├── ToolError            a program or service that labkit drives failed
    │   └── HypervisorError  … and it was the hypervisor
    ├── DownloadError        a file could not be had, or is not what it should be
    └── MachineError         a machine did not do what was asked
        ├── CommandFailed    a command exited with something other than 0
        ├── CommandTimeout   a command, or the guest itself, missed its deadline
        ├── NotRunning       the machine is off, paused or gone, so it cannot answer
        ├── GuestCrashed     the guest's kernel panicked
        ├── BootTimeout      the guest did not come up within its deadline
        └── TransferError    a file did not arrive as it was sent

Every error carries `evidence` (what was seen: a command, an exit, the last lines of a log) and
`mend` (what to do), and prints them below its sentence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labkit.machines.machine import Completed

__all__ = [
    "BootTimeout",
    "CommandFailed",
    "CommandTimeout",
    "Conflict",
    "DownloadError",
    "GuestCrashed",
    "HostError",
    "HypervisorError",
    "LabInUse",
    "LabkitError",
    "MachineError",
    "NotFound",
    "NotRunning",
    "SpecError",
    "ToolError",
    "TransferError",
]


class LabkitError(Exception):
    """The root of everything that labkit raises on purpose.

    Arguments:
        message: one sentence that says what happened.
        evidence: what was seen (may have several lines).
        mend: what the reader can do about it.
    """

    def __init__(self, message: str, *, evidence: str = "", mend: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.evidence = evidence.strip()
        self.mend = mend.strip()

    def _render_traceback_(self) -> list[str]:
        """What IPython shows instead of a traceback: where a call went is no news to a learner."""
        return [f"{type(self).__name__}: {self}"]

    def __str__(self) -> str:
        lines = [self.message]
        lines += [f"  | {line}" for line in self.evidence.splitlines()]
        if self.mend:
            lines.append(f"  What to do: {self.mend}")
        return "\n".join(lines)


class SpecError(LabkitError, ValueError):
    """What was asked for makes no sense: a name, a size or a combination."""


class NotFound(LabkitError, LookupError):
    """There is no lab, machine, snapshot or image of that name."""


class Conflict(LabkitError):
    """Something of that name exists already and differs, or is in use."""


class LabInUse(Conflict):
    """Another living owner (a process, a notebook) holds this lab."""


class HostError(LabkitError):
    """This computer lacks something: a package, a permission, memory, disk space."""


class ToolError(LabkitError):
    """A program or service that labkit drives failed.

    `command` is the argument list or the call, `returncode` its exit (None where it had none).
    """

    def __init__(
        self,
        message: str,
        *,
        command: str = "",
        returncode: int | None = None,
        evidence: str = "",
        mend: str = "",
    ) -> None:
        seen = "\n".join(part for part in (command and f"$ {command}", evidence.strip()) if part)
        super().__init__(message, evidence=seen, mend=mend)
        self.command = command
        self.returncode = returncode


class HypervisorError(ToolError):
    """The hypervisor refused or failed."""


class DownloadError(LabkitError):
    """A file could not be had, or is not what its checksum says."""


class MachineError(LabkitError):
    """A machine did not do what was asked of it."""


class CommandFailed(MachineError):
    """A command exited with something other than 0; `completed` has its output."""

    def __init__(self, machine: str, completed: Completed) -> None:
        tail = completed.stderr.strip() or completed.stdout.strip()
        super().__init__(
            f"On {machine}, the command exited with {completed.returncode}: {completed.command}",
            evidence="\n".join(tail.splitlines()[-10:]),
        )
        self.completed = completed


class CommandTimeout(MachineError):
    """A command missed its deadline; `stdout` and `stderr` hold what it had said by then (bytes)."""

    def __init__(
        self,
        message: str,
        *,
        stdout: bytes = b"",
        stderr: bytes = b"",
        evidence: str = "",
        mend: str = "",
    ) -> None:
        super().__init__(message, evidence=evidence, mend=mend)
        self.stdout = stdout
        self.stderr = stderr


class NotRunning(MachineError):
    """The machine is off, paused or gone, so it cannot answer."""


class GuestCrashed(MachineError):
    """The guest's kernel panicked; the evidence is the end of its console."""


class BootTimeout(MachineError):
    """The guest did not come up within its deadline; the evidence is the end of its console."""


class TransferError(MachineError):
    """A file did not arrive as it was sent."""
