"""Snapshots, clones and sizes, each effect seen from inside the guest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from labkit import VM, DiskSpec, Lab
from labkit.errors import Conflict, NotFound, SpecError

pytestmark = pytest.mark.qemu
Eventually = Callable[..., Any]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("past") as lab:
        yield lab


@pytest.fixture
def vm(lab: Lab) -> Iterator[VM]:
    vm = lab.vm("web", memory="128 MiB", max_memory="256 MiB").start()
    yield vm
    for snapshot in reversed(vm.snapshots):
        vm.delete_snapshot(snapshot.name)


def cpus(vm: VM) -> int:
    return int(vm.run("nproc").stdout)


def memory(vm: VM) -> int:
    """MiB that the guest's kernel has."""
    return int(vm.run("grep MemTotal /proc/meminfo").stdout.split()[1]) // 1024


# Snapshots


def test_revert_brings_memory_and_disk_back(vm: VM) -> None:
    vm.run("echo before > /data/file; echo before > /tmp/file; sync")
    made = vm.snapshot("one", note="<before> & after")
    assert (made.name, made.memory, made.current, made.note) == ("one", True, True, "<before> & after")
    vm.run("echo after > /data/file; echo after > /tmp/file; sync; hostname broken")
    assert vm.revert("one").state == "running"
    assert vm.run("cat /data/file /tmp/file; hostname").stdout == "before\nbefore\nweb\n"


def test_revert_of_a_machine_that_is_off_or_was(vm: VM) -> None:
    vm.run("echo before > /data/file")
    vm.stop()
    assert not vm.snapshot("off").memory
    vm.start().run("echo after > /data/file; sync")
    vm.snapshot("on")
    assert vm.revert("off").state == "off"
    assert vm.start().run("cat /data/file").stdout == "before\n"
    vm.stop()
    assert vm.revert("on").state == "running"
    assert vm.run("cat /data/file").stdout == "after\n"


def test_the_guests_clock_is_right_after_a_revert(vm: VM) -> None:
    vm.snapshot("one")
    vm.run("date -s '2001-01-01 00:00:00'")
    time.sleep(3)  # so much would it be late
    vm.revert("one")
    assert abs(int(vm.run("date +%s").stdout) - time.time()) < 1.4


def test_reverts_to_one_moment_draw_different_random_numbers(vm: VM) -> None:
    vm.snapshot("one")
    draws = {vm.revert("one").run("head -c 16 /dev/urandom | xxd -p").stdout for _ in range(2)}
    assert len(draws) == 2


def test_a_snapshots_name_is_taken_once_and_those_there_are_named(vm: VM) -> None:
    vm.snapshot("one")
    with pytest.raises(Conflict, match="snapshot named one already"):
        vm.snapshot("one")
    for verb in (vm.revert, vm.delete_snapshot):
        with pytest.raises(NotFound, match="snapshots: one"):
            verb("two")


@pytest.mark.parametrize("name", ["../x", "<x>", "", "a" * 300, None])
def test_a_bad_name_of_a_snapshot_is_a_spec_error(vm: VM, name: Any) -> None:
    with pytest.raises(SpecError):
        vm.snapshot(name)
    assert vm.snapshots == []


def test_a_deleted_snapshot_leaves_those_that_came_after_it(vm: VM) -> None:
    vm.snapshot("one")
    vm.run("echo kept > /tmp/kept")
    vm.snapshot("two")
    assert [(each.name, each.parent) for each in vm.snapshots] == [("one", None), ("two", "one")]
    vm.delete_snapshot("one")
    assert [(each.name, each.parent) for each in vm.snapshots] == [("two", None)]
    vm.run("rm /tmp/kept")
    assert vm.revert("two").run("cat /tmp/kept").stdout == "kept\n"


def test_a_crashed_machine_goes_back_to_its_snapshot(vm: VM) -> None:
    vm.snapshot("good")
    vm.run("(sleep 0.2; echo c > /proc/sysrq-trigger) > /dev/null 2>&1 &")
    while vm.state == "running":
        pass
    assert vm.revert("good").run("echo back").stdout == "back\n"


# Sizes


def test_cpus_change_while_it_runs_and_stay_changed(vm: VM) -> None:
    for count in (3, 1, 2):
        assert cpus(vm.resize(cpus=count)) == count
    assert vm.spec.cpus == 2
    assert cpus(vm.stop().start()) == 2
    vm.resize(cpus=1)
    assert cpus(vm.destroy().start()) == 1


