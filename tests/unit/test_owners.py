"""Owners: whether they are still there."""

from __future__ import annotations

import dataclasses
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkit import owners, reaper
from labkit.owners import Owner


def of(pid: int) -> Owner:
    return dataclasses.replace(owners.current(), pid=pid, started=owners._start_time(pid) or 0)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "99"])
    yield process
    process.kill()
    process.wait()


def test_this_process_is_alive_and_described() -> None:
    me = owners.current()
    assert me.kind == "process"
    assert me.alive()
    assert me.describe().startswith(f"process {os.getpid()} (")


def test_a_dead_process_is_gone(child: subprocess.Popen[bytes]) -> None:
    owner = of(child.pid)
    assert owner.alive()
    child.kill()
    child.wait()
    assert not owner.alive()


def test_a_zombie_is_gone(child: subprocess.Popen[bytes]) -> None:
    owner = of(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped
    assert Path(f"/proc/{child.pid}").exists()
    assert not owner.alive()


def test_a_later_process_of_the_same_number_is_another(child: subprocess.Popen[bytes]) -> None:
    owner = of(child.pid)
    assert not dataclasses.replace(owner, started=owner.started - 1).alive()


def test_an_owner_of_another_boot_is_gone() -> None:
    assert not dataclasses.replace(owners.current(), boot="before").alive()


def test_an_owner_in_another_pid_namespace_is_not_taken_for_dead() -> None:
    assert dataclasses.replace(owners.current(), namespace="pid:[1]", pid=2**22 - 1).alive()


def test_a_stopped_process_is_alive(child: subprocess.Popen[bytes]) -> None:
    os.kill(child.pid, 19)
    assert of(child.pid).alive()
    os.kill(child.pid, 18)


def test_the_explicit_owner_never_goes() -> None:
    assert owners.explicit().alive()
    assert owners.explicit().same(owners.explicit())
    assert not owners.explicit().same(owners.current())


def test_a_process_is_the_same_as_itself_only(child: subprocess.Popen[bytes]) -> None:
    assert owners.current().same(owners.current())
    assert not owners.current().same(of(child.pid))


def test_a_process_with_a_strange_name_is_read_right() -> None:
    code = (
        "import ctypes, sys; ctypes.CDLL(None).prctl(15, b'a) Z 1 (b'); print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert of(process.pid).alive()


# Jupyter, with a server of our own (test_ownership_jupyter.py has the real one)


class Answers(http.server.BaseHTTPRequestHandler):
    kernels: dict[str, int] = {}

    def do_GET(self) -> None:
        status = self.kernels.get(self.path.rpartition("/")[2], 404)
        if status == 0:
            self.wfile.write(b"nonsense\r\n\r\n")
            return
        if self.headers["Authorization"] != "token secret":
            status = 403
        self.send_response(status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[Owner]:
    """A restarted kernel's owner: its process is gone, its server may have it still."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        info = tmp_path / "jpserver-1.json"
        info.write_text(
            json.dumps(
                {"pid": os.getpid(), "token": "secret", "url": f"http://127.0.0.1:{server.server_port}/"}
            )
        )
        yield dataclasses.replace(
            owners.current(), kind="jupyter", pid=2**22 - 1, started=1, server=str(info), kernel="k"
        )
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "alive"), [(200, True), (404, False), (403, True), (500, True), (0, True)]
)
def test_a_kernel_lives_unless_its_server_says_it_does_not(notebook: Owner, status: int, alive: bool) -> None:
    Answers.kernels = {"k": status}
    assert notebook.alive() == alive


@pytest.mark.parametrize("proxy", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_a_proxy_is_not_asked_for_the_server(
    notebook: Owner, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Answers.kernels = {}
    monkeypatch.setenv(proxy, "http://127.0.0.1:1")
    assert not notebook.alive()


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"pid": "x", "url": 5}', '{"pid": 4194303, "url": "x"}'])
def test_a_kernel_is_gone_with_its_server(notebook: Owner, text: str) -> None:
    Path(notebook.server).write_text(text)
    assert not notebook.alive()


def test_a_server_file_that_is_gone_means_the_server_is(notebook: Owner) -> None:
    Path(notebook.server).unlink()
    assert not notebook.alive()


def test_a_restarted_kernel_is_the_same_owner(notebook: Owner) -> None:
    restarted = dataclasses.replace(notebook, pid=os.getpid(), started=5)
    assert notebook.same(restarted)
    assert not notebook.same(dataclasses.replace(restarted, kernel="other"))


# The reaper's own settings


@pytest.mark.parametrize(
    ("value", "grace"), [("5", 5), ("0", 0), ("-3", 0), ("soon", reaper.GRACE), ("", reaper.GRACE)]
)
def test_the_grace_time_can_be_set(monkeypatch: pytest.MonkeyPatch, value: str, grace: float) -> None:
    monkeypatch.setenv("LABKIT_GRACE", value)
    assert reaper._grace() == grace
