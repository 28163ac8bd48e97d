"""The lab tells the truth: each situation shown with dig, curl, ping and tcpdump, without VPN Sentinel.

Numbers are the rows of the table of situations.
"""

from __future__ import annotations

import secrets
import sys

import pytest

from lab import Home, Lab, plan, until
from lab.outside.rewriter import ADVERTISEMENT

pytestmark = pytest.mark.acceptance

SRV = plan.SRV4
# What a link says to itself is no leak; a multicast listener's report hides behind a hop-by-hop header (RFC 3810).
IPV6 = "ip6 and not icmp6 and not ip6 multicast"


def seen(home: Home, family: int = 4, timeout: float = 3) -> str | None:
    """The address the world sees this site's host come from; None when nothing comes back."""
    target = "1.1.1.1" if family == 4 else "[2606:4700:4700::1111]"
    done = home.run(["curl", "-sS", "-m", str(timeout), f"https://{target}/cdn-cgi/trace"])
    lines = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return lines.get("ip")


_CANARY = f"""
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as canary:
    canary.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    canary.sendto(b"?", ("{SRV}", 9))
"""


def physical(home: Home) -> str:
    """C2, the kill-switch canary: what happens to a packet bound to the physical interface."""
    sent = home.run([sys.executable, "-c", _CANARY])
    if "PermissionError" in sent.stderr:
        return "EPERM"
    return "open" if pings(home, SRV, "-I", "eth0") else "lost"


def resolve(home: Home, server: str | None = None) -> tuple[str, str | None]:
    """Look up a fresh name; returns it and the answer."""
    name = f"{secrets.token_hex(6)}.probe.test"
    done = home.run(["dig", "+short", "+tries=1", "+time=2", name, *([f"@{server}"] if server else [])])
    answer = done.stdout.strip() if done.returncode == 0 and "203.0.113" in done.stdout else None
    return name, answer


def askers(lab: Lab, home: Home, server: str | None = None) -> set[str]:
    """Resolver egress, as the authoritative side knows it."""
    name, answer = resolve(home, server)
    assert answer == "203.0.113.7", f"{name} did not resolve"
    return lab.dns.askers(name)


def pings(home: Home, address: str, *options: str) -> bool:
    return home.run(["ping", "-n", "-c", "1", "-W", "1", *options, address]).returncode == 0


def test_row_1_healthy_with_a_kill_switch(closed: Home) -> None:
    assert seen(closed) == closed.exit4
    assert seen(closed, 6) == closed.exit6
    assert physical(closed) == "EPERM"


def test_row_1_nothing_but_the_tunnel_leaves_the_home(lab: Lab, closed: Home) -> None:
    with lab.capture(closed, "not arp and not icmp6") as wire:
        seen(closed)
        askers(lab, closed)
    assert wire.packets()
    assert {p.dst for p in wire.packets() if p.src == closed.home4} == {closed.line.provider.endpoint}  # type: ignore[union-attr]


def test_row_2_healthy_without_a_kill_switch(opened: Home) -> None:
    assert seen(opened) == opened.exit4
    assert physical(opened) == "open"


def test_row_3_link_down_with_a_kill_switch(lab: Lab, closed: Home) -> None:
    with lab.capture(closed, f"host {SRV} or udp port 53 or host 1.1.1.1") as wire:
        closed.link_down()
        assert not pings(closed, SRV)
        assert seen(closed) is None
    assert wire.packets() == []


def test_row_4_tunnel_deleted_with_a_kill_switch(lab: Lab, closed: Home) -> None:
    with lab.capture(closed, f"host {SRV} or udp port 53 or host 1.1.1.1") as wire:
        closed.delete_tunnel()
        assert not closed.host.has_link(str(closed.vpn_interface))
        assert seen(closed) is None
        assert resolve(closed)[1] is None
    assert wire.packets() == []


def test_row_5_tunnel_deleted_without_a_kill_switch(lab: Lab, opened: Home) -> None:
    with lab.capture(opened, "host 1.1.1.1") as wire:
        opened.delete_tunnel()
        assert seen(opened) == opened.home4
        assert seen(opened, 6) == opened.home6
    assert opened.home4 in {p.src for p in wire.packets()}
    opened.heal()
    assert seen(opened) == opened.exit4


def test_row_6_endpoint_blocked_without_a_kill_switch(opened: Home) -> None:
    opened.block_endpoint()
    assert seen(opened, timeout=2) is None
    assert physical(opened) == "open"
    assert opened.host.has_link(str(opened.vpn_interface))
    opened.heal()
    assert seen(opened) == opened.exit4


