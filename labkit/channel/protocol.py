"""The frames that host and guest exchange over a virtio-serial port; pure, no I/O.

Protocol, version 1 (the other end, `labkit/guests/agent/agent.c`, says the same):

A frame is `type u8 | session u32 | number u32 | job u32 | payload | crc32 u32` in little-endian order,
the CRC being zlib's over all that precedes it. Frames are escaped as RFC 1055 (SLIP) has it and stand
between two END bytes, so that whoever was frozen in mid-frame by a snapshot is in step again at the
next END. Frames that are damaged or too long are dropped. Each side numbers the frames that it sends
in a session, from 0 (HELLO, HELLO_ACK); a number out of turn shows that the guest was reverted to a
time at which it knew the session already, and that something was lost or is said twice.

HELLO and HELLO_ACK keep this form in all versions, so that two that differ can say so.

    type          direction  payload
     1 HELLO      to guest   nonce, 16 bytes; session is its first four. The port's earlier client is
                             gone: its jobs are killed and forgotten, what was on its way is dropped
     2 HELLO_ACK  to host    nonce | version u16 | agent's pid u32 | CLOCK_REALTIME ns u64 |
                             CLOCK_MONOTONIC ns u64 | boot id, as text
     3 EXEC       to guest   flags u8 (1: it has standard input) | argc u32 | envc u32 | cwd | arguments |
                             NAME=value pairs; each text ends with NUL. At most 1 MiB
     4 STDIN      to guest   data; at most the credit that is left, which begins at 128 KiB
     5 STDIN_EOF  to guest
     6 CREDIT     to host    u32: the command took so many more bytes of its standard input
     7 STDOUT     to host    data, at most 32 KiB
     8 STDERR     to host    likewise
     9 SIGNAL     to guest   u32: the signal for the job's whole process group
    10 EXIT       to host    u32: its wait status; the last frame of a job
    11 PING       to guest   any, at most 64 bytes
    12 PONG       to host    u8: whether the job is known | PING's payload
    13 RESEED     to guest   random bytes, stirred into the kernel's pool and credited
    14 SETTIME    to guest   u64: CLOCK_REALTIME in ns
    15 DONE       to host    u32: errno of a RESEED or SETTIME, 0 where it worked
    16 STALE      to host    u8: the type of a frame, of that session and job, that did nothing: the
                             session is not known (any more), or the frame is out of turn. Not numbered

A job ends when its direct child has ended and both its pipes are at their end. A process left in the
background may hold them open (`sleep 1000 &`), for which ssh would wait and a terminal would not. Here
what the pipes hold at the child's end is delivered, and EXIT follows as soon as they have been quiet
for 150 ms, or after 1 s of foreign chatter. What the background writes later is read and thrown away.
"""

from __future__ import annotations

import enum
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from labkit.errors import SpecError

VERSION = 1
#: Most bytes of standard input in a frame.
DATA_MAX = 32 * 1024
#: Most bytes of an EXEC's payload.
EXEC_MAX = 1024 * 1024
#: Bytes of standard input that may be on their way before the first CREDIT.
STDIN_WINDOW = 128 * 1024
NONCE_SIZE = 16

_END, _ESC = b"\xc0", b"\xdb"
_ESC_END, _ESC_ESC = b"\xdb\xdc", b"\xdb\xdd"
_HEADER = struct.Struct("<BIII")
_U32 = struct.Struct("<I")
_HELLO_ACK = struct.Struct(f"<{NONCE_SIZE}sHIQQ")
#: The guest sends no frame that is longer, even with every byte of it escaped.
_ENCODED_MAX = 2 * (DATA_MAX + 64)


class Type(enum.IntEnum):
    """What a frame is."""

    HELLO = 1
    HELLO_ACK = 2
    EXEC = 3
    STDIN = 4
    STDIN_EOF = 5
    CREDIT = 6
    STDOUT = 7
    STDERR = 8
    SIGNAL = 9
    EXIT = 10
    PING = 11
    PONG = 12
    RESEED = 13
    SETTIME = 14
    DONE = 15
    STALE = 16


class Frame(NamedTuple):
    """A frame as it came in: whole, and with the right CRC. `type` may be one that is not known."""

    type: int
    session: int
    number: int
    job: int
    payload: bytes


class Hello(NamedTuple):
    """How the agent introduces itself.

    Attributes:
        nonce: the client's own, given back.
        version: of the protocol.
        pid: the agent's, in the guest.
        realtime, monotonic: the guest's clocks, in ns.
        boot_id: the guest kernel's, new with every boot (kept by a snapshot).
    """

    nonce: bytes
    version: int
    pid: int
    realtime: int
    monotonic: int
    boot_id: str


