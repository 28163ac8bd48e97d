"""The walk through rules and tables, held against the kernel's own answers."""

import os
import random
import socket
import struct
import subprocess
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest

from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.kernel import Netlink
from vpn_sentinel.agent.net.link import Interface
from vpn_sentinel.agent.net.netlink import attribute
from vpn_sentinel.agent.net.routes import RTN_LOCAL, RTN_UNICAST
from vpn_sentinel.agent.net.routing_rules import Sender
from vpn_sentinel.agent.net.space import intersect, joined, subtract

DEVICES = """
link set lo up
link add eth0 type veth peer name far0
link add eth1 type veth peer name far1
link set eth0 up
link set far0 up
link set eth1 up
link set far1 up
addr add 172.17.0.2/16 dev eth0
addr add 172.18.0.2/16 dev eth1
addr add 2001:db8:17::2/64 dev eth0 nodad
tuntap add wg0 mode tun
link set wg0 up
addr add 10.2.0.2/32 dev wg0
addr add fd00:2::2/128 dev wg0 nodad
route add default via 172.17.0.1
route add default via 172.18.0.1 metric 100
-6 route add default via 2001:db8:17::1
"""
SETUPS = {
    "wg-quick": """
        route add default dev wg0 table 51820
        rule add not fwmark 51820 table 51820
        rule add table main suppress_prefixlength 0
        -6 route add default dev wg0 table 51820
        -6 rule add not fwmark 51820 table 51820
        -6 rule add table main suppress_prefixlength 0
        route add 5.9.10.0/24 via 172.17.0.1
    """,
    "OpenVPN": """
        route add 198.51.100.7/32 via 172.17.0.1
        route add 0.0.0.0/1 dev wg0
        route add 128.0.0.0/1 dev wg0
        -6 route add 2000::/3 dev wg0
        -6 route add 2000::/4 via 2001:db8:17::1
    """,
    "gluetun": """
        route add default via 172.17.0.1 table 200
        rule add from 172.17.0.2 lookup 200 pref 100
        rule add to 172.17.0.0/16 lookup main pref 98
        route add default dev wg0 table 51820
        rule add not fwmark 51820 lookup 51820 pref 101
    """,
    "Tailscale": """
        route add default dev wg0 table 52
        route add throw 192.168.0.0/16 table 52
        rule add fwmark 0x80000/0xff0000 lookup main pref 5210
        rule add fwmark 0x80000/0xff0000 lookup default pref 5230
        rule add fwmark 0x80000/0xff0000 unreachable pref 5250
        rule add lookup 52 pref 5270
    """,
    "one user": """
        route add default dev wg0 table 42
        rule add uidrange 997-997 lookup 42
        rule add uidrange 998-998 prohibit
    """,
    "suppressed by the device's group": """
        link set eth0 group 16
        route add 93.0.0.0/8 via 172.17.0.1
        route add 94.0.0.0/8 via 172.18.0.1
        route add 95.0.0.0/8 nexthop via 172.17.0.1 nexthop via 172.18.0.1
        route add 96.0.0.0/8 nexthop via 172.18.0.1 nexthop via 172.17.0.1
        route add unreachable 97.0.0.0/8
        route add default dev wg0 table 51820
        rule add table 51820
        rule add table main suppress_ifgroup 16 suppress_prefixlength 0
        -6 route add 2400::/12 via 2001:db8:17::1
        -6 route add default dev wg0 table 51820
        -6 rule add table 51820
        -6 rule add table main suppress_ifgroup 16
    """,
    "by nexthop objects": """
        link del wg0
        link add wg0 type veth peer name far2
        link set far2 up
        link set wg0 up
        addr add 10.2.0.2/32 dev wg0
        addr add fd00:2::2/128 dev wg0 nodad
        nexthop add id 1 dev wg0
        nexthop add id 2 via 172.17.0.1 dev eth0
        nexthop add id 3 via 172.18.0.1 dev eth1
        nexthop add id 4 blackhole
        nexthop add id 5 group 3
        -6 nexthop add id 6 dev wg0
        -6 nexthop add id 7 via 2001:db8:17::1 dev eth0
        nexthop add id 8 via inet6 2001:db8:17::1 dev eth0
        route add default nhid 1 table 51820
        rule add not fwmark 51820 table 51820
        rule add table main suppress_prefixlength 0
        route add 93.0.0.0/8 nhid 2
        route add 94.0.0.0/8 nhid 5 table 51820
        route add 5.0.0.0/8 nhid 4 table 51820
        route add 193.0.0.0/8 nhid 8
        -6 route add default nhid 6 table 51820
        -6 rule add not fwmark 51820 table 51820
        -6 rule add table main suppress_prefixlength 0
        -6 route add 2400::/12 nhid 7
    """,
    "by protocol and port": """
        route add default dev wg0 table 51820
        rule add lookup 51820 pref 1000
        rule add ipproto tcp dport 443 lookup main pref 900
        rule add ipproto udp sport 51820 lookup main pref 901
        rule add ipproto icmp lookup main pref 902
        rule add not to 10.0.0.0/8 fwmark 7 lookup main pref 903
    """,
    "refused and passed over": """
        route add blackhole 1.1.1.0/24
        route add unreachable 8.8.0.0/16
        route add prohibit 9.9.9.9
        route add throw 5.0.0.0/8 table 7
        route add default dev wg0 table 7
        rule add lookup 7 pref 50
        rule add goto 32766 pref 40 to 93.184.216.0/24
        rule add blackhole to 208.67.0.0/16 pref 45
    """,
    "rules that lead on to rules that lead on": """
        route add default dev wg0 table 7
        route add default via 172.18.0.1 table 8
        rule add goto 302 pref 90 to 93.0.0.0/8
        rule add goto 300 pref 100 to 0.0.0.0/1
        rule add goto 200 pref 110 fwmark 7
        rule add lookup 7 pref 120 to 128.0.0.0/2
        rule add goto 310 pref 200 to 192.0.0.0/3
        rule add lookup 8 pref 300 to 93.0.0.0/8
        rule add goto 32766 pref 305 to 5.0.0.0/8
        rule add lookup 7 pref 310
        rule add goto 40000 pref 320
    """,
    "by source": """
        -6 route del default via 2001:db8:17::1
        -6 route add default from 2001:db8:17::/64 via 2001:db8:17::1 metric 512
        -6 route add default dev wg0 metric 1024
        -6 route add 2400::/12 from fd00:2::/64 dev wg0
        -6 route add 2400::/16 from fd00::/16 via 2001:db8:17::1
        -6 route add 2400::/16 from fd00:2::2 dev wg0 metric 2048
    """,
    "halves": """
        route add default dev wg0 table 51820
        rule add lookup 51820 pref 1000
        route add 128.0.0.0/1 via 172.17.0.1 dev eth0 table 51820
        route add 5.9.0.0/16 via 172.18.0.1 table 51820 metric 5
        route add 5.9.0.0/16 dev wg0 table 51820 metric 9
    """,
}
SENDERS = (
    Sender(),
    Sender(mark=51820),
    Sender(mark=0x80000),
    Sender(mark=7),
    Sender(uid=997),
    Sender(uid=998),
    Sender(protocol=6, destination_port=443),
    Sender(protocol=17, destination_port=443),
    Sender(protocol=17, source_port=51820, destination_port=53),
    Sender(protocol=1),
    Sender(source=ip_address("172.17.0.2")),
    Sender(source=ip_address("10.2.0.2")),
    Sender(source=ip_address("2001:db8:17::2")),
    Sender(source=ip_address("fd00:2::2")),
)


