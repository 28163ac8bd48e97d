"""gluetun's stand-in says what the real one would, in the site's own namespace."""

from __future__ import annotations

import pytest

from lab import Home

pytestmark = pytest.mark.acceptance

API = "http://127.0.0.1:8000/v1"


def test_row_37_gluetun_tells_another_forwarded_port(closed: Home) -> None:
    gluetun = closed.gluetun(port=45678)
    try:
        assert closed.http("GET", f"{API}/portforward").json() == {"port": 45678, "ports": [45678]}
        assert closed.http("GET", f"{API}/openvpn/portforwarded").status == 301
        assert closed.http("GET", f"{API}/publicip/ip").json()["public_ip"] == closed.exit4
        gluetun.say(port=45679)
        assert closed.http("GET", f"{API}/portforward").json()["port"] == 45679
        gluetun.age()
        assert closed.http("GET", f"{API}/portforward").status == 404
        assert closed.http("GET", f"{API}/openvpn/portforwarded").json() == {"port": 45679}
        with pytest.raises(ConnectionError):  # nobody outside reaches it
            closed.router.http("GET", f"http://{closed.lan4}:8000/v1/vpn/status", timeout=1)
    finally:
        gluetun.stop()


def test_row_44_gluetun_says_running_over_a_dead_tunnel(closed: Home) -> None:
    gluetun = closed.gluetun()
    try:
        closed.no_forwarding()
        assert closed.run(["ping", "-n", "-c", "1", "-W", "1", "1.1.1.1"]).returncode != 0
        assert closed.http("GET", f"{API}/vpn/status").json() == {"status": "running"}
        assert closed.http("GET", "http://127.0.0.1:9999/").status == 200
        gluetun.say(healthy="lookup cloudflare.com: i/o timeout")
        assert closed.http("GET", "http://127.0.0.1:9999/").status == 500
    finally:
        gluetun.stop()


def test_gluetun_asks_for_its_key_or_its_login(closed: Home) -> None:
    gluetun = closed.gluetun()
    try:
        gluetun.protect(key="k1")
        assert closed.http("GET", f"{API}/vpn/status").status == 401
        assert closed.http("GET", f"{API}/vpn/status", headers={"X-API-Key": "k1"}).status == 200
        gluetun.protect(user="anna", password="p1")
        assert closed.http("GET", f"{API}/vpn/status", headers={"X-API-Key": "k1"}).status == 401
        basic = {"Authorization": "Basic YW5uYTpwMQ=="}
        assert closed.http("GET", f"{API}/vpn/status", headers=basic).status == 200
    finally:
        gluetun.stop()


def test_row_10_an_idle_tunnel_works_long_after_its_handshake(closed: Home) -> None:
    """Each VPN's own account is there to be asked: WireGuard's socket, OpenVPN's management interface."""
    if closed.site.vpn == "openvpn":
        said = closed.run(["socat", "-t0.5", "-", "UNIX-CONNECT:/run/openvpn/management.sock"], stdin="state\n")
        assert ",CONNECTED,SUCCESS," in said.stdout
        return
    shown = closed.run(["wg", "show", "wg0", "latest-handshakes"], check=True).stdout.split()
    assert int(shown[1]) > 0
    assert closed.run(["ping", "-n", "-c", "1", "-W", "1", closed.gateway4]).returncode == 0
