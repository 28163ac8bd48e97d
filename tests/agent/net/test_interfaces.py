from dataclasses import replace
from ipaddress import ip_address

import pytest

from tests.agent.doubles import ETH, LO, UP, WG, FakeKernel, surveyed
from vpn_sentinel.agent.leakwatch.egress_map import EgressMap, egress_map
from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.interfaces import Paths, Surveyor, survey
from vpn_sentinel.agent.net.link import IFF_POINTOPOINT, IFF_UP, Interface
from vpn_sentinel.agent.net.roles import Remembered
from vpn_sentinel.agent.net.routes import RTN_LOCAL
from vpn_sentinel.agent.net.rtnetlink import Route
from vpn_sentinel.domain.observation import Escape, Path

TAILSCALE = Interface(
    index=4, name="tailscale0", kind="tun", flags=UP | IFF_POINTOPOINT, addresses=(ip_address("100.64.0.1"),)
)
PPP = Interface(index=5, name="ppp0", kind="ppp", flags=UP | IFF_POINTOPOINT, addresses=(ip_address("203.0.113.5"),))
BRIDGE = Interface(index=6, name="docker0", kind="bridge", flags=UP, addresses=(ip_address("172.17.0.1"),))


def test_the_tunnel_is_the_vpn_interface_that_carries_the_internet() -> None:
    found = survey(FakeKernel(links=(LO, ETH, TAILSCALE, WG)))
    assert found.tunnel == "wg0"
    link = found.link()
    assert link is not None
    assert (link.name, link.present, link.up, link.rx_bytes, link.tx_bytes) == ("wg0", True, True, 11, 12)


def test_a_vpn_interface_that_carries_only_its_own_network_is_none() -> None:
    found = survey(FakeKernel(links=(LO, ETH, TAILSCALE), default=2))
    assert found.tunnel is None
    assert found.link() is None


def test_one_rule_for_one_destination_does_not_hide_the_tunnel() -> None:
    assert survey(FakeKernel(routes={"1.1.1.1": Route(interface=2)})).tunnel == "wg0"


def test_a_remembered_tunnel_is_missed() -> None:
    link = survey(FakeKernel(links=(LO, ETH), default=2), remembered=Remembered(tunnel="wg0")).link()
    assert link is not None
    assert (link.name, link.present, link.up) == ("wg0", False, False)


def test_another_tunnel_takes_the_place_of_a_remembered_one() -> None:
    assert survey(FakeKernel(), remembered=Remembered(tunnel="tun0")).tunnel == "wg0"


def test_a_home_line_over_ppp_does_not_take_its_place() -> None:
    assert survey(FakeKernel(links=(LO, PPP), default=5), remembered=Remembered(tunnel="wg0")).tunnel == "wg0"
    assert survey(FakeKernel(links=(LO, PPP), default=5)).tunnel is None


def test_what_the_server_remembers_is_believed_where_nothing_is_remembered_here() -> None:
    fresh = Surveyor(FakeKernel(links=(LO, ETH), default=2))
    assert fresh.look().tunnel is None
    assert fresh.learn("wg0", ["eth0"])
    link = fresh.look().link()
    assert link is not None
    assert (link.name, link.present) == ("wg0", False)
    assert not fresh.learn("tun7", [])
    assert fresh.look().tunnel == "wg0"


def test_a_configured_name_wins() -> None:
    assert survey(FakeKernel(), configured="tun7", remembered=Remembered(tunnel="wg0")).tunnel == "tun7"


def test_a_tun_without_its_process_is_down() -> None:
    link = survey(FakeKernel(links=(LO, ETH, replace(WG, flags=IFF_UP | IFF_POINTOPOINT)))).link()
    assert link is not None
    assert (link.present, link.up) == (True, False)


@pytest.mark.parametrize("kernel", [None, FakeKernel(broken=True)], ids=["no netlink", "netlink refuses"])
def test_where_the_kernel_cannot_be_asked_nothing_is_known(kernel: FakeKernel | None) -> None:
    found = survey(kernel, configured="wg0")
    assert (found.link(), found.names(), found.physical, found.tunnel) == (None, None, None, "wg0")
    assert found.owns(ip_address("10.0.0.1"))
    assert Paths(kernel, found).of(ip_address("1.1.1.1")) is Path.UNKNOWN


def test_the_physical_interface_is_the_one_with_a_gateway() -> None:
    found = survey(FakeKernel(links=(LO, BRIDGE, TAILSCALE, replace(ETH, index=9), WG), gateways={9, 3}))
    assert found.physical is not None
    assert found.physical.name == "eth0"


