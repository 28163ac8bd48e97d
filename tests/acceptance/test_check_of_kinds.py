"""`check`, cold, on tunnels whose own packets are known by nothing but a trial, or by a program on this host."""

import json
import sys
from collections.abc import Iterator

import pytest

from lab import Lab, Site
from lab.home import Home

pytestmark = pytest.mark.acceptance
CHECK = [sys.executable, "-m", "vpn_sentinel", "check", "--json"]
# Datagrams to a host, for ten seconds.
TALK = (
    "import socket, sys, time\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "for _ in range(100): s.sendto(b'x' * 50, (sys.argv[1], 4444)); time.sleep(0.1)"
)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    kinds = ("wireguard-tcp", "openvpn", "openconnect")
    with Lab([Site(kind.replace("-", ""), vpn=kind, kill_switch=False) for kind in kinds]) as running:
        yield running


# As in a container of its own: WireGuard cannot be asked there.
APART = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run/wireguard && exec "$@"', "sh"]


def said(site: Home, *before: str) -> tuple[str, set[str]]:
    found = json.loads(site.run([*before, *CHECK], timeout=60).stdout)
    return found["state"], {f["code"] for f in found["findings"]}


@pytest.mark.parametrize("name", ["wireguardtcp", "openvpn", "openconnect"])
def test_a_healthy_tunnel_leaks_nothing(lab: Lab, name: str) -> None:
    state, codes = said(lab.site(name))
    assert (state, codes) == ("protected", {"killswitch_open"})


def test_what_carries_wireguard_is_tried_where_it_cannot_be_asked(lab: Lab) -> None:
    site = lab.site("wireguardtcp")
    assert said(site, *APART) == ("protected", {"killswitch_open"})
    assert site.endpoint is not None
    stranger = "5.9.10.20"
    site.run(["ip", "route", "add", stranger, "via", site.router4, "dev", "eth0"], check=True)
    talking = site.spawn([sys.executable, "-c", TALK, stranger], log="stranger")
    try:
        state, codes = said(site, *APART)
    finally:
        talking.stop()
        site.run(["ip", "route", "del", stranger], check=True)
    assert state == "leaking"
    assert "split_route" in codes


@pytest.mark.parametrize("name", ["openvpn", "openconnect"])
def test_what_goes_to_another_port_of_the_vpn_servers_host_is_a_leak(lab: Lab, name: str) -> None:
    site = lab.site(name)
    assert site.endpoint is not None
    talking = site.spawn([sys.executable, "-c", TALK, site.endpoint[0]], log="talk")
    try:
        state, codes = said(site)
    finally:
        talking.stop()
    assert state == "leaking"
    assert "split_route" in codes
