"""The reaper: a small process that removes labs whose owners are gone.

One runs for each kit (each `LABKIT_HOME`) while there are labs that belong to processes or notebooks,
and ends when there are none. A process's lab goes within seconds of the process; a notebook's when
its session has been gone for a grace time, so that a kernel can be restarted.

Run as `python -m labkit.reaper`.
"""

from __future__ import annotations

import fcntl
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from labkit import paths, state
from labkit.owners import Owner

_log = logging.getLogger("labkit.reaper")

#: Seconds between two looks at the owners.
PERIOD = 1.0
#: Seconds that a notebook's lab outlives its session, where LABKIT_GRACE does not say otherwise.
GRACE = 60.0
#: Seconds that a reaper without work stays.
LINGER = 3.0


def ensure() -> None:
    """Start the reaper where none runs. To be called after the lab is in the ledger."""
    lock = _try_lock()
    if lock is None:
        return
    os.close(lock)
    # It finds this labkit and what it needs, wherever the program that starts it found them.
    path = [str(Path(__file__).resolve().parent.parent), *(each for each in sys.path if os.path.isabs(each))]
    with (paths.state_dir() / "reaper.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "labkit.reaper"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))},
            cwd="/",
            start_new_session=True,
        )


def main() -> None:
    """Watch until there is nothing to watch."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    path = _lock_path()
    while (lock := _try_lock()) is not None:
        try:
            _watch(path)
        finally:
            os.close(lock)
        # A lab that was claimed while the lock was still held started no reaper: look once more.
        if not path.exists() or not _mortal():
            return


def _watch(lock: Path) -> None:
    gone_since: dict[tuple[str, Owner], float] = {}
    idle_since = time.monotonic()
    grace = _grace()
    # Where somebody has removed the kit's whole directory, looking for labs would make it anew.
    while lock.exists():
        mortal = _mortal()
        now = time.monotonic()
        if mortal:
            idle_since = now
        elif now - idle_since >= LINGER:
            return
        # A claim by somebody new counts anew, since the key has the owner in it.
        gone_since = {key: gone_since.get(key, now) for key in mortal if not key[1].alive()}
        for (name, owner), since in gone_since.items():
            if now - since >= (grace if owner.kind == "jupyter" else 0):
                _reap(name, owner)
        time.sleep(PERIOD)


def _grace() -> float:
    try:
        return max(0.0, float(os.environ["LABKIT_GRACE"]))
    except (KeyError, ValueError):
        return GRACE


def _mortal() -> list[tuple[str, Owner]]:
    """The labs that end with their owners, and these."""
    found = []
    for name in state.lab_names():
        record = state.peek(name)
        if record and record.owner.kind != "explicit":
            found.append((name, record.owner))
    return found


def _reap(name: str, owner: Owner) -> None:
    _log.info("removing the lab %s of %s", name, owner.describe())
    try:
        from labkit import lab  # heavy: only where there is something to do

        lab.remove(name, only_of=owner)
    except Exception:  # noqa: BLE001  # whatever it is, the other labs still have their reaper
        _log.exception("the lab %s could not be removed; trying again", name)


def _lock_path() -> Path:
    return paths.runtime_dir() / "reaper.lock"


def _try_lock() -> int | None:
    """The reaper's lock, or None where a reaper holds it."""
    descriptor = os.open(_lock_path(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


if __name__ == "__main__":
    main()
