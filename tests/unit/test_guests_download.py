"""Downloads go on where they broke off, and take nothing that is not what it should be."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from labkit.errors import DownloadError
from labkit.guests.download import check_form, fetch, find_checksum, resolve_checksum
from labkit.progress import Progress, progress

DATA = random.Random(1).randbytes(3_000_000)
RIGHT = "sha256:" + hashlib.sha256(DATA).hexdigest()
NO_PAUSES = (0.0, 0.0, 0.0)


@dataclass
class Files:
    """What is served, and how badly.

    Attributes:
        content: path -> bytes.
        cut_after: body bytes after which each answer breaks off; None for never.
        ranges: whether byte ranges are understood.
        failures: how many of the next answers are "503 Service Unavailable".
        etag: the entity tag, or "".
        asked: the Range header of each request so far, or "".
    """

    content: dict[str, bytes] = field(default_factory=dict)
    cut_after: int | None = None
    ranges: bool = True
    failures: int = 0
    etag: str = ""
    asked: list[str] = field(default_factory=list)
    url: str = ""


@contextmanager
def file_server() -> Iterator[Files]:
    """Serve `Files` until the block ends; its `url` has no slash at the end."""
    files = Files()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            files.asked.append(self.headers.get("Range", ""))
            if files.failures:
                files.failures -= 1
                self.send_error(503)
            elif self.path not in files.content:
                self.send_error(404)
            else:
                self._send(files.content[self.path])

        def _send(self, data: bytes) -> None:
            start = self._start()
            if start and start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            if files.etag:
                self.send_header("ETag", files.etag)
            rest = data[start:]
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            self.wfile.write(rest if files.cut_after is None else rest[: files.cut_after])
            self.close_connection = True

        def _start(self) -> int:
            match = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
            unchanged = self.headers.get("If-Range", files.etag) == files.etag
            return int(match[1]) if match and files.ranges and unchanged else 0

        def log_message(self, *_args: object) -> None:
            """Be silent: the log is not what a test looks at."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    files.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield files
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def files() -> Iterator[Files]:
    with file_server() as served:
        served.content["/disk.img"] = DATA
        yield served


@pytest.fixture
def shown() -> Iterator[Progress]:
    with progress("Testing") as handle:
        yield handle


def test_a_whole_download_arrives(files: Files, shown: Progress, tmp_path: Path) -> None:
    target = tmp_path / "downloads" / "disk.img"

    fetch(f"{files.url}/disk.img", target, checksum=RIGHT, progress=shown)

    assert target.read_bytes() == DATA
    assert shown.done == len(DATA)
    assert [path.name for path in target.parent.iterdir()] == ["disk.img"]


def test_a_connection_that_breaks_off_is_taken_up_again(
    files: Files, shown: Progress, tmp_path: Path
) -> None:
    files.cut_after = 1_000_000

    fetch(f"{files.url}/disk.img", tmp_path / "disk.img", checksum=RIGHT, progress=shown, pauses=NO_PAUSES)

    assert (tmp_path / "disk.img").read_bytes() == DATA
    assert files.asked == ["", "bytes=1000000-", "bytes=2000000-"]


def test_a_server_without_ranges_sends_it_from_the_start(
    files: Files, shown: Progress, tmp_path: Path
) -> None:
    files.ranges = False
    (tmp_path / "disk.img.part").write_bytes(DATA[:500_000])

    fetch(f"{files.url}/disk.img", tmp_path / "disk.img", checksum=RIGHT, progress=shown)

    assert (tmp_path / "disk.img").read_bytes() == DATA


def test_an_interrupted_download_is_resumed_by_the_next_call(
    files: Files, shown: Progress, tmp_path: Path
) -> None:
    (tmp_path / "disk.img.part").write_bytes(DATA[:2_500_000])

    fetch(f"{files.url}/disk.img", tmp_path / "disk.img", checksum=RIGHT, progress=shown)

    assert (tmp_path / "disk.img").read_bytes() == DATA
    assert files.asked == ["bytes=2500000-"]


def test_all_of_it_being_there_already_is_fine(files: Files, shown: Progress, tmp_path: Path) -> None:
    (tmp_path / "disk.img.part").write_bytes(DATA)

    fetch(f"{files.url}/disk.img", tmp_path / "disk.img", checksum=RIGHT, progress=shown)

    assert (tmp_path / "disk.img").read_bytes() == DATA


def test_a_file_that_changed_meanwhile_comes_from_its_start(
    files: Files, shown: Progress, tmp_path: Path
) -> None:
    files.etag, files.cut_after = '"new"', None
    (tmp_path / "disk.img.part").write_bytes(b"old" * 100_000)
    (tmp_path / "disk.img.part.etag").write_text('"old"')

    fetch(f"{files.url}/disk.img", tmp_path / "disk.img", checksum=RIGHT, progress=shown)

    assert (tmp_path / "disk.img").read_bytes() == DATA


def test_more_than_there_is_of_it_is_thrown_away(files: Files, shown: Progress, tmp_path: Path) -> None:
    (tmp_path / "disk.img.part").write_bytes(DATA + b"too much")

    fetch(f"{files.url}/disk.img", tmp_path / "disk.img", checksum=RIGHT, progress=shown, pauses=NO_PAUSES)

    assert (tmp_path / "disk.img").read_bytes() == DATA


