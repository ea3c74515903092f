"""labkit's own libvirt daemon: private to the user and the kit, with no configuration of the host's.

It runs under `tini -s`, which takes up and reaps the orphans that libvirtd makes: where PID 1 does
not reap promptly, as in many containers, every libvirt call otherwise waits 10 s for zombies. Root
runs it in a user namespace as an ordinary user, so that libvirt keeps to its session driver and
leaves the host's system driver alone; where that is forbidden, a preloaded library tells it the same
(ordinary_user.c). It ends by itself when nobody has used it for a while and no VM
of it runs.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from pathlib import Path
from urllib.parse import quote

from labkit import paths, state
from labkit.errors import HypervisorError
from labkit.tools import require, run_tool

#: Seconds without clients and running VMs after which the daemon ends by itself.
IDLE = 30
_START_DEADLINE = 30.0
#: What a daemon logs while the one before it, which answers no more, has not quite ended.
_HELD = b"Failed to acquire pid file"
_PRELOADED = Path(__file__).with_name("ordinary_user.c")

# stdio_handler: QEMU writes console logs itself, where libvirt would start one more daemon for it.
_QEMU_CONF = """\
stdio_handler = "file"
security_driver = "none"
"""


def uri() -> str:
    """The libvirt URI of the daemon, which is started where it is not running.

    Raises:
        HostError: a program is missing.
        HypervisorError: it did not start; with the end of its log.
    """
    path = socket_path()
    if not _answers(path):
        with state.lock_file(paths.state_dir() / "libvirtd.lock"):
            if not _answers(path):
                _start(path, time.monotonic() + _START_DEADLINE)
    return f"qemu+unix:///session?socket={quote(str(path))}"


def socket_path() -> Path:
    """The daemon's socket, whether or not it is there."""
    return paths.runtime_dir() / "libvirt" / "libvirt-sock"


def stop() -> None:
    """End the daemon, if it is ours and running; VMs that run go on without it."""
    pid = _pid()
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
            if not _exited(descriptor, 10):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)


def _exited(descriptor: int, timeout: float) -> bool:
    readable, _, _ = select.select([descriptor], [], [], timeout)
    return bool(readable)


def _pid() -> int | None:
    """The daemon's process, proven to be ours by the pid that its socket's peer has."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(socket_path()))
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(credentials[:4], "little", signed=True)
    return None


def _answers(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    except OSError:
        return False
    return True


def _start(path: Path, deadline: float) -> None:
    runtime = paths.runtime_dir()
    log = paths.state_dir() / "libvirtd.log"
    command, preload = _command()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(runtime) | preload,
            cwd="/",
            start_new_session=True,
        )
    while not _answers(path):
        if process.poll() is not None and _HELD in log.read_bytes() and time.monotonic() < deadline:
            time.sleep(0.05)
            _start(path, deadline)
            return
        if process.poll() is not None or time.monotonic() > deadline:
            ended = process.returncode
            process.kill()
            raise HypervisorError(
                "labkit's libvirt daemon "
                + ("did not answer in time." if ended is None else f"ended at once with exit {ended}."),
                command=" ".join(command),
                returncode=ended,
                evidence=_tail(log),
                mend="Run labkit doctor, which checks what the daemon needs.",
            )
        time.sleep(0.005)


def _command() -> tuple[list[str], dict[str, str]]:
    """What starts it, and what that needs in its environment."""
    command = [
        require("tini", package="tini"),
        "-s",
        "--",
        require("libvirtd", package="libvirt-daemon libvirt-daemon-driver-qemu"),
        "--timeout",
        str(IDLE),
    ]
    if os.geteuid() != 0:
        return command, {}
    unshare = [
        require("unshare", package="util-linux"),
        "--user",
        "--map-user=1000",
        "--map-group=1000",
        "--",
    ]
    if subprocess.run([*unshare, "/bin/true"], capture_output=True, check=False).returncode == 0:
        return [*unshare, *command], {}
    library = paths.state_dir() / "ordinary_user.so"
    if not library.exists():
        compiler = require("cc", package="gcc libc6-dev")
        aside = library.with_suffix(f".{os.getpid()}")
        run_tool(
            [compiler, "-shared", "-fPIC", "-Os", "-o", aside, _PRELOADED],
            what="compile what the libvirt daemon needs where user namespaces are forbidden",
            mend="sudo apt install gcc libc6-dev",
        )
        aside.replace(library)
    return command, {"LD_PRELOAD": str(library)}


def _environment(runtime: Path) -> dict[str, str]:
    """The user's environment with libvirt's directories in our own.

    Configuration is reached through a link in the runtime directory: libvirt puts QEMU's monitor
    socket below it, and the path of a socket must be short.
    """
    persistent = paths.state_dir() / "libvirt"
    (persistent / "libvirt").mkdir(parents=True, exist_ok=True)
    (persistent / "libvirt" / "qemu.conf").write_text(_QEMU_CONF, encoding="utf-8")
    link = runtime / "c"
    if not link.is_symlink() or Path(os.readlink(link)) != persistent:
        link.unlink(missing_ok=True)
        link.symlink_to(persistent)
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("LIBVIRT_", "VIR_"))}
    return {
        **keep,
        "XDG_RUNTIME_DIR": str(runtime),
        "XDG_CONFIG_HOME": str(link),
        "XDG_CACHE_HOME": str(paths.cache_dir()),
        "XDG_DATA_HOME": str(persistent),
        "LC_ALL": "C.UTF-8",
    }


def _tail(log: Path) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(errors="replace").splitlines()[-8:])
    return ""
