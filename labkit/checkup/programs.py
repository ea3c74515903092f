"""Checks of the programs that labkit drives: QEMU, libvirt, and the optional ones."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from labkit import tools
from labkit.checkup.report import Check
from labkit.errors import LabkitError
from labkit.hypervisors import accelerator

__all__ = ["docker", "docker_urls", "install_qemu", "libvirt_daemon", "qemu", "qemu_package", "virtualbox"]


def qemu(program: str | None = None) -> Check:
    """Is QEMU there, and which version? `program`: its path, looked for by default."""
    program = program or accelerator.qemu_program()
    tool = tools.which("qemu-img")
    if program is None or tool is None:
        name = "qemu-img" if program else f"qemu-system-{accelerator.host_arch()}"
        return Check(
            "qemu",
            "fail",
            f"{name} is not installed",
            "QEMU runs the course's virtual machines; without it there are none.",
            install_qemu(),
        )
    output = tools.run_tool([program, "--version"], what="ask QEMU for its version", timeout=15)
    version = output.splitlines()[0].removeprefix("QEMU emulator version ")
    return Check("qemu", "ok", f"{program}, {version}", "QEMU is installed.")


def qemu_package() -> str:
    """Debian's package of the QEMU for this computer's architecture."""
    return "qemu-system-x86" if accelerator.host_arch() == "x86_64" else "qemu-system-arm"


def install_qemu() -> str:
    """How QEMU is installed."""
    return f"`sudo apt install --no-install-recommends {qemu_package()} qemu-utils`"


def libvirt_daemon() -> Check:
    """Is libvirt's binding there, does a daemon answer, and which version is it?"""
    try:
        from labkit.hypervisors import libvirt
    except ImportError as exc:
        return _no_binding(exc)
    try:
        connection = libvirt.connect()
        library, hypervisor = connection.version()
        where = connection.uri or "labkit's own daemon"
    except LabkitError as exc:
        return Check(
            "libvirt",
            "fail",
            " / ".join((exc.message, *exc.evidence.splitlines())),
            "libvirt manages the course's virtual machines; without it there are none.",
            _mend_libvirt(exc),
        )
    return Check(
        "libvirt",
        "ok",
        f"libvirt {library} with QEMU {hypervisor} answers at {where}",
        "libvirt manages virtual machines here.",
    )


_DAEMON = "libvirt-daemon libvirt-daemon-driver-qemu tini"
_INSTALL_LIBVIRT = f"`sudo apt install --no-install-recommends {_DAEMON}`; or `./lab up`"


def _no_binding(exc: ImportError) -> Check:
    missing = exc.name or "libvirt"
    mend = pip_install(missing)
    if missing.startswith("libvirt"):
        # The binding is compiled against the system's library, whichever that is.
        daemon = "" if tools.which("libvirtd") and tools.which("tini") else f"{_DAEMON} "
        packages = f"{daemon}libvirt-dev pkg-config gcc python3-dev"
        mend = f"`sudo apt install --no-install-recommends {packages}`, then {pip_install('libvirt-python')}"
    return Check(
        "libvirt",
        "fail",
        f"the Python module cannot be imported: {exc}",
        "labkit speaks to libvirt by it, and libvirt manages the course's virtual machines.",
        mend,
    )


def pip_install(packages: str) -> str:
    """How Python packages are installed where labkit runs."""
    if sys.prefix == sys.base_prefix:  # pip refuses to touch a distribution's own Python
        return f"`./lab up`, which makes an environment with {packages}"
    return f"`{sys.executable} -m pip install {packages}`; or `./lab up`"


def _mend_libvirt(exc: LabkitError) -> str:
    if tools.which("libvirtd") is None or tools.which("tini") is None:
        return _INSTALL_LIBVIRT
    if os.environ.get("LABKIT_URI"):
        return "`virsh -c $LABKIT_URI list` says more; or `unset LABKIT_URI`, which uses labkit's own daemon"
    return exc.mend or _INSTALL_LIBVIRT