def test_without_a_gateway_one_with_an_address_will_do() -> None:
    found = survey(FakeKernel(links=(LO, BRIDGE, WG), gateways=set()))
    assert found.physical is not None
    assert found.physical.name == "docker0"


@pytest.mark.parametrize(
    "interface",
    [replace(ETH, addresses=()), replace(ETH, addresses=(ip_address("fe80::1"),)), replace(ETH, flags=0)],
    ids=["no address", "link-local only", "switched off"],
)
def test_an_interface_that_cannot_lead_anywhere_is_not_physical(interface: Interface) -> None:
    assert survey(FakeKernel(links=(LO, interface, WG))).physical is None


def test_names_are_all_but_lo() -> None:
    found = survey(FakeKernel())
    assert found.names() == ("eth0", "wg0")
    assert found.owns(ip_address("10.66.0.2"))
    assert not found.owns(ip_address("10.66.0.3"))
    assert survey(FakeKernel(links=(LO,), default=None), remembered=Remembered(tunnel="wg0")).names() == ()


PATHS = {
    "tunnel": (Route(interface=3), Path.TUNNEL),
    "physical": (Route(interface=2), Path.OUTSIDE),
    "this host": (Route(interface=1, type=RTN_LOCAL), Path.LOCAL),
    "loopback": (Route(interface=1), Path.LOCAL),
    "another vpn": (Route(interface=4), Path.UNKNOWN),
    "no route": (None, Path.UNKNOWN),
    "an interface that just came": (Route(interface=99), Path.UNKNOWN),
}


@pytest.mark.parametrize(("route", "path"), PATHS.values(), ids=PATHS.keys())
def test_paths(route: Route | None, path: Path) -> None:
    seen = surveyed(LO, ETH, WG, TAILSCALE)
    assert Paths(FakeKernel(routes={"192.0.2.1": route}), seen).of(ip_address("192.0.2.1")) is path


def test_a_kernel_that_stops_answering_makes_paths_unknown() -> None:
    seen = surveyed(LO, ETH, WG)
    kernel = FakeKernel(broken=True)
    assert Paths(kernel, seen).of(ip_address("192.0.2.1")) is Path.UNKNOWN
    assert not Paths(kernel, seen).has_host_route(ip_address("192.0.2.1"), 5000)
    assert not Paths(None, seen).has_host_route(ip_address("192.0.2.1"), 5000)


def test_a_host_route_is_a_way_of_its_own() -> None:
    seen = surveyed(LO, ETH, WG)
    kernel = FakeKernel(routes={"192.0.2.1": Route(interface=2, prefix=32), "192.0.2.2": Route(interface=2, prefix=0)})
    assert Paths(kernel, seen).has_host_route(ip_address("192.0.2.1"), 5000)
    assert not Paths(kernel, seen).has_host_route(ip_address("192.0.2.2"), 5000)


class Steady(FakeKernel):
    """Its tables are the same object while nothing changed in them, as `Netlink`'s are."""

    tables = FakeKernel().fib()

    def fib(self) -> Fib:
        return self.tables


def test_a_way_out_is_the_same_one_when_it_has_carried_more() -> None:
    kernel = Steady(routes={"192.0.2.1": Route(interface=2)})
    surveyor = Surveyor(kernel)
    for carrier_of in range(4):
        kernel.links = (LO, replace(ETH, rx_bytes=carrier_of, tx_bytes=carrier_of), replace(WG, rx_bytes=carrier_of))
        seen = surveyor.look()
        assert Paths(kernel, seen).of(ip_address("192.0.2.1")) is Path.OUTSIDE
        assert egress_map(seen, None, allowed=(), resolvers=(), before=EgressMap()).others == frozenset()
        link = seen.link()
        assert link is not None
        assert link.rx_bytes == carrier_of


def test_a_packet_that_left_beside_the_tunnel_is_told_with_how_routes_send_it() -> None:
    """A program that binds itself to eth0 is not helped by a route: there is one already."""
    there = ip_address("203.0.113.9")
    beside = Escape(interface="eth0", protocol="udp", source=ip_address("192.0.2.2"), destination=there)
    found = survey(FakeKernel())
    by_route = FakeKernel(routes={str(there): Route(interface=2)})
    assert [e.path for e in Paths(FakeKernel(), found).known_of((beside,))] == [Path.TUNNEL]
    assert [e.path for e in Paths(by_route, found).known_of((beside,))] == [Path.OUTSIDE]
    assert [e.path for e in Paths(None, found).known_of((beside,))] == [Path.UNKNOWN]