def test_row_7_no_forwarding(closed: Home) -> None:
    closed.no_forwarding()
    assert pings(closed, closed.gateway4)
    assert not pings(closed, SRV)


def test_row_8_account_revoked(closed: Home) -> None:
    closed.revoke_peer()
    assert not pings(closed, closed.gateway4)
    assert seen(closed, timeout=2) is None
    closed.heal()
    assert seen(closed) == closed.exit4


def test_row_8_healing_does_not_leak_by_itself(lab: Lab, opened: Home) -> None:
    flow = opened.spawn(["ping", "-n", "-q", "-i", "0.01", SRV], log="flow")
    with lab.capture(opened, f"host {SRV}") as wire:
        opened.revoke_peer()
        assert seen(opened, timeout=1) is None
        opened.heal()
    flow.stop()
    assert wire.packets() == []
    assert seen(opened) == opened.exit4


def test_row_9_half_open(lab: Lab, closed: Home) -> None:
    closed.half_open()
    with lab.capture(lab.node("nl" if closed.line.vpn == "wireguard" else "ch").name, f"icmp and host {SRV}") as inside:
        assert not pings(closed, SRV)
    assert any(p.dst == SRV for p in inside.packets())


def test_row_11_exit_hops_within_the_country(closed: Home) -> None:
    before = closed.exit4
    closed.move_exit()
    assert seen(closed) == closed.exit4 != before
    assert plan.place_of(before) == plan.place_of(closed.exit4)


def test_row_12_exit_hops_to_another_country(lab: Lab, closed: Home) -> None:
    before = plan.place_of(closed.exit4)
    closed.move_exit(country="other")
    after = plan.place_of(closed.exit4)
    assert before is not None
    assert after is not None
    assert before.country != after.country
    assert before.asn == after.asn
    assert closed.http("GET", "https://ipinfo.io/json").json()["country"] == after.country
    assert closed.http("GET", "http://ip-api.com/json").json()["countryCode"] == after.country
    assert closed.http("GET", "https://ipwho.is/").json()["country_code"] == after.country


def test_row_13_sources_may_disagree(lab: Lab, closed: Home) -> None:
    lab.service("ipwhois").place(closed.exit4, country="SE", city="Stockholm")
    try:
        assert closed.http("GET", "https://ipwho.is/").json()["country_code"] == "SE"
        assert closed.http("GET", "https://ipinfo.io/json").json()["country"] in {"NL", "CH"}
    finally:
        lab.service("ipwhois").place(closed.exit4)


def test_row_14_exit_differs_from_the_endpoint(closed: Home) -> None:
    assert closed.endpoint is not None
    assert seen(closed) != closed.endpoint[0]


def test_row_15_resolver_outside_the_tunnel(lab: Lab, opened: Home) -> None:
    with lab.capture(opened, "udp port 53") as wire:
        opened.resolver_outside()
        assert askers(lab, opened) == {plan.ISP_RESOLVER_EGRESS}
    assert wire.packets()
    assert seen(opened) == opened.exit4


def test_row_15_a_kill_switch_stops_it(lab: Lab, closed: Home) -> None:
    with lab.capture(closed, "udp port 53") as wire:
        closed.resolver_outside()
        assert resolve(closed)[1] is None
    assert wire.packets() == []


def test_row_16_lan_forwarder_leaks_past_a_kill_switch(lab: Lab, lan: Home) -> None:
    lan.lan_forwarder()
    assert physical(lan) == "EPERM"
    assert askers(lab, lan) == {plan.ISP_RESOLVER_EGRESS}
    assert seen(lan) == lan.exit4


def test_row_17_public_resolver_through_the_tunnel(lab: Lab, closed: Home) -> None:
    closed.use_resolvers(["1.1.1.1"])
    with lab.capture(closed, "udp port 53") as wire:
        assert askers(lab, closed) == {plan.CLOUDFLARE_EGRESS}
    assert wire.packets() == []
    whoami = closed.run(["dig", "+short", "CH", "TXT", "whoami.cloudflare", "@1.1.1.1"]).stdout
    assert whoami.strip() == f'"{closed.exit4}"'


def test_row_17_google_sends_the_client_subnet(closed: Home) -> None:
    texts = closed.run(["dig", "+short", "TXT", "o-o.myaddr.l.google.com", "@8.8.8.8"]).stdout
    subnet = closed.exit4.rpartition(".")[0] + ".0/24"
    assert f'"edns0-client-subnet {subnet}"' in texts
    assert f'"{plan.GOOGLE_EGRESS}"' in texts


