"""Compiling the guest's side of labkit's channel: one C file, linked statically, so that it runs in any guest."""

from __future__ import annotations

import tempfile
from pathlib import Path

from labkit.tools import require, run_tool

AGENT_SOURCE = Path(__file__).parent / "agent" / "agent.c"


def build_agent() -> bytes:
    """The program, for this computer's architecture.

    Raises:
        HostError: there is no C compiler.
        ToolError: the compiler failed.
    """
    compiler = require("cc", package="gcc libc6-dev")
    with tempfile.TemporaryDirectory(prefix="labkit-agent-") as directory:
        program = Path(directory) / "labkit-agent"
        # --build-id=none and -s: the same source gives the same bytes.
        argv = [compiler, "-static", "-Os", "-s", "-Wl,--build-id=none", "-o", program, AGENT_SOURCE]
        run_tool(argv, what="compile the guest's agent", mend="sudo apt install gcc libc6-dev")
        return program.read_bytes()
