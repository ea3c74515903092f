"""Getting large files: resumed where they broke off, tried again, and taken only with the right checksum."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from labkit.errors import DownloadError
from labkit.progress import Progress

if TYPE_CHECKING:
    import httpx

#: Seconds between attempts that brought nothing new; after the last one it is given up.
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
_PIECE = 1 << 20
_SUMS_MAX = 4 << 20
_CHECKSUM = re.compile(r"(sha256|sha512):([0-9a-f]+)")
_DIGITS = {"sha256": 64, "sha512": 128}


def fetch(
    source: str,
    target: Path,
    *,
    checksum: str | None,
    progress: Progress,
    pauses: Sequence[float] = PAUSES,
) -> None:
    """Get a file. What had arrived of it when an earlier call was interrupted is not fetched again.

    Arguments:
        source: an http, https or file URL, or a path.
        target: where it goes; made in one step when all of it is there and right. Beside it, "NAME.part"
            holds what has arrived so far.
        checksum: "sha256:hex" or "sha512:hex"; None takes whatever comes.
        pauses: seconds to wait between attempts.

    Raises:
        DownloadError: it could not be had, or is not what its checksum says (it is deleted then).
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    path = local_path(source)
    if path is None:
        _fetch_http(source, part, progress, pauses)
    else:
        _copy(path, part, progress)
    if checksum:
        progress.step("checking what has arrived")
        _verify(part, source, checksum)
    part.replace(target)
    _etag_file(part).unlink(missing_ok=True)


def local_path(source: str) -> Path | None:
    """The path that a file URL or a plain path means, or None for http and https.

    Raises:
        DownloadError: it is a URL of another kind.
    """
    url = urllib.parse.urlsplit(source)
    if url.scheme in ("http", "https"):
        return None
    if url.scheme == "file":
        return Path(urllib.parse.unquote(url.path))
    if "://" in source:
        raise DownloadError(f"{source} cannot be fetched.", mend="Use an http, https or file URL, or a path.")
    return Path(source).expanduser()


def resolve_checksum(source: str, checksum: str) -> str:
    """A checksum as "sha256:hex" or "sha512:hex", looked up where the project publishes it.

    Arguments:
        source: the file's URL; its last part is the name to look for.
        checksum: the checksum itself, or a URL or path of a list as sha256sum, sha512sum or Fedora write it.

    Raises:
        DownloadError: the list could not be had, or says nothing of the file.
    """
    if _CHECKSUM.fullmatch(checksum):
        return checksum
    name = source.rstrip("/").rpartition("/")[2]
    found = find_checksum(_read_text(checksum), name)
    if found is None:
        raise DownloadError(
            f"{checksum} has no checksum of {name}.", mend="See whether the image has a new name."
        )
    return found


def find_checksum(text: str, name: str) -> str | None:
    """The checksum of `name` in a list: "hex  name", "hex *name", "SHA256 (name) = hex", or one hex alone."""
    entries: list[tuple[str, str]] = []
    for line in text.splitlines():
        if match := re.fullmatch(r"([0-9a-fA-F]{64}|[0-9a-fA-F]{128})(?:\s+\*?(\S+))?\s*", line):
            entries.append((match[2] or "", match[1]))
        elif match := re.fullmatch(r"SHA(?:256|512) \((.+)\) = ([0-9a-fA-F]+)\s*", line):
            entries.append((match[1], match[2]))
    for listed, digest in entries:
        if listed.rpartition("/")[2] == name or (not listed and len(entries) == 1):
            return f"sha{len(digest) * 4}:{digest.lower()}"
    return None


def check_form(checksum: str) -> bool:
    """True for "sha256:" or "sha512:" with as many hexadecimal digits as it has."""
    match = _CHECKSUM.fullmatch(checksum)
    return match is not None and len(match[2]) == _DIGITS[match[1]]


def _read_text(source: str) -> str:
    path = local_path(source)
    if path is not None:
        try:
            return path.read_text(errors="replace")
        except OSError as exc:
            raise DownloadError(f"{path} cannot be read: {exc.strerror}.") from exc
    import httpx

    try:
        with _client() as client:
            answer = client.get(source)
            answer.raise_for_status()
    except httpx.HTTPError as exc:
        raise _unreachable(source, exc) from exc
    return answer.text[:_SUMS_MAX]


