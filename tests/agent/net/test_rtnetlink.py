"""Messages captured from a kernel (6.18, x86-64) with strace, and ones made by hand."""

import asyncio
import errno
import os
import socket
import struct
import subprocess
import sys
import time
from ipaddress import ip_address, ip_network
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.agent.doubles import ETH, WG
from tests.conftest import until
from vpn_sentinel.agent.net import rtnetlink as netlink
from vpn_sentinel.agent.net.kernel import Netlink
from vpn_sentinel.agent.net.link import IFF_LOWER_UP, IFF_UP
from vpn_sentinel.agent.net.netlink import attributes, messages
from vpn_sentinel.agent.net.routes import RTN_LOCAL
from vpn_sentinel.agent.net.rtnetlink import parse_address, parse_link
from vpn_sentinel.agent.sensors.netlink import NetworkChanges, NetworkSensor


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def message(kind: int, body: bytes, flags: int = 0, sequence: int = 0) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, sequence, 0) + body + b"\0" * (-len(body) % 4)


def link(index: int, name: str, flags: int, kind: str = "") -> bytes:
    body = struct.pack("=BxHiII", 0, 1, index, flags, 0) + attribute(3, name.encode() + b"\0")
    if kind:
        body += attribute(18 | 0x8000, attribute(1, kind.encode()))
    return body + attribute(23, struct.pack("=4Q", 1, 2, 1000, 2000))


def address(index: int, text: str) -> bytes:
    packed = ip_address(text).packed
    return struct.pack("=BBBBi", 2 if len(packed) == 4 else 10, 24, 0, 0, index) + attribute(1, packed)


def route(table: int = 254, flags: int = 0) -> bytes:
    return struct.pack("=8BI", 2, 0, 0, 0, table, 3, 0, 1, flags)


def test_a_link_is_read() -> None:
    found = parse_link(link(7, "wg0", IFF_UP, "wireguard"))
    assert found is not None
    assert (found.index, found.name, found.kind, found.rx_bytes, found.tx_bytes) == (7, "wg0", "wireguard", 1000, 2000)


def test_a_name_that_cannot_be_printed_can_be_reported() -> None:
    found = parse_link(link(7, "a\x1b[31m", 0))
    assert found is not None
    assert found.name == "a?[31m"


def test_an_address_is_the_local_one() -> None:
    body = address(3, "10.0.0.1") + attribute(2, ip_address("10.0.0.2").packed)
    assert parse_address(body) == (3, ip_address("10.0.0.2"))
    assert parse_address(address(3, "2001:db8::1")) == (3, ip_address("2001:db8::1"))
    assert parse_address(struct.pack("=BBBBi", 2, 24, 0, 0, 3)) is None


def test_the_network_of_an_address_and_the_next_hop_of_a_route() -> None:
    assert netlink.parse_network(address(7, "10.66.0.2")) == (7, ip_network("10.66.0.0/24"))
    assert (
        netlink.parse_network(struct.pack("=BBBBi", 2, 99, 0, 0, 7) + attribute(1, ip_address("10.66.0.2").packed))
        is None
    )
    found = netlink.parse_route(route() + attribute(5, ip_address("10.66.0.9").packed))
    assert found is not None
    assert (found.gateway, found.next_hop) == (True, ip_address("10.66.0.9"))


def test_what_is_cut_off_is_left_out() -> None:
    whole = message(16, link(1, "lo", 0))
    assert [m.type for m in messages(whole + whole[:20])] == [16]
    assert list(messages(struct.pack("=IHHII", 4, 0, 0, 0, 0))) == []
    assert attributes(struct.pack("=HH", 2, 1)) == {}
    assert attributes(struct.pack("=HH", 99, 1)) == {}
    assert parse_link(b"") is None
    assert parse_address(b"") is None
    assert netlink.parse_route(b"") is None


