"""A VM's life: every verb, once and twice, in and out of order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from labkit import VM, Lab
from labkit.errors import LabkitError, NotFound, NotRunning

pytestmark = pytest.mark.qemu
Eventually = Callable[..., Any]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("life") as lab:
        yield lab


@pytest.fixture(scope="module")
def shared(lab: Lab) -> VM:
    return lab.vm("web")


@pytest.fixture
def running(shared: VM) -> VM:
    return shared.start()


@pytest.fixture
def off(shared: VM) -> VM:
    return shared.destroy()


def boot_id(vm: VM) -> str:
    return vm.run("cat /proc/sys/kernel/random/boot_id").stdout


def test_a_new_vm_is_off(lab: Lab) -> None:
    assert lab.vm("fresh").state == "off"


def test_start_gives_a_machine_that_is_ready(off: VM) -> None:
    assert off.start() is off
    assert off.state == "running"
    assert off.run("hostname").stdout == "web\n"


def test_start_twice_leaves_it_running_as_it_was(running: VM) -> None:
    before = boot_id(running)
    running.start()
    assert boot_id(running) == before


def test_pause_twice_and_resume_twice(running: VM) -> None:
    before = boot_id(running)
    assert running.pause().pause().state == "paused"
    assert running.resume().resume().state == "running"
    assert boot_id(running) == before


def test_start_lets_a_paused_machine_go_on(running: VM) -> None:
    before = boot_id(running)
    running.pause().start()
    assert boot_id(running) == before


def test_a_command_on_a_paused_machine_says_that_it_is_paused(running: VM) -> None:
    running.pause()
    try:
        with pytest.raises(NotRunning, match="is paused") as caught:
            running.run("true", timeout=30)
    finally:
        running.resume()
    assert "resume" in caught.value.mend


def test_a_short_pause_goes_unnoticed_by_a_command(running: VM) -> None:
    running.pause()
    hypervisor = running._hypervisor

    def on_output(*_: object) -> None:
        hypervisor.suspend(running.uuid)
        hypervisor.resume(running.uuid)

    running.resume()
    assert running.run("echo one; sleep 0.5; echo two", on_output=on_output).stdout == "one\ntwo\n"


def test_reset_boots_anew(running: VM) -> None:
    before = boot_id(running)
    assert running.reset().state == "running"
    assert boot_id(running) != before


def test_reset_of_a_paused_machine_boots_anew(running: VM) -> None:
    before = boot_id(running)
    running.pause().reset()
    assert boot_id(running) != before


def test_stop_asks_the_guest_and_its_files_are_written(running: VM) -> None:
    running.run("echo kept > /data/file")  # not synced: the guest's own shutdown does that
    running.stop()
    assert running.state == "off"
    assert "Power down" in running.console_log
    assert running.start().run("cat /data/file").stdout == "kept\n"


def test_stop_right_after_start_asks_too(off: VM) -> None:
    """The guest does not listen to its power button yet."""
    off.start().stop()
    assert "Power down" in off.console_log


def test_stop_of_a_guest_that_does_not_listen_pulls_the_plug_at_the_deadline(running: VM) -> None:
    running.run("killall acpid || true; kill -STOP 1; for p in $(pidof acpid); do kill -STOP $p; done")
    running.stop(timeout=1)
    assert running.state == "off"


def test_stop_of_a_paused_machine(running: VM) -> None:
    assert running.pause().stop().state == "off"


def test_stop_and_destroy_twice_are_fine(off: VM) -> None:
    assert off.stop().stop().destroy().destroy().state == "off"


def test_destroy_pulls_the_plug(running: VM) -> None:
    assert running.destroy().state == "off"
    assert "Power down" not in running.console_log


VERBS_THAT_NEED_IT_ON: dict[str, Callable[[VM], object]] = {
    "pause": VM.pause,
    "resume": VM.resume,
    "reset": VM.reset,
    "screenshot": VM.screenshot,
    "console": VM.open_console,
    "run": lambda vm: vm.run("true"),
    "put": lambda vm: vm.put(b"x", "/tmp/x"),
    "get": lambda vm: vm.get("/etc/hosts", "/tmp/never-written"),
}


@pytest.mark.parametrize("verb", VERBS_THAT_NEED_IT_ON)
def test_a_machine_that_is_off_says_so(off: VM, verb: str) -> None:
    with pytest.raises(NotRunning) as caught:
        VERBS_THAT_NEED_IT_ON[verb](off)
    assert "start" in caught.value.mend


VERBS: dict[str, Callable[[VM], object]] = {
    **VERBS_THAT_NEED_IT_ON,
    "start": VM.start,
    "stop": VM.stop,
    "destroy": VM.destroy,
    "resize": lambda vm: vm.resize(cpus=1),
    "resize_disk": lambda vm: vm.resize_disk("2 GiB"),
    "snapshot": lambda vm: vm.snapshot("x"),
    "revert": lambda vm: vm.revert("x"),
    "snapshots": lambda vm: vm.snapshots,
    "clone": lambda vm: vm.clone("copy"),
    "xml": VM.xml,
}


@pytest.fixture(scope="module")
def deleted(lab: Lab) -> VM:
    vm = lab.vm("gone")
    vm.delete()
    return vm


@pytest.mark.parametrize("verb", [*VERBS, "accelerator"])
def test_a_deleted_machine_says_so_and_is_not_made_again(lab: Lab, deleted: VM, verb: str) -> None:
    with pytest.raises(NotFound) as caught:
        VERBS[verb](deleted) if verb in VERBS else deleted.accelerator
    assert "lab.vm" in caught.value.mend
    assert deleted.state == "missing"
    assert "gone" not in lab.vms
    assert not [name for _, name, _ in deleted._hypervisor.labelled() if "gone" in name]


def test_delete_twice_is_fine_and_repr_and_log_do_not_fail(deleted: VM) -> None:
    deleted.delete()
    assert "missing" in repr(deleted)
    assert deleted.console_log == ""


def test_delete_takes_a_running_machine_with_its_files(lab: Lab) -> None:
    vm = lab.vm("doomed").start()
    vm.snapshot("one")
    directory = vm._entry.directory
    sockets = vm._sockets
    vm.delete()
    assert not directory.exists()
    assert not sockets.exists()


def test_an_old_handle_does_not_touch_a_new_machine_of_its_name(lab: Lab) -> None:
    old = lab.vm("again")
    old.delete()
    new = lab.vm("again")
    old.delete()
    with pytest.raises(NotFound):
        old.start()
    assert new.state == "off"
    assert lab.vms["again"].uuid == new.uuid


def test_after_the_lab_is_closed_every_verb_says_so() -> None:
    with Lab("short") as lab:
        vm = lab.vm("web")
    for verb in VERBS.values():
        with pytest.raises(NotFound):
            verb(vm)
    with pytest.raises(LabkitError, match="closed"):
        lab.vm("web")
    assert "closed" in repr(lab)
    lab.close()


def test_what_it_is_made_of_is_told(running: VM) -> None:
    assert running.accelerator in {"kvm", "tcg"}
    assert running.spec.memory == 128 << 20
    assert "web: pocket, 1 CPU, 128 MiB" in repr(running)
    assert running.name in running.xml()
    assert running.uuid in running.xml()


def test_a_screenshot_is_a_png_of_a_screen(running: VM, tmp_path_factory: pytest.TempPathFactory) -> None:
    picture = running.screenshot()
    assert picture.png.startswith(b"\x89PNG\r\n")
    assert picture.size[0] >= 640
    assert picture.size[1] >= 400
    path = tmp_path_factory.mktemp("shot") / "web.png"
    assert picture.save(path).read_bytes() == picture.png


def test_the_console_log_holds_what_the_guest_printed(running: VM, eventually: Eventually) -> None:
    eventually(lambda: "root@web" in running.console_log)
