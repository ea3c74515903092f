"""The real agent as a process of the host, and ports that behave as QEMU's do."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from labkit.channel import protocol
from labkit.channel.protocol import Decoder, Frame, Type
from labkit.channel.session import Session

SOURCE = Path(__file__).parents[3] / "labkit" / "guests" / "agent" / "agent.c"


def eventually(condition: Callable[[], object], what: str, within: float = 10) -> None:
    """Wait for a condition, up to a deadline."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not within {within} s: {what}"
        time.sleep(0.005)


def soon(seconds: float = 10) -> float:
    """A deadline that is not missed unless something hangs."""
    return time.monotonic() + seconds


def is_alive(pid: int) -> bool:
    """Whether a process runs (one that ended and is not reaped yet does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class Agent:
    """A running agent, and the host's ends of its ports."""

    def __init__(self, program: Path, ports: int = 1) -> None:
        pairs = [socket.socketpair() for _ in range(ports)]
        self.ends = [host for host, _ in pairs]
        guests = [guest for _, guest in pairs]
        arguments = [word for guest in guests for word in ("--fd", str(guest.fileno()))]
        self.process = subprocess.Popen([program, *arguments], pass_fds=[guest.fileno() for guest in guests])
        for guest in guests:
            guest.close()

    @property
    def rss(self) -> int:
        """Its resident memory, in KiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0])

    def stop(self) -> None:
        """End it by ending its ports, so that it kills what it runs."""
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        try:
            self.process.wait(5)
        finally:
            self.process.kill()


class Raw:
    """A client that says whatever it is told to."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.end.settimeout(10)
        self.session = 0
        self.number = 0
        self.frames: list[Frame] = []
        self._decoder = Decoder()

    def encode(self, kind: int, job: int = 0, payload: bytes = b"") -> bytes:
        self.number += 1
        return protocol.encode(kind, self.session, self.number - 1, job, payload)

    def send(self, kind: int, job: int = 0, payload: bytes = b"") -> None:
        self.end.sendall(self.encode(kind, job, payload))

    def hello(self, nonce: bytes = b"0123456789abcdef") -> Frame:
        self.session = protocol.session_of(nonce)
        self.number = 0
        self.send(Type.HELLO, payload=nonce)
        while True:
            frame = self.next(Type.HELLO_ACK)
            if frame.session == self.session:
                return frame

    def execute(self, job: int, *argv: str, has_input: bool = False) -> None:
        self.send(Type.EXEC, job, protocol.exec_payload(argv, has_input=has_input))

    def next(self, kind: int | None = None) -> Frame:
        """The next frame, of that type if one is named (others before it are dropped)."""
        while True:
            while self.frames:
                frame = self.frames.pop(0)
                if kind in (None, frame.type):
                    return frame
            data = self.end.recv(65536)
            assert data, "the agent closed the port"
            self.frames += self._decoder.feed(data)


class Port:
    """A unix socket that serves one client at a time, as QEMU's character devices do.

    The guest does not see that a client leaves and another comes; what one left unread is lost.
    """

    def __init__(self, path: Path, guest: socket.socket) -> None:
        self.path = path
        self.guest = guest
        self.served = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self._stopping:
                client.close()
                return
            self.served += 1
            with client:
                self._relay(client)

    def _relay(self, client: socket.socket) -> None:
        ended = None  # a guest's end that is over, until another takes its place
        while not self._stopping:
            guest = self.guest
            readable, _, _ = select.select([client] if guest is ended else [client, guest], [], [], 0.02)
            for source, target in ((client, guest), (guest, client)):
                if source not in readable:
                    continue
                try:
                    data = source.recv(65536)
                except OSError:
                    data = b""
                if not data and source is client:
                    return
                if not data:
                    ended = guest
                    continue
                try:
                    target.sendall(data)
                except OSError:
                    if target is client:
                        return
                    ended = guest  # what was on its way to a guest that ended is lost

    def stop(self) -> None:
        self._stopping = True
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as last:
            last.connect(str(self.path))
        self._thread.join(5)
        self._listener.close()


class Machine:
    """An agent whose ports are reached by unix sockets, and which can be restarted under its clients."""

    def __init__(self, program: Path, directory: Path, ports: int) -> None:
        self._program = program
        self.directory = directory
        self.agent = Agent(program, ports)
        self.ports = [Port(directory / f"{n}.sock", end) for n, end in enumerate(self.agent.ends)]

    def restart(self) -> None:
        """Another agent takes over, one that knows nobody; connections stay, as in a revert or a reboot."""
        old, self.agent = self.agent, Agent(self._program, len(self.ports))
        for port, end in zip(self.ports, self.agent.ends, strict=True):
            port.guest = end
        for end in old.ends:
            end.shutdown(socket.SHUT_RDWR)
        old.process.wait(5)

    def stop(self) -> None:
        for port in self.ports:
            port.stop()
        self.agent.stop()


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent, compiled as for a guest."""
    path = tmp_path_factory.mktemp("agent") / "labkit-agent"
    subprocess.run(
        ["cc", "-static", "-Os", "-Wall", "-Wextra", "-Werror", "-o", path, SOURCE], check=True, timeout=120
    )
    return path


@pytest.fixture
def start_agent(program: Path) -> Iterator[Callable[..., Agent]]:
    with contextlib.ExitStack() as stack:

        def start(ports: int = 1) -> Agent:
            agent = Agent(program, ports)
            stack.callback(agent.stop)
            return agent

        yield start


@pytest.fixture
def agent(start_agent: Callable[..., Agent]) -> Agent:
    return start_agent()


@pytest.fixture
def raw(agent: Agent) -> Raw:
    return Raw(agent.ends[0])


@pytest.fixture
def session(agent: Agent) -> Iterator[Session]:
    client = Session(agent.ends[0])
    client.hello(soon())
    yield client
    client.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection, for what no real agent can be brought to do."""
    here, there = socket.socketpair()
    with here, there:
        yield here, there


@pytest.fixture
def start_machine(program: Path) -> Iterator[Callable[[int], Machine]]:
    with contextlib.ExitStack() as stack:
        # Not pytest's own directory, whose path may be too long for a socket.
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lk-")))
        os.chmod(directory, 0o700)

        def start(ports: int) -> Machine:
            machine = Machine(program, directory, ports)
            stack.callback(machine.stop)
            return machine

        yield start


@pytest.fixture
def helpers() -> type[Helpers]:
    return Helpers


class Helpers:
    """What test modules need from here; under --import-mode=importlib they cannot import it."""

    eventually = staticmethod(eventually)
    soon = staticmethod(soon)
    is_alive = staticmethod(is_alive)
    Raw = Raw