def test_row_18_public_resolver_outside_the_tunnel(lab: Lab, opened: Home) -> None:
    with lab.capture(opened, "udp port 53") as wire:
        opened.public_outside()
        whoami = opened.run(["dig", "+short", "CH", "TXT", "whoami.cloudflare"]).stdout
        assert whoami.strip() == f'"{opened.home4}"'
        assert askers(lab, opened) == {plan.CLOUDFLARE_EGRESS}
    assert {p.dst for p in wire.packets() if p.src == opened.home4} == {"1.1.1.1"}


def test_row_19_providers_resolver_in_another_country(lab: Lab, closed: Home) -> None:
    closed.resolver_elsewhere()
    (egress,) = askers(lab, closed)
    there, here = plan.place_of(egress), plan.place_of(closed.exit4)
    assert there is not None
    assert here is not None
    assert there.country != here.country
    assert there.asn == here.asn


def test_row_20_one_of_two_resolvers_leaks(lab: Lab, opened: Home) -> None:
    opened.two_resolvers_one_leaks()
    inside, outside = opened.resolvers
    assert askers(lab, opened, inside) == {opened.line.provider.resolver_egress}  # type: ignore[union-attr]
    assert askers(lab, opened, outside) == {plan.ISP_RESOLVER_EGRESS}
    assert opened.run(["grep", "-c", "nameserver", "/etc/resolv.conf"]).stdout.strip() == "2"


def test_row_21_transparent_proxy_at_home(lab: Lab, opened: Home) -> None:
    opened.public_outside()
    opened.transparent_proxy("home")
    assert askers(lab, opened) == {plan.ISP_RESOLVER_EGRESS}
    opened.split_route(SRV)
    assert resolve(opened, SRV)[1] is not None, "an address that runs no DNS answers"


def test_names_that_do_not_exist_are_given_an_address(closed: Home) -> None:
    name = "nx-0123456789.sentinel.test"
    assert closed.run(["dig", "+short", "A", name]).stdout == ""
    closed.rewrite_names()
    assert closed.run(["dig", "+short", "A", name]).stdout.strip() == ADVERTISEMENT
    assert closed.run(["dig", "+short", "A", "whoami.akamai.net"]).stdout.strip() != ADVERTISEMENT
    closed.heal()
    assert closed.run(["dig", "+short", "A", f"again-{name}"]).stdout == ""


def test_row_21_transparent_proxy_inside_the_tunnel(lab: Lab, closed: Home) -> None:
    assert resolve(closed, SRV)[1] is None
    closed.transparent_proxy("provider")
    assert askers(lab, closed, SRV) == {closed.line.provider.resolver_egress}  # type: ignore[union-attr]


def test_row_22_resolver_down(closed: Home) -> None:
    closed.stop_resolver()
    assert resolve(closed)[1] is None
    assert seen(closed) == closed.exit4


def test_row_23_one_name_refused(lab: Lab, closed: Home) -> None:
    closed.block_name("whoami.akamai.net")
    refused = closed.run(["dig", "whoami.akamai.net"]).stdout
    assert "REFUSED" in refused
    assert closed.run(["dig", "+short", "TXT", "whoami.ds.akahelp.net"]).stdout.startswith('"ns"')
    closed.heal()
    assert "NOERROR" in closed.run(["dig", "whoami.akamai.net"]).stdout


def test_row_24_ipv6_outside(lab: Lab, closed: Home) -> None:
    closed.ipv6_outside()
    assert seen(closed) == closed.exit4
    assert seen(closed, 6) == closed.home6
    assert closed.exit6 is None


def test_row_25_ipv6_dropped(lab: Lab, opened: Home) -> None:
    with lab.capture(opened, IPV6) as wire:
        opened.ipv6_dropped()
        assert seen(opened) == opened.exit4
        assert seen(opened, 6, timeout=1) is None
    assert wire.packets() == []


def test_row_26_ipv6_inside(lab: Lab, opened: Home) -> None:
    with lab.capture(opened, IPV6) as wire:
        assert seen(opened, 6) == opened.exit6
    assert wire.packets() == []


def test_row_27_split_route(opened: Home) -> None:
    opened.split_route("1.1.1.1")
    assert seen(opened) == opened.home4
    assert opened.http("GET", "https://ipinfo.io/json").json()["ip"] == opened.exit4


def test_row_28_orphaned(closed: Home) -> None:
    closed.orphan()
    assert [line.split(":")[0].strip() for line in closed.host.links()] == ["lo"]
    assert "unreachable" in closed.run(["ping", "-n", "-c", "1", "-W", "1", SRV]).stderr
    closed.heal()
    assert seen(closed) == closed.exit4