def docker(sockets: Sequence[str] | None = None) -> Check:
    """Does a Docker or Podman daemon answer? Starts none.

    Arguments:
        sockets: URLs to try in turn; DOCKER_HOST and the usual places by default.
    """
    try:
        import docker as sdk
    except ImportError as exc:
        return Check(
            "docker",
            "info",
            f"the Python module cannot be imported: {exc}",
            "Containers beside virtual machines are optional; the rest of the course works.",
            f"Optional: {pip_install('docker')}",
        )
    tried = []
    for url in docker_urls() if sockets is None else sockets:
        path = Path(url.removeprefix("unix://"))
        if url.startswith("unix://") and not path.exists():
            continue
        try:
            client = sdk.DockerClient(base_url=url, timeout=5) if url else sdk.from_env(timeout=5)
            try:
                told = client.version()
            finally:
                client.close()
        except Exception as exc:  # noqa: BLE001  # the SDK lets many kinds through
            tried.append((url, exc))
            continue
        name = told.get("Platform", {}).get("Name") or told.get("Components", [{}])[0].get("Name", "Engine")
        return Check(
            "docker",
            "ok",
            f"{name} {told.get('Version', '')} answers at {url or os.environ.get('DOCKER_HOST')}",
            "The chapters on containers can be done here.",
        )
    return _no_docker(tried)


def docker_urls(environ: Mapping[str, str] | None = None) -> list[str]:
    """Where a daemon may answer; "" stands for what DOCKER_HOST and its like say."""
    environ = os.environ if environ is None else environ
    if environ.get("DOCKER_HOST"):
        return [""]
    runtime = environ.get("XDG_RUNTIME_DIR", f"/run/user/{os.getuid()}")
    home = environ.get("HOME", "/nonexistent")
    places = [
        "/var/run/docker.sock",
        f"{runtime}/docker.sock",
        f"{home}/.docker/run/docker.sock",
        f"{home}/.docker/desktop/docker.sock",
        f"{runtime}/podman/podman.sock",
        "/run/podman/podman.sock",
    ]
    return [f"unix://{place}" for place in places]


def _no_docker(tried: Sequence[tuple[str, Exception]]) -> Check:
    meaning = "Containers beside virtual machines are optional; the rest of the course works."
    denied = [url for url, exc in tried if "Permission denied" in str(exc)]
    if denied:
        return Check(
            "docker",
            "info",
            f"a daemon is there ({denied[0]}), and this user may not speak to it",
            meaning,
            "Optional: `sudo usermod -aG docker $USER`, then log out and in again (it makes that user "
            "as powerful as root)",
        )
    if tried:
        url, exc = tried[0]
        seen = f"no answer at {url or os.environ.get('DOCKER_HOST')}: {exc}"
    else:
        seen = "no daemon's socket is there"
    return Check("docker", "info", seen, meaning, f"Optional: {_start_docker()}")


def _start_docker() -> str:
    if os.environ.get("DOCKER_HOST"):
        return "`unset DOCKER_HOST`, which asks for a daemon on this computer; or start the one that it names"
    if tools.which("dockerd"):
        systemd = Path("/run/systemd/system").exists()
        return (
            "`sudo systemctl start docker`"
            if systemd
            else "`sudo sh -c 'dockerd >/var/log/dockerd.log 2>&1 &'`"
        )
    if tools.which("podman"):
        return "`systemctl --user start podman.socket`"
    return "`sudo apt install docker.io` (not beside docker-ce)"


def virtualbox(driver: Path = Path("/dev/vboxdrv"), program: str | None = None) -> Check:
    """Is VirtualBox there, and its kernel driver?"""
    program = program or tools.which("VBoxManage")
    if program is None:
        return Check(
            "virtualbox",
            "info",
            "VBoxManage is not installed",
            "VirtualBox beside QEMU is optional; the rest of the course works.",
            "Optional: `sudo apt install virtualbox` (Ubuntu), or the package for this system from "
            "https://www.virtualbox.org/wiki/Linux_Downloads",
        )
    output = tools.run_tool([program, "--version"], what="ask VirtualBox for its version", timeout=15)
    version = output.strip().splitlines()[-1] if output.strip() else "of an unknown version"
    if driver.exists():
        return Check(
            "virtualbox",
            "ok",
            f"{program} {version}; {driver} is there",
            "Virtual machines can be made and started with VirtualBox too.",
        )
    return Check(
        "virtualbox",
        "info",
        f"{program} {version}; there is no {driver}",
        "VirtualBox can make, clone and export machines here, and start none.",
        "Optional: `sudo modprobe vboxdrv`; if there is no such module: "
        "`sudo apt install virtualbox-dkms linux-headers-$(uname -r)`, or with Oracle's package "
        "`sudo /sbin/vboxconfig`",
    )
