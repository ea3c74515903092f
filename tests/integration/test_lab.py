"""Labs: made again and again, side by side, at the same time, and closed at any moment."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from labkit import VM, Lab, state
from labkit.errors import Conflict, LabInUse, NotFound
from labkit.hypervisors import libvirt
from labkit.lab import inventory

pytestmark = pytest.mark.qemu
Eventually = Callable[..., Any]
Program = Callable[..., subprocess.Popen[str]]


def known(lab: str) -> list[str]:
    """What the hypervisor has of a lab."""
    return [name for _, name, label in libvirt.connect().labelled() if label == lab]


def left_of(lab: str) -> list[Any]:
    """All traces of a lab: domains, ledger, files, sockets, locks."""
    root = Path(os.environ["LABKIT_HOME"])
    sockets = root / "run" / "vm"
    return [
        *known(lab),
        *(name for name in state.lab_names() if name == lab),
        *(root / "state" / "labs").glob(f"*{lab}*"),
        *(sockets.glob("*") if sockets.exists() and not state.lab_names() else ()),
    ]


def test_cells_run_twice_find_the_same_machine() -> None:
    for _ in range(3):
        lab = Lab("twice")
        vm = lab.vm("web", memory="128 MiB", disk="64 MiB")
        vm.start()
        vm.run("echo x >> /data/runs")
    assert vm.run("cat /data/runs").stdout == "x\n" * 3
    assert len(inventory()) == 1
    lab.close()
    assert left_of("twice") == []


def test_a_different_spec_is_a_conflict_that_says_in_what() -> None:
    with Lab("conflict") as lab:
        lab.vm("web", memory="128 MiB", cpus=1)
        with pytest.raises(Conflict) as caught:
            lab.vm("web", memory="192 MiB", cpus=2)
        assert "memory: it has 128 MiB, you ask for 192 MiB" in caught.value.evidence
        assert "cpus: it has 1, you ask for 2" in caught.value.evidence
        assert 'lab["web"].delete()' in caught.value.mend
        lab["web"].resize(cpus=2)  # what was asked for is what counts
        lab.vm("web", memory="128 MiB", cpus=1)


def test_two_labs_with_machines_of_one_name_do_not_meet() -> None:
    with Lab("one") as one, Lab("two") as two:
        first, second = one.start(one.vm("web"))[0], two.start(two.vm("web"))[0]
        first.run("echo first > /data/file")
        assert not second.run("cat /data/file", check=False).ok
        one.close()
        assert second.run("echo lives").stdout == "lives\n"
        assert [thing["lab"] for thing in inventory()] == ["two"]
    assert left_of("one") == left_of("two") == []


def test_a_machine_that_is_not_there_is_not_found() -> None:
    with Lab("empty") as lab:
        lab.vm("db")
        with pytest.raises(NotFound, match="machines: db"):
            lab["web"]
        assert [vm.name for vm in lab] == ["db"]


def test_threads_that_ask_for_one_machine_get_one() -> None:
    with Lab("same") as lab:
        got: list[VM] = []
        threads = [threading.Thread(target=lambda: got.append(lab.vm("web").start())) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({vm.uuid for vm in got}) == 1
        assert len(got) == 6
        assert known("same") == ["labkit.same.web"]
        assert got[0].run("echo up").ok


def test_processes_that_ask_for_one_machine_get_one() -> None:
    code = (
        "import labkit; vm = labkit.Lab.attach('same').vm('web').start(); print(vm.uuid, vm.run('true').ok)"
    )
    with Lab("same"):
        others = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        said = {other.communicate(timeout=120)[0] for other in others}
        assert said == {f"{Lab.attach('same')['web'].uuid} True\n"}


def test_eight_machines_start_at_the_same_time() -> None:
    with Lab("fleet") as lab:
        vms = [lab.vm(f"n{number}") for number in range(8)]
        assert lab.start() == vms or len(list(lab)) == 8
        assert [vm.run("hostname").stdout for vm in vms] == [f"n{number}\n" for number in range(8)]
    assert left_of("fleet") == []


def test_a_machine_that_does_not_start_does_not_keep_the_others_from_it() -> None:
    with Lab("mixed") as lab:
        good, bad = lab.vm("good"), lab.vm("bad")
        next(bad._entry.directory.glob("disk0*")).unlink()
        with pytest.raises(Exception, match="disk0"):
            lab.start()
        assert good.run("echo up").stdout == "up\n"


def test_a_lab_is_left_as_it_was_found_by_an_error_in_the_block() -> None:
    with contextlib.suppress(ZeroDivisionError), Lab("broken") as lab:
        lab.vm("web").start()
        raise ZeroDivisionError
    assert left_of("broken") == []


INTERRUPTED = """
import _thread, threading
threading.Timer(float(sys.argv[1]) if len(sys.argv) > 1 else {delay}, _thread.interrupt_main).start()
try:
    with labkit.Lab("interrupted") as lab:
        {work}
except KeyboardInterrupt:
    pass
