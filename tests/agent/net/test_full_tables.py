"""Full routing tables, of a router that speaks BGP or of a list of a country's networks: how much a look at them takes.

What is counted is walks and what is read anew, not time.
"""

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from tests.agent.net.test_audit import WG
from tests.agent.net.test_fib import ip
from tests.agent.net.test_roles import SECOND
from vpn_sentinel.agent.leakwatch.egress_map import EgressMap, egress_map
from vpn_sentinel.agent.net import coverage, fib, rtnetlink
from vpn_sentinel.agent.net.audit import audit
from vpn_sentinel.agent.net.interfaces import Surveyor
from vpn_sentinel.agent.net.kernel import Netlink

MANY = 5000
SPLIT = "via 172.17.0.1 dev eth0"
INSIDE = "dev wg0 table 51820"


@pytest.fixture
def kernel(namespace: None) -> Iterator[Netlink]:
    ip(WG)
    kernel = Netlink()
    yield kernel
    kernel.close()


def many(way: str) -> None:
    lines = "".join(f"route add 20.{n // 128}.{n % 128 * 2}.0/24 {way}\n" for n in range(MANY))
    subprocess.run(["ip", "-batch", "-"], input=lines, text=True, check=True)


def counted(monkeypatch: pytest.MonkeyPatch, where: object, name: str) -> list[object]:
    """Calls of a function, by their arguments, from now on."""
    calls: list[object] = []
    real = getattr(where, name)

    def counting(*arguments: object, **named: object) -> object:
        calls.append(arguments)
        return real(*arguments, **named)

    monkeypatch.setattr(where, name, counting)
    return calls


@pytest.mark.parametrize("way", [INSIDE, SPLIT])
def test_whoever_looks_at_the_same_tables_walks_them_once(
    kernel: Netlink, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    ip(SECOND + "rule add ipproto tcp dport 443 lookup main pref 10")
    many(way)
    flattened = counted(monkeypatch, fib, "flattened")
    walks = counted(monkeypatch, coverage, "_by_device")
    surveyor, stood = Surveyor(kernel), EgressMap()
    for _ in range(5):
        around = surveyor.look()
        stood = egress_map(around, kernel, allowed=(), resolvers=(), before=stood)
        audit(around)
    # Everybody and TCP to port 443, by IPv4; everybody by IPv6; and who is left without the tunnel.
    assert len(walks) <= 5
    # Each table of a rule once, and once more without the tunnel where that leads by it.
    assert len(flattened) <= 9


def test_a_full_table_by_one_device_is_few_parts(kernel: Netlink) -> None:
    many(INSIDE)
    found = kernel.fib()
    assert len(found.segments(4)) > MANY
    assert len(found.segments(4, merge=True)) < 50


def test_what_is_as_it_was_is_not_read_anew(kernel: Netlink, monkeypatch: pytest.MonkeyPatch) -> None:
    many(INSIDE)
    before = kernel.fib()
    parsed = counted(monkeypatch, rtnetlink, "attributes")
    ip("route add 45.83.223.0/24 via 172.17.0.1")
    kernel.changed()
    after = kernel.fib()
    assert after is not before
    assert len(parsed) < 100
    assert set(after.entries) - set(before.entries) == {after.lookup(ip_address("45.83.223.1"))}
    ip("route del 45.83.223.0/24")
    kernel.changed()
    assert kernel.fib().is_like(before)


def test_a_nexthop_object_that_turns_turns_its_routes(kernel: Netlink) -> None:
    Path("/proc/sys/net/ipv4/nexthop_compat_mode").write_text("0", encoding="ascii")
    ip(SECOND + "nexthop add id 7 dev eth1\nroute add 45.83.223.0/24 nhid 7")
    leads = kernel.fib().lookup(ip_address("45.83.223.1"))
    ip("nexthop replace id 7 via 172.17.0.1 dev eth0")
    kernel.changed()
    turned = kernel.fib().lookup(ip_address("45.83.223.1"))
    assert leads is not None
    assert turned is not None
    assert turned.hops != leads.hops
    assert replace(turned, hops=leads.hops) == leads


def test_of_many_networks_outside_some_are_named_and_all_counted(kernel: Netlink) -> None:
    many(SPLIT)
    ip("route add 45.0.0.0/12 via 172.17.0.1")
    (outside,) = [part for part in audit(Surveyor(kernel).look()) or () if part.interface == "eth0"]
    assert str(outside.networks[0]) == "45.0.0.0/12"
    assert len(outside.networks) + outside.more == MANY + 1