def _copy(path: Path, part: Path, progress: Progress) -> None:
    try:
        progress.step(f"copying {path.name}", total=path.stat().st_size)
        with path.open("rb") as source, part.open("wb") as out:
            while piece := source.read(_PIECE):
                out.write(piece)
                progress.update(len(piece))
    except OSError as exc:
        part.unlink(missing_ok=True)
        raise DownloadError(
            f"{path} cannot be copied: {exc.strerror}.", mend="See whether it is there."
        ) from exc


def _fetch_http(url: str, part: Path, progress: Progress, pauses: Sequence[float]) -> None:
    """Fetch until all is there; an attempt that brought something does not count as failed."""
    import httpx

    failures = 0
    with _client() as client:
        while True:
            before = _size(part)
            try:
                return _fetch_rest(client, url, part, progress)
            except httpx.HTTPStatusError as exc:
                if exc.response.status_code < 500 and exc.response.status_code not in (408, 429):
                    raise _unreachable(url, exc) from exc
                failure: httpx.HTTPError = exc
            except httpx.TransportError as exc:
                failure = exc
            failures = 0 if _size(part) > before else failures + 1
            if failures > len(pauses):
                raise _unreachable(url, failure) from failure
            progress.step("waiting for the connection to come back")
            time.sleep(pauses[max(0, failures - 1)] if pauses else 0)


def _fetch_rest(client: httpx.Client, url: str, part: Path, progress: Progress) -> None:
    """One attempt: ask for what is missing, append it."""
    import httpx

    have, headers = _size(part), {}
    etag = _etag_file(part).read_text() if have and _etag_file(part).exists() else ""
    if have:
        headers["Range"] = f"bytes={have}-"
        if etag:
            headers["If-Range"] = etag  # a file that has changed since comes from its start
    with client.stream("GET", url, headers=headers) as answer:
        if answer.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            if _total(answer) == have:
                return  # an earlier attempt had got all of it
            part.unlink()
            raise httpx.RemoteProtocolError("the file is shorter than what we had of it")
        answer.raise_for_status()
        resumed = answer.status_code == httpx.codes.PARTIAL_CONTENT and _range_start(answer) == have
        if not resumed:
            have = 0
        _remember_etag(part, answer.headers.get("ETag", ""))
        length = answer.headers.get("Content-Length")
        progress.step("downloading", total=have + int(length) if length else None)
        progress.update(have)
        with part.open("ab" if resumed else "wb") as out:
            for piece in answer.iter_raw():  # as it comes: what is gathered first is lost with the connection
                out.write(piece)
                progress.update(len(piece))


def _client() -> httpx.Client:
    import httpx  # here, so that naming an image does not load it

    # identity: a compressed answer could not be resumed by its offset.
    return httpx.Client(
        follow_redirects=True, timeout=httpx.Timeout(30, read=60), headers={"Accept-Encoding": "identity"}
    )


def _range_start(answer: httpx.Response) -> int | None:
    match = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _total(answer: httpx.Response) -> int | None:
    match = re.match(r"bytes \*/(\d+)", answer.headers.get("Content-Range", ""))
    return int(match[1]) if match else None


def _etag_file(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _remember_etag(part: Path, etag: str) -> None:
    if etag and not etag.startswith("W/"):  # a weak one does not promise the same bytes
        _etag_file(part).write_text(etag)
    else:
        _etag_file(part).unlink(missing_ok=True)


def _size(path: Path) -> int:
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _verify(part: Path, source: str, checksum: str) -> None:
    algorithm, _, expected = checksum.partition(":")
    with part.open("rb") as file:
        seen = hashlib.file_digest(file, algorithm).hexdigest()
    if seen != expected:
        part.unlink()
        _etag_file(part).unlink(missing_ok=True)
        raise DownloadError(
            f"What came from {source} is not the file that its checksum belongs to. It was deleted.",
            evidence=f"expected {algorithm} {expected}\nseen     {algorithm} {seen}",
            mend="Try again. If it happens again, the server hands out a changed file.",
        )


def _unreachable(url: str, cause: Exception) -> DownloadError:
    return DownloadError(
        f"{url} cannot be had.",
        evidence=f"{type(cause).__name__}: {cause}",
        mend="See whether this computer is online. The pocket and debian guests are made without it.",
    )


def download_path(base: Path, url: str) -> Path:
    """Where the download of a URL is kept while it is under way: one place for each URL."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", url.rstrip("/").rpartition("/")[2])[-80:]
    return base / "downloads" / f"{hashlib.sha256(os.fsencode(url)).hexdigest()[:12]}-{name}"