"""


@pytest.mark.parametrize(
    ("work", "delay"),
    [
        ("lab.vm('web').start(); lab.vm('web').run('sleep 60')", 0.9),
        pytest.param("lab.start(*[lab.vm(f'n{n}') for n in range(3)])", 1.5, marks=pytest.mark.soak),
        pytest.param(
            "vm = lab.vm('web').start()\n        while True: vm.clone('c').delete()",
            8,
            marks=pytest.mark.soak,
        ),
        ("while True: lab.vm('web').delete()", 1),
    ],
    ids=["start", "start-three", "clone", "make"],
)
def test_an_interrupt_leaves_nothing_behind(work: str, delay: float, eventually: Eventually) -> None:
    code = "import sys, labkit\n" + INTERRUPTED.format(work=work, delay=delay)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    eventually(lambda: left_of("interrupted") == [])


def test_an_interrupt_during_close_is_made_good_by_the_reaper(
    program: Program, eventually: Eventually
) -> None:
    owner = program("lab = labkit.Lab('cut'); [lab.vm(f'n{n}').start() for n in range(2)]")
    closer = "import labkit; labkit.Lab.attach('cut').close()"
    other = subprocess.Popen([sys.executable, "-c", closer])
    eventually(lambda: len(known("cut")) < 2)
    other.kill()
    other.wait()
    owner.kill()
    eventually(lambda: left_of("cut") == [])


def test_a_lab_that_another_took_over_is_not_closed_by_its_former_owner(program: Program) -> None:
    lab = Lab("passed-on")
    lab.close()
    program("lab = labkit.Lab('passed-on'); lab.vm('web')")
    lab.close()
    assert known("passed-on") == ["labkit.passed-on.web"]


def test_the_child_of_a_fork_that_leaves_the_block_does_not_close_the_lab() -> None:
    with Lab("forked") as lab:
        vm = lab.vm("web")
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                lab.__exit__()
            os._exit(0)
        os.waitpid(child, 0)
        assert vm.state == "off"


def test_while_the_owner_lives_another_is_told_who_it_is(program: Program) -> None:
    owner = program("labkit.Lab('held').vm('web')")
    with pytest.raises(LabInUse, match=f"process {owner.pid} ") as caught:
        Lab("held")
    assert "labkit clean held --all" in caught.value.mend
    with pytest.raises(LabInUse):
        Lab("held", keep=True)


def test_a_dead_owners_lab_is_taken_up_with_its_machines(program: Program) -> None:
    owner = program("vm = labkit.Lab('taken').vm('web').start(); vm.run('echo kept > /tmp/kept')")
    owner.kill()
    owner.wait()
    with Lab("taken") as lab:  # at once: before the reaper comes
        assert lab["web"].state == "running"
        assert lab["web"].run("cat /tmp/kept").stdout == "kept\n"
        time.sleep(3)  # a reaper that took it for the dead one's would have come by now
        assert lab["web"].run("cat /tmp/kept").stdout == "kept\n"


def test_a_kept_lab_outlives_its_program() -> None:
    code = "import labkit; labkit.Lab('kept', keep=True).vm('web').start().run('echo kept > /tmp/kept')"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    try:
        time.sleep(3)
        assert Lab.attach("kept")["web"].run("cat /tmp/kept").stdout == "kept\n"
        with pytest.raises(LabInUse, match="command line"):
            Lab("kept")
    finally:
        Lab("kept", keep=True).close()
    assert left_of("kept") == []


# The ledger and the hypervisor disagree


def test_an_entry_without_a_domain_is_made_whole() -> None:
    with Lab("half") as lab:
        vm = lab.vm("web")
        libvirt.connect().remove(vm.uuid, "half")  # as after a crash between the entry and the domain
        assert vm.state == "missing"
        assert lab.vm("web").start().run("hostname").stdout == "web\n"


def test_a_domain_without_an_entry_gives_way() -> None:
    with Lab("stray") as lab:
        old = lab.vm("web").start()
        old._entry.forget()  # somebody removed the files by hand
        new = lab.vm("web")
        assert new.uuid != old.uuid
        assert old.state == "missing"
        assert known("stray") == ["labkit.stray.web"]
        assert new.start().run("echo up").ok


def test_a_lab_with_a_torn_entry_can_be_closed() -> None:
    with Lab("torn") as lab:
        vm = lab.vm("web").start()
        (vm._entry.directory / "entry.json").write_text("")
        assert list(lab.vms) == []
    assert left_of("torn") == []


def test_a_machine_that_carries_another_label_is_left_alone() -> None:
    with Lab("mine") as mine:
        vm = mine.vm("web")
        with pytest.raises(Conflict, match="left alone"):
            libvirt.connect().remove(vm.uuid, "theirs")
        assert vm.state == "off"


def test_sockets_directory_that_is_gone_is_made_again() -> None:
    """As when /tmp is swept, or the computer restarts."""
    with Lab("swept") as lab:
        vm = lab.vm("web")
        if vm._sockets.exists():
            vm._sockets.rmdir()
        assert vm.start().run("echo up").ok
