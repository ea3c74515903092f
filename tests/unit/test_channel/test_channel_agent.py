"""The real agent, spoken to frame by frame, and in ways that no client of ours would."""

from __future__ import annotations

import fcntl
import random
import struct
import termios
from pathlib import Path

import pytest

from labkit.channel import protocol
from labkit.channel.protocol import Type

END = b"\xc0"


def waiting(end) -> int:
    """Bytes that can be read from a socket."""
    return struct.unpack("i", fcntl.ioctl(end.fileno(), termios.FIONREAD, b"\0" * 4))[0]


def still_works(raw) -> None:
    raw.end.sendall(END)
    raw.hello()
    raw.execute(77, "echo", "on")
    assert raw.next(Type.STDOUT).payload == b"on\n"
    assert protocol.get_u32(raw.next(Type.EXIT).payload) == 0


@pytest.mark.parametrize("seed", range(8))
def test_noise_does_no_harm(raw, seed: int) -> None:
    source = random.Random(seed)
    for _ in range(30):
        raw.end.sendall(source.randbytes(source.randrange(40_000)))
    still_works(raw)


@pytest.mark.parametrize("seed", range(4))
def test_noise_made_of_framing_bytes_does_no_harm(raw, seed: int) -> None:
    source = random.Random(seed)
    raw.end.sendall(bytes(source.choice(b"\xc0\xdb\xdc\xdd\x01") for _ in range(200_000)))
    still_works(raw)


@pytest.mark.parametrize("seed", range(8))
def test_damaged_commands_are_not_run(raw, tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    raw.hello()
    for number in range(200):
        payload = protocol.exec_payload(["touch", str(tmp_path / "x")], has_input=False)
        frame = bytearray(raw.encode(Type.EXEC, number, payload))
        raw.number -= 1  # so that it would be in turn if it got through
        frame[source.randrange(1, len(frame) - 1)] ^= 1 << source.randrange(8)
        raw.end.sendall(frame)
    still_works(raw)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("seed", range(8))
def test_well_framed_nonsense_does_no_harm(raw, seed: int) -> None:
    # Not RESEED and SETTIME: as root, they would work.
    kinds = [kind for kind in range(40) if kind not in (Type.RESEED, Type.SETTIME)]
    source = random.Random(seed)
    raw.hello()
    raw.execute(1, "cat", has_input=True)
    for _ in range(2000):
        payload = source.randbytes(source.choice([0, 1, 4, 9, 10, 16, 100]))
        if source.random() < 0.1:
            raw.end.sendall(
                protocol.encode(source.choice(kinds), source.choice([raw.session, 0]), 5, 1, payload)
            )
        else:
            raw.send(source.choice(kinds), source.randrange(3), payload)
        if waiting(raw.end):
            raw.end.recv(65536)
    still_works(raw)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\0" * 9,
        struct.pack("<BII", 0, 0, 0) + b"\0",
        struct.pack("<BII", 0, 1, 0) + b"\0echo",
        struct.pack("<BII", 0, 2, 0) + b"\0echo\0",
        struct.pack("<BII", 0, 1, 0) + b"\0echo\0more\0",
        struct.pack("<BII", 0, 0xFFFFFFFF, 2) + b"\0echo\0",
        struct.pack("<BII", 0, 1, 0xFFFFFFFF) + b"\0echo\0",
    ],
)
def test_malformed_commands_are_dropped(raw, payload: bytes) -> None:
    raw.hello()
    raw.send(Type.EXEC, 1, payload)
    raw.send(Type.PING, 1)
    assert raw.next().type == Type.PONG
    still_works(raw)


def test_a_frame_that_is_too_long_is_dropped_and_takes_no_memory(raw, agent) -> None:
    raw.hello()
    raw.end.sendall(END)
    for _ in range(64):
        raw.end.sendall(b"x" * (1 << 20))
    still_works(raw)
    assert agent.rss < 8 * 1024


def test_a_client_that_was_cut_off_in_mid_frame_gives_way_to_the_next(raw) -> None:
    raw.hello()
    payload = protocol.exec_payload(["echo", "never"], has_input=False)
    raw.end.sendall(raw.encode(Type.EXEC, 1, payload)[:-10])
    still_works(raw)


def test_hello_kills_the_jobs_of_the_client_before(raw, helpers) -> None:
    raw.hello()
    raw.execute(1, "/bin/sh", "-c", "sleep 1000 & echo $! $$; wait")
    pids = [int(word) for word in raw.next(Type.STDOUT).payload.split()]
    raw.hello(b"the next client.")
    for pid in pids:
        helpers.eventually(lambda pid=pid: not helpers.is_alive(pid), "the old job is killed")
    raw.send(Type.PING, 1)
    assert raw.next().type == Type.PONG  # and nothing of the old job before it


