"""The boundary with apt and dpkg: which packages there are, getting them, reading them; nothing is installed.

Everything here works as an ordinary user and touches no state of apt's: `apt-cache` and
`apt-get --print-uris` read the package lists that are there, `apt-get download` writes into our cache.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tarfile
import urllib.parse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from labkit.errors import HostError, ToolError
from labkit.guests.process import run_watched
from labkit.progress import Progress
from labkit.tools import require, run_tool, which

_UPDATE = "sudo apt update   (then try again)"
#: QEMU's name of an architecture, by dpkg's.
QEMU_ARCH = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class Package:
    """A package version that can be downloaded: size in bytes, digest as "SHA256:hex"."""

    name: str
    version: str
    filename: str
    size: int
    digest: str


@dataclass(frozen=True)
class Entry:
    """A file or link in a package; `target` is set for links."""

    data: bytes
    mode: int
    target: str | None = None


@dataclass(frozen=True)
class Distribution:
    """This computer's distribution: ("debian", "bookworm", "Debian GNU/Linux 12 (bookworm)")."""

    id: str
    codename: str
    title: str


def distribution() -> Distribution:
    """Which distribution this is.

    Raises:
        HostError: it is neither Debian nor Ubuntu nor made from them, so its packages make no guest.
    """
    path = Path("/etc/os-release")
    fields = dict(re.findall(r'^(\w+)="?(.*?)"?$', path.read_text(), re.MULTILINE)) if path.exists() else {}
    family = {fields.get("ID", ""), *fields.get("ID_LIKE", "").split()}
    if not which("apt-get") or not family & {"debian", "ubuntu"}:
        name = fields.get("NAME", "another system")
        raise HostError(
            f"Guests are made from Debian's or Ubuntu's packages, and this is {name}.",
            mend="Use Debian 12 or 13 or Ubuntu 24.04 (WSL and virtual machines will do).",
        )
    kind = "ubuntu" if "ubuntu" in family else "debian"
    return Distribution(kind, fields.get("VERSION_CODENAME", ""), fields.get("PRETTY_NAME", kind))


def architecture() -> str:
    """The architecture of this computer's packages: "amd64" or "arm64".

    Raises:
        HostError: it is another.
    """
    arch = run_tool([require("dpkg", package="dpkg"), "--print-architecture"], what="ask dpkg").strip()
    if arch not in QEMU_ARCH:
        raise HostError(
            f"Guests are made for amd64 and arm64, and this computer is {arch}.", mend="Use another computer."
        )
    return arch


def dependencies(package: str, *, recurse: bool = False) -> dict[str, list[str]]:
    """What a package depends on: package -> names, in the order in which the package lists them.

    Alternatives and providers of virtual packages are all listed.

    Raises:
        HostError: apt's lists do not have the package.
    """
    kinds = ("recommends", "suggests", "conflicts", "breaks", "replaces", "enhances")
    options = [f"--no-{kind}" for kind in kinds] + (["--recurse"] if recurse else [])
    try:
        out = run_tool([require("apt-cache", package="apt"), "depends", *options, package], what="ask apt")
    except ToolError as exc:
        raise _not_listed([package], exc) from exc
    graph: dict[str, list[str]] = {}
    current: list[str] = []
    for line in out.splitlines():
        if not line.startswith(" "):
            current = graph.setdefault(line.strip(), [])
        else:  # "  Depends: x", " |Depends: x", "    provider-of-x"
            name = line.rpartition(": ")[2].strip()
            if not name.startswith("<"):
                current.append(name.partition(":")[0])
    return graph


def candidates(names: Iterable[str]) -> list[Package]:
    """The versions that `apt-get` would take of the named packages.

    Raises:
        HostError: apt's lists do not have them.
    """
    wanted = list(dict.fromkeys(names))
    try:
        out = run_tool(
            [require("apt-get", package="apt"), *_options(), "--print-uris", "download", *wanted],
            what="ask apt",
        )
    except ToolError as exc:
        raise _not_listed(wanted, exc) from exc
    found = [_parse_uri(line) for line in out.splitlines() if line.startswith("'")]
    return [next(package for package in found if package.name == name) for name in wanted]


def _parse_uri(line: str) -> Package:
    """From "'URI' name_1%3a2.0-1_amd64.deb 928188 SHA256:…" (a colon in a version is written %3a)."""
    _uri, filename, size, digest = line.split()
    name, version, _rest = filename.split("_", 2)
    return Package(name, urllib.parse.unquote(version), filename, int(size), digest)


