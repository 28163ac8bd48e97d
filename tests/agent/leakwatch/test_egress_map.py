"""Which interfaces are watched, and what counts as LAN, as the VPN's host and as a way of its own."""

import struct
from collections.abc import Collection
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network

import pytest

from tests.agent.doubles import ETH, LO, UP, WG, surveyed
from vpn_sentinel.agent.leakwatch.egress_map import EgressMap, egress_map
from vpn_sentinel.agent.net.endpoints import parse_endpoint
from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.kernel import DeviceRoute, device_routes
from vpn_sentinel.agent.net.link import IFF_POINTOPOINT, Interface
from vpn_sentinel.agent.net.routes import Hop, RouteEntry
from vpn_sentinel.agent.net.routing_rules import Rule
from vpn_sentinel.agent.net.rtnetlink import Route, parse_entry, parse_link
from vpn_sentinel.domain.policy import IPAddress

TUN = replace(WG, name="tun0", kind="tun")


@dataclass
class Tables:
    found: tuple[DeviceRoute, ...] = ()

    def device_routes(self, by: Collection[int]) -> tuple[DeviceRoute, ...]:
        return tuple(w for w in self.found if w.interface in by)

    def route(
        self,
        destination: IPAddress,
        *,
        port: int = 0,
        protocol: int = 17,
        source: tuple[IPAddress, int] | None = None,
    ) -> Route | None:
        return None  # the ground asks for no single packet

    def changed(self) -> None:
        """What it holds is never read twice."""


def way(network: str, interface: int = 2, *, gateway: bool = False) -> DeviceRoute:
    return DeviceRoute(network=ip_network(network), interface=interface, gateway=gateway)


def stand(tables: Tables, *links: Interface, tunnel: str = "wg0", before: EgressMap | None = None) -> EgressMap:
    return egress_map(
        surveyed(*(links or (LO, ETH, WG)), tunnel=tunnel),
        tables,
        allowed=(),
        resolvers=(),
        before=before or EgressMap(),
    )


def test_only_what_leads_out_of_this_host_is_watched() -> None:
    bridge = Interface(index=5, name="br0", kind="bridge", flags=UP)
    others = (
        Interface(index=6, name="veth1", kind="veth", flags=UP, master=5),
        Interface(index=7, name="dummy0", kind="dummy", flags=UP),
        Interface(index=8, name="tailscale0", kind="tun", flags=UP | IFF_POINTOPOINT),
    )
    assert [i.name for i in stand(Tables(), LO, ETH, WG, bridge, *others).interfaces] == ["eth0", "br0"]


LAN = {
    "the network that we are in": (way("192.168.1.0/24"), True),
    "a private network behind a router": (way("192.168.9.0/24", gateway=True), True),
    "a public network that we are in": (way("203.0.113.0/24"), True),
    "a public network on the link, without an address of ours": (way("198.51.100.0/24"), False),
    "a public network behind a router": (way("203.0.113.0/24", gateway=True), False),
    "half of the internet": (way("0.0.0.0/1", gateway=True), False),
    "the other half, without a router": (way("128.0.0.0/1"), False),
    "a network behind the tunnel": (way("10.0.0.0/8", 3), False),
    "unique local addresses": (way("fd00::/8", gateway=True), True),
}


@pytest.mark.parametrize(("found", "lan"), LAN.values(), ids=LAN.keys())
def test_what_is_lan(found: DeviceRoute, lan: bool) -> None:
    eth = replace(ETH, addresses=(*ETH.addresses, ip_address("203.0.113.9")))
    assert (found.network in stand(Tables((found,)), LO, eth, WG).rules.lan) is lan


def test_a_host_route_is_believed_for_the_vpns_host_only() -> None:
    hosts = Tables((way("198.51.100.7/32", gateway=True), way("203.0.113.5/32", gateway=True)))
    openvpn = stand(hosts, LO, ETH, TUN, tunnel="tun0")
    assert openvpn.can_tell_tunnel(())
    assert {str(n) for n in openvpn.with_endpoints((), ()).outside} == {"198.51.100.7/32", "203.0.113.5/32"}
    known = openvpn.with_endpoints([parse_endpoint("198.51.100.7:1194")], ())
    assert {str(n) for n in known.outside} == {"198.51.100.7/32"}
    another = openvpn.with_endpoints((), (), [parse_endpoint("192.0.2.1:51820")])
    assert {str(n) for n in another.outside} == {"198.51.100.7/32", "203.0.113.5/32"}
    wireguard = stand(hosts)
    assert not wireguard.can_tell_tunnel(())
    assert wireguard.with_endpoints((), ()).outside == ()
    server = wireguard.with_endpoints((), [ip_address("203.0.113.5")])
    assert {str(n) for n in server.outside} == {"203.0.113.5/32"}


