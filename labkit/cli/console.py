"""A VM's serial console in this terminal."""

from __future__ import annotations

import os
import select
import sys
import termios
import tty

from labkit.errors import HostError
from labkit.machines.vm import VM

_ESCAPE = b"\x1d"  # Ctrl-], as telnet and virsh have it


def attach(vm: VM) -> None:
    """Join this terminal to the VM's serial console until Ctrl-] is typed or the VM goes off.

    Raises:
        HostError: standard input is no terminal.
        NotRunning: the VM is off.
    """
    if not sys.stdin.isatty():
        raise HostError(
            "The console needs a terminal.", mend="In a script or notebook, use .run(…) and .console_log."
        )
    device = os.open(vm.console_device, os.O_RDWR | os.O_NOCTTY)
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    print(f"Connected to {vm.name}; Ctrl-] leaves, Enter shows a prompt.", file=sys.stderr)
    try:
        tty.setraw(device)
        tty.setraw(terminal)
        _join(terminal, device)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        os.close(device)
        print(f"\nLeft {vm.name}.", file=sys.stderr)


def _join(terminal: int, device: int) -> None:
    while True:
        ready, _, _ = select.select([terminal, device], [], [])
        if terminal in ready:
            typed = os.read(terminal, 1024)
            if not typed or _ESCAPE in typed:
                return
            os.write(device, typed)
        if device in ready:
            try:
                said = os.read(device, 65536)
            except OSError:  # the other end went away: the VM is off
                return
            if not said:
                return
            os.write(sys.stdout.fileno(), said)
