"""The real `./lab` in fresh roots of other distributions: as nobody in particular, with sudo, and as root.

Roots are made by mmdebstrap from the distribution's own mirror and kept for a week in the cache; each
run works in a fresh copy, inside namespaces of its own, so that no mount and no process is left.
Ubuntu is tried only where its mirror answers.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distros, pytest.mark.timeout(3600)]

DEBIAN = "http://deb.debian.org/debian"
UBUNTU = "http://archive.ubuntu.com/ubuntu"
ROOTS = {  # suite: mirror, components
    "bookworm": (DEBIAN, "main"),
    "trixie": (DEBIAN, "main"),
    "noble": (UBUNTU, "main,universe"),
}
ALL_PASSED = re.compile(r"^tests: [1-9]\d* passed, 0 failed", re.MULTILINE)
A_WEEK = 7 * 24 * 3600


def _answers(mirror: str, suite: str) -> bool:
    try:
        with urllib.request.urlopen(f"{mirror}/dists/{suite}/Release", timeout=20) as reply:
            return f"Codename: {suite}".encode() in reply.read(4096)
    except (OSError, urllib.error.URLError):
        return False


def _ubuntu_keyring(folder: Path) -> Path:
    """Ubuntu's keys: the system's, or those in Debian 13's package, which Debian's own keys vouch for."""
    keyring = Path("usr/share/keyrings/ubuntu-archive-keyring.gpg")
    if (Path("/") / keyring).exists():
        return Path("/") / keyring
    apt = folder / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (apt / name).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    (apt / "sources.list").write_text(f"deb {DEBIAN} trixie main\n")
    own = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::State::lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "APT::Sandbox::User": "root",
    }
    options = [word for key, value in own.items() for word in ("-o", f"{key}={value}")]
    for words in (["update"], ["download", "ubuntu-keyring"]):
        subprocess.run(["apt-get", "-q", *options, *words], cwd=apt, check=True, capture_output=True)
    (package,) = apt.glob("*.deb")
    subprocess.run(["dpkg-deb", "-x", package, folder / "ubuntu"], check=True)
    shutil.rmtree(apt)
    return folder / "ubuntu" / keyring


def _base(suite: str) -> Path:
    """A minimal root's archive, from the cache or made anew."""
    mirror, components = ROOTS[suite]
    folder = Path(os.environ["LABKIT_CACHE"]) / "distros"
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{suite}.tar"
    if archive.exists() and time.time() - archive.stat().st_mtime < A_WEEK:
        return archive
    fresh = archive.with_suffix(".new.tar")
    command = [
        "mmdebstrap",
        "--variant=minbase",
        f"--components={components}",
        "--include=apt,sudo,ca-certificates",
        suite,
        str(fresh),
        mirror,
    ]
    # Not below the user's home, which apt's own user may not enter.
    with tempfile.TemporaryDirectory(prefix="labkit-keys-", dir="/var/tmp") as keys:
        Path(keys).chmod(0o755)
        if mirror == UBUNTU:
            command[1:1] = ["--keyring", str(_ubuntu_keyring(Path(keys)))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr[:1000]}\n…\n{done.stderr[-2000:]}"
    fresh.replace(archive)
    return archive


