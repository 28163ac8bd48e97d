"""What routes and rules send past the tunnel, on real tables in a namespace."""

from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from tests.agent.net.test_fib import ip
from tests.agent.net.test_roles import GATEWAY, LAN, OPENCONNECT, OPENVPN, SECOND, WG_QUICK
from vpn_sentinel.agent.leakwatch.meant import MeantOutside, parse_meant
from vpn_sentinel.agent.net.audit import audit
from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.interfaces import Surveyor, survey
from vpn_sentinel.agent.net.kernel import Netlink
from vpn_sentinel.domain.observation import Routed

WG = LAN + GATEWAY + WG_QUICK.format("wg0")
SIX = """
addr add 2001:db8:17::2/64 dev eth0 nodad
-6 route add default via 2001:db8:17::1
addr add fd00:2::2/128 dev wg0 nodad
-6 route add default dev wg0 table 51820
-6 rule add not fwmark 51820 table 51820
-6 rule add table main suppress_prefixlength 0
"""
# Set-up, and by device (and kind of traffic) the networks that leave beside the tunnel.
OUTSIDE: dict[str, tuple[str, dict[str, list[str]]]] = {
    "wg-quick": (WG, {}),
    "OpenVPN": (LAN + GATEWAY + OPENVPN.format("tun0", "tun"), {}),
    "OpenConnect": (LAN + GATEWAY + OPENCONNECT, {}),
    "both versions": (WG + SIX, {}),
    "one half": (WG + "route add 128.0.0.0/1 via 172.17.0.1 dev eth0 table 51820", {"eth0": ["128.0.0.0/1"]}),
    "one network": (WG + "route add 5.9.10.0/24 via 172.17.0.1", {"eth0": ["5.9.10.0/24"]}),
    "a rule to one network": (WG + "rule add to 5.9.10.0/24 lookup main pref 10", {"eth0": ["5.9.10.0/24"]}),
    "by the second uplink": (WG + SECOND + "route add 5.9.0.0/16 via 172.18.0.1", {"eth1": ["5.9.0.0/16"]}),
    "part of IPv6": (WG + SIX + "-6 route add 2000::/4 via 2001:db8:17::1", {"eth0": ["2000::/4"]}),
    "balanced": (
        WG + "route replace default table 51820 nexthop dev wg0 nexthop via 172.17.0.1 dev eth0",
        {"eth0": ["0.0.0.0/0"]},
    ),
    "one port": (WG + "rule add ipproto tcp dport 443 lookup main pref 10", {"eth0 TCP to port 443": ["0.0.0.0/0"]}),
    "one protocol": (WG + "rule add ipproto udp lookup main pref 10", {"eth0 UDP": ["0.0.0.0/0"]}),
    "one type of service": (
        WG + "rule add tos 0x10 lookup main pref 10", {"eth0 packets with TOS 0x10": ["0.0.0.0/0"]}
    ),
    "a route for one type of service": (
        WG + "route add default via 172.17.0.1 dev eth0 tos 0x08 table 51820",
        {"eth0 packets with TOS 0x08": ["0.0.0.0/0"]},
    ),
    "people's packets": (
        WG + "rule add uidrange 1000-60000 lookup main pref 10", {"eth0 packets of users 1000-60000": ["0.0.0.0/0"]}
    ),
    "everybody's but root's": (
        WG + "rule add not uidrange 0-0 lookup main pref 10", {"eth0 packets of all but user 0": ["0.0.0.0/0"]}
    ),
    "the users of system programs": (WG + "rule add uidrange 100-999 lookup main pref 10", {}),
    "NAT64": (WG + SIX + "-6 route add 64:ff9b::/96 via 2001:db8:17::1", {"eth0": ["64:ff9b::/96"]}),
    "a NAT64 of one's own": (
        WG + SIX + "-6 route add 64:ff9b:1::/48 via 2001:db8:17::1", {"eth0": ["64:ff9b:1::/48"]}
    ),
    "what has the tunnel's address": (WG + "rule add from 10.2.0.2 lookup main pref 10", {"eth0": ["0.0.0.0/0"]}),
    "the server by a rule for it": (
        LAN + GATEWAY + """
        tuntap add wg0 mode tun
        link set wg0 up
        addr add 10.2.0.2/32 dev wg0
        route add default dev wg0 table 100
        rule add lookup 100 pref 1000
        rule add to 198.51.100.7 lookup main pref 900
        """,
        {},
    ),
    "private networks": (WG + "route add 192.168.0.0/16 via 172.17.0.1", {}),
    "what lists of private networks hold beside these": (
        WG + SIX + "route add 203.0.113.0/24 via 172.17.0.1\nroute add 192.88.99.0/24 via 172.17.0.1\n"
        "-6 route add 3fff::/20 via 2001:db8:17::1", {},
    ),
    "refused": (WG + "route add blackhole 5.9.10.0/24", {}),
    "a second host beside the VPN's": (
        LAN + GATEWAY + OPENCONNECT + "route add 5.9.10.20/32 via 172.17.0.1", {"eth0": ["5.9.10.20/32"]}
    ),
    "the ports of everybody's connections": (
        WG + "rule add ipproto udp sport 32768-60999 lookup main pref 10",
        {"eth0 UDP from ports 32768-60999": ["0.0.0.0/0"]},
    ),
    "a program's own port": (WG + "rule add ipproto udp sport 41641 lookup main pref 10", {}),
    "one user is meant to go outside": (WG + "rule add uidrange 990-990 lookup main pref 10", {}),
    "the default class of another mark": (WG + "rule add fwmark 0x80000/0xff0000 lookup main pref 10", {}),
}  # fmt: skip
# A bridge with containers behind it, whose packets this host passes on.
BRIDGE = (
    WG
    + """
link add docker0 type bridge
link set docker0 up
addr add 172.18.5.1/24 dev docker0
"""
)
PASSED_ON: dict[str, tuple[str, list[str]]] = {
    "no rule": ("", []),
    "what comes in there": (
        "rule add iif docker0 lookup main pref 10", ["eth0 packets from 172.18.5.0/24"],
    ),
    "from its network": (
        "rule add from 172.18.5.0/24 lookup main pref 10", ["eth0 packets from 172.18.5.0/24"],
    ),
    "from one container": (
        "rule add from 172.18.5.9 lookup main pref 10", ["eth0 packets from 172.18.5.9/32"],
    ),
    "from a wider network": (
        "rule add from 172.16.0.0/12 lookup main pref 10", ["eth0 packets from 172.18.5.0/24"],
    ),
    "from this host's own address there": ("rule add from 172.18.5.1 lookup main pref 10", []),
    "from this host's own address on the line": ("rule add from 172.17.0.2 lookup main pref 10", []),
    "into the tunnel": ("rule add iif docker0 lookup 51820 pref 10", []),
    "from a network that is not there": ("rule add from 10.99.0.0/16 lookup main pref 10", []),
}  # fmt: skip
SERVER = ip_address("198.51.100.7")


