"""Messages captured from a kernel (6.18, x86-64) with strace, and ones made by hand."""

import asyncio
import socket
import struct
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.agent.doubles import ETH, WG
from tests.conftest import until
from vpn_sentinel.agent import netlink
from vpn_sentinel.agent.net.attributes import attributes
from vpn_sentinel.agent.net.link import IFF_LOWER_UP, IFF_UP
from vpn_sentinel.agent.netlink import Netlink, messages, parse_address, parse_link
from vpn_sentinel.agent.sensors.netlink import Changes, NetworkSensor


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
    assert [m.kind for m in messages(whole + whole[:20])] == [16]
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
    Changes().notice(data)
    Changes().notice(message(16, data) + message(20, data) + message(24, data))


def test_the_kernel_knows_the_loopback() -> None:
    kernel = Netlink()
    try:
        lo = next(i for i in kernel.interfaces() if i.name == "lo")
        assert ip_network("127.0.0.0/8") in lo.networks
        found = kernel.route(ip_address("127.0.0.1"), port=53)
        assert found is not None
        assert (found.interface, found.kind) == (lo.index, netlink.LOCAL)
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
    assert Changes((ETH, WG)).notice(data) is news


def test_a_change_is_news_once() -> None:
    changes = Changes((ETH, WG))
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


async def test_the_kernel_lets_us_listen() -> None:
    sensor = NetworkSensor(lambda: None)
    sensor.start()
    sensor.close()
