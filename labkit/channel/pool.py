"""The ports of one VM, shared by the threads and processes of one user.

QEMU serves one client at a time on a port's socket; a second one would wait unheard. So whoever uses a
port holds an flock on its lock file, in which stands who it is and what for. A process keeps one
connection between commands, for speed; the last port is never kept, so that there is always one which
comes free when a command ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shlex
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from labkit.channel.protocol import Hello
from labkit.channel.result import Check, Input, OnOutput, Result, nothing_happened
from labkit.channel.session import Session, StaleSession
from labkit.errors import Conflict

__all__ = ["Pool"]

#: Connects to a port of the VM: its number, and the deadline on `time.monotonic`'s clock.
OpenPort = Callable[[int, float], socket.socket]

_LABEL_MAX = 200
_PING_TIMEOUT = 60.0
_LOOK_AGAIN, _LOOK_AGAIN_MOST = 0.005, 0.05  # seconds; flock cannot be waited for with a deadline


@dataclass(eq=False)
class _Lease:
    """A port that is ours alone: its lock, held, and the connection."""

    port: int
    lock: int
    session: Session | None = None
    fresh: bool = True  # the session has just said hello

    def label(self, purpose: str) -> None:
        """Write into the lock file who holds it and what for."""
        text = " ".join(f"process {os.getpid()}: {purpose}".split()).encode(errors="replace")[:_LABEL_MAX]
        os.pwrite(self.lock, text.ljust(_LABEL_MAX) + b"\n", 0)

    def release(self) -> None:
        """Give the port back."""
        if self.session is not None:
            self.session.close()
        # By hand, since a child that was forked meanwhile may have inherited the descriptor.
        fcntl.flock(self.lock, fcntl.LOCK_UN)
        os.close(self.lock)

    def abandon(self) -> None:
        """Forget the port in the child of a fork; it stays the parent's."""
        if self.session is not None:
            self.session.abandon()
        with contextlib.suppress(OSError):
            os.close(self.lock)


