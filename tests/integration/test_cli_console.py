"""`labkit console` on a real terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from labkit import VM, Lab

pytestmark = pytest.mark.qemu
LABKIT = str(Path(sys.executable).with_name("labkit"))


@pytest.fixture(scope="module")
def vm() -> Iterator[VM]:
    with Lab("console", keep=True) as lab:
        yield lab.vm("web").start()


class Terminal:
    """A terminal with `labkit console web` in it."""

    def __init__(self) -> None:
        self.ours, theirs = pty.openpty()
        self.before = termios.tcgetattr(theirs)
        self.process = subprocess.Popen(
            [LABKIT, "console", "web"], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        self._theirs = theirs
        self.seen = b""

    def type(self, text: bytes) -> None:
        self.seen = b""
        os.write(self.ours, text)

    def wait_for(self, text: bytes, within: float = 30) -> None:
        deadline = time.monotonic() + within
        while text not in self.seen:
            left = deadline - time.monotonic()
            assert left > 0, self.seen
            if select.select([self.ours], [], [], left)[0]:
                self.seen += os.read(self.ours, 4096)

    def attributes(self) -> Any:
        return termios.tcgetattr(self._theirs)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._theirs)
        os.close(self.ours)


@pytest.fixture
def terminal(vm: VM) -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.close()


def test_what_is_typed_is_answered_and_ctrl_bracket_leaves(terminal: Terminal) -> None:
    terminal.wait_for(b"Ctrl-] leaves")
    terminal.type(b"\n")
    terminal.wait_for(b"root@web")
    terminal.type(b"echo $((6 * 7)) is the answer\n")
    terminal.wait_for(b"42 is the answer")
    terminal.type(b"\x1d")
    assert terminal.process.wait(timeout=10) == 0
    terminal.wait_for(b"Left web.")
    assert terminal.attributes() == terminal.before


def test_ctrl_c_goes_to_the_guest(terminal: Terminal) -> None:
    terminal.wait_for(b"Ctrl-] leaves")
    terminal.type(b"\nsleep 1000\n")
    terminal.wait_for(b"sleep 1000")
    terminal.type(b"\x03")  # the guest throws away what follows too closely
    terminal.wait_for(b"root@web")
    terminal.type(b"echo $((40 + 2)) lives\n")
    terminal.wait_for(b"42 lives")
    terminal.type(b"\x1d")
    assert terminal.process.wait(timeout=10) == 0


def test_a_machine_that_goes_off_ends_the_console(
    terminal: Terminal, vm: VM, eventually: Callable[..., Any]
) -> None:
    terminal.wait_for(b"Ctrl-] leaves")
    vm.destroy()
    assert terminal.process.wait(timeout=10) == 0
    assert terminal.attributes() == terminal.before
    again = Terminal()
    again.wait_for(b"not running")
    assert again.process.wait(timeout=10) == 1
    assert again.attributes() == again.before
    again.close()
    vm.start()