def look(*may_leave: str, servers: bool = True) -> tuple[Routed, ...]:
    kernel = Netlink()
    try:
        networks = [ip_network(n) for n in may_leave]
        found = audit(survey(kernel), may_leave=networks, servers=[SERVER] if servers else [])
    finally:
        kernel.close()
    assert found is not None
    return found


@pytest.mark.parametrize(("setup", "outside"), OUTSIDE.values(), ids=OUTSIDE.keys())
def test_what_leaves_beside_the_tunnel_is_named(namespace: None, setup: str, outside: dict[str, list[str]]) -> None:
    ip(setup)
    tunnel = {"wg0", "tun0"}
    found = {f"{p.interface} {p.only}".strip(): p for p in look() if p.interface not in tunnel}
    assert found.keys() == outside.keys()
    for name, networks in outside.items():
        assert {ip_network(n) for n in networks} <= set(found[name].networks)
    inside = [p for p in look() if p.interface in tunnel and p.family == 4]
    assert inside
    assert inside[0].share > 0.4 or outside


@pytest.mark.parametrize(
    ("rule", "ports"),
    {
        "ipproto udp dport 53 tos 0x10": (53, 53),
        "ipproto udp dport 53-54": (53, 54),
        "dport 1-65534": (1, 65534),
        "ipproto udp": None,
        "tos 0x10": None,
        "ipproto udp sport 32768-60999": None,
    }.items(),
)
def test_the_ports_that_a_rule_selects_are_reported(namespace: None, rule: str, ports: tuple[int, int] | None) -> None:
    ip(f"{WG}rule add {rule} lookup main pref 10")
    (part,) = [p for p in look() if p.interface == "eth0"]
    assert part.ports == ports