def sources(codename: str) -> tuple[str, ...]:
    """Lines for a sources.list of Debian's own suites of that release, from where this computer gets them."""
    form = "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)"
    argv = [require("apt-get", package="apt"), "indextargets", "--format", form, "Created-By: Packages"]
    lines: dict[str, None] = {}
    for target in run_tool(argv, what="ask apt for its sources").splitlines():
        origin, uri, release, component = target.split("|")
        if origin == "Debian" and release.startswith(codename) and uri.startswith(("http:", "https:")):
            lines.setdefault(f"deb {uri} {release} {component}")
    return tuple(lines)


def download(packages: Iterable[Package], into: Path, progress: Progress) -> dict[str, Path]:
    """Get packages into a directory, those that are not there yet: name -> file.

    Raises:
        ToolError: apt could not get one, often because the lists are older than the archive (404).
    """
    into.mkdir(parents=True, exist_ok=True)
    wanted = list(packages)
    missing = [package for package in wanted if not _is_complete(into / package.filename, package)]
    if missing:
        with _Staging(into) as staging:
            _fetch(missing, staging, progress)
            for package in missing:
                _publish(staging / package.filename, into / package.filename, package)
    return {package.name: into / package.filename for package in wanted}


def _fetch(packages: list[Package], staging: Path, progress: Progress) -> None:
    size = sum(package.size for package in packages)
    progress.step(f"downloading {len(packages)} packages ({size / 1e6:.0f} MB)")
    argv = [require("apt-get", package="apt"), *_options(), "-qq", "download"]
    argv += [f"{package.name}={package.version}" for package in packages]
    seen = 0

    def count() -> None:
        nonlocal seen
        now = _size_below(staging)
        progress.update(max(0, now - seen))
        seen = max(seen, now)

    what = "download the packages that the guest is made from"
    run_watched(argv, what=what, log=staging / "apt.log", tick=count, cwd=staging, mend=_UPDATE)


def _size_below(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue  # apt renames its partial files while we look
    return total


class _Staging:
    """A directory of our own inside the package cache: two processes may download at once."""

    def __init__(self, into: Path) -> None:
        self._path = into / f".staging-{os.getpid()}"

    def __enter__(self) -> Path:
        shutil.rmtree(self._path, ignore_errors=True)
        self._path.mkdir()
        return self._path

    def __exit__(self, *_exc: object) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


def _publish(source: Path, target: Path, package: Package) -> None:
    if not _is_complete(source, package):
        raise ToolError(
            f"The package {package.name} is not what apt's lists say it should be.",
            evidence=f"expected {package.size} bytes, {package.digest}",
            mend=_UPDATE,
        )
    for older in target.parent.glob(f"{package.name}_*.deb"):
        if older != target:
            older.unlink(missing_ok=True)
    os.replace(source, target)


def _is_complete(path: Path, package: Package) -> bool:
    if not path.exists() or path.stat().st_size != package.size:
        return False
    algorithm, _, expected = package.digest.partition(":")
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm.lower()).hexdigest() == expected


def read_package(deb: Path, wanted: Callable[[str], bool]) -> dict[str, Entry]:
    """The files of a package whose path satisfies `wanted`: path -> entry.

    Paths have no leading "./", and none "usr/": whether a file stands in /lib or /usr/lib differs between
    releases, and guests have one merged tree.
    """
    argv = [require("dpkg-deb", package="dpkg"), "--fsys-tarfile", str(deb)]
    found: dict[str, Entry] = {}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    path = member.name.removeprefix("./").removeprefix("usr/")
                    if wanted(path) and (entry := _entry(archive, member)):
                        found[path] = entry
        except tarfile.TarError as exc:
            process.kill()
            raise ToolError(f"The package {deb.name} cannot be read: {exc}.", command=" ".join(argv)) from exc
        process.stdout.read()  # the tar's padding; dpkg-deb would complain of a closed pipe
        said = process.stderr.read().decode(errors="replace")
    if process.returncode != 0:
        raise ToolError(
            f"The package {deb.name} cannot be read.",
            command=" ".join(argv),
            returncode=process.returncode,
            evidence=said,
        )
    return found


def _entry(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Entry | None:
    if member.issym() or member.islnk():
        return Entry(b"", member.mode, member.linkname)
    file = archive.extractfile(member)
    return Entry(file.read(), member.mode) if file else None


def _options() -> list[str]:
    # As root apt drops to the user _apt, who may not write into a cache below /root.
    return ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []


def _not_listed(names: list[str], cause: ToolError) -> HostError:
    return HostError(
        f"apt does not know all of the packages that the guest is made from: {', '.join(names)}.",
        evidence=cause.evidence,
        mend=_UPDATE,
    )
