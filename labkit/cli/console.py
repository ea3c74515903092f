"""A VM's serial console in this terminal."""

from __future__ import annotations

import os
import select
import socket
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
    console = vm.open_console()
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    try:
        tty.setraw(terminal)  # throws away what was typed before it, so it is said afterwards
        print(f"Connected to {vm.name}; Ctrl-] leaves, Enter shows a prompt.\r", file=sys.stderr)
        _join(terminal, console)
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
        console.close()
        print(f"\nLeft {vm.name}.", file=sys.stderr)


def _join(terminal: int, console: socket.socket) -> None:
    while True:
        ready, _, _ = select.select([terminal, console.fileno()], [], [])
        if terminal in ready:
            typed, escape, _ = os.read(terminal, 1024).partition(_ESCAPE)
            console.sendall(typed)
            if escape or not typed:
                return
        if console.fileno() in ready:
            said = console.recv(65536)
            if not said:  # the VM went off, or another took the console
                return
            os.write(sys.stdout.fileno(), said)