def test_hello_leaves_the_jobs_of_other_ports_alone(start_agent, helpers) -> None:
    agent = start_agent(ports=2)
    one, two = (helpers.Raw(end) for end in agent.ends)
    one.hello()
    two.hello()
    one.execute(1, "/bin/sh", "-c", "echo; read line; echo $line", has_input=True)
    one.next(Type.STDOUT)
    two.hello(b"the next client.")
    one.send(Type.STDIN, 1, b"still here\n")
    assert one.next(Type.STDOUT).payload == b"still here\n"


def test_the_end_of_a_port_kills_its_jobs_and_no_others(start_agent, helpers) -> None:
    agent = start_agent(ports=2)
    one, two = (helpers.Raw(end) for end in agent.ends)
    one.hello()
    one.execute(1, "/bin/sh", "-c", "echo $$; sleep 1000")
    pid = int(one.next(Type.STDOUT).payload)
    one.end.close()
    helpers.eventually(lambda: not helpers.is_alive(pid), "the job is killed")
    still_works(two)
    two.end.close()
    assert agent.process.wait(10) == 0


def test_frames_of_a_session_that_is_not_known_do_nothing_and_are_answered(raw, tmp_path: Path) -> None:
    payload = protocol.exec_payload(["touch", str(tmp_path / "x")], has_input=False)
    raw.end.sendall(protocol.encode(Type.EXEC, 0, 0, 5, payload))
    assert raw.next() == (Type.STALE, 0, 0, 5, bytes([Type.EXEC]))
    raw.hello()
    raw.end.sendall(protocol.encode(Type.EXEC, raw.session + 1, 1, 6, payload))
    assert raw.next() == (Type.STALE, raw.session + 1, 0, 6, bytes([Type.EXEC]))
    still_works(raw)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("step", [-1, 1, 1000])
def test_frames_out_of_turn_do_nothing_and_are_answered(raw, tmp_path: Path, step: int) -> None:
    payload = protocol.exec_payload(["touch", str(tmp_path / "x")], has_input=False)
    raw.hello()
    raw.send(Type.PING)
    assert raw.next().number == 1
    raw.number += step
    raw.send(Type.EXEC, 6, payload)
    assert raw.next() == (Type.STALE, raw.session, 0, 6, bytes([Type.EXEC]))
    still_works(raw)
    assert not (tmp_path / "x").exists()


def test_pong_says_whether_the_job_is_known(raw) -> None:
    raw.hello()
    raw.execute(1, "cat", has_input=True)
    raw.send(Type.PING, 1, b"mark")
    assert raw.next().payload == b"\1mark"
    raw.send(Type.PING, 2, b"mark")
    assert raw.next().payload == b"\0mark"
    raw.send(Type.STDIN_EOF, 1)
    raw.next(Type.EXIT)
    raw.send(Type.PING, 1)
    assert raw.next().payload == b"\0"


def test_jobs_run_beside_each_other(raw) -> None:
    raw.hello()
    for job in range(1, 21):
        raw.execute(job, "cat", has_input=True)
    for job in range(20, 0, -1):
        raw.send(Type.STDIN, job, b"%d" % job)
        raw.send(Type.STDIN_EOF, job)
    seen = {}
    while len(seen) < 20:
        frame = raw.next(Type.STDOUT)
        seen[frame.job] = frame.payload
    assert seen == {job: b"%d" % job for job in range(1, 21)}


def test_too_many_jobs_are_refused_one_by_one(raw) -> None:
    raw.hello()
    for job in range(1, 66):
        raw.execute(job, "sleep", "1000")
    assert raw.next(Type.STDERR).payload == b"labkit: sleep: too many commands at once\n"
    frame = raw.next(Type.EXIT)
    assert (frame.job, protocol.get_u32(frame.payload)) == (65, 126 << 8)
    raw.hello(b"the next client.")
    still_works(raw)


