"""VMs at a hypervisor that is not labkit's own: a second libvirt daemon stands for another computer.

Nothing of it is reached but by its URI: files go through its storage pool, commands through its streams.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkit import Lab
from labkit.errors import HostError, HypervisorError
from labkit.hypervisors import libvirt
from labkit.machines.vm import VM

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a second daemon, with no storage pool yet."""
    # Below the session's own home, so that whatever is left of it is found there.
    home = Path(os.environ["LABKIT_HOME"]) / "far"
    home.mkdir(mode=0o700)
    environment = {**os.environ, "LABKIT_HOME": str(home)}

    def call(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", f"from labkit.hypervisors import daemon; {code}"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    yield call("print(daemon.uri())")
    call("daemon.stop()")


@pytest.fixture(scope="module")
def pool(elsewhere: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of the other daemon's storage pool."""
    directory = tmp_path_factory.mktemp("pool")
    subprocess.run(
        ["virsh", "-q", "-c", elsewhere, "pool-create-as", "labkit", "dir", "--target", directory], check=True
    )
    yield directory
    subprocess.run(["virsh", "-q", "-c", elsewhere, "pool-destroy", "labkit"], check=True)


@pytest.fixture(scope="module")
def lab(elsewhere: str, pool: Path) -> Iterator[Lab]:
    with Lab("far", uri=elsewhere) as lab:
        yield lab


@pytest.fixture(scope="module")
def vm(lab: Lab) -> VM:
    return lab.vm("web").start()


def test_without_a_pool_the_error_says_how_to_make_one(elsewhere: str) -> None:
    with Lab("poolless", uri=elsewhere) as lab:
        with pytest.raises(HostError, match="no storage pool") as caught:
            lab.vm("web")
        assert f"virsh -c {elsewhere} pool-create-as labkit" in caught.value.mend
        assert lab.vms == {}


def test_a_hypervisor_that_does_not_answer_is_named() -> None:
    uri = "qemu+unix:///session?socket=/nonexistent/libvirt-sock"
    with Lab("nowhere", uri=uri) as lab, pytest.raises(HypervisorError, match="cannot be reached") as caught:
        lab.vm("web")
    assert uri in caught.value.evidence


def test_commands_go_through_the_stream(vm: VM) -> None:
    assert vm.run("hostname").stdout == "web\n"


def test_its_channel_has_no_socket_of_ours(vm: VM) -> None:
    assert os.environ["LABKIT_HOME"] + "/run" not in vm.xml()


def test_files_arrive_there_and_back(vm: VM, tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    sent = vm.put(content, "/data/blob")
    assert vm.get("/data/blob", tmp_path / "blob") == sent
    assert (tmp_path / "blob").read_bytes() == content


def test_output_of_any_size_arrives(vm: VM) -> None:
    assert len(vm.run("head -c 8000000 /dev/zero").stdout_bytes) == 8_000_000


def test_a_snapshot_with_memory_comes_back(vm: VM) -> None:
    vm.run("echo before > /tmp/state")
    vm.snapshot("kept")
    vm.run("echo after > /tmp/state")
    vm.revert("kept")
    assert vm.run("cat /tmp/state").stdout == "before\n"


def test_the_console_answers(vm: VM) -> None:
    with vm.open_console() as console:
        console.settimeout(10)
        console.sendall(b"\necho an''swer\n")
        said = b""
        while b"answer" not in said:
            said += console.recv(4096)


def test_the_screen_can_be_seen(vm: VM) -> None:
    assert vm.screenshot().png.startswith(b"\x89PNG")


def test_disks_grow_and_copy_there(lab: Lab, vm: VM) -> None:
    vm.run("echo here > /data/file && sync")
    vm.resize_disk("2 GiB")
    assert vm.run("cat /sys/block/vda/size").stdout == f"{(2 << 30) // 512}\n"
    vm.stop()
    vm.resize_disk("3 GiB")
    copy = vm.clone("copy")
    vm.start()
    copy.start()
    assert copy.run("hostname; cat /data/file").stdout == "copy\nhere\n"
    copy.delete()


def test_all_that_was_made_there_is_removed(elsewhere: str, pool: Path) -> None:
    with Lab("brief", uri=elsewhere) as lab:
        vm = lab.vm("web")
        made = {path.name for path in pool.iterdir() if vm.uuid in path.name}
        assert made
    left = {path.name for path in pool.iterdir()}
    assert not made & left
    assert libvirt.connect(elsewhere).state(vm.uuid) == "missing"
