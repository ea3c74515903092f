"""Where labkit keeps its things: the user's cache, state and runtime directories.

    cache     guest images and packages that they were made from; may be deleted at any time
    state     disks, saved states, the ledger of what exists
    runtime   sockets, in a short path of mode 0700 (a unix socket's path holds at most 107 bytes)

The runtime directory hangs on the state directory alone: whoever comes to the same ledger, from a desktop,
over ssh or by cron, must find the same daemon. (XDG_RUNTIME_DIR and TMPDIR differ between these, and the
former goes at logout, when machines may still run.)

`LABKIT_HOME` puts all three below one directory instead, which makes a kit of its own that meets no
other: tests and graders use it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import platformdirs

from labkit.errors import HostError

#: Bytes of a runtime directory's path. Below it QEMU's monitor socket has the longest name, with a domain's
#: number of up to five digits: c/libvirt/qemu/lib/domain-12345-labkit.abcdefghijklm/monitor.sock.
_RUNTIME_PATH_MAX = 107 - 66


def home() -> Path | None:
    """The directory that `LABKIT_HOME` names, or None where the user's own directories are used."""
    value = os.environ.get("LABKIT_HOME")
    return Path(value).absolute() if value else None


def cache_dir() -> Path:
    """Guest images and downloads; made if it is not there. `LABKIT_CACHE` overrides it alone."""
    override = os.environ.get("LABKIT_CACHE")
    base = home()
    if override:
        path = Path(override).absolute()
    elif base:
        path = base / "cache"
    else:
        path = _of_user(platformdirs.user_cache_path)
    return _made(path)


def state_dir() -> Path:
    """Disks, saved states and the ledger; made if it is not there, mode 0700."""
    base = home()
    return _private(base / "state" if base else _of_user(platformdirs.user_state_path))


def runtime_dir() -> Path:
    """Sockets; made if it is not there, mode 0700, ours alone.

    Raises:
        HostError: somebody else owns the directory, or others may enter it.
    """
    near = (home() or state_dir()) / "run"
    if len(os.fsencode(near)) <= _RUNTIME_PATH_MAX:
        return _private(near)
    # The name tells apart the kits of one user; whoever else made it first is caught by _private.
    key = hashlib.sha256(os.fsencode(state_dir())).hexdigest()[:8]
    return _private(Path("/tmp") / f"labkit-{os.getuid()}-{key}")


def _of_user(place: Callable[[str], Path]) -> Path:
    try:
        path = place("labkit")
        if path.is_absolute():
            return path
    except RuntimeError:  # HOME is unset and the user has no entry; older platformdirs leave "~" as it is
        pass
    raise HostError("You have no home directory on this computer.", mend="Set HOME, or LABKIT_HOME.")


def _made(path: Path) -> Path:
    """Make it with its parents, all of them closed to others, whatever the umask."""
    try:
        for missing in reversed([each for each in (path, *path.parents) if not each.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)
        path.mkdir(exist_ok=True)  # raises where it is a file
    except OSError as exc:
        raise HostError(
            f"The directory {path} cannot be made: {exc.strerror}.",
            mend="Set LABKIT_HOME to a directory that you may write to.",
        ) from exc
    return path


def _private(path: Path) -> Path:
    _made(path.parent)
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        seen = path.lstat()
    except OSError as exc:
        raise HostError(
            f"The directory {path} cannot be made: {exc.strerror}.",
            mend="Set LABKIT_HOME to a directory that you may write to.",
        ) from exc
    if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid():
        raise HostError(
            f"{path} is not a directory of yours (owner: user {seen.st_uid}).",
            mend="Set LABKIT_HOME to a directory of your own.",
        )
    if stat.S_IMODE(seen.st_mode) & 0o077:
        path.chmod(0o700)
    return path