def ip(lines: str) -> None:
    for line in lines.strip().splitlines():
        if line.strip():
            subprocess.run(["ip", *line.split()], check=True)


def asked(destination: str, sender: Sender) -> str | None:
    """The device by `ip route get`, "" for this host itself, None when the kernel refuses."""
    words: list[str] = ["ip", "-o", "route", "get", destination]
    words += ["mark", str(sender.mark)] if sender.mark else []
    words += ["uid", str(sender.uid if sender.uid is not None else 12345)]
    words += ["from", str(sender.source)] if sender.source else []
    words += ["ipproto", str(sender.protocol)] if sender.protocol else []
    words += ["sport", str(sender.source_port)] if sender.source_port else []
    words += ["dport", str(sender.destination_port)] if sender.destination_port else []
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    said = done.stdout.split()
    return "" if said[0] == "local" else said[said.index("dev") + 1]


def destinations() -> Sequence[str]:
    rng = random.Random(7)
    some = [str(IPv4Address(rng.getrandbits(32))) for _ in range(12)]
    some += ["5.9.10.20", "5.1.2.3", "1.1.1.1", "8.8.8.8", "9.9.9.9", "198.51.100.7", "93.184.216.34", "208.67.222.222"]
    some += ["192.168.1.1", "172.17.0.9", "10.2.0.2", "10.9.9.9", "94.9.9.9", "193.0.14.129", "2400:cb00::1"]
    some += [str(IPv6Address((0b001 << 125) | rng.getrandbits(125))) for _ in range(4)]
    return [d for d in (*some, "2001:db8:17::2") if ":" in d or int(d.split(".")[0]) not in (0, 127, *range(224, 256))]


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())
def test_it_walks_as_the_kernel_does(namespace: None, setup: str) -> None:
    ip(DEVICES)
    ip(setup)
    walks_as_the_kernel()