@given(st.binary(max_size=200))
def test_no_bytes_break_the_parsers(data: bytes) -> None:
    parse_link(data)
    parse_address(data)
    netlink.parse_network(data)
    netlink.parse_route(data)
    NetworkChanges().notice(data)
    NetworkChanges().notice(message(16, data) + message(20, data) + message(24, data))


def test_the_kernel_knows_the_loopback() -> None:
    kernel = Netlink()
    try:
        lo = next(i for i in kernel.interfaces() if i.name == "lo")
        assert ip_network("127.0.0.0/8") in lo.networks
        found = kernel.route(ip_address("127.0.0.1"), port=53)
        assert found is not None
        assert (found.interface, found.type) == (lo.index, RTN_LOCAL)
        matched = kernel.route(ip_address("127.0.0.1"), match=True)
        assert matched is not None
    finally:
        kernel.close()


NEWS = {
    "a link goes down": (message(16, link(3, "wg0", 0)), True),
    "a link loses its other end": (message(16, link(3, "wg0", IFF_UP)), True),
    "a link repeats itself": (message(16, link(3, "wg0", IFF_UP | IFF_LOWER_UP)), False),
    "a new link": (message(16, link(9, "tun0", 0)), True),
    "a link is deleted": (message(17, link(3, "wg0", 0)), True),
    "an unknown link is deleted": (message(17, link(77, "x", 0)), False),
    "an address is renewed": (message(20, address(2, "192.168.1.20")), False),
    "a new address": (message(20, address(2, "192.168.1.21")), True),
    "an address goes": (message(21, address(2, "192.168.1.20")), True),
    "an unknown address goes": (message(21, address(2, "192.0.2.9")), False),
    "a route comes": (message(24, route()), True),
    "a route goes": (message(25, route()), True),
    "a route of the host's own": (message(24, route(table=255)), False),
    "a cached route": (message(24, route(flags=0x200)), False),
    "a rule comes": (message(32, b""), True),
    "a rule goes": (message(33, b""), True),
    "a neighbour": (message(28, b""), False),
    "nonsense": (b"\x01", False),
    "a link cut short": (message(16, b"x"), False),
    "an address cut short": (message(20, b"x"), False),
}


@pytest.mark.parametrize(("data", "news"), NEWS.values(), ids=NEWS.keys())
def test_changes_are_told_from_repetitions(data: bytes, news: bool) -> None:
    assert NetworkChanges((ETH, WG)).notice(data) is news


def test_a_change_is_news_once() -> None:
    changes = NetworkChanges((ETH, WG))
    down = message(16, link(3, "wg0", 0))
    assert changes.notice(down)
    assert not changes.notice(down)
    assert changes.notice(message(20, address(3, "10.0.0.9")))
    assert changes.notice(message(21, address(3, "10.0.0.9")))
    assert changes.notice(message(20, address(3, "10.0.0.9")))


async def test_the_sensor_tells_once_of_many_changes_at_once() -> None:
    told: list[int] = []
    kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)
    sensor = NetworkSensor(lambda: told.append(1), (ETH, WG), ours)
    sensor.start()
    try:
        kernel.send(message(20, address(2, "192.168.1.20")))  # a repetition
        for _ in range(5):
            kernel.send(message(24, route()))
        await until(lambda: told)
        assert told == [1]
        kernel.send(message(32, b""))
        await until(lambda: len(told) == 2)
        kernel.send(message(32, b""))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    finally:
        sensor.close()
        kernel.close()


async def test_changes_while_it_rests_from_one_that_took_long_are_one() -> None:
    loop = asyncio.get_running_loop()
    began: list[float] = []
    kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.setblocking(False)

    def changed() -> None:
        began.append(loop.time())
        until = time.thread_time() + 0.15
        while time.thread_time() < until:  # as full tables do
            pass

    sensor = NetworkSensor(changed, (ETH, WG), ours)
    sensor.start()
    try:
        while len(began) < 3:
            kernel.send(message(24, route()))
            await asyncio.sleep(0.01)
        assert all(later - sooner > 0.5 for sooner, later in pairwise(began))  # three of four parts are rest
    finally:
        sensor.close()
        kernel.close()


