"""Every kind of tunnel and of uplink, without VPN Sentinel: who is seen outside, and what passes on the home's line."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest

from lab import Home, Lab, Site, plan

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root: it makes network namespaces"),
    pytest.mark.xdist_group("kinds"),
]

KINDS = [kind for kind in plan.KINDS if kind not in ("wireguard", "openvpn")]  # those are test_ground_truth's
FOUR = "1.1.1.1"
SIX = "[2606:4700:4700::1111]"
APART = "5.9.10.11"


def seen(home: Home, target: str = FOUR) -> str | None:
    """The address the world sees this site's host come from; None when nothing comes back."""
    done = home.run(["curl", "-sS", "-m", "3", f"https://{target}/cdn-cgi/trace"])
    lines = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return lines.get("ip")


def pings(home: Home, address: str, *options: str) -> bool:
    return home.run(["ping", "-n", "-c", "1", "-W", "1", *options, address]).returncode == 0


def askers(lab: Lab, home: Home) -> set[str]:
    name = f"{secrets.token_hex(6)}.probe.test"
    done = home.run(["dig", "+short", "+tries=2", "+time=2", name])
    assert done.stdout.strip() == "203.0.113.7", f"{name} did not resolve"
    return lab.dns.askers(name)


@pytest.fixture(scope="module")
def kinds() -> Iterator[Lab]:
    device = {"wg-quick": "berlin-1"}
    sites = [Site(kind, vpn=kind, device=device.get(kind), kill_switch=False) for kind in KINDS]
    with Lab(sites) as running:
        yield running


@pytest.fixture(params=KINDS)
def home(kinds: Lab, request: pytest.FixtureRequest) -> Iterator[Home]:
    found = kinds.site(request.param)
    try:
        yield found
    finally:
        found.heal()


def test_healthy_without_a_kill_switch(kinds: Lab, home: Home) -> None:
    assert seen(home) == home.exit4
    assert seen(home, SIX) == home.exit6
    assert askers(kinds, home) == {plan.PROVIDERS["nl"].resolver_egress}
    assert home.vpn_interface is not None
    assert home.host.has_link(home.vpn_interface)


def test_healthy_with_a_kill_switch(kinds: Lab, home: Home) -> None:
    home.set_kill_switch(True)
    with kinds.capture(home, "ip") as wire:
        assert seen(home) == home.exit4
        wire.settle()
    assert home.endpoint is not None
    assert {p.dst for p in wire.packets() if p.src == home.home4} == {home.endpoint[0]}
    assert not pings(home, plan.SRV4, "-I", home.uplink.interface)


def test_who_forgot_a_neighbour_on_a_tap_device_asks_for_it(kinds: Lab) -> None:
    """Else IPv6 through it ends half a minute later, and Linux takes home's default route: a leak that nobody made."""
    home = kinds.site("openvpn-tap")
    assert seen(home, SIX) == home.exit6  # now both know each other
    for node, device in ((kinds.node("nl"), "openvpn-tap"), (home.host, "tap0")):
        node.run(["ip", "-6", "neighbor", "flush", "dev", device], check=True)
        assert seen(home, SIX) == home.exit6


def test_deleted_without_a_kill_switch_comes_out_at_home(home: Home) -> None:
    home.delete_tunnel()
    assert seen(home) == home.home4


def test_deleted_with_a_kill_switch_leaves_nothing(kinds: Lab, home: Home) -> None:
    home.set_kill_switch(True)
    home.delete_tunnel()
    with kinds.capture(home, f"host {FOUR} or host {plan.SRV4}") as wire:
        assert seen(home) is None
        assert not pings(home, plan.SRV4)
    assert wire.packets() == []


def test_killed_without_a_kill_switch(home: Home) -> None:
    home.kill_openvpn()
    # vpnc-script replaced the default route, and a killed client puts nothing back.
    assert seen(home) == (None if home.name == "openconnect" else home.home4)


def test_restarted(home: Home) -> None:
    home.kill_openvpn()
    home.restore_tunnel()
    home.wait_up()
    assert seen(home) == home.exit4


def test_dead_on_the_line(home: Home) -> None:
    home.block_endpoint()
    assert seen(home) is None


def test_account_revoked(home: Home) -> None:
    home.revoke_peer()
    # charon has no policy left once its peer has ended the session, and its route goes too.
    assert seen(home) == (home.home4 if home.name == "strongswan" else None)


def test_more_specific_route_past_it(kinds: Lab, home: Home) -> None:
    home.split_route(f"{APART}/32")
    with kinds.capture(home, f"host {APART}") as wire:
        pings(home, APART)
        wire.settle()
    assert home.home4 in {p.src for p in wire.packets()}
    assert seen(home) == home.exit4


def test_isp_resolver_past_it(kinds: Lab, home: Home) -> None:
    home.resolver_outside()
    assert askers(kinds, home) == {plan.ISP_RESOLVER_EGRESS}
    assert seen(home) == home.exit4