def test_signals_reach_the_whole_group_though_input_is_stuck(raw) -> None:
    raw.hello()
    script = "trap 'echo caught' TERM; sh -c 'echo; exec sleep 1000' & wait $!; echo $?"
    raw.execute(1, "/bin/sh", "-c", script, has_input=True)
    raw.next(Type.STDOUT)
    for _ in range(protocol.STDIN_WINDOW // protocol.DATA_MAX):
        raw.send(Type.STDIN, 1, bytes(protocol.DATA_MAX))
    raw.send(Type.SIGNAL, 1, protocol.u32(15))
    said = b""
    while (frame := raw.next()).type != Type.EXIT:
        said += frame.payload if frame.type == Type.STDOUT else b""
    assert sorted(said.split()) == [b"143", b"caught"]


def test_credit_is_given_as_the_command_takes_its_input(raw) -> None:
    raw.hello()
    raw.execute(1, "wc", "-c", has_input=True)
    credit, sent = protocol.STDIN_WINDOW, 0
    while sent < 10 << 20:
        while credit >= protocol.DATA_MAX:
            raw.send(Type.STDIN, 1, bytes(protocol.DATA_MAX))
            credit -= protocol.DATA_MAX
            sent += protocol.DATA_MAX
        credit += protocol.get_u32(raw.next(Type.CREDIT).payload)
    raw.send(Type.STDIN_EOF, 1)
    assert int(raw.next(Type.STDOUT).payload) == sent


def test_no_credit_is_given_where_the_command_takes_nothing(raw) -> None:
    raw.hello()
    raw.execute(1, "/bin/sh", "-c", "echo; sleep 1000", has_input=True)
    raw.next(Type.STDOUT)
    for _ in range(protocol.STDIN_WINDOW // protocol.DATA_MAX):
        raw.send(Type.STDIN, 1, bytes(protocol.DATA_MAX))
    raw.send(Type.PING, 1)
    granted = 0
    while (frame := raw.next()).type != Type.PONG:
        assert frame.type == Type.CREDIT
        granted += protocol.get_u32(frame.payload)
    assert granted <= 64 << 10  # a pipe's worth


def test_a_client_that_overdraws_its_credit_is_cut_short(raw, agent) -> None:
    raw.hello()
    raw.execute(1, "sleep", "1000", has_input=True)
    for _ in range(200):
        raw.send(Type.STDIN, 1, bytes(protocol.DATA_MAX))
    assert agent.rss < 4 * 1024
    still_works(raw)


def test_output_that_the_host_does_not_take_holds_the_command_up(raw, agent, helpers, tmp_path: Path) -> None:
    raw.hello()
    done = tmp_path / "done"
    size = 32 << 20
    raw.execute(1, "/bin/sh", "-c", f"head -c {size} /dev/zero; touch {done}")
    seen = [-1]

    def is_full() -> bool:  # three looks in a row that find no more than the one before
        seen.append(waiting(raw.end))
        return len(seen) > 3 and seen[-1] > 0 and len(set(seen[-3:])) == 1

    helpers.eventually(is_full, "the agent stops sending")
    assert not done.exists()
    assert agent.rss < 4 * 1024
    got = 0
    while (frame := raw.next()).type != Type.EXIT:
        got += len(frame.payload)
    assert got == size
    assert done.exists()


def test_a_host_that_takes_nothing_still_gets_its_signals_through(raw, agent, helpers) -> None:
    raw.hello()
    raw.execute(1, "/bin/sh", "-c", "echo $$; exec yes")
    pid = int(raw.next(Type.STDOUT).payload.split()[0])
    helpers.eventually(lambda: waiting(raw.end) > 100_000, "output has piled up")
    raw.send(Type.SIGNAL, 1, protocol.u32(9))
    helpers.eventually(lambda: not helpers.is_alive(pid), "the command is killed")
    assert protocol.get_u32(raw.next(Type.EXIT).payload) == 9


def test_an_idle_agent_does_not_wake_up(raw, agent, helpers) -> None:
    raw.hello()
    raw.execute(1, "sleep", "1000")
    raw.send(Type.PING, 1)
    raw.next(Type.PONG)
    status = Path(f"/proc/{agent.process.pid}/status")
    seen = []

    def is_still() -> bool:  # over twenty looks it was not scheduled once
        seen.append([line for line in status.read_text().splitlines() if "ctxt_switches" in line])
        return len(seen) > 20 and all(look == seen[-1] for look in seen[-20:])

    helpers.eventually(is_still, "the agent waits")


def test_orders_of_the_wrong_size_are_refused(raw) -> None:
    raw.hello()
    raw.send(Type.SETTIME, 3, b"1234567")
    frame = raw.next()
    assert (frame.type, frame.job, protocol.get_u32(frame.payload)) == (Type.DONE, 3, 22)  # EINVAL


def test_children_are_reaped(raw, agent, helpers) -> None:
    raw.hello()
    for job in range(1, 51):
        raw.execute(job, "true" if job % 2 else "no-such-program")
        raw.next(Type.EXIT)
    children = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children")
    helpers.eventually(lambda: not children.read_text().split(), "all children are reaped")


def test_descriptors_are_given_back(raw, agent) -> None:
    raw.hello()
    before = len(list(Path(f"/proc/{agent.process.pid}/fd").iterdir()))
    for job in range(1, 51):
        raw.execute(job, "true" if job % 2 else "no-such-program", has_input=bool(job % 3))
        raw.next(Type.EXIT)
    raw.send(Type.PING)
    raw.next(Type.PONG)
    assert len(list(Path(f"/proc/{agent.process.pid}/fd").iterdir())) == before