def test_after_lost_messages_what_seems_to_repeat_the_known_is_news() -> None:
    changes = NetworkChanges((ETH, WG))
    up = message(16, link(3, "wg0", IFF_UP | IFF_LOWER_UP))
    assert not changes.notice(up)
    changes.forget()  # among what was lost: wg0 went down
    assert changes.notice(up)
    assert not changes.notice(up)
    changes.forget()
    assert changes.notice(message(17, link(2, "eth0", 0)))
    assert changes.notice(message(21, address(2, "192.168.1.20")))


class Broken(socket.socket):
    """A socket that can be read, and fails each time, as no more than a bug or the kernel could make it."""

    def recv(self, *_: object) -> bytes:
        raise OSError(errno.EIO, "broken")


async def test_a_socket_that_breaks_is_replaced_and_what_was_missed_is_looked_for() -> None:
    told: list[int] = []
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    broken = Broken(fileno=one.detach())
    kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    for sock in (broken, ours):
        sock.setblocking(False)
    sensor = NetworkSensor(lambda: told.append(1), (ETH, WG), broken, subscribe=lambda: ours)
    sensor.start()
    try:
        other.send(b"x")
        await until(lambda: told)
        kernel.send(message(32, b""))
        await until(lambda: len(told) == 2)
    finally:
        sensor.close()
        kernel.close()
        other.close()


OVERRUN = """
import asyncio, socket, subprocess
from vpn_sentinel.agent.sensors.netlink import NetworkSensor, subscribed

async def main():
    told = []
    sock = subscribed()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sensor = NetworkSensor(lambda: told.append(1), (), sock)
    sensor.start()
    def burst(times):
        lines = "".join(f"link set lo {state}\\n" for _ in range(times) for state in ("up", "down"))
        subprocess.run(["ip", "-batch", "-"], input=lines, text=True, check=True)
    burst(200)  # more than the socket holds: ENOBUFS
    async with asyncio.timeout(20):
        while not told:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        once = len(told)
        subprocess.run("ip link set lo up".split(), check=True)
        while len(told) == once:
            await asyncio.sleep(0.01)
    sensor.close()
    print(once)

asyncio.run(main())
"""


async def test_more_news_than_the_socket_holds_are_news_and_the_next_are_heard() -> None:
    alone = ["unshare", "--user", "--net", "--map-root-user", sys.executable, "-c", OVERRUN]
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = await asyncio.create_subprocess_exec(*alone, env=env, stdout=-1, stderr=-1)
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    if b"unshare:" in err:
        pytest.skip(f"no namespaces here: {err.decode().strip()}")
    assert process.returncode == 0, err.decode()
    assert int(out) >= 1


def test_a_kernel_socket_that_broke_fails_one_question() -> None:
    descriptor = os.open("/dev/null", os.O_RDWR)  # the lowest that is free: the socket's
    os.close(descriptor)
    kernel = Netlink()
    try:
        assert kernel.interfaces()
        other = os.open("/dev/null", os.O_RDWR)
        os.dup2(other, descriptor)
        os.close(other)
        with pytest.raises(OSError, match="non-socket"):
            kernel.interfaces()
        assert any(i.name == "lo" for i in kernel.interfaces())
        assert kernel.route(ip_address("127.0.0.1")) is not None
    finally:
        kernel.close()


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True)


async def test_a_nexthop_object_that_turns_is_news(namespace: None) -> None:
    told = asyncio.Event()
    ip("link set lo up")
    ip("nexthop add id 7 dev lo")
    sensor = NetworkSensor(told.set)
    sensor.start()
    try:
        ip("nexthop replace id 7 blackhole")
        await asyncio.wait_for(told.wait(), 5)
    finally:
        sensor.close()


async def test_the_kernel_lets_us_listen() -> None:
    sensor = NetworkSensor(lambda: None)
    sensor.start()
    sensor.close()
