"""A packet socket of this kernel's, with the filters that the watch puts on it."""

import asyncio
import contextlib
import os
import socket
import subprocess
import time
from functools import partial
from ipaddress import ip_address
from pathlib import Path

import pytest

from vpn_sentinel.agent.leakwatch import bpf
from vpn_sentinel.agent.leakwatch.rules import Rules
from vpn_sentinel.agent.leakwatch.tap import Tap
from vpn_sentinel.agent.net.endpoints import UDP, Endpoint
from vpn_sentinel.agent.net.packettime import timestamp_socket

FAR = "93.184.216.34"


@pytest.fixture
def old_kernel(namespace: None) -> None:
    """Room for filters as before Linux 6.8."""
    with contextlib.suppress(FileNotFoundError):  # of the whole machine there, and as small
        Path("/proc/sys/net/core/optmem_max").write_text("20480")


async def test_a_filter_follows_another_where_the_kernel_has_no_room_for_two(old_kernel: None) -> None:
    """Else each change of the rules closes every socket, and nothing is watched until the next look."""
    came: list[bytes] = []
    tap = Tap("lo", bpf.program(Rules()), lambda _name, _type, data, _at: came.append(data))
    try:
        tap.filter(bpf.program(Rules(marks=((7, 0xFFFFFFFF),))))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as user:
            user.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
            for mark in (7, 0):
                user.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
                user.sendto(b"marked" if mark else b"hello", (FAR, 4444))
        await asyncio.sleep(0)
        tap.read()
    finally:
        tap.close()
    assert [data[28:] for data in came] == [b"hello"]


@pytest.mark.parametrize("version", [4, 6])
async def test_the_filter_of_a_provider_with_many_servers_has_room(old_kernel: None, version: int) -> None:
    """gluetun and OpenVPN choose one of as many as are named."""
    hosts = (f"198.51.100.{n}" if version == 4 else f"2001:db8::{n:x}" for n in range(1, 33))
    rules = Rules(endpoints=tuple(Endpoint(ip_address(host), 51820, UDP) for host in hosts))
    for made in (bpf.program(rules), bpf.exempt(rules, ()), bpf.inbound(rules)):
        Tap("lo", made, lambda *_: None).close()


async def test_a_packets_time_is_when_it_passed_however_late_it_is_read(namespace: None) -> None:
    """By it an answer is told from what was asked before: of the first packets, too."""
    kept = timestamp_socket()
    assert kept is not None
    passed: list[float] = []
    with kept, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as user:
        await asyncio.sleep(0.2)
        tap = Tap("lo", bpf.program(Rules()), lambda _name, _type, _data, at: passed.append(at))
        try:
            user.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
            user.sendto(b"hello", (FAR, 4444))
            sent = time.time()
            time.sleep(0.1)  # noqa: ASYNC251  (busy with something else)
            tap.read()
        finally:
            tap.close()
    assert len(passed) == 1
    assert passed[0] <= sent


async def test_an_interface_that_is_given_a_name_that_is_no_text_is_not_heard_any_more(namespace: None) -> None:
    """Python tells no such name: that nobody watches it has to be said, and no round may break."""
    came: list[str] = []
    missed: list[int] = []
    odd = os.fsdecode(b"wan\xff\xfe")
    run = partial(subprocess.run, check=True)
    run(["ip", "link", "add", "wan", "type", "veth", "peer", "name", "far"])
    run(["ip", "link", "set", "wan", "up"])
    tap = Tap("wan", bpf.program(Rules()), lambda name, *_: came.append(name), missed.append)
    try:
        assert tap.is_bound_to("wan")
        run(["ip", "link", "set", "wan", "name", odd])
        run(["ip", "link", "set", odd, "up"])
        run(["ip", "link", "set", "far", "up"])
        run(["ip", "route", "add", "default", "dev", odd])
        run(["ip", "neigh", "add", FAR, "lladdr", "02:00:00:00:00:01", "dev", odd])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as user:
            user.sendto(b"hello", (FAR, 4444))
        tap.read()
        assert not tap.is_bound_to("wan")
        assert not tap.is_bound_to("wan\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}")
    finally:
        tap.close()
    assert came == []
    assert missed == [1]
    with pytest.raises(ValueError, match="no text"):
        Tap("wan\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}", bpf.program(Rules()), lambda *_: None)
