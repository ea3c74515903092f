"""One client on one connected port of a guest: says hello, then runs commands, one after another."""

from __future__ import annotations

import enum
import io
import math
import os
import selectors
import signal
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from labkit.channel import protocol
from labkit.channel.protocol import Frame, Hello, Type
from labkit.channel.result import Check, Input, OnOutput, Result, Stream, in_seconds, nothing_happened
from labkit.errors import CommandTimeout, HostError, MachineError, NotRunning

__all__ = ["Session", "StaleSession", "connect_unix"]

_IDLE = 0.25  # seconds without news after which we ask whether the machine is still there
_PING_FIRST, _PING_MOST = 1.0, 8.0  # seconds of silence after which we ask the guest for its news
_HELLO_AGAIN, _HELLO_AGAIN_MOST = 1.0, 5.0  # a HELLO is lost if the guest is reverted with it in flight
_KILL_GRACE = 1.0
_RECEIVE = 256 * 1024
_QUEUE_MOST = 4 * protocol.DATA_MAX  # bytes that wait to be sent before more input is read


class StaleSession(NotRunning):
    """The guest does not know our session (any more): it was reverted or restarted. Nothing was run."""


class _Late(Exception):
    """The deadline has passed."""


def connect_unix(path: str | Path, deadline: float, check: Check = nothing_happened) -> socket.socket:
    """A connection to a unix socket, as soon as somebody listens there.

    Arguments:
        path: of the socket.
        deadline: on `time.monotonic`'s clock, in seconds.
        check: called while nobody listens; raises what happened to the machine.

    Raises:
        CommandTimeout: nobody listened by then.
    """
    pause = 0.005
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.setblocking(False)
        try:
            connection.connect(os.fspath(path))
            return connection
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError) as exc:
            # BlockingIOError: others queue up to be accepted, as many as the listener lets wait.
            connection.close()
            evidence = f"{path}: {exc.strerror}"
        except BaseException:
            connection.close()
            raise
        check()
        left = deadline - time.monotonic()
        if left <= 0:
            raise CommandTimeout("The machine did not offer its command port in time.", evidence=evidence)
        time.sleep(min(pause, left))
        pause = min(2 * pause, 0.1)


class _Link:
    """Frames over a non-blocking socket, both ways at once."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._decoder = protocol.Decoder()
        self._outgoing = bytearray()
        self._selector = selectors.DefaultSelector()
        self._selector.register(connection, selectors.EVENT_READ)
        self._waits_to_write = False

    @property
    def queued(self) -> int:
        """Bytes that wait to be sent."""
        return len(self._outgoing)

    def send(self, frame: bytes) -> None:
        """Send a frame, now or while `receive` waits."""
        self._outgoing += frame
        self._flush()

    def receive(self, timeout: float) -> list[Frame] | None:
        """What comes next: frames, [] if there was progress without one, None if nothing moved.

        Raises:
            EOFError: the other end is gone, and all that it sent has been given.
        """
        if self._waits_to_write != bool(self._outgoing):
            self._waits_to_write = not self._waits_to_write
            write = selectors.EVENT_WRITE if self._waits_to_write else 0
            self._selector.modify(self._socket, selectors.EVENT_READ | write)
        ready = self._selector.select(timeout)
        if not ready:
            return None
        if ready[0][1] & selectors.EVENT_WRITE:
            self._flush()
        if ready[0][1] & selectors.EVENT_READ:
            return self._read()
        return []

    def _read(self) -> list[Frame]:
        try:
            data = self._socket.recv(_RECEIVE)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as exc:
            raise EOFError from exc
        if not data:
            raise EOFError
        return self._decoder.feed(data)

    def _flush(self) -> None:
        try:
            while self._outgoing:
                sent = self._socket.send(self._outgoing)
                del self._outgoing[:sent]
        except (BlockingIOError, InterruptedError):
            pass
        except OSError:
            # Gone; but it may have said something before, which is read first, up to the EOF.
            self._outgoing.clear()

    def shutdown(self) -> None:
        """End the connection for everybody who has the socket; whoever waits in `receive` gets EOF."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        """Let go of the socket; a process that shares it (after a fork) keeps its connection."""
        self._selector.close()
        self._socket.close()


class _Job:
    """A command while it runs: what it still gets, and what it has said."""

    def __init__(self, number: int, source: BinaryIO | None, on_output: OnOutput | None, keep: bool) -> None:
        self.number = number
        self.source = source
        self.credit = protocol.STDIN_WINDOW
        self.on_output = on_output
        self.keep = keep
        self.stdout = bytearray()
        self.stderr = bytearray()
        self.status: int | None = None

    def take(self, kind: int, payload: bytes) -> None:
        """A frame of this job's."""
        if kind == Type.STDOUT or kind == Type.STDERR:
            self._take_output("stdout" if kind == Type.STDOUT else "stderr", payload)
        elif kind == Type.CREDIT:
            self.credit += protocol.get_u32(payload)
        elif kind == Type.EXIT:
            self.status = protocol.get_u32(payload)

    def _take_output(self, stream: Stream, data: bytes) -> None:
        if stream == "stderr":
            self.stderr += data
        elif self.keep:
            self.stdout += data
        if self.on_output is not None:
            self.on_output(stream, data)


