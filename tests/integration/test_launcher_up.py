"""The real `./lab up` in this checkout, which `./lab test` has brought up before."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import psutil
import pytest

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """As a user has it who brought the kit up before: the doctor's verdict is remembered."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "JUPYTER"))}


@pytest.fixture(scope="module", autouse=True)
def _brought_up(repository: Path, environment: dict[str, str]) -> None:
    if not (repository / ".venv/.labkit-stamp").exists():
        pytest.skip("this checkout was not brought up by ./lab")
    subprocess.run(
        [repository / "lab", "up", "--no-server", "--yes"], env=environment, check=True, capture_output=True
    )


@pytest.mark.smoke
def test_the_second_run_takes_under_five_seconds(repository: Path, environment: dict[str, str]) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [repository / "lab", "up", "--no-server"], env=environment, capture_output=True, text=True, cwd="/"
    )
    took = time.monotonic() - started
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert took < 5


class Server:
    """A running `./lab up`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        line = ""
        for line in process.stdout:
            if "http://" in line:
                break
        assert "http://" in line, "it ended without an address"
        self.address = line.strip()
        parts = urlsplit(self.address)
        self.port = parts.port
        self.page = parts.path
        (self.token,) = parse_qs(parts.query)["token"]


@pytest.fixture(scope="module")
def server(
    repository: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    errors = (tmp_path_factory.mktemp("server") / "stderr").open("w+")
    process = subprocess.Popen(
        [repository / "lab", "up"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,
    )
    try:
        yield Server(process)
    finally:
        try:
            process.terminate()
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.close()


def _get(server: Server, path: str, **options: object) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{server.port}{path}", timeout=30, **options)  # type: ignore[arg-type]


def test_the_address_opens_on_the_course_with_its_token(server: Server, repository: Path) -> None:
    assert server.address.startswith(f"http://127.0.0.1:{server.port}/lab")
    if (repository / "notebooks/00-start-here.ipynb").exists():
        assert server.page == "/lab/tree/notebooks/00-start-here.ipynb"
    assert _get(server, f"{server.page}?token={server.token}", follow_redirects=True).status_code == 200


def test_nobody_without_the_token_gets_in(server: Server) -> None:
    assert _get(server, "/api/contents").status_code == 403
    assert _get(server, "/api/contents", headers={"Authorization": "token wrong"}).status_code == 403
    good = _get(server, "/api/contents", headers={"Authorization": f"token {server.token}"})
    assert good.status_code == 200


def test_no_command_line_shows_the_token(server: Server) -> None:
    for process in psutil.process_iter(["cmdline"]):
        assert not any(server.token in word for word in process.info["cmdline"] or [])


def test_it_listens_on_loopback_alone(server: Server) -> None:
    leader = psutil.Process(server.process.pid)
    # Asked of the system at once, not of each process: some of them end meanwhile.
    ours = {leader.pid, *(child.pid for child in leader.children(recursive=True))}
    listening = {
        connection.laddr.ip
        for connection in psutil.net_connections("inet")
        if connection.pid in ours and connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_a_second_server_finds_another_port(server: Server, part: Callable[[str], str]) -> None:
    assert part("choose_port ''; echo $port") != str(server.port)


@pytest.fixture
def part(repository: Path) -> Callable[[str], str]:
    def run(snippet: str) -> str:
        sources = "".join(
            f"source '{repository}/scripts/{name}.sh'\n" for name in ("say", "python", "server")
        )
        done = subprocess.run(
            ["bash", "-c", f"set -euo pipefail\nroot='{repository}'\n{sources}{snippet}"],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    return run


def test_a_taken_port_that_was_asked_for_is_refused(repository: Path, environment: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [repository / "lab", "up", "--port", port], env=environment, capture_output=True, text=True
        )
    assert done.returncode == 1
    assert f"Port {port} of 127.0.0.1 is taken" in done.stderr


def test_what_a_kernel_prints_goes_through_sockets_of_ours(server: Server) -> None:
    """From a port of loopback every user of this computer could read it."""
    authorized = {"Authorization": f"token {server.token}"}
    address = f"http://127.0.0.1:{server.port}/api/kernels"
    kernel = httpx.post(address, headers=authorized, timeout=60).json()["id"]
    try:
        (process,) = [
            each
            for each in psutil.process_iter(["cmdline"])
            if any(kernel in word for word in each.info["cmdline"] or [])
        ]
        connection = Path(next(word for word in process.cmdline() if kernel in word))
        assert json.loads(connection.read_text())["transport"] == "ipc"
        assert oct(connection.parent.stat().st_mode & 0o777) == oct(0o700)
        deadline = time.monotonic() + 30
        while len(list(connection.parent.glob(f"kernel-{kernel}-ipc-*"))) < 5:  # one for each channel
            assert time.monotonic() < deadline, "its sockets did not come"
            time.sleep(0.05)
    finally:
        httpx.delete(f"{address}/{kernel}", headers=authorized, timeout=30)
