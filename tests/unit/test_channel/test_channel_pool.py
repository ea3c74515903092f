"""A pool over ports that behave as QEMU's do, with the real agent behind them."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from labkit.channel.pool import Pool
from labkit.channel.session import connect_unix
from labkit.errors import CommandTimeout, Conflict, NotRunning

HOLDER = """
import sys
from pathlib import Path
from labkit.channel.pool import Pool
from labkit.channel.session import connect_unix
directory = Path(sys.argv[1])
pool = Pool(lambda port, deadline: connect_unix(directory / f"{port}.sock", deadline), 1, directory / "locks")
pool.run(["/bin/sh", "-c", "echo $$; sleep 1000"], on_output=lambda _, data: print(data.decode(), flush=True))
"""


@pytest.fixture
def make_pool():
    pools = []

    def make(machine, ports: int | None = None) -> Pool:
        def open_port(port: int, deadline: float):
            return connect_unix(machine.directory / f"{port}.sock", deadline)

        pool = Pool(open_port, ports or len(machine.ports), machine.directory / "locks")
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()


def served(machine) -> list[int]:
    return [port.served for port in machine.ports]


def run_all(*actions) -> None:
    """Run them in threads, to their end; their exceptions are raised here."""
    errors = []

    def guarded(action) -> None:
        try:
            action()
        except Exception as exc:  # noqa: BLE001  # raised in the test's own thread below
            errors.append(exc)

    threads = [threading.Thread(target=guarded, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for error in errors:
        raise error


def test_one_connection_serves_command_after_command(start_machine, make_pool) -> None:
    machine = start_machine(2)
    pool = make_pool(machine)
    for number in range(5):
        assert pool.run(["echo", str(number)]).stdout == b"%d\n" % number
    assert served(machine) == [1, 0]


def test_hello_says_who_is_there(start_machine, make_pool, helpers) -> None:
    machine = start_machine(2)
    assert make_pool(machine).hello(helpers.soon()).pid == machine.agent.process.pid


def test_threads_take_a_port_each(start_machine, make_pool) -> None:
    machine = start_machine(4)
    pool = make_pool(machine)
    meeting = threading.Barrier(4, timeout=20)

    def run() -> None:
        # None ends before all have begun.
        pool.run(["/bin/sh", "-c", "echo; read line"], input=Meeting())

    class Meeting(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            meeting.wait()
            return b""

    run_all(*[run] * 4)
    assert served(machine) == [1, 1, 1, 1]
    pool.run(["true"])
    assert sum(served(machine)) == 4  # one connection was kept


def test_more_threads_than_ports_take_turns(start_machine, make_pool) -> None:
    machine = start_machine(2)
    pool = make_pool(machine)
    seen = []

    def run(number: int) -> None:
        seen.extend(pool.run(["echo", str(number)]).stdout for _ in range(10))

    run_all(*[lambda number=number: run(number) for number in range(6)])
    assert sorted(seen) == sorted(b"%d\n" % number for number in range(6) for _ in range(10))


def test_all_ports_busy_is_a_conflict_that_says_with_what(start_machine, make_pool) -> None:
    machine = start_machine(2)
    pool, other = make_pool(machine), make_pool(machine)
    begun = threading.Semaphore(0)
    threads = [
        threading.Thread(
            target=lambda: pool.run(
                ["/bin/sh", "-c", "echo; exec cat"], input=Held(), on_output=lambda *_: begun.release()
            )
        )
        for _ in range(2)
    ]
    release = threading.Event()

    class Held(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            release.wait(20)
            return b""

    # The input is asked for before any output is heard, so the commands have begun when it is.
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while sum(served(machine)) < 2:
        assert time.monotonic() < deadline
    with pytest.raises(Conflict) as caught:
        other.run(["true"], timeout=0.2)
    release.set()
    for thread in threads:
        thread.join(10)
    assert f"process {os.getpid()}: /bin/sh -c 'echo; exec cat'" in str(caught.value)
    assert other.run(["echo", "on"]).stdout == b"on\n"


def test_a_kept_connection_does_not_shut_others_out(start_machine, make_pool) -> None:
    machine = start_machine(3)
    pools = [make_pool(machine) for _ in range(5)]
    for _ in range(2):
        for pool in pools:
            assert pool.run(["echo", "on"], timeout=5).stdout == b"on\n"


def test_another_process_holds_a_port_until_it_dies(start_machine, make_pool, helpers) -> None:
    machine = start_machine(1)
    pool = make_pool(machine)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(machine.directory)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    try:
        command = int(process.stdout.readline())
        with pytest.raises(Conflict) as caught:
            pool.run(["true"], timeout=0.2)
        assert f"process {process.pid}: /bin/sh -c 'echo $$; sleep 1000'" in str(caught.value)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert pool.run(["echo", "on"]).stdout == b"on\n"
    helpers.eventually(lambda: not helpers.is_alive(command), "what the dead process ran is killed")


def test_the_time_out_includes_a_guest_that_does_not_answer(start_machine, make_pool) -> None:
    machine = start_machine(1)
    machine.agent.process.send_signal(signal.SIGSTOP)
    with pytest.raises(CommandTimeout):
        make_pool(machine).run(["true"], timeout=0.2)
    machine.agent.process.send_signal(signal.SIGCONT)


def test_a_guest_that_was_restarted_under_a_kept_connection_goes_unnoticed(start_machine, make_pool) -> None:
    machine = start_machine(2)
    pool = make_pool(machine)
    pool.run(["true"])
    machine.restart()
    assert pool.run(["cat"], input=b"on").stdout == b"on"
    machine.restart()
    assert pool.run(["cat"], input=io.BytesIO(b"on")).stdout == b"on"


def test_a_command_that_is_lost_in_a_restart_is_told_so(start_machine, make_pool) -> None:
    machine = start_machine(2)
    pool = make_pool(machine)
    with pytest.raises(NotRunning, match="reverted or restarted while"):
        pool.run(["/bin/sh", "-c", "echo; sleep 1000"], on_output=lambda *_: machine.restart())
    assert pool.run(["echo", "on"]).stdout == b"on\n"


def test_a_connection_that_ended_while_idle_is_made_anew(start_machine, make_pool) -> None:
    machine = start_machine(2)
    pool = make_pool(machine)
    pool.run(["true"])
    pool._warm.session.interrupt("as if QEMU had been restarted")
    assert pool.run(["echo", "on"]).stdout == b"on\n"
    assert served(machine) == [2, 0]


def test_reset_ends_what_runs_and_says_hello_anew(start_machine, make_pool) -> None:
    machine = start_machine(2)
    pool = make_pool(machine)

    def reset(*_: object) -> None:
        thread = threading.Thread(target=pool.reset)
        thread.start()
        thread.join(10)

    with pytest.raises(NotRunning, match="reverted or restored"):
        pool.run(["/bin/sh", "-c", "echo; sleep 1000"], on_output=reset)
    assert pool.run(["echo", "on"]).stdout == b"on\n"
    pool.reset()
    assert pool.run(["echo", "on"]).stdout == b"on\n"
    assert served(machine) == [3, 0]


def test_a_time_out_keeps_the_connection(start_machine, make_pool) -> None:
    machine = start_machine(2)
    pool = make_pool(machine)
    with pytest.raises(CommandTimeout):
        pool.run(["sleep", "1000"], timeout=0.2)
    pool.run(["true"])
    assert served(machine) == [1, 0]


def test_check_is_raised_while_ports_are_waited_for(start_machine, make_pool) -> None:
    machine = start_machine(1)
    pool = make_pool(machine)

    def check() -> None:
        raise NotRunning("web is off.")

    def try_another(*_: object) -> None:
        other = Pool(pool._open_port, 1, machine.directory / "locks", check)
        with pytest.raises(NotRunning, match="web is off"):
            other.run(["true"])

    pool.run(["/bin/sh", "-c", "echo; sleep 0"], on_output=try_another)


def test_the_child_of_a_fork_has_connections_of_its_own(start_machine, make_pool) -> None:
    machine = start_machine(3)
    pool = make_pool(machine)
    pool.run(["true"])
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if pool.run(["echo", "child"], timeout=10).stdout == b"child\n" else 2
            pool.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pool.run(["echo", "parent"]).stdout == b"parent\n"
    assert served(machine) == [1, 1, 0]


def test_a_fork_in_mid_command_leaves_the_command_to_the_parent(start_machine, make_pool) -> None:
    machine = start_machine(2)
    pool = make_pool(machine)
    children = []

    def fork(*_: object) -> None:
        children.append(os.fork())
        if children[-1] == 0:
            os._exit(0)

    assert pool.run(["/bin/sh", "-c", "echo; sleep 0.1; exit 5"], on_output=fork).returncode == 5
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0


def test_a_port_is_free_though_a_child_lives_on(start_machine, make_pool) -> None:
    machine = start_machine(1)
    pool, other = make_pool(machine), make_pool(machine)
    reader, writer = os.pipe()
    children = []

    def fork(*_: object) -> None:
        children.append(os.fork())
        if children[-1] == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)

    pool.run(["echo"], on_output=fork)
    assert other.run(["echo", "on"], timeout=5).stdout == b"on\n"
    os.close(writer)
    os.waitpid(children[0], 0)
    os.close(reader)