def test_row_29_kill_switch_late(closed: Home) -> None:
    closed.set_kill_switch(False)
    assert physical(closed) == "open"
    closed.set_kill_switch(True)
    assert physical(closed) == "EPERM"


def test_row_30_mtu_black_hole(closed: Home) -> None:
    closed.mtu_black_hole()
    assert pings(closed, SRV, "-s", "100")
    assert not pings(closed, SRV, "-s", "1350", "-M", "do")
    assert not pings(closed, SRV, "-s", "1300", "-M", "do")
    closed.heal()
    assert pings(closed, SRV, "-s", "1300", "-M", "do")


def test_row_31_saturated(closed: Home) -> None:
    closed.saturate()

    def slow() -> bool:
        lines = closed.run(["ping", "-n", "-c", "1", "-W", "2", SRV]).stdout.splitlines()
        times = [float(line.split("time=")[1].split()[0]) for line in lines if "time=" in line]
        return bool(times) and times[0] > 50

    assert until(slow, 10, "the round trip to grow")


def test_row_32_lossy(closed: Home) -> None:
    closed.loss(30)
    done = closed.run(["ping", "-n", "-q", "-c", "200", "-i", "0.005", "-W", "1", SRV])
    loss = float(done.stdout.split("% packet loss")[0].rsplit(" ", 1)[1])
    assert 15 < loss < 45


def test_row_33_home_internet_down(lan: Home) -> None:
    assert lan.reference is not None
    assert lan.reference.run(["ping", "-n", "-c", "1", "-W", "1", SRV]).returncode == 0
    lan.home_internet_down()
    assert not pings(lan, SRV)
    assert lan.reference.run(["ping", "-n", "-c", "1", "-W", "1", SRV]).returncode != 0
    assert pings(lan, str(lan.server_lan)), "the second way out, over the LAN"
    lan.heal()
    assert lan.reference.run(["ping", "-n", "-c", "1", "-W", "1", SRV]).returncode == 0
    assert seen(lan) == lan.exit4


def test_row_34_captive_portal(opened: Home) -> None:
    opened.captive_portal()
    assert seen(opened, timeout=1) is None
    opened.delete_tunnel()
    assert opened.http("GET", f"http://{plan.HOSTS['ip-api.com'][0]}/json", timeout=5).status == 302
    with pytest.raises(ConnectionError, match="certificate"):
        opened.http("GET", "https://1.1.1.1/cdn-cgi/trace")
    assert not pings(opened, SRV)
    opened.heal()
    assert seen(opened) == opened.exit4


def test_row_35_one_site_blocks_vpn_users(closed: Home) -> None:
    closed.drop_destination("1.1.1.1")
    assert seen(closed, timeout=1) is None
    assert pings(closed, SRV)


def test_row_38_forwarded_port(lab: Lab, closed: Home) -> None:
    closed.open_port(45678)
    server = closed.spawn(["socat", "TCP-LISTEN:45678,fork,reuseaddr", "EXEC:echo hello"], log="socat")
    closed.host.wait_port(45678)
    reach = ["socat", "-T2", "-", f"TCP:{closed.exit4}:45678,connect-timeout=1"]
    assert lab.srv.run(reach).stdout == "hello\n"
    closed.close_port(45678)
    assert lab.srv.run(reach).stdout == ""
    server.stop()


def test_row_43_home_address_changes(lab: Lab, opened: Home) -> None:
    before = opened.home4
    after = opened.renew_home_address()
    assert after != before
    assert physical(opened) == "open"
    opened.wait_up(30)
    assert seen(opened) == opened.exit4
    opened.delete_tunnel()
    assert seen(opened) == after


@pytest.mark.parametrize("name", ["ov-closed", "ov-open"])
def test_row_45_openvpn_killed(lab: Lab, name: str) -> None:
    home = lab.site(name)
    try:
        home.kill_openvpn()
        assert not home.host.has_link("tun0")
        assert seen(home, timeout=2) == (home.home4 if name == "ov-open" else None)
    finally:
        home.heal()
    assert seen(home) == home.exit4


def test_faults_are_idempotent_and_independent_of_order(opened: Home) -> None:
    opened.resolver_outside()
    opened.loss(30)
    opened.delete_tunnel()
    opened.delete_tunnel()
    opened.block_endpoint()
    opened.ipv6_outside()
    opened.move_exit()
    opened.heal()
    opened.heal()
    assert seen(opened) == opened.exit4
    assert seen(opened, 6) == opened.exit6
