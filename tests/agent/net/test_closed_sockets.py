"""Sockets that ended, told by the kernel about real ones."""

import socket
import time
from collections.abc import AsyncIterator
from ipaddress import ip_address

import pytest

from tests.conftest import until
from vpn_sentinel.agent.net.closed_sockets import ClosedSockets

SET = {"by": 0.0}  # by how many seconds the clock was set
LO, FAR = ip_address("127.0.0.1"), ip_address("192.0.2.1")


@pytest.fixture
async def closed() -> AsyncIterator[ClosedSockets]:
    found = ClosedSockets(lambda: time.time() + SET["by"])
    SET["by"] = 0.0
    yield found
    found.close()


def used(device: bytes = b"", *, connect: bool = False) -> int:
    """Send to port 9 of this host from a socket that is closed at once; returns its port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        if device:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
        if connect:
            made.connect(("127.0.0.1", 9))
            made.send(b"x")
        else:
            made.sendto(b"x", ("127.0.0.1", 9))
        return int(made.getsockname()[1])


@pytest.mark.parametrize("connect", [False, True])
async def test_how_a_socket_that_ended_was_bound(closed: ClosedSockets, *, connect: bool) -> None:
    since = time.time()
    free, bound = used(connect=connect), used(b"lo", connect=connect)
    await until(lambda: closed.of(17, LO, free, LO, 9, since=since))
    await until(lambda: closed.of(17, LO, bound, LO, 9, since=since))
    assert [s.device for s in closed.of(17, LO, free, LO, 9, since=since)] == [0]
    assert [s.device for s in closed.of(17, LO, bound, LO, 9, since=since)] == [socket.if_nametoindex("lo")]
    assert closed.of(6, LO, free, LO, 9, since=since) == []  # of another protocol
    assert closed.of(17, LO, free, LO, 9, since=time.time()) == []  # before that
    assert bool(closed.of(17, LO, free, FAR, 9, since=since)) is not connect


async def test_a_connection_that_was_refused(closed: ClosedSockets) -> None:
    since = time.time()
    with socket.socket() as refused:
        refused.bind(("127.0.0.1", 0))
        port = refused.getsockname()[1]
        refused.connect_ex(("127.0.0.1", 9))
    await until(lambda: closed.of(6, LO, port, LO, 9, since=since))


async def test_more_than_the_kernel_keeps_is_no_end(closed: ClosedSockets) -> None:
    since = time.time()
    assert not closed.lost(since)
    for _ in range(20_000):
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
    await until(lambda: closed.of(17, LO, 1, LO, 9, since=since) == [] and closed.lost(since))
    assert not closed.lost(time.time())
    later: list[int] = []

    def is_told() -> bool:
        later.append(used())
        return any(closed.of(17, LO, port, LO, 9, since=since) for port in later)

    await until(is_told)


async def test_what_ended_before_the_clock_was_set_back_is_of_no_packet_after_it(closed: ClosedSockets) -> None:
    since = time.time()
    port = used()
    await until(lambda: closed.of(17, LO, port, LO, 9, since=since))
    for _ in range(20_000):
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).close()
    await until(lambda: closed.of(17, LO, 1, LO, 9, since=since) == [] and closed.lost(since))
    SET["by"] = -3600.0
    assert not closed.lost(since - 3600)
    assert closed.of(17, LO, port, LO, 9, since=since - 3600) == []
