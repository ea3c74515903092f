"""Who a lab belongs to, and whether they are still there.

process    a script: gone when the process is
jupyter    a kernel of a Jupyter server, across its restarts: gone when the server no longer lists it
explicit   a person, by the command line: never gone; the lab stays until it is removed
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

OwnerKind = Literal["process", "jupyter", "explicit"]


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The owner of a lab.

    Attributes:
        kind: see the module's text.
        pid, started: the process and its start in clock ticks after boot, which tell it from a later
            process of the same number (0 for an explicit owner).
        namespace: the PID namespace that the number is of.
        boot: the host's boot id.
        command: what people know the process by.
        server: for jupyter, the file in which the server says how it is reached.
        kernel: for jupyter, the kernel's id, which survives its restarts.
    """

    kind: OwnerKind
    pid: int = 0
    started: int = 0
    namespace: str = ""
    boot: str = ""
    command: str = ""
    server: str = ""
    kernel: str = ""

    def same(self, other: Owner) -> bool:
        """True where both are one owner, a restarted kernel included."""
        if self.kind != other.kind:
            return False
        match self.kind:
            case "explicit":
                return True
            case "jupyter":
                return (self.server, self.kernel) == (other.server, other.kernel)
            case "process":
                return (self.pid, self.started, self.boot) == (other.pid, other.started, other.boot)

    def alive(self) -> bool:
        """False where the owner is known to be gone; in doubt it is alive."""
        match self.kind:
            case "explicit":
                return True
            case "jupyter":
                return self._process_alive() or self._listed_by_server()
            case "process":
                return self._process_alive()

    def describe(self) -> str:
        """For people: `process 4711 (python lesson.py)`."""
        if self.kind == "explicit":
            return "the command line (kept until it is removed)"
        what = "notebook kernel" if self.kind == "jupyter" else "process"
        return f"{what} {self.pid} ({self.command})"

    def _process_alive(self) -> bool:
        if self.boot != _boot_id():
            return False
        if self.namespace != _pid_namespace():
            return True
        return _start_time(self.pid) == self.started

    def _listed_by_server(self) -> bool:
        """Whether the Jupyter server that started the kernel still has it, say between two runs of it."""
        if self.boot != _boot_id():
            return False
        try:
            server: dict[str, Any] = json.loads(Path(self.server).read_text(encoding="utf-8"))
            pid, url = int(server["pid"]), str(server["url"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if _start_time(pid) is None:
            return False
        request = urllib.request.Request(
            f"{url}api/kernels/{self.kernel}",
            headers={"Authorization": f"token {server.get('token', '')}"},
        )
        try:
            # ProxyHandler({}): the address is loopback, whatever proxy the user has set.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=3):
                return True
        except urllib.error.HTTPError as exc:
            return exc.code != 404
        except (OSError, http.client.HTTPException):
            return True


def explicit() -> Owner:
    """The person at the command line."""
    return Owner(kind="explicit")


def current() -> Owner:
    """This process, or the Jupyter session that it is the kernel of."""
    kernel = _jupyter_kernel()
    pid = os.getpid()
    return Owner(
        kind="jupyter" if kernel else "process",
        pid=pid,
        started=_start_time(pid) or 0,
        namespace=_pid_namespace(),
        boot=_boot_id(),
        command=os.environ.get("JPY_SESSION_NAME", "") if kernel else _command_line(),
        server=str(kernel[0]) if kernel else "",
        kernel=kernel[1] if kernel else "",
    )


def _jupyter_kernel() -> tuple[Path, str] | None:
    """The server's information file and the kernel's id, where this is a Jupyter server's kernel.

    Kernels that other programs start (nbclient, nbval, editors) have no server that could be asked;
    they are processes like any other.
    """
    application = getattr(sys.modules.get("ipykernel.kernelapp"), "IPKernelApp", None)
    if application is None or not application.initialized():
        return None
    connection = Path(application.instance().abs_connection_file)
    information = connection.parent / f"jpserver-{os.environ.get('JPY_PARENT_PID', '')}.json"
    if not information.exists():
        return None
    return information, connection.stem.removeprefix("kernel-")


def _start_time(pid: int) -> int | None:
    """When a process started, in ticks after boot; None where it is gone or only waits to be reaped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def _command_line() -> str:
    with contextlib.suppress(OSError):
        words = Path("/proc/self/cmdline").read_bytes().split(b"\0")
        return b" ".join(words).decode(errors="replace").strip()[:120]
    return sys.argv[0]


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