def _pip_paths() -> list[str]:
    """Local folders and files that this machine's pip is set up to use: they have to be there inside too."""
    known = {"/etc/pip.conf", "/etc/xdg/pip"}
    listed = subprocess.run(["python3", "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    for word in re.split(r"[\s'\"=,]+", listed):
        path = word.removeprefix("file://")
        if path.startswith("/"):
            known.add(path)
    there = sorted({str(Path(path)) for path in known if Path(path).exists()})
    return [path for path in there if not any(path.startswith(f"{other}/") for other in there)]


@dataclass
class Root:
    """A distribution's root file system to run things in."""

    suite: str
    folder: Path
    shown: Path
    times: list[tuple[str, float]] = field(default_factory=list)

    def run(self, command: str, *, user: str = "root", cwd: str = "/") -> subprocess.CompletedProcess[str]:
        home = "/root" if user == "root" else f"/home/{user}"
        env = {
            "HOME": home,
            "USER": user,
            "LOGNAME": user,
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            **{name: value for name, value in os.environ.items() if name.startswith("PIP_")},
        }
        inner = f"cd {shlex.quote(cwd)} && {command}"
        argv = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash"]
        argv += [str(Path(__file__).with_name("inside.sh")), str(self.folder), str(self.shown)]
        # bash stays as the first process and collects orphans, as an init would.
        switch = f"env -i {shlex.join(f'{k}={v}' for k, v in env.items())}"
        if user != "root":
            switch = f"runuser -u {user} -- {switch}"
        argv += ["/bin/bash", "-c", f"{switch} /bin/bash -c {shlex.quote(inner)}; exit $?"]
        started = time.monotonic()
        done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=1800)
        self.times.append((f"{user}: {command}", time.monotonic() - started))
        took = f"{self.times[-1][1]:.1f} s, exit {done.returncode}"
        print(f"\n[{self.suite}] {user}: {command}  {took}", flush=True)  # noqa: T201  # it takes minutes
        return done

    def ok(self, command: str, *, user: str = "root", cwd: str = "/") -> str:
        done = self.run(command, user=user, cwd=cwd)
        assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout


@pytest.fixture(scope="module", params=list(ROOTS))
def root(request: pytest.FixtureRequest, repository: Path) -> Iterator[Root]:
    suite = request.param
    mirror, _ = ROOTS[suite]
    if mirror == UBUNTU and not _answers(mirror, suite):
        pytest.skip(f"{suite} is untested here: Ubuntu's mirror does not answer")
    base = _base(suite)
    folder = Path(tempfile.mkdtemp(prefix=f"labkit-{suite}-", dir="/var/tmp"))
    try:
        folder.chmod(0o755)
        subprocess.run(["tar", "-C", folder, "--numeric-owner", "-xf", base], check=True)
        _furnish(folder, repository)
        shown = folder / "shown.list"
        shown.write_text("".join(f"{path}\n" for path in _pip_paths()))
        yield Root(suite, folder, shown)
    finally:
        mounts = Path("/proc/self/mounts").read_text()
        assert f" {folder}" not in mounts, "a mount is left, so nothing is removed"
        shutil.rmtree(folder)


def _furnish(folder: Path, repository: Path) -> None:
    """The host's way to the network, two ordinary users, and a checkout for each."""
    for name in ("resolv.conf", "hosts"):
        shutil.copy(Path("/etc") / name, folder / "etc" / name)
    proxy = subprocess.run(
        ["apt-config", "dump", "--format", "%f %v%n", "Acquire::http::Proxy"], capture_output=True, text=True
    ).stdout.split()
    if len(proxy) == 2:
        (folder / "etc/apt/apt.conf.d/90proxy").write_text(f'Acquire::http::Proxy "{proxy[1]}";\n')
    users = "useradd -m -s /bin/bash learner && useradd -m -s /bin/bash guest"
    subprocess.run(["chroot", folder, "/bin/bash", "-c", users], check=True)
    (folder / "etc/sudoers.d/learner").write_text("learner ALL=(ALL) NOPASSWD: ALL\n")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=repository,
        capture_output=True,
        check=True,
    ).stdout
    for home in ("root", "home/learner", "home/guest"):
        target = folder / home / "labkit"
        target.mkdir()
        subprocess.run(
            ["bash", "-c", f"tar --null --ignore-failed-read -T - -c | tar -x -C {shlex.quote(str(target))}"],
            cwd=repository,
            input=files,
            check=True,
            stderr=subprocess.DEVNULL,
        )
    owners = "chown -R learner: /home/learner && chown -R guest: /home/guest"
    subprocess.run(["chroot", folder, "/bin/bash", "-c", owners], check=True)


# In this order, since each finds the root as the one before left it.


def test_somebody_without_sudo_is_told_what_to_have_installed(root: Root) -> None:
    away, back = "mv /usr/bin/sudo /usr/bin/sudo.away", "mv /usr/bin/sudo.away /usr/bin/sudo"
    done = root.run(f"{away}; runuser -u guest -- ./lab up --no-server; {back}", cwd="/home/guest/labkit")
    assert "apt-get install --no-install-recommends" in done.stderr
    assert "libvirt-daemon" in done.stderr


def test_an_ordinary_user_brings_it_up(root: Root) -> None:
    root.ok("./lab up --no-server --yes", user="learner", cwd="/home/learner/labkit")


def test_no_service_was_enabled_and_no_policy_left(root: Root) -> None:
    links = root.ok("find /etc/systemd /etc/rc?.d -name '*virt*' -o -name '*qemu*' | grep -v '/K' || true")
    assert links.split() == []
    assert not (root.folder / "usr/sbin/policy-rc.d").exists()


def test_a_second_run_takes_under_five_seconds(root: Root) -> None:
    root.ok("./lab up --no-server --yes", user="learner", cwd="/home/learner/labkit")
    assert root.times[-1][1] < 5


def test_an_ordinary_user_runs_the_unit_tests(root: Root) -> None:
    assert ALL_PASSED.search(root.ok("./lab test unit", user="learner", cwd="/home/learner/labkit"))


def test_an_ordinary_user_runs_the_demo(root: Root) -> None:
    assert json.loads(root.ok("./lab demo --json", user="learner", cwd="/home/learner/labkit"))["ok"] is True


def test_root_brings_it_up(root: Root) -> None:
    root.ok("./lab up --no-server", cwd="/root/labkit")


def test_root_runs_the_unit_tests(root: Root) -> None:
    assert ALL_PASSED.search(root.ok("./lab test unit", cwd="/root/labkit"))


def test_root_runs_the_demo(root: Root) -> None:
    assert json.loads(root.ok("./lab demo --json", cwd="/root/labkit"))["ok"] is True