def test_it_walks_as_the_kernel_does_where_routes_only_name_their_nexthops(namespace: None) -> None:
    Path("/proc/sys/net/ipv4/nexthop_compat_mode").write_text("0", encoding="ascii")
    ip(DEVICES)
    ip(SETUPS["by nexthop objects"])
    walks_as_the_kernel()
    ip("link set eth1 down")  # and 94.0.0.0/8 with it
    walks_as_the_kernel()
    ip("""
        nexthop replace id 5 group 1/2
        -6 nexthop replace id 7 dev wg0
        nexthop del id 2
    """)
    fib = walks_as_the_kernel()
    balanced = fib.lookup(ip_address("94.9.9.9"))
    assert balanced is not None
    assert len(balanced.hops) == 1  # nexthop 2 went, and its place in the group with it


def walks_as_the_kernel() -> Fib:
    fib, wrong = compared()
    for _ in range(5):
        again, before = read(), fib
        if (again.rules, again.entries) == (before.rules, before.entries):
            break
        fib, wrong = compared()  # a device that was just switched on got its carrier, or an address, meanwhile
    assert not wrong
    return fib


def read() -> Fib:
    kernel = Netlink()
    try:
        return kernel.fib()
    finally:
        kernel.close()


def interfaces() -> tuple[Interface, ...]:
    kernel = Netlink()
    try:
        return kernel.interfaces()
    finally:
        kernel.close()


def compared() -> tuple[Fib, list[object]]:
    """All that is read now, and where the walk through it comes to another end than the kernel."""
    fib, names = read(), dict(socket.if_nameindex())
    wrong: list[object] = []
    for destination in destinations():
        for sender in SENDERS:
            address = ip_address(destination)
            if sender.source is not None and sender.source.version != address.version:
                continue
            if sender.protocol == 1 and address.version == 6:
                continue
            found = fib.lookup(address, sender)
            if found is None:
                mine: str | None = None
            elif found.type == RTN_LOCAL:
                mine = ""
            else:
                mine = names[found.hops[0].interface] if found.type == RTN_UNICAST else None
            if mine != (said := asked(destination, sender)):
                wrong.append((destination, sender, mine, said))
            parts = [s for s in fib.segments(address.version, sender) if s.first <= int(address) <= s.last]
            assert len(parts) <= 1
            spread = parts[0].entry if parts else None
            assert spread is found or (found is None and spread is not None and spread.type != RTN_UNICAST)
            ways = fib.segments(address.version, sender, merge=True)
            way = [s.interfaces for s in ways if s.first <= int(address) <= s.last]
            assert way == [s.interfaces for s in parts]
    return fib, wrong


def test_a_socket_without_an_address_gets_one_where_all_routes_are_for_a_source(namespace: None) -> None:
    ip(DEVICES)
    ip("""
        -6 route del default via 2001:db8:17::1
        -6 route add default from 2001:db8:17::/64 via 2001:db8:17::1
    """)
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.connect(("2606:4700::1111", 53))
        assert sock.getsockname()[0] == "2001:db8:17::2"
    found, names = read().lookup(ip_address("2606:4700::1111")), dict(socket.if_nameindex())
    assert found is not None
    assert [names[h.interface] for h in found.hops] == ["eth0"]


def test_a_balanced_route_leads_by_all_its_devices(namespace: None) -> None:
    ip(DEVICES)
    ip("route replace default nexthop dev wg0 nexthop via 172.17.0.1 dev eth0")
    kernel = Netlink()
    try:
        fib, names = kernel.fib(), {i.index: i.name for i in kernel.interfaces()}
    finally:
        kernel.close()
    found = fib.lookup(ip_address("1.1.1.1"))
    assert found is not None
    assert {names[h.interface] for h in found.hops} == {"wg0", "eth0"}
    wg0 = next(h.interface for h in found.hops if names[h.interface] == "wg0")
    left = fib.without(wg0).lookup(ip_address("1.1.1.1"))
    assert left is not None
    assert [names[h.interface] for h in left.hops] == ["eth0"]