class _Ending(enum.Enum):
    """What became of a command that was to be killed."""

    GONE = enum.auto()
    ALIVE = enum.auto()  # the guest answers, but the command would not die
    SILENT = enum.auto()  # the guest does not answer


class Session:
    """A client on one connected port; used by one thread at a time.

    Arguments:
        connection: a stream socket to the agent; the session owns it from here on.
        check: called when nothing was heard for 0.25 s and when the connection has ended; raises what
            happened to the machine, if something has.

    Attributes:
        guest: how the agent introduced itself; None before `hello`.
        broken: True once the connection is of no more use; close it and connect anew.
    """

    def __init__(self, connection: socket.socket, *, check: Check = nothing_happened) -> None:
        self._link = _Link(connection)
        self._check = check
        self._session = 0
        self._sent = 0  # the number of the next frame out
        self._expected = 0  # and in
        self._job = 0
        self._interrupted = ""
        self.guest: Hello | None = None
        self.broken = False

    # -- the public face

    def hello(self, deadline: float) -> Hello:
        """Become the port's client; jobs of the one before us are killed.

        Waits for a guest that is still booting, since the port holds what was sent until it is opened.

        Arguments:
            deadline: on `time.monotonic`'s clock, in seconds.

        Raises:
            CommandTimeout: the agent did not answer by then.
            HostError: it speaks another version of the protocol.
            NotRunning: the connection ended, or what `check` raises.
        """
        nonce = os.urandom(protocol.NONCE_SIZE)
        self._session = protocol.session_of(nonce)
        self.broken = True  # until we are known
        again = _HELLO_AGAIN
        while True:
            self._sent = self._expected = 0
            self._send(Type.HELLO, 0, nonce)
            try:
                guest = self._await_hello(nonce, min(deadline, time.monotonic() + again))
            except _Late:
                if time.monotonic() >= deadline:
                    raise CommandTimeout("The guest's agent did not answer in time.") from None
                again = min(2 * again, _HELLO_AGAIN_MOST)
                continue
            if guest.version != protocol.VERSION:
                raise HostError(
                    f"The guest's agent speaks version {guest.version} of the protocol, "
                    f"and this labkit {protocol.VERSION}.",
                    mend="Make the guest's image anew.",
                )
            self.guest = guest
            self.broken = False
            return guest

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
        """Run a command in the guest to its end, in a process group of its own.

        If this is left by an exception (out of `on_output`, or a KeyboardInterrupt), the group is
        killed and the session stays of use.

        Arguments:
            argv: the program, looked for in the guest's PATH, and its arguments.
            input: its standard input: bytes, or a binary file that is streamed; None is /dev/null.
            timeout: seconds until the group is killed; None waits for ever.
            cwd: the directory to run it in; None is the agent's own.
            env: variables added to the agent's own.
            on_output: called with (stream, bytes) as output arrives, in this thread.
            keep: False where only `on_output` is to see standard output, and the result holds none of it.

        Raises:
            SpecError: the command is none.
            CommandTimeout: it missed the deadline; says whether it was killed or the guest is silent.
            StaleSession: the guest was reverted or restarted, before it took the command.
            NotRunning: … or meanwhile; or the connection ended.
        """
        payload = protocol.exec_payload(argv, has_input=input is not None, cwd=cwd, env=env)
        source = io.BytesIO(input) if isinstance(input, bytes | bytearray) else input
        self._job += 1
        job = _Job(self._job, source, on_output, keep)
        started = time.monotonic()
        try:
            self._send(Type.EXEC, job.number, payload)
            self._drive(job, started + (math.inf if timeout is None else timeout))
        except _Late:
            raise self._timed_out(job, timeout or 0) from None
        except BaseException:
            if not self.broken:
                self._kill(job)
            raise
        assert job.status is not None
        seconds = time.monotonic() - started
        return Result(protocol.returncode(job.status), bytes(job.stdout), bytes(job.stderr), seconds)

    def ping(self, *, timeout: float = 5) -> float:
        """Ask the agent whether it is there and knows us; the seconds that the answer took.

        Raises:
            StaleSession, NotRunning, CommandTimeout: as `run`.
        """
        started = time.monotonic()
        self._request(Type.PING, b"", started + timeout, "answer")
        return time.monotonic() - started

    def reseed(self, data: bytes, *, timeout: float = 5) -> None:
        """Give the guest's kernel random bytes (up to 512), so that it draws other numbers than its twins.

        Raises:
            StaleSession, NotRunning, CommandTimeout: as `run`.
            MachineError: the guest's kernel refused.
        """
        self._order(Type.RESEED, data, timeout, "take random bytes")

    def set_time(self, ns: int | None = None, *, timeout: float = 5) -> None:
        """Set the guest's clock to `ns` nanoseconds since 1970, or to the host's time.

        Raises: as `reseed`.
        """
        payload = protocol.u64(time.time_ns() if ns is None else ns)
        self._order(Type.SETTIME, payload, timeout, "set its clock")

    def has_ended(self) -> bool:
        """Whether the connection turns out to have ended while nobody used it."""
        try:
            while not self.broken and (frames := self._link.receive(0)) is not None:
                self._in_turn(frames)
        except (EOFError, NotRunning):
            self.broken = True
        return self.broken

    def interrupt(self, why: str) -> None:
        """End the session from another thread: whoever waits in it gets NotRunning, which says why."""
        self._interrupted = why
        self._link.shutdown()

    def close(self) -> None:
        """End the connection."""
        self.broken = True
        self._link.shutdown()
        self._link.close()

    def abandon(self) -> None:
        """Let go of the connection in the child of a fork, whose parent goes on with it."""
        self.broken = True
        self._link.close()

    # -- frames

    def _send(self, kind: Type, job: int, payload: bytes = b"") -> None:
        self._link.send(protocol.encode(kind, self._session, self._sent, job, payload))
        self._sent += 1

    def _receive(self, deadline: float) -> Iterable[Frame] | None:
        """The session's next frames; None after a while without any news.

        Raises:
            _Late: the deadline has passed.
            NotRunning: the connection ended; the guest was reverted; or what `check` raises.
        """
        left = deadline - time.monotonic()
        if left <= 0:
            raise _Late
        try:
            frames = self._link.receive(min(left, _IDLE))
        except EOFError:
            self.broken = True
            if self._interrupted:
                raise NotRunning(self._interrupted) from None
            self._check()
            raise NotRunning(
                "The connection to the guest ended, and with it what was being done there.",
                mend="See whether the machine is still running, and run the command again.",
            ) from None
        if frames is None:
            self._check()
            return None
        return self._in_turn(frames)

    def _in_turn(self, frames: Iterable[Frame]) -> list[Frame]:
        """Those frames that are our session's.

        Raises:
            NotRunning: one is out of turn, since the guest was reverted.
        """
        ours = [frame for frame in frames if frame.session == self._session]
        for frame in ours:
            if frame.type == Type.HELLO_ACK:
                self._expected = 0  # there are as many of them as we said HELLO
            if frame.type != Type.STALE:
                if frame.number != self._expected:
                    raise self._stale(nothing_ran=False)
                self._expected = (self._expected + 1) & 0xFFFFFFFF
        return ours

    def _await_hello(self, nonce: bytes, deadline: float) -> Hello:
        while True:
            for frame in self._receive(deadline) or ():
                guest = protocol.parse_hello(frame.payload) if frame.type == Type.HELLO_ACK else None
                if guest and guest.nonce == nonce:
                    return guest

    def _request(self, kind: Type, payload: bytes, deadline: float, what: str) -> bytes:
        """Send what is no command, and return the payload of the answer."""
        self._job += 1
        self._send(kind, self._job, payload)
        try:
            while True:
                for frame in self._receive(deadline) or ():
                    if frame.job != self._job:
                        continue
                    if frame.type == Type.STALE:
                        raise self._stale(nothing_ran=True)
                    return frame.payload
        except _Late:
            self.broken = True
            raise CommandTimeout(f"The guest did not {what} in time.") from None

    def _order(self, kind: Type, payload: bytes, timeout: float, what: str) -> None:
        answer = self._request(kind, payload, time.monotonic() + timeout, what)
        if error := protocol.get_u32(answer):
            raise MachineError(f"The guest could not {what}: {os.strerror(error)}.")

    def _stale(self, *, nothing_ran: bool) -> NotRunning:
        self.broken = True
        if nothing_ran:
            return StaleSession("The guest was reverted or restarted since it was last spoken to.")
        return NotRunning("The guest was reverted or restarted while the command ran.")

    # -- a command

    def _drive(self, job: _Job, deadline: float) -> None:
        """Feed and hear a command until it ends."""
        silent_since, ping_after = time.monotonic(), _PING_FIRST
        while job.status is None:
            self._feed(job)
            frames = self._receive(deadline)
            if frames is None:
                # A revert may have left the connection standing and the command nowhere: so ask.
                if time.monotonic() - silent_since >= ping_after:
                    self._send(Type.PING, job.number)
                    silent_since, ping_after = time.monotonic(), min(2 * ping_after, _PING_MOST)
                continue
            for frame in frames:
                if frame.job == job.number:
                    self._take(job, frame)
                    silent_since = time.monotonic()

    def _take(self, job: _Job, frame: Frame) -> None:
        if frame.type == Type.STALE:
            raise self._stale(nothing_ran=frame.payload == bytes([Type.EXEC]))
        if frame.type == Type.PONG and frame.payload[:1] == b"\0" and job.status is None:
            # Its EXIT would have come before.
            raise NotRunning("The guest was reverted while the command ran, to a time before it did.")
        job.take(frame.type, frame.payload)

    def _feed(self, job: _Job) -> None:
        """Send standard input as far as the guest has room for it."""
        while job.source is not None and job.credit and self._link.queued < _QUEUE_MOST:
            data = job.source.read(min(job.credit, protocol.DATA_MAX))
            if not data:
                job.source = None
                self._send(Type.STDIN_EOF, job.number)
                return
            job.credit -= len(data)
            self._send(Type.STDIN, job.number, data)

    def _kill(self, job: _Job) -> _Ending:
        """Kill a command's group and wait, for a bounded time, until it is gone.

        The session is marked broken where that could not be seen: the next HELLO kills what is left.
        """
        job.source = job.on_output = None
        deadline = time.monotonic() + _KILL_GRACE
        ending = _Ending.SILENT
        try:
            self._send(Type.SIGNAL, job.number, protocol.u32(signal.SIGKILL))
            self._send(Type.PING, job.number)
            while job.status is None:
                for frame in self._receive(deadline) or ():
                    if frame.job == job.number:
                        self._take(job, frame)
                        ending = _Ending.ALIVE
            return _Ending.GONE
        except _Late:
            self.broken = True
            return ending
        except NotRunning:
            # It is gone, one way or another. Whether the connection is too, `broken` says already.
            return _Ending.GONE
        except BaseException:
            self.broken = True
            raise

    def _timed_out(self, job: _Job, timeout: float) -> CommandTimeout:
        ending = self._kill(job)
        limit = in_seconds(timeout)
        message, mend = f"The command took longer than {limit}, and was killed.", ""
        if ending is _Ending.ALIVE:
            message = (
                f"The command took longer than {limit}, and could not be killed: the guest answers, "
                f"but the command was still there {_KILL_GRACE:g} s after SIGKILL."
            )
            mend = "It hangs in the guest's kernel, most likely; see the guest's console and `dmesg`."
        elif ending is _Ending.SILENT:
            message = (
                f"The guest itself did not answer: not when the command's {limit} were over, "
                "nor when it was to be killed."
            )
            mend = "See whether the machine is paused or too busy; its console may tell more."
        return CommandTimeout(message, mend=mend, stdout=bytes(job.stdout), stderr=bytes(job.stderr))
