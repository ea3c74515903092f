"""Compiling our own programs for guests: one C file each, linked statically, to run in any of them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from labkit.tools import require, run_tool

#: The guest's side of labkit's channel.
AGENT_SOURCE = Path(__file__).parent / "agent" / "agent.c"
#: Shows text on a screen that the kernel does not know.
SCREEN_SOURCE = AGENT_SOURCE.with_name("screen.c")


def build_program(source: Path) -> bytes:
    """A program, for this computer's architecture.

    Raises:
        HostError: there is no C compiler.
        ToolError: the compiler failed.
    """
    compiler = require("cc", package="gcc libc6-dev")
    with tempfile.TemporaryDirectory(prefix="labkit-agent-") as directory:
        program = Path(directory) / "program"
        # --build-id=none and -s: the same source gives the same bytes.
        argv = [compiler, "-static", "-Os", "-s", "-Wl,--build-id=none", "-o", str(program), str(source)]
        run_tool(argv, what=f"compile {source.name} for the guest", mend="sudo apt install gcc libc6-dev")
        return program.read_bytes()


def build_agent() -> bytes:
    """The agent, as `build_program` makes it."""
    return build_program(AGENT_SOURCE)
