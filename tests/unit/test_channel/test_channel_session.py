"""A session with the real agent, which runs as a process of the host."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from labkit.channel import protocol
from labkit.channel.protocol import Type
from labkit.channel.session import Session, StaleSession, connect_unix
from labkit.errors import CommandTimeout, GuestCrashed, HostError, MachineError, NotRunning


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def test_hello_tells_who_is_there(session, agent) -> None:
    assert session.guest.pid == agent.process.pid
    assert session.guest.version == protocol.VERSION
    assert session.guest.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert abs(session.guest.realtime - time.time_ns()) < 10e9
    assert abs(session.guest.monotonic - time.monotonic_ns()) < 10e9


def test_output_and_exit_come_back(session) -> None:
    result = session.run(shell("echo out; echo err >&2; exit 3"))
    assert (result.returncode, result.stdout, result.stderr) == (3, b"out\n", b"err\n")
    assert 0 < result.seconds < 10


def test_any_bytes_come_back(session) -> None:
    data = bytes(range(256)) * 3
    assert session.run(["cat"], input=data).stdout == data


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 32768, 32769, 65536, 1_000_003])
def test_output_of_any_size_is_whole(session, size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert session.run(["cat"], input=data).stdout == data


def test_much_output_is_whole_though_not_kept(session) -> None:
    seen = hashlib.sha256()
    size = 64 << 20
    script = f"head -c {size} /dev/zero"
    result = session.run(shell(script), on_output=lambda _, data: seen.update(data), keep=False)
    assert seen.hexdigest() == hashlib.sha256(bytes(size)).hexdigest()
    assert result.stdout == b""


def test_a_long_file_is_streamed_as_input(session, tmp_path: Path) -> None:
    path = tmp_path / "long"
    piece = random.Random(1).randbytes(1 << 20)
    path.write_bytes(piece * 64)
    with path.open("rb") as file:
        result = session.run(["sha256sum"], input=file)
    assert result.stdout.split()[0].decode() == hashlib.sha256(piece * 64).hexdigest()


def test_input_and_output_flow_at_once(session) -> None:
    data = random.Random(2).randbytes(8 << 20)
    assert session.run(["cat"], input=data).stdout == data


def test_no_input_is_an_empty_one(session) -> None:
    assert session.run(["cat"]).stdout == b""
    assert session.run(["cat"], input=b"").stdout == b""


def test_input_that_nobody_reads_is_no_matter(session, tmp_path: Path) -> None:
    assert session.run(["true"], input=bytes(10 << 20)).returncode == 0
    assert session.run(shell("exec <&-; echo on"), input=bytes(10 << 20)).stdout == b"on\n"


def test_output_arrives_while_the_command_runs(session, tmp_path: Path) -> None:
    go = tmp_path / "go"
    os.mkfifo(go)
    pieces = []

    def take(stream: str, data: bytes) -> None:
        pieces.append((stream, data))
        if len(pieces) == 1:
            go.write_text("second\n")

    session.run(["/bin/sh", "-c", f"echo first; cat {go} >&2"], on_output=take)
    assert pieces == [("stdout", b"first\n"), ("stderr", b"second\n")]


def test_signals_are_told_as_a_shell_does(session) -> None:
    assert session.run(shell("kill -9 $$")).returncode == 137
    assert session.run(shell("kill -TERM $$")).returncode == 143


def test_what_is_not_found_exits_with_127(session) -> None:
    result = session.run(["no-such-program"])
    assert (result.returncode, result.stderr) == (127, b"labkit: no-such-program: not found\n")


def test_what_may_not_run_exits_with_126(session, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("hello")
    result = session.run([str(plain)])
    assert result.returncode == 126
    assert b"Permission denied" in result.stderr


def test_too_long_an_argument_exits_with_126(session) -> None:
    result = session.run(["echo", "x" * 200_000])
    assert result.returncode == 126
    assert b"too long" in result.stderr


def test_a_script_without_an_interpreter_is_a_shell_script(session, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text('echo "$1"\n')
    script.chmod(0o755)
    assert session.run([str(script), "one two"]).stdout == b"one two\n"


def test_it_runs_in_the_directory_asked_for(session, tmp_path: Path) -> None:
    assert session.run(["pwd"], cwd=str(tmp_path)).stdout.decode().strip() == str(tmp_path)


def test_a_directory_that_is_not_there_is_named(session) -> None:
    result = session.run(["pwd"], cwd="/no/such")
    assert result.returncode == 126
    assert result.stderr == b"labkit: /no/such: no such directory to run in\n"


def test_environment_is_added_to_the_agents_own(session) -> None:
    result = session.run(
        shell("echo $HOME; echo $GREETING; echo $EMPTY."), env={"GREETING": "hé é", "EMPTY": ""}
    )
    assert result.stdout.decode() == f"{os.environ['HOME']}\nhé é\n.\n"


def test_programs_are_looked_for_in_the_path_that_is_given(session, tmp_path: Path) -> None:
    program = tmp_path / "my-program"
    program.write_text("#!/bin/sh\necho mine\n")
    program.chmod(0o755)
    assert session.run(["my-program"]).returncode == 127
    assert session.run(["my-program"], env={"PATH": f"/usr/bin:{tmp_path}"}).stdout == b"mine\n"


@pytest.mark.parametrize(
    "text", ["", "a b", "ünïcödé ☃", "$HOME `ls` 'x' \"y\" \\", "\n", "\udcff\udc80", "-n"]
)
def test_arguments_arrive_as_they_are(session, text: str) -> None:
    assert session.run(["printf", "%s", text]).stdout == os.fsencode(text)


def test_many_and_long_arguments_arrive(session) -> None:
    words = [f"word-{number}" * 10 for number in range(5000)]
    assert session.run(["printf", r"%s\n", *words]).stdout.decode().split() == words


def test_commands_get_signals_and_files_as_from_a_fresh_shell(session) -> None:
    script = "grep -E '^Sig(Blk|Ign)' /proc/self/status; ls /proc/self/fd"
    lines = session.run(shell(script)).stdout.decode().split()
    assert lines == ["SigBlk:", "0" * 16, "SigIgn:", "0" * 16, "0", "1", "2", "3"]  # 3 is ls's own


def test_the_time_out_kills_the_whole_group(session, helpers) -> None:
    with pytest.raises(CommandTimeout, match="was killed") as caught:
        session.run(shell("sleep 1000 & echo $!; echo $$; echo no >&2; sleep 1000"), timeout=0.3)
    assert caught.value.stderr == b"no\n"
    pids = [int(word) for word in caught.value.stdout.split()]
    assert len(pids) == 2
    for pid in pids:
        helpers.eventually(lambda pid=pid: not helpers.is_alive(pid), "the command was killed")
    assert not session.broken
    assert session.run(["echo", "on"]).stdout == b"on\n"


def test_the_time_out_comes_though_input_is_stuck(session) -> None:
    started = time.monotonic()
    with pytest.raises(CommandTimeout, match="was killed"):
        session.run(["sleep", "1000"], input=bytes(100 << 20), timeout=0.3)
    assert time.monotonic() - started < 5
    assert session.run(["cat"], input=b"on").stdout == b"on"


def test_the_time_out_comes_though_output_never_stops(session) -> None:
    with pytest.raises(CommandTimeout, match="was killed") as caught:
        session.run(["yes"], timeout=0.2)
    assert caught.value.stdout.startswith(b"y\ny\n")
    assert session.run(["echo", "on"]).stdout == b"on\n"


def test_a_guest_that_is_silent_is_told_from_a_command_that_is_slow(session, agent) -> None:
    agent.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(CommandTimeout, match="guest itself did not answer"):
            session.run(["true"], timeout=0.1)
    finally:
        agent.process.send_signal(signal.SIGCONT)
    assert session.broken


def test_a_command_that_cannot_be_killed_is_told_too(pair) -> None:
    here, there = pair

    def guest() -> None:  # one whose command hangs in the kernel, which cannot be had here
        decoder = protocol.Decoder()
        while data := there.recv(65536):
            for frame in decoder.feed(data):
                if frame.type == Type.PING:
                    there.sendall(protocol.encode(Type.PONG, frame.session, 0, frame.job, b"\1"))

    thread = threading.Thread(target=guest)
    thread.start()
    session = Session(here)
    with pytest.raises(CommandTimeout, match="could not be killed"):
        session.run(["true"], timeout=0.1)
    assert session.broken
    session.close()  # which ends the guest too
    thread.join(10)


def test_the_background_does_not_keep_a_command_from_ending(session, helpers) -> None:
    result = session.run(shell("sleep 1000 & echo $!"), timeout=10)
    assert result.returncode == 0
    pid = int(result.stdout)
    assert helpers.is_alive(pid)
    os.kill(pid, signal.SIGKILL)


def test_what_the_background_says_later_does_not_kill_it(session, tmp_path: Path, helpers) -> None:
    go, done = tmp_path / "go", tmp_path / "done"
    os.mkfifo(go)
    session.run(shell(f"(cat {go}; head -c 1000000 /dev/zero && echo survived >{done}) & "))
    go.write_text("go")
    helpers.eventually(done.exists, "the background has written its output")


def test_the_background_is_not_killed_by_the_next_client(session, agent, helpers) -> None:
    pid = int(session.run(shell("sleep 1000 >/dev/null 2>&1 & echo $!")).stdout)
    session.hello(helpers.soon())
    assert session.run(["true"]).returncode == 0
    assert helpers.is_alive(pid)
    os.kill(pid, signal.SIGKILL)


def test_a_talkative_background_is_cut_off(session, helpers) -> None:
    result = session.run(shell("yes & echo $! >&2"), timeout=20, keep=False)
    assert result.returncode == 0
    os.kill(int(result.stderr), signal.SIGKILL)


def test_all_that_the_command_itself_said_is_heard_though_the_background_holds_on(session) -> None:
    result = session.run(shell("sleep 1000 & head -c 65000 /dev/zero; echo $! >&2"))
    assert len(result.stdout) == 65000
    os.kill(int(result.stderr), signal.SIGKILL)


def test_an_exception_out_of_on_output_kills_the_command(session, helpers) -> None:
    pids = []

    def take(_: str, data: bytes) -> None:
        pids.append(int(data))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        session.run(shell("echo $$; sleep 1000"), on_output=take)
    assert not helpers.is_alive(pids[0])
    assert session.run(["echo", "on"]).stdout == b"on\n"


def test_an_exception_out_of_the_input_kills_the_command(session) -> None:
    class Broken:
        def read(self, size: int) -> bytes:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        session.run(["cat"], input=Broken())
    assert session.run(["echo", "on"]).stdout == b"on\n"


def test_a_keyboard_interrupt_kills_the_command(session, helpers) -> None:
    pids = []

    def take(_: str, data: bytes) -> None:
        pids.append(int(data))
        threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        session.run(shell("echo $$; sleep 1000"), on_output=take)
    helpers.eventually(lambda: not helpers.is_alive(pids[0]), "the command was killed")
    if not session.broken:
        assert session.run(["echo", "on"]).stdout == b"on\n"


def test_check_is_asked_while_nothing_is_heard(agent, helpers) -> None:
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise GuestCrashed("The kernel panicked.")

    session = Session(agent.ends[0], check=check)
    session.hello(helpers.soon())
    with pytest.raises(GuestCrashed):
        session.run(["sleep", "1000"])
    assert session.run(["echo", "on"]).stdout == b"on\n"


def test_the_end_of_the_connection_is_explained_by_check(agent, helpers) -> None:
    def check() -> None:
        raise NotRunning("web is off.")

    session = Session(agent.ends[0], check=check)
    session.hello(helpers.soon())
    agent.process.kill()
    with pytest.raises(NotRunning, match="web is off"):
        session.run(["true"])
    assert session.broken


def test_the_end_of_the_connection_is_told_where_check_knows_nothing(session, agent) -> None:
    with pytest.raises(NotRunning, match="connection to the guest ended"):
        session.run(["yes"], on_output=lambda *_: agent.process.kill(), keep=False)
    assert session.broken


def test_an_idle_session_notices_that_it_ended(session, agent) -> None:
    assert not session.has_ended()
    agent.process.kill()
    agent.process.wait()
    assert session.has_ended()


def test_a_session_can_be_interrupted_by_another_thread(session) -> None:
    def take(_: str, __: bytes) -> None:
        threading.Thread(target=session.interrupt, args=("It was reverted.",)).start()

    with pytest.raises(NotRunning, match="It was reverted"):
        session.run(shell("echo; sleep 1000"), on_output=take)


def test_a_session_that_the_guest_does_not_know_is_stale(session, raw) -> None:
    raw.hello(b"another's nonce.")
    with pytest.raises(StaleSession):
        session.run(["true"])
    assert session.broken


def test_a_session_whose_guest_went_back_in_time_is_stale(session) -> None:
    session.run(["true"])
    session._sent += 1  # as if the guest had forgotten a frame
    with pytest.raises(StaleSession):
        session.run(["true"])
    assert session.broken


def test_output_with_a_gap_in_it_is_not_passed_off_as_whole(session) -> None:
    session._expected += 1  # as if the guest had gone back to before it sent a frame
    with pytest.raises(NotRunning, match="reverted or restarted while the command ran"):
        session.run(["echo", "on"])
    assert session.broken


def test_hello_misses_its_deadline_where_nobody_answers(pair) -> None:
    with pytest.raises(CommandTimeout, match="did not answer in time"):
        Session(pair[0]).hello(time.monotonic() + 0.1)


def test_hello_is_said_again_where_it_was_lost(pair, helpers) -> None:
    here, there = pair
    session = Session(here)
    thread = threading.Thread(target=session.hello, args=(helpers.soon(),))
    thread.start()
    there.recv(65536)  # the guest was reverted with the first one in flight
    decoder = protocol.Decoder()
    [hello] = decoder.feed(there.recv(65536))
    answer = hello.payload + protocol.VERSION.to_bytes(2, "little") + bytes(20) + b"boot"
    there.sendall(protocol.encode(Type.HELLO_ACK, hello.session, 0, 0, answer))
    thread.join(10)
    assert session.guest is not None
    assert session.guest.boot_id == "boot"


def test_another_version_of_the_protocol_is_refused(pair, helpers) -> None:
    here, there = pair

    def guest() -> None:
        [hello] = protocol.Decoder().feed(there.recv(65536))
        answer = hello.payload + b"\x63" + bytes(23)
        there.sendall(protocol.encode(Type.HELLO_ACK, hello.session, 0, 0, answer))

    thread = threading.Thread(target=guest)
    thread.start()
    with pytest.raises(HostError, match="version 99"):
        Session(here).hello(helpers.soon())
    thread.join()


def test_ping_is_answered(session) -> None:
    assert 0 < session.ping() < 5


def test_an_order_that_the_guest_cannot_follow_is_an_error(session) -> None:
    # A clock that is not of this world: refused by the kernel, whoever asks.
    with pytest.raises(MachineError, match="set its clock"):
        session.set_time(2**64 - 1)


def test_connecting_waits_for_somebody_to_listen(tmp_path: Path, monkeypatch, helpers) -> None:
    monkeypatch.chdir(tmp_path)  # so that the path is short enough, whatever tmp_path is
    asked = []
    with socket.socket(socket.AF_UNIX) as listener:

        def check() -> None:
            asked.append(1)
            if len(asked) == 2:
                listener.bind("s")
            if len(asked) == 3:
                listener.listen(1)

        connection = connect_unix("s", helpers.soon(), check)
        connection.close()
    assert len(asked) == 3


def test_connecting_gives_up_at_its_deadline(tmp_path: Path) -> None:
    with pytest.raises(CommandTimeout, match="did not offer its command port"):
        connect_unix(tmp_path / "s", time.monotonic() + 0.05)
