"""The framing, by itself."""

from __future__ import annotations

import random
import struct

import pytest

from labkit.channel import protocol
from labkit.channel.protocol import Decoder, Frame, Type, encode
from labkit.errors import SpecError

SPECIAL = bytes([0xC0, 0xDB, 0xDC, 0xDD, 0x00, 0xFF])


def payloads(seed: int, count: int, longest: int = 300) -> list[bytes]:
    """Random payloads, in which the bytes that framing cares about are frequent."""
    source = random.Random(seed)
    return [
        bytes(
            source.choice(SPECIAL) if source.random() < 0.5 else source.randrange(256)
            for _ in range(source.randrange(longest))
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_frames_survive_any_cutting(seed: int) -> None:
    source = random.Random(seed)
    sent = [
        Frame(source.randrange(256), *(source.randrange(2**32) for _ in range(3)), data)
        for data in payloads(seed, 40)
    ]
    wire = b"".join(encode(*frame) for frame in sent)
    decoder, seen = Decoder(), []
    while wire:
        size = source.choice([1, 2, 7, 100, 5000])
        seen += decoder.feed(wire[:size])
        wire = wire[size:]
    assert seen == sent


def test_the_longest_data_frame_survives_where_every_byte_is_escaped() -> None:
    data = b"\xdb" * protocol.DATA_MAX
    wire = encode(Type.STDOUT, 1, 2, 3, data)
    decoder = Decoder()
    frames = [frame for at in range(0, len(wire), 1000) for frame in decoder.feed(wire[at : at + 1000])]
    assert frames == [Frame(Type.STDOUT, 1, 2, 3, data)]


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_frame_is_dropped_and_the_next_one_is_not(seed: int) -> None:
    source = random.Random(seed)
    for data in payloads(seed, 40):
        wire = bytearray(encode(Type.STDOUT, 7, 8, 9, data))
        wire[source.randrange(1, len(wire) - 1)] ^= 1 << source.randrange(8)
        after = encode(Type.EXIT, 7, 8, 9, b"\0\0\0\0")
        assert Decoder().feed(bytes(wire) + after)[-1:] == [Frame(Type.EXIT, 7, 8, 9, b"\0\0\0\0")]
        assert Frame(Type.STDOUT, 7, 8, 9, data) not in Decoder().feed(bytes(wire) + after)


@pytest.mark.parametrize("seed", range(20))
def test_a_stream_entered_in_mid_frame_finds_its_step(seed: int) -> None:
    source = random.Random(seed)
    first = encode(Type.STDOUT, 1, 1, 1, bytes(source.randrange(256) for _ in range(500)))
    second = encode(Type.EXIT, 1, 1, 1, b"\0\0\0\0")
    cut = source.randrange(1, len(first))
    assert Decoder().feed(first[cut:] + second) == [Frame(Type.EXIT, 1, 1, 1, b"\0\0\0\0")]
    assert Decoder().feed(first[:cut] + second)[-1:] == [Frame(Type.EXIT, 1, 1, 1, b"\0\0\0\0")]


@pytest.mark.parametrize("seed", range(5))
def test_noise_makes_no_frames_and_takes_no_memory(seed: int) -> None:
    source = random.Random(seed)
    decoder = Decoder()
    for _ in range(50):
        assert decoder.feed(source.randbytes(10_000)) == []
    for _ in range(100):  # without a single END
        assert decoder.feed(b"\x01" * 10_000) == []
    assert len(decoder._rest) < 100_000
    assert decoder.feed(encode(Type.PING, 1, 2)) == [Frame(Type.PING, 1, 2, 0, b"")]


def test_encoding_holds_no_end_but_at_its_ends() -> None:
    for data in payloads(1, 50):
        wire = encode(Type.STDIN, 0xC0DBC0DB, 0xC0DB, 0xDB, data)
        assert wire.startswith(b"\xc0")
        assert wire.endswith(b"\xc0")
        assert b"\xc0" not in wire[1:-1]


def test_exec_payload_has_its_texts_in_order() -> None:
    payload = protocol.exec_payload(["echo", "é"], has_input=True, cwd="/tmp", env={"A": "1", "B": ""})
    assert payload == struct.pack("<BII", 1, 2, 2) + b"/tmp\0echo\0" + "é".encode() + b"\0A=1\0B=\0"


@pytest.mark.parametrize(
    ("argv", "env"),
    [
        ([], {}),
        ("ls", {}),
        (["ls", "a\0b"], {}),
        (["ls"], {"A=B": "1"}),
        (["ls"], {"": "1"}),
        (["ls"], {"A": "\0"}),
        (["ls", "\ud800"], {}),
        (["ls", "x" * protocol.EXEC_MAX], {}),
    ],
)
def test_what_is_no_command_is_refused(argv: list[str], env: dict[str, str]) -> None:
    with pytest.raises(SpecError):
        protocol.exec_payload(argv, has_input=False, env=env)


@pytest.mark.parametrize(
    ("status", "code"), [(0, 0), (3 << 8, 3), (255 << 8, 255), (9, 137), (0x80 | 11, 139)]
)
def test_returncode_is_as_a_shell_says_it(status: int, code: int) -> None:
    assert protocol.returncode(status) == code


def test_a_hello_that_is_too_short_is_none() -> None:
    assert protocol.parse_hello(b"x" * 20) is None