def test_the_ports_that_a_rule_selects_under_a_mask_are_reported(namespace: None) -> None:
    """The mask is put in here: kernels before Linux 6.15 take none."""
    ip(f"{WG}rule add ipproto udp dport 53 lookup main pref 10")
    kernel = Netlink()
    try:
        seen = survey(kernel)
    finally:
        kernel.close()
    assert seen.fib is not None
    rules = [replace(r, destination_mask=0xFFFE) if r.destination_ports else r for r in seen.fib.rules]
    fib = Fib(rules=tuple(rules), entries=seen.fib.entries, groups=seen.fib.groups)
    (part,) = [p for p in audit(replace(seen, fib=fib), servers=[SERVER]) or () if p.interface == "eth0"]
    assert (part.only, part.ports) == ("UDP to port 53 under mask 0xfffe", (52, 53))


@pytest.mark.parametrize(("rule", "outside"), PASSED_ON.values(), ids=PASSED_ON.keys())
def test_what_this_host_passes_on_beside_the_tunnel_is_named(namespace: None, rule: str, outside: list[str]) -> None:
    ip(BRIDGE + rule)
    forwarding = Path("/proc/sys/net/ipv4/conf/docker0/forwarding")
    for on in ("1", "0"):
        forwarding.write_text(on)
        found = [f"{p.interface} {p.only}".strip() for p in look() if p.interface != "wg0"]
        assert found == (outside if on == "1" else [])


def test_what_is_meant_to_leave_is_left_out(namespace: None) -> None:
    ip(WG + "route add 5.9.10.0/24 via 172.17.0.1")
    assert {p.interface for p in look("5.9.0.0/16")} == {"wg0"}
    found = next(p for p in look("5.9.10.0/25") if p.interface == "eth0")
    assert found.networks == (ip_network("5.9.10.128/25"),)


@pytest.mark.parametrize(
    ("rule", "meant", "other"),
    [
        ("ipproto udp dport 123", "port 123/udp", "port 124/udp"),
        ("dport 8000-8010", "port 8000-8080/tcp; port 8000-8080/udp", "port 8000-8080/tcp"),
        ("ipproto tcp dport 22", "interface eth0", "interface eth1"),
    ],
)
def test_what_is_declared_to_go_outside_is_left_out(namespace: None, rule: str, meant: str, other: str) -> None:
    ip(f"{WG}rule add {rule} lookup main pref 10")
    kernel = Netlink()
    try:
        seen = survey(kernel)
    finally:
        kernel.close()

    def outside(declared: MeantOutside) -> set[str]:
        found = audit(seen, servers=[SERVER], interfaces=declared.interfaces, is_meant=declared.covers)
        return {p.interface for p in found or ()} - {"wg0"}

    assert outside(parse_meant(meant)) == set()
    assert outside(parse_meant(other)) == {"eth0"}


def test_a_public_network_behind_a_nat_is_not_local(namespace: None) -> None:
    """A stranger's router gives out addresses of the internet's (LocalNet, CVE-2023-36672)."""
    ip(WG + "addr add 93.184.216.99/24 dev eth0")
    around = Surveyor(kernel := Netlink())
    try:
        before = audit(around.look())
        assert around.learn_exits({"eth0": frozenset({ip_network("91.10.10.20/32")})})
        assert not around.learn_exits({"eth0": frozenset({ip_network("91.10.10.20/32")})})
        after = audit(around.look())
    finally:
        kernel.close()
    assert before is not None
    assert after is not None
    assert {p.interface for p in before} == {"wg0"}
    assert {p.networks for p in after if p.interface == "eth0"} == {(ip_network("93.184.216.0/24"),)}


def test_while_nobody_knows_the_vpns_server_a_host_by_a_router_may_be_it(namespace: None) -> None:
    ip(LAN + GATEWAY + OPENCONNECT)
    assert {p.interface for p in look(servers=False)} == {"tun0"}


def test_a_public_nameserver_by_a_router_is_no_vpns_server(namespace: None) -> None:
    """Without the right to watch packets its route alone tells."""
    ip(LAN + GATEWAY + OPENCONNECT + "route add 208.67.222.222 via 172.17.0.1\nroute add 1.2.3.4 via 172.17.0.1")
    kernel = Netlink()
    try:
        found = audit(Surveyor(kernel).look(), services=[ip_address("208.67.222.222")]) or ()
    finally:
        kernel.close()
    assert {p.networks for p in found if p.interface != "tun0"} == {(ip_network("208.67.222.222/32"),)}


def test_a_country_is_named_by_its_largest_networks(namespace: None) -> None:
    ip(WG + "\n".join(f"route add 5.{n}.0.0/17 via 172.17.0.1" for n in range(40)))
    found = next(p for p in look() if p.interface == "eth0")
    assert (len(found.networks), found.more) == (16, 24)
    assert 0 < found.share < 0.001