def test_a_server_that_is_busy_is_asked_again(files: Files, shown: Progress, tmp_path: Path) -> None:
    files.failures = 3

    fetch(f"{files.url}/disk.img", tmp_path / "disk.img", checksum=RIGHT, progress=shown, pauses=NO_PAUSES)

    assert (tmp_path / "disk.img").read_bytes() == DATA


def test_a_server_that_stays_busy_is_given_up(files: Files, shown: Progress, tmp_path: Path) -> None:
    files.failures = 100

    with pytest.raises(DownloadError, match="cannot be had") as caught:
        fetch(
            f"{files.url}/disk.img", tmp_path / "disk.img", checksum=RIGHT, progress=shown, pauses=NO_PAUSES
        )

    assert "503" in caught.value.evidence
    assert len(files.asked) == len(NO_PAUSES) + 1


def test_a_file_that_is_not_there_is_asked_for_once(files: Files, shown: Progress, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="cannot be had"):
        fetch(f"{files.url}/nothing.img", tmp_path / "x", checksum=None, progress=shown, pauses=NO_PAUSES)

    assert len(files.asked) == 1


def test_a_wrong_file_is_deleted_and_named(files: Files, shown: Progress, tmp_path: Path) -> None:
    files.content["/disk.img"] = b"something else"

    with pytest.raises(DownloadError, match="not the file that its checksum belongs to") as caught:
        fetch(f"{files.url}/disk.img", tmp_path / "disk.img", checksum=RIGHT, progress=shown)

    assert RIGHT.removeprefix("sha256:") in caught.value.evidence
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_loses_nothing_of_what_had_arrived(
    files: Files, shown: Progress, tmp_path: Path
) -> None:
    target = tmp_path / "disk.img"
    script = (
        "import sys, pathlib\n"
        "from labkit.guests.download import fetch\n"
        "from labkit.progress import progress\n"
        "with progress('Testing') as p:\n"
        "    fetch(sys.argv[1], pathlib.Path(sys.argv[2]), checksum=None, progress=p, pauses=(60,))\n"
    )
    files.cut_after = 1_000_000
    files.content["/slow.img"] = DATA
    with subprocess.Popen([sys.executable, "-c", script, f"{files.url}/slow.img", target]) as process:
        part = tmp_path / "disk.img.part"
        deadline = time.monotonic() + 30
        while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    arrived = part.stat().st_size
    files.asked.clear()
    files.cut_after = None

    fetch(f"{files.url}/slow.img", target, checksum=RIGHT, progress=shown)

    assert target.read_bytes() == DATA
    assert files.asked == ([f"bytes={arrived}-"])


@pytest.mark.parametrize("form", ["{path}", "file://{path}"])
def test_files_of_this_computer_are_copied(form: str, shown: Progress, tmp_path: Path) -> None:
    source = tmp_path / "with space.img"
    source.write_bytes(DATA)

    fetch(form.format(path=source), tmp_path / "copy.img", checksum=RIGHT, progress=shown)

    assert (tmp_path / "copy.img").read_bytes() == DATA
    assert source.exists()


@pytest.mark.parametrize("source", ["/no/such/file.img", "ftp://example.org/disk.img"])
def test_what_cannot_be_fetched_is_an_error_of_ours(source: str, shown: Progress, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="cannot be"):
        fetch(source, tmp_path / "x", checksum=None, progress=shown)


HEX = hashlib.sha256(b"").hexdigest()
LONG = hashlib.sha512(b"").hexdigest()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{HEX}  other.img\n{'0' * 64}  disk.img\n", "sha256:" + "0" * 64),
        (f"{HEX} *disk.img\n", f"sha256:{HEX}"),
        (f"{LONG}  ./disk.img\n", f"sha512:{LONG}"),
        (f"# disk.img: 5 bytes\nSHA256 (disk.img) = {HEX.upper()}\n", f"sha256:{HEX}"),
        (f"{LONG}\n", f"sha512:{LONG}"),
        (f"{HEX}  other.img\n", None),
        ("<html>disk.img</html>", None),
    ],
)
def test_checksums_are_found_in_each_projects_form(text: str, expected: str | None) -> None:
    assert find_checksum(text, "disk.img") == expected


def test_a_published_checksum_is_looked_up(files: Files) -> None:
    files.content["/SHA256SUMS"] = f"{RIGHT[7:]} *disk.img\n".encode()

    assert resolve_checksum(f"{files.url}/disk.img", f"{files.url}/SHA256SUMS") == RIGHT


def test_a_list_without_the_file_is_an_error(files: Files) -> None:
    files.content["/SHA256SUMS"] = b""

    with pytest.raises(DownloadError, match=r"no checksum of disk\.img"):
        resolve_checksum(f"{files.url}/disk.img", f"{files.url}/SHA256SUMS")


@pytest.mark.parametrize(
    ("checksum", "right"),
    [
        (f"sha256:{HEX}", True),
        (f"sha512:{LONG}", True),
        (f"sha256:{LONG}", False),
        (HEX, False),
        ("md5:0", False),
    ],
)
def test_the_form_of_a_checksum_is_checked(checksum: str, right: bool) -> None:
    assert check_form(checksum) is right
