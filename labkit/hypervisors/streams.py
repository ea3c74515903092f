"""A libvirt stream as a socket: two threads carry the bytes, so that the rest need not know."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

import libvirt

_CHUNK = 1 << 16


def as_socket(stream: Any, close: Callable[[], object]) -> socket.socket:
    """One end of a socket pair whose other end is joined to the stream.

    Closing it ends the stream; the stream's end shuts it down.

    Arguments:
        close: called when both directions have ended, to give back what the stream came from.
    """
    ours, theirs = socket.socketpair()
    sender = threading.Thread(target=_to_stream, args=(stream, theirs), name="labkit-to-stream", daemon=True)

    def receive() -> None:
        _from_stream(stream, theirs)
        sender.join()
        theirs.close()
        with contextlib.suppress(libvirt.libvirtError):
            close()

    sender.start()
    threading.Thread(target=receive, name="labkit-from-stream", daemon=True).start()
    return ours


def _to_stream(stream: Any, end: socket.socket) -> None:
    with contextlib.suppress(OSError, libvirt.libvirtError):
        while data := end.recv(_CHUNK):
            while data:
                data = data[stream.send(data) :]
    with contextlib.suppress(libvirt.libvirtError):
        stream.abort()


def _from_stream(stream: Any, end: socket.socket) -> None:
    with contextlib.suppress(OSError, libvirt.libvirtError):
        while data := stream.recv(_CHUNK):
            end.sendall(data)
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