def test_a_snapshot_with_plugged_in_cpus_can_be_gone_back_to(vm: VM) -> None:
    vm.snapshot("few")
    vm.resize(cpus=3)
    vm.snapshot("many")
    vm.resize(cpus=1)
    assert cpus(vm.revert("many")) == 3
    assert cpus(vm.revert("few")) == 1
    assert cpus(vm.revert("many")) == 3
    vm.destroy().resize(cpus=1)


def test_memory_changes_while_it_runs_and_stays_changed(vm: VM, eventually: Eventually) -> None:
    vm.destroy().start()
    # The guest's balloon driver comes to it some time after the start.
    eventually(lambda: memory(vm) < 110, within=30)
    vm.resize(memory="256 MiB")
    eventually(lambda: memory(vm) > 200)
    vm.resize(memory="160 MiB")
    eventually(lambda: memory(vm) < 140)
    vm.destroy().start()
    assert vm.spec.memory == 160 << 20
    eventually(lambda: memory(vm) < 140, within=30)
    vm.resize(memory="256 MiB")  # the maximum did not shrink with it
    eventually(lambda: memory(vm) > 200)
    vm.resize(memory="128 MiB")


@pytest.mark.parametrize(
    ("change", "mend"),
    [
        ({"memory": "512 MiB"}, "max_memory"),
        ({"cpus": 5}, "max_cpus"),
        ({"memory": "10 TiB"}, "max_memory"),
        ({"memory": 0}, "MiB"),
        ({"memory": "64 MiB"}, "128 MiB at least"),  # its kernel would panic
        ({"cpus": 0}, "1 to"),
        ({"cpus": "two"}, "1 to"),
        ({"memory": "lots"}, "MiB"),
    ],
)
def test_more_than_the_maximum_is_a_spec_error_and_changes_nothing(
    vm: VM, change: dict[str, Any], mend: str
) -> None:
    before = vm.spec
    with pytest.raises(SpecError) as caught:
        vm.resize(**change)
    assert mend in caught.value.mend
    assert vm.spec == before


def test_a_disk_grows_while_it_runs_and_off(lab: Lab) -> None:
    vm = lab.vm("disks", disks=[DiskSpec(size="16 MiB")]).start()
    vm.resize_disk("2 GiB").resize_disk("32 MiB", disk=1)
    assert vm.run("cat /sys/block/vda/size /sys/block/vdb/size").stdout.split() == ["4194304", "65536"]
    vm.stop().resize_disk("3 GiB")
    assert vm.start().run("cat /sys/block/vda/size").stdout == "6291456\n"
    with pytest.raises(SpecError, match="cannot shrink"):
        vm.resize_disk("1 GiB")
    for disk in (-1, 2):
        with pytest.raises(SpecError, match=f"no disk {disk}"):
            vm.resize_disk("9 GiB", disk=disk)
    vm.delete()


# Clones


def test_a_clone_is_a_machine_of_its_own(vm: VM, lab: Lab) -> None:
    vm.run("echo mine > /data/file")
    copy = vm.clone("copy")
    assert (copy.state, vm.state) == ("off", "running")
    assert copy.uuid != vm.uuid
    copy.start()
    assert copy.run("hostname; cat /data/file").stdout == "copy\nmine\n"
    copy.run("echo theirs > /data/file")
    assert vm.run("cat /data/file").stdout == "mine\n"
    vm.run("rm /data/file; sync")
    assert copy.run("cat /data/file").stdout == "theirs\n"
    copy.delete()
    assert vm.run("echo lives").ok


@pytest.mark.parametrize("state", ["off", "paused"])
def test_a_clone_of_a_machine_that_is(vm: VM, state: str) -> None:
    vm.run("echo kept > /data/file; sync")
    vm.stop() if state == "off" else vm.pause()
    copy = vm.clone("copy")
    assert vm.state == state
    assert copy.start().run("cat /data/file").stdout == "kept\n"
    copy.delete()
    vm.start()


def test_a_clone_does_not_take_a_name_that_is_there(vm: VM, lab: Lab) -> None:
    with pytest.raises(Conflict, match="named web already"):
        vm.clone("web")
    with pytest.raises(SpecError):
        vm.clone("../web")
    assert list(lab.vms) == ["web"]


def test_an_interrupted_clone_leaves_nothing(vm: VM, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from labkit.storage import qemu_img

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(qemu_img, "copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vm.clone("copy")
    assert list(lab.vms) == ["web"]
    assert vm.state == "running"
    assert not (vm._entry.directory.parent / "vm-copy").exists()
