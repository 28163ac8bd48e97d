"""Situations from the field by their row, shown with dig, curl, ping and tcpdump, without VPN Sentinel."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import pytest

from bench.situations import traffic
from lab import Home, Lab, Site, dscp, plan
from tests.lab.test_kinds import APART, FOUR, SIX, askers, pings, seen

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root: it makes network namespaces"),
    pytest.mark.xdist_group("field"),
]

NOBODYS = "93.184.216.34"  # routed nowhere in the lab
HIGH, LOW = "208.67.222.222", "1.1.1.1"  # in the upper and in the lower half of IPv4
SITES = [
    Site("rootless", uplink="rootless", kill_switch=False),
    Site("novpn", vpn=None, uplink="rootless"),
    Site("ppp", uplink="ppp", kill_switch=False),
    Site("two", uplink="two", kill_switch=True),
    Site("bare", uplink="bare", kill_switch=False),
    Site("docker", uplink="docker", kill_switch=False),
    Site("open", kill_switch=False),
    Site("closed", kill_switch=True, lan_server=True, kill_switch_lan=True),
    Site("user", user=997, kill_switch=False),
    Site("connect", vpn="openconnect", kill_switch=False),
    Site("switch", other="openvpn-tcp", kill_switch=True),
    Site("moving", next_server=True, kill_switch=True),
    Site("movingovpn", vpn="openvpn", next_server=True, kill_switch=True),
    Site("standby", standby="ch", resolver="public", kill_switch=False),
    Site("standbyovpn", vpn="openvpn", standby="ch", resolver="public", kill_switch=False),
    Site("late", standby="ch", standby_waits=True, resolver="public", kill_switch=True),
    Site("openovpn", vpn="openvpn", kill_switch=False),
    Site("carrier", cgnat=True, mtu=1460, kill_switch=False),
]


@pytest.fixture(scope="module")
def field() -> Iterator[Lab]:
    with Lab(SITES) as running:
        yield running


@pytest.fixture
def home(field: Lab) -> Iterator[Callable[[str], Home]]:
    used: list[Home] = []

    def by_name(name: str) -> Home:
        used.append(field.site(name))
        return used[-1]

    yield by_name
    for each in used:
        each.heal()


def test_row_47_a_rootless_container_leaks_by_tap0(home: Callable[[str], Home]) -> None:
    site = home("rootless")
    assert site.host.has_link("tap0")
    assert not site.host.has_link("eth0")
    assert seen(site) == site.exit4
    site.delete_tunnel()
    assert seen(site) == site.home4


def test_row_48_without_a_vpn_tap0_is_the_way_home(home: Callable[[str], Home]) -> None:
    site = home("novpn")
    assert "default via 10.0.2.2 dev tap0" in site.run(["ip", "route"]).stdout
    assert seen(site) == site.home4


def test_row_49_a_router_leaks_by_ppp0(home: Callable[[str], Home]) -> None:
    site = home("ppp")
    assert "POINTOPOINT" in site.run(["ip", "link", "show", "ppp0"]).stdout
    assert "default dev ppp0" in site.run(["ip", "route"]).stdout
    assert seen(site) == site.exit4
    site.delete_tunnel()
    assert seen(site) == site.home4


def test_row_50_a_kill_switch_that_knows_one_network(home: Callable[[str], Home]) -> None:
    site = home("two")
    assert seen(site) == site.exit4
    out = [
        site.run(["curl", "-s", "-m", "2", "--interface", i, f"https://{FOUR}/cdn-cgi/trace"]) for i in ("eth0", "eth1")
    ]
    assert f"ip={site.home4}" not in out[0].stdout
    assert f"ip={site.home4}" in out[1].stdout


def test_row_51_no_way_but_to_the_vpn_server(field: Lab, home: Callable[[str], Home]) -> None:
    site = home("bare")
    assert seen(site) == site.exit4
    site.block_endpoint()
    assert seen(site) is None
    assert site.endpoint is not None
    assert "default" not in site.run(["ip", "route"]).stdout
    assert pings(site, site.endpoint[0])  # the home connection is well


def test_row_52_a_default_route_over_two_ways(home: Callable[[str], Home]) -> None:
    site = home("open")
    site.balance_default()
    targets = [f"1.1.1.{n}" for n in range(1, 33)]
    routes = [site.run(["ip", "route", "get", target]).stdout for target in targets]
    assert any(" dev wg0 " in route for route in routes)
    assert any(" dev eth0 " in route for route in routes)


@pytest.mark.parametrize("name", ["closed", "docker"])
def test_row_54_a_resolver_on_the_own_link_asks_the_isp(field: Lab, home: Callable[[str], Home], name: str) -> None:
    site = home(name)
    site.lan_forwarder()
    assert site.resolvers == ({"docker": "172.17.0.1"}.get(name, site.router4),)
    assert askers(field, site) == {plan.ISP_RESOLVER_EGRESS}
    assert seen(site) == site.exit4


def test_row_55_an_ad_blocker_answers_a_whoami_name_itself(field: Lab, home: Callable[[str], Home]) -> None:
    site = home("open")
    site.ad_block()
    assert site.run(["dig", "+short", "whoami.akamai.net"]).stdout.strip() == "0.0.0.0"
    assert askers(field, site) == {plan.PROVIDERS["nl"].resolver_egress}


def test_row_56_without_a_nameserver_no_program_resolves(home: Callable[[str], Home]) -> None:
    site = home("open")
    site.use_resolvers([])
    asked = "import socket; socket.getaddrinfo('fresh.probe.test', 443)"
    assert "gaierror" in site.run([sys.executable, "-c", asked], timeout=60).stderr
    assert seen(site) == site.exit4


def test_row_57_half_of_ipv4_outside(home: Callable[[str], Home]) -> None:
    site = home("open")
    site.route_outside("128.0.0.0/1")
    assert " dev eth0 " in site.run(["ip", "route", "get", HIGH]).stdout
    assert seen(site, LOW) == site.exit4


def test_row_59_a_published_page_answers_by_the_uplink(field: Lab, home: Callable[[str], Home]) -> None:
    site = home("open")
    site.spawn([sys.executable, "-m", "http.server", "8088", "--bind", "0.0.0.0"], log="page")
    site.host.wait_port(8088)
    site.publish(8088)
    with field.capture(site, "tcp port 8088") as wire:
        assert field.http("srv", "GET", f"http://{site.home4}:8088/", timeout=5).status == 200
        wire.settle()
    assert site.home4 in {p.src for p in wire.packets()}
    assert seen(site) == site.exit4


_MARKED = f"""
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as program:
    program.setsockopt(socket.SOL_SOCKET, 36, 0x80000)  # SO_MARK
    program.sendto(b"STUN", ("{APART}", 3478))