def test_the_vpns_host_by_its_ports_where_those_are_known() -> None:
    hosts = Tables((way("198.51.100.7/32", gateway=True), way("203.0.113.5/32", gateway=True)))
    openvpn = stand(hosts, LO, ETH, TUN, tunnel="tun0")
    ends, ours = [parse_endpoint("198.51.100.7:1194")], ip_address("203.0.113.5")
    assert openvpn.candidates((), ()) == ((ends[0].address, ours), False)
    assert openvpn.candidates((), [ours]) == ((ends[0].address,), False)
    assert openvpn.candidates(ends, ()) == ((ends[0].address,), True)
    assert stand(hosts).candidates((), ()) == ((), False)  # WireGuard's needs no route
    for rules in (
        openvpn.with_endpoints(ends, [ours], closed=True),
        openvpn.with_endpoints((), [ours], ends, ends[0].address, closed=True),
    ):
        assert (rules.endpoints, [str(n) for n in rules.outside]) == (tuple(ends), ["203.0.113.5/32"])


def test_what_told_the_tunnels_packets_holds_while_its_interface_is_gone() -> None:
    before = stand(Tables((way("198.51.100.7/32", gateway=True),)), LO, ETH, TUN, tunnel="tun0")
    gone = stand(Tables(), LO, ETH, tunnel="tun0", before=before)
    assert gone.can_tell_tunnel(())
    assert [str(n) for n in gone.with_endpoints((), ()).outside] == ["198.51.100.7/32"]


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + b"\0" * (-len(value) % 4)


def route(prefix: int, *attributes: bytes, kind: int = 1) -> bytes:
    return struct.pack("=8BI", 2, prefix, 0, 0, 254, 0, 0, kind, 0) + b"".join(attributes)


def test_routes_and_masters_are_read() -> None:
    net, oif = attribute(1, bytes([10, 1, 0, 0])), attribute(4, struct.pack("=I", 2))

    def read(body: bytes) -> list[DeviceRoute]:
        entry = parse_entry(body)
        return [] if entry is None else list(device_routes(entry, [2]))

    assert read(route(16, net, oif)) == [way("10.1.0.0/16")]
    assert read(route(16, net, oif, attribute(5, bytes([10, 0, 0, 1])))) == [way("10.1.0.0/16", gateway=True)]
    assert read(route(0, oif)) == []
    assert read(route(16, net)) == []
    assert read(route(16, net, oif, kind=2)) == []
    assert read(b"short") == []
    link = parse_link(
        struct.pack("=BxHiII", 0, 1, 4, 1, 0) + attribute(3, b"p1\0") + attribute(10, struct.pack("=I", 7))
    )
    assert link is not None
    assert (link.name, link.master) == ("p1", 7)


def test_an_endpoint_that_nothing_here_reaches_switches_off_no_other_evidence() -> None:
    hosts = Tables((way("198.51.100.7/32", gateway=True),))
    wrapped = stand(hosts)  # WireGuard whose endpoint is a wrapper on this host, or on the LAN
    for told in ("127.0.0.1:51820", "192.168.1.9:51820"):
        ends = [parse_endpoint(told)]
        assert wrapped.can_tell_tunnel(ends)
        assert [str(n) for n in wrapped.with_endpoints(ends, ()).outside] == ["198.51.100.7/32"]
    elsewhere = [parse_endpoint("203.0.113.9:51820")]  # one that is reached here is the VPN's host, and no other
    assert wrapped.with_endpoints(elsewhere, ()).outside == ()


def test_an_endpoint_behind_another_tunnel_is_no_evidence_here() -> None:
    other = Interface(index=9, name="wg1", kind="wireguard", flags=UP)
    found = replace(stand(Tables((way("198.51.100.7/32", gateway=True),))), others=frozenset({9}))
    route = RouteEntry(version=4, table=254, first=int(ip_address("203.0.113.9")), prefix=32, hops=(Hop(other.index),))
    found = replace(found, fib=Fib((Rule(version=4, priority=1, table=254),), (route,)))
    ends = [parse_endpoint("203.0.113.9:51820")]
    assert [str(n) for n in found.with_endpoints(ends, ()).outside] == ["198.51.100.7/32"]
    assert found.can_tell_tunnel(ends)