def encode(type: int, session: int, number: int, job: int = 0, payload: bytes = b"") -> bytes:
    """A frame as it goes over the wire, with an END before and after it."""
    body = _HEADER.pack(type, session, number & 0xFFFFFFFF, job) + payload
    body += _U32.pack(zlib.crc32(body))
    # ESC first: what END becomes has an ESC in it.
    return _END + body.replace(_ESC, _ESC_ESC).replace(_END, _ESC_END) + _END


class Decoder:
    """Takes the wire apart, however it is cut into pieces.

    What is no frame (noise, a bad CRC, the tail of one that began before we listened) is dropped, and
    memory is bounded: more than the longest frame without an END is noise.
    """

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that these bytes complete, in order."""
        self._rest += data
        if _END not in data:
            if len(self._rest) > _ENCODED_MAX:
                # Keep one byte: it makes what follows, up to the next END, a frame with a bad CRC.
                del self._rest[1:]
            return []
        *chunks, rest = bytes(self._rest).split(_END)
        self._rest = bytearray(rest[:_ENCODED_MAX])
        frames = (_decode(chunk) for chunk in chunks if chunk)
        return [frame for frame in frames if frame is not None]


def _decode(chunk: bytes) -> Frame | None:
    if _ESC in chunk:
        chunk = chunk.replace(_ESC_END, _END).replace(_ESC_ESC, _ESC)
    end = len(chunk) - _U32.size
    if end < _HEADER.size or _U32.unpack_from(chunk, end)[0] != zlib.crc32(memoryview(chunk)[:end]):
        return None
    type, session, number, job = _HEADER.unpack_from(chunk)
    return Frame(type, session, number, job, chunk[_HEADER.size : end])


def u32(value: int) -> bytes:
    """The payload of SIGNAL."""
    return _U32.pack(value)


def get_u32(payload: bytes) -> int:
    """What CREDIT, EXIT and DONE say; 0 where the payload is too short to say anything."""
    return int(_U32.unpack_from(payload)[0]) if len(payload) >= _U32.size else 0


def u64(value: int) -> bytes:
    """The payload of SETTIME."""
    return struct.pack("<Q", value)


def session_of(nonce: bytes) -> int:
    """The session that a HELLO with this nonce begins."""
    return get_u32(nonce)


def parse_hello(payload: bytes) -> Hello | None:
    """What a HELLO_ACK says; None where it is too short."""
    if len(payload) < _HELLO_ACK.size:
        return None
    nonce, version, pid, realtime, monotonic = _HELLO_ACK.unpack_from(payload)
    boot_id = payload[_HELLO_ACK.size :].decode("ascii", "replace")
    return Hello(nonce, version, pid, realtime, monotonic, boot_id)


def exec_payload(
    argv: Sequence[str], *, has_input: bool, cwd: str | None = None, env: Mapping[str, str] | None = None
) -> bytes:
    """The payload of EXEC.

    Raises:
        SpecError: there is no argument; a text holds a NUL, or a variable's name an "="; it is too long.
    """
    if isinstance(argv, str) or not argv:
        raise SpecError("A command is a list of at least one word.")
    variables = env or {}
    for name in variables:
        if not name or "=" in name:
            raise SpecError(f"{name!r} cannot be the name of an environment variable.")
    texts = [cwd or "", *argv, *(f"{name}={value}" for name, value in variables.items())]
    head = struct.pack("<BII", has_input, len(argv), len(variables))
    payload = head + b"".join(_text(text) + b"\0" for text in texts)
    if len(payload) > EXEC_MAX:
        raise SpecError(
            f"The command has {len(payload)} bytes, and {EXEC_MAX} are the most.",
            mend="Give long data by `input=`, or put a file on the machine first.",
        )
    return payload


def _text(text: str) -> bytes:
    try:
        data = os.fsencode(text)
    except UnicodeEncodeError as exc:
        raise SpecError(f"{text[:40]!r} is no text that a guest could get: {exc.reason}.") from None
    if b"\0" in data:
        raise SpecError(f"{text[:40]!r} holds a NUL, which no argument can.")
    return data


def returncode(status: int) -> int:
    """A wait status as a shell says it: the exit, or 128 + N where signal N ended the command."""
    signal = status & 0x7F
    return 128 + signal if signal else status >> 8 & 0xFF