"""


def test_row_60_packets_with_a_mark_go_by_main(field: Lab, home: Callable[[str], Home]) -> None:
    site = home("open")
    site.mark_outside()
    with field.capture(site, "udp port 3478") as wire:
        site.run([sys.executable, "-c", _MARKED], check=True)
        wire.settle()
    assert [p.src for p in wire.packets()] == [site.home4]
    assert seen(site) == site.exit4


def test_row_78_a_firewalls_mark_leads_connections_outside(home: Callable[[str], Home]) -> None:
    site = home("open")
    site.firewall_marks("tcp dport 443")
    said = site.run(["curl", "-sS", "-m", "3", f"https://{FOUR}/cdn-cgi/trace"]).stdout
    assert f"ip={site.home4}" in said
    told = site.run(["dig", "+short", "@1.1.1.1", "CH", "TXT", "whoami.cloudflare"]).stdout
    assert site.exit4 in told  # datagrams go through the tunnel


def test_row_61_one_user_goes_by_the_vpn(home: Callable[[str], Home]) -> None:
    site = home("user")
    trace = ["curl", "-sS", "-m", "3", f"https://{FOUR}/cdn-cgi/trace"]
    as_user = site.run(["setpriv", "--reuid=997", "--clear-groups", *trace])
    assert f"ip={site.exit4}" in as_user.stdout
    assert seen(site) == site.home4


def test_row_62_what_leaves_of_a_tcp_wrapper_is_tcp() -> None:
    with Lab([Site("a", vpn="wireguard-tcp", kill_switch=True)]) as lab:
        site = lab.site("a")
        assert "127.0.0.1:51821" in site.run(["wg", "show", "wg0", "endpoints"]).stdout
        with lab.capture(site, "ip") as wire:
            assert seen(site) == site.exit4
            wire.settle()
        assert {(p.dst, p.dport) for p in wire.packets() if p.src == site.home4} == {site.endpoint}


def test_row_63_a_host_route_that_is_not_the_vpns(field: Lab, home: Callable[[str], Home]) -> None:
    site = home("connect")
    site.route_outside(f"{APART}/32")
    with field.capture(site, f"host {APART}") as wire:
        pings(site, APART)
        wire.settle()
    assert site.home4 in {p.src for p in wire.packets()}
    assert seen(site) == site.exit4


def test_row_63_all_that_goes_to_the_vpn_servers_own_host_leaves_beside_the_tunnel(
    field: Lab, home: Callable[[str], Home]
) -> None:
    site = home("connect")
    server = site.line.endpoint
    for protocol in ("tcp", "udp"):
        with field.capture(site, f"{protocol} port 4444") as wire:
            site.run(["timeout", "1", "bash", "-c", f"echo secret > /dev/{protocol}/{server}/4444"])
            wire.settle()
        assert server in {p.dst for p in wire.packets() if p.src == site.home4}
    assert seen(site) == site.exit4


def test_row_64_another_protocol_under_the_same_kill_switch(field: Lab, home: Callable[[str], Home]) -> None:
    site = home("switch")
    assert (site.vpn_interface, seen(site)) == ("wg0", site.exit4)
    servers = {plan.PROVIDERS["nl"].server(octet) for octet in plan.SERVERS}
    with field.capture(site, "ip") as wire:
        site.switch_protocol()
        site.wait_up()
        assert (site.vpn_interface, seen(site)) == ("tun0", site.exit4)
        wire.settle()
    assert {p.dst for p in wire.packets() if p.src == site.home4} <= servers
    site.heal()
    assert (site.vpn_interface, seen(site)) == ("wg0", site.exit4)


@pytest.mark.parametrize("name", ["moving", "movingovpn"])
def test_row_79_the_next_server_of_the_list(field: Lab, home: Callable[[str], Home], name: str) -> None:
    site = home(name)
    assert seen(site) == site.exit4
    first = site.endpoint
    with field.capture(site, "ip") as wire:
        site.move_server()
        site.wait_up()
        assert seen(site) == site.exit4
        wire.settle()
    left = {(p.dst, p.dport) for p in wire.packets() if p.src == site.home4}
    assert site.endpoint in left <= {first, site.endpoint}
    assert site.endpoint != first


@pytest.mark.parametrize("name", ["open", "openovpn"])
def test_row_80_a_nexthop_object_is_turned_outside(field: Lab, home: Callable[[str], Home], name: str) -> None:
    site = home(name)
    site.route_by_object("93.0.0.0/8")
    with field.capture(site, f"host {NOBODYS}") as wire:
        traffic.call_out(site, NOBODYS)
        wire.settle()
    assert wire.packets() == []
    said = site.run(["ip", "route", "show", "93.0.0.0/8", "table", "all"]).stdout
    site.turn_object()
    assert site.run(["ip", "route", "show", "93.0.0.0/8", "table", "all"]).stdout == said
    assert "dev" not in said
    with field.capture(site, f"host {NOBODYS}") as wire:
        traffic.call_out(site, NOBODYS)
        wire.settle()
    assert {p.src for p in wire.packets()} == {site.home4}
    assert seen(site) == site.exit4


@pytest.mark.parametrize("name", ["open", "openovpn"])
def test_row_81_packets_of_one_dscp_value_leave_outside(field: Lab, home: Callable[[str], Home], name: str) -> None:
    if not dscp.known():
        pytest.skip("this kernel knows no routing rules by DSCP (Linux 6.12)")
    site = home(name)
    site.dscp_outside(46)
    left = []
    for value in (46, 0, 10):
        with field.capture(site, f"host {NOBODYS}") as wire:
            traffic.call_out(site, NOBODYS, dscp=value)
            wire.settle()
        left.append({p.src for p in wire.packets()})
    assert left == [{site.home4}, set(), set()]
    assert seen(site) == site.exit4


@pytest.mark.parametrize("name", ["standby", "standbyovpn", "late"])
def test_row_82_a_second_vpn_takes_over(field: Lab, home: Callable[[str], Home], name: str) -> None:
    site = home(name)
    assert seen(site) == site.exit4
    with field.capture(site, "ip and not net 185.65.134.0/24 and not net 156.146.62.0/24") as wire:
        site.fail_over()
        assert seen(site) == site.standby_exit4 != site.exit4
        site.heal()
        assert seen(site) == site.exit4
        wire.settle()
    assert site.home4 not in {p.src for p in wire.packets()}
    site.end_both()
    assert seen(site) == (None if site.site.kill_switch else site.home4)


def test_row_83_a_packet_by_eth0_beside_sixty_networks(field: Lab, home: Callable[[str], Home]) -> None:
    site = home("open")
    site.container_networks(60)
    assert len(site.run(["ip", "-4", "-o", "address", "show", "to", "10.200.0.0/16"]).stdout.splitlines()) == 60
    with field.capture(site, f"host {NOBODYS}") as wire:
        traffic.call_out(site, NOBODYS, device="eth0")
        wire.settle()
    assert {p.src for p in wire.packets()} == {site.home4}
    assert seen(site) == site.exit4


def test_row_84_a_resolver_denies_names(field: Lab, home: Callable[[str], Home]) -> None:
    site = home("open")
    asked = ["dig", "+noall", "+comments", "a.root-servers.net"]
    site.deny_names()
    assert "NXDOMAIN" in site.run(asked).stdout
    site.deny_names("akamai.net")
    assert "NXDOMAIN" in site.run(["dig", "+noall", "+comments", "whoami.akamai.net"]).stdout
    assert "NOERROR" in site.run(asked).stdout
    assert askers(field, site) == {plan.PROVIDERS["nl"].resolver_egress}
    assert seen(site) == site.exit4


def test_row_65_one_network_outside(field: Lab, home: Callable[[str], Home]) -> None:
    site = home("open")
    site.route_outside("5.9.10.0/24")
    with field.capture(site, "net 5.9.10.0/24") as wire:
        pings(site, APART)
        wire.settle()
    assert site.home4 in {p.src for p in wire.packets()}
    assert seen(site) == site.exit4


def test_row_66_a_part_of_ipv6_outside(home: Callable[[str], Home]) -> None:
    site = home("open")
    site.route_outside("2000::/4")
    assert seen(site, SIX) == site.home6
    assert seen(site) == site.exit4


def test_row_68_large_packets_vanish_and_a_second_way_is_there(field: Lab, home: Callable[[str], Home]) -> None:
    site = home("closed")
    site.mtu_black_hole(1200)
    assert pings(site, plan.SRV4)
    assert not pings(site, plan.SRV4, "-s", "1300")
    assert site.server_lan is not None
    assert pings(site, site.server_lan, "-s", "1400")


def test_row_69_no_ipv4_and_ipv6_from_home(home: Callable[[str], Home]) -> None:
    site = home("open")
    site.no_ipv4_route()
    site.ipv6_outside()
    assert seen(site) is None
    assert seen(site, SIX) == site.home6


def test_row_71_a_killed_openconnect_leaves_no_default_route(home: Callable[[str], Home]) -> None:
    site = home("connect")
    site.kill_openvpn()
    assert "default" not in site.run(["ip", "route"]).stdout
    assert seen(site) is None


def test_behind_a_carriers_nat(field: Lab, home: Callable[[str], Home]) -> None:
    site = home("carrier")
    assert seen(site) == site.exit4
    site.delete_tunnel()
    with field.capture(site, f"host {FOUR}") as wire:
        assert seen(site) == site.home4
        wire.settle()
    assert "100.64." in next(iter({p.src for p in wire.packets()} - {FOUR}))