class Pool:
    """Runs commands in one VM by whichever of its ports is free.

    Arguments:
        open_port: connects to a port, given its number and a deadline (on `time.monotonic`'s clock).
        ports: how many there are.
        lock_dir: a directory of this VM's and this user's own, for the lock files; made if it is not there.
        check: raises what happened to the machine, if something has.

    Any thread may use it, and so may the child of a fork, which gets connections of its own.
    """

    def __init__(
        self, open_port: OpenPort, ports: int, lock_dir: Path, check: Check = nothing_happened
    ) -> None:
        self._open_port = open_port
        self._ports = ports
        self._lock_dir = lock_dir
        self._check = check
        self._changed = threading.Condition()
        self._warm: _Lease | None = None
        self._busy: set[_Lease] = set()
        _pools.add(self)

    def run(
        self,
        argv: Sequence[str],
        *,
        input: Input = None,
        timeout: float | None = 60,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        on_output: OnOutput | None = None,
        keep: bool = True,
    ) -> Result:
        """Run a command, as `Session.run` does; `timeout` includes the wait for a port and for the guest.

        Raises:
            Conflict: all ports were busy until the deadline; says who holds them.
            SpecError, CommandTimeout, NotRunning: as `Session.run`; what `check` raises.
        """
        started = time.monotonic()
        deadline = started + (math.inf if timeout is None else timeout)
        while True:
            with self._leased(deadline, shlex.join(argv)) as lease:
                left = None if timeout is None else max(deadline - time.monotonic(), 0)
                try:
                    if not (lease.fresh or input is None or isinstance(input, bytes)):
                        # What has been read of a file cannot be read again, so make sure beforehand.
                        _session(lease).ping(timeout=_PING_TIMEOUT if left is None else left)
                    result = _session(lease).run(
                        argv, input=input, timeout=left, cwd=cwd, env=env, on_output=on_output, keep=keep
                    )
                except StaleSession:
                    # The guest took nothing of it; a connection that was kept may meet this, a new one not.
                    if lease.fresh:
                        raise
                    continue
            return Result(result.returncode, result.stdout, result.stderr, time.monotonic() - started)

    def hello(self, deadline: float) -> Hello:
        """Wait until the guest's agent answers, and say who it is.

        Arguments:
            deadline: on `time.monotonic`'s clock, in seconds.

        Raises:
            CommandTimeout: it did not answer by then; and as `run`.
        """
        self._drop_warm()
        with self._leased(deadline, "hello") as lease:
            guest = _session(lease).guest
        assert guest is not None
        return guest

    def refresh(self, random: bytes, ns: int | None = None, *, timeout: float = 5) -> None:
        """Wake a guest up to its new present, after a revert, a restore or a fork.

        Arguments:
            random: bytes for its kernel's random numbers (up to 512), so that they differ from its twins'.
            ns: the time that its clock is set to, in ns since 1970; None is the host's when it is sent.
            timeout: seconds.

        Raises:
            MachineError: the guest's kernel refused; and as `run`.
        """
        deadline = time.monotonic() + timeout
        while True:
            with self._leased(deadline, "refresh") as lease:
                try:
                    _session(lease).reseed(random, timeout=timeout)
                    _session(lease).set_time(ns, timeout=timeout)
                    return
                except StaleSession:
                    if lease.fresh:
                        raise

    def reset(self) -> None:
        """Drop all connections, as after a revert or a restore: the next command says hello anew.

        Commands that other threads have under way end with NotRunning.
        """
        with self._changed:
            for lease in self._busy:
                if lease.session is not None:
                    lease.session.interrupt("The machine was reverted or restored while the command ran.")
        self._drop_warm()

    def close(self) -> None:
        """Give all ports back. Commands of other threads end with NotRunning; a later one connects again."""
        with self._changed:
            for lease in self._busy:
                if lease.session is not None:
                    lease.session.interrupt("The connection to the machine was closed while the command ran.")
        self._drop_warm()

    # -- leases

    @contextlib.contextmanager
    def _leased(self, deadline: float, purpose: str) -> Iterator[_Lease]:
        """A port with a session that has said hello, for the length of the block."""
        lease = self._take_warm() or self._take_free(deadline, purpose)
        try:
            lease.label(purpose)
            if lease.session is None:
                self._connect(lease, deadline)
            yield lease
        finally:
            self._give_back(lease)

    def _take_warm(self) -> _Lease | None:
        with self._changed:
            lease, self._warm = self._warm, None
            if lease is None:
                return None
            self._busy.add(lease)
        lease.fresh = False
        session = _session(lease)
        if session.has_ended():
            session.close()
            lease.session = None
            lease.fresh = True
        return lease

    def _take_free(self, deadline: float, purpose: str) -> _Lease:
        """The first port whose lock is to be had, by the deadline."""
        self._lock_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        pause = _LOOK_AGAIN
        while True:
            for port in range(self._ports):
                lock = _try_lock(self._lock_file(port))
                if lock is not None:
                    lease = _Lease(port, lock)
                    with self._changed:
                        self._busy.add(lease)
                    return lease
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._all_busy()
            self._check()
            with self._changed:
                self._changed.wait(min(pause, left))
            pause = min(2 * pause, _LOOK_AGAIN_MOST)

    def _connect(self, lease: _Lease, deadline: float) -> None:
        lease.session = Session(self._open_port(lease.port, deadline), check=self._check)
        lease.session.hello(deadline)

    def _give_back(self, lease: _Lease) -> None:
        with self._changed:
            if lease not in self._busy:  # we are the child of a fork that happened in mid-command
                return
            self._busy.discard(lease)
            keep = (
                self._warm is None
                and lease.port < self._ports - 1
                and lease.session is not None
                and not lease.session.broken
            )
            if keep:
                self._warm = lease
                lease.label("nothing just now")
            else:
                lease.release()
            self._changed.notify_all()

    def _drop_warm(self) -> None:
        with self._changed:
            if self._warm is not None:
                self._warm.release()
            self._warm = None
            self._changed.notify_all()

    def _all_busy(self) -> Conflict:
        holders = []
        for port in range(self._ports):
            with contextlib.suppress(OSError):
                holders.append(f"port {port}: {self._lock_file(port).read_text(errors='replace').strip()}")
        return Conflict(
            f"All {self._ports} command ports of the machine are in use.",
            evidence="\n".join(holders),
            mend="Wait for one of these to end, or end it.",
        )

    def _lock_file(self, port: int) -> Path:
        return self._lock_dir / f"port-{port}.lock"

    def _forget_parent(self) -> None:
        """In the child of a fork: connections and locks are the parent's."""
        self._changed = threading.Condition()
        for lease in (*self._busy, *([self._warm] if self._warm else [])):
            lease.abandon()
        self._busy.clear()
        self._warm = None


def _session(lease: _Lease) -> Session:
    assert lease.session is not None
    return lease.session


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the file's lock, or None where another has it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise
    return lock


_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for pool in list(_pools):
        pool._forget_parent()


os.register_at_fork(after_in_child=_after_fork_in_child)
