"""How commands reach a guest.

    protocol.py   the frames that host and guest exchange: pure, no I/O
    session.py    one client on one connected port: runs commands, one after another
    pool.py       the ports of one VM, shared by threads and processes
    qga.py        the QEMU guest agent, for images that do not have ours
    result.py     what all of them give back

The other end of the protocol is `labkit/guests/agent/agent.c`.
"""