def new_rule(table: int, *more: tuple[int, bytes]) -> None:
    """Make an IPv4 rule with attributes that iproute2 may be too old for (RTM_NEWRULE, linux/fib_rules.h)."""
    fixed = struct.pack("=8BI", socket.AF_INET, 0, 0, 0, 0, 0, 0, 1, 0)
    body = fixed + b"".join(attribute(k, v) for k, v in ((15, struct.pack("=I", table)), *more))
    create_and_answer = 0x1 | 0x4 | 0x400 | 0x200
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        sock.send(struct.pack("=IHHII", 16 + len(body), 32, create_and_answer, 1, 0) + body)
        (code,) = struct.unpack_from("=i", sock.recv(4096), 16)
    if code:
        pytest.skip(f"this kernel takes no such rule: {os.strerror(-code)}")


@pytest.mark.parametrize(
    ("selector", "inside", "outside"),
    [
        (((25, b"\x2e"),), ["tos 0", "tos 0x10"], ["tos 0xb8"]),
        (((25, b"\x28"), (30, b"\x38")), ["tos 0", "tos 0x88"], ["tos 0xb8", "tos 0xa0"]),
        (
            ((22, b"\x11"), (24, struct.pack("=HH", 4444, 4444)), (29, struct.pack("=H", 0xFFFC))),
            ["ipproto udp dport 4443", "ipproto udp dport 4448", "ipproto tcp dport 4445"],
            ["ipproto udp dport 4444", "ipproto udp dport 4447"],
        ),
        (
            ((22, b"\x11"), (23, struct.pack("=HH", 1, 1)), (28, struct.pack("=H", 0x1))),
            ["ipproto udp sport 4444 dport 9"],
            ["ipproto udp sport 4445 dport 9"],
        ),
    ],
    ids=["DSCP", "DSCP under a mask", "a port under a mask", "odd ports"],
)
def test_rules_of_newer_kernels_select_as_the_kernel_does(
    namespace: None, selector: tuple[tuple[int, bytes], ...], inside: list[str], outside: list[str]
) -> None:
    """Linux 6.12 knows DSCP, 6.15 masks of it and of ports, and says the whole mask of every rule that has one."""
    ip(DEVICES)
    ip("route replace default dev wg0")
    ip("route add default via 172.17.0.1 table 100")
    new_rule(100, *selector)
    fib = read()
    names = {i.index: i.name for i in interfaces()}
    for words in (*inside, *outside):
        given = dict(zip(words.split()[::2], words.split()[1::2], strict=True))
        sender = Sender(
            tos=int(given.get("tos", "0"), 16),
            protocol={"udp": 17, "tcp": 6}.get(given.get("ipproto", ""), 0),
            source_port=int(given.get("sport", "0")),
            destination_port=int(given.get("dport", "0")),
        )
        said = subprocess.run(
            ["ip", "-o", "route", "get", "1.1.1.1", *words.split()], capture_output=True, text=True, check=True
        ).stdout.split()
        found = fib.lookup(ip_address("1.1.1.1"), sender)
        assert found is not None
        assert names[found.hops[0].interface] == said[said.index("dev") + 1], words
        assert (words in outside) is (names[found.hops[0].interface] == "eth0")


def test_ten_thousand_routes_are_one_walk(namespace: None) -> None:
    ip(DEVICES)
    lines = "".join(
        f"route add {20 + n // 65536}.{n // 256 % 256}.{n % 256}.0/24 via 172.17.0.1\n" for n in range(10_000)
    )
    subprocess.run(["ip", "-batch", "-"], input=lines, text=True, check=True)
    kernel = Netlink()
    try:
        fib = kernel.fib()
    finally:
        kernel.close()
    assert len([s for s in fib.segments(4) if s.entry is not None and s.entry.prefix == 24]) == 10_000


def test_a_thousand_rules_that_lead_on_are_one_walk(namespace: None) -> None:
    subprocess.run(
        ["ip", "-batch", "-"],
        input="".join(f"rule add pref {n} goto {n + 1}\n" for n in range(1, 1501)),
        text=True,
        check=True,
    )
    ip(DEVICES)
    assert all(s.entry is not None for s in read().segments(4))


def test_an_empty_kernel_routes_nothing() -> None:
    assert Fib().lookup(ip_address("1.1.1.1")) is None
    assert Fib().segments(4) == []


def test_intervals() -> None:
    assert intersect([(0, 10), (20, 30)], [(5, 25)]) == [(5, 10), (20, 25)]
    assert subtract([(0, 10), (20, 30)], [(5, 25)]) == [(0, 4), (26, 30)]
    assert subtract([(0, 10)], [(2, 3), (5, 6)]) == [(0, 1), (4, 4), (7, 10)]
    assert joined([(5, 6), (0, 4), (9, 9)]) == [(0, 6), (9, 9)]
