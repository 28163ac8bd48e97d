"""What the tunnel's own programs say arrives at the server as evidence, and the canaries decide.

The server has a leg on each home's LAN, so that what is wrong is told while the tunnel is dead.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from lab import Lab, Site, until
from lab.gluetun import Gluetun
from tests.acceptance.stand import Stand

pytestmark = pytest.mark.acceptance

KEY = "gluetun-key-1"
# told: an idle tunnel and its gluetun; rows 7, 10, 37, 44. open: no kill switch; rows 34, 35.
SITES: dict[str, dict[str, Any]] = {
    "told": {"kill_switch": True, "kill_switch_lan": True, "keepalive": 0, "lan_server": True},
    "open": {"kill_switch": False, "lan_server": True},
}
Stands = dict[str, Stand]


@pytest.fixture(scope="module")
def gluetuns() -> list[Gluetun]:
    """That of each lab, the running one last."""
    return []


@pytest.fixture(scope="module", params=["wireguard", "openvpn"])
def stands(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, gluetuns: list[Gluetun]
) -> Iterator[Stands]:
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    with ExitStack() as ends:
        lab = ends.enter_context(Lab([Site(name, vpn=kind, provider="nl", **more) for name, more in SITES.items()]))
        made = {}
        for number, name in enumerate(SITES):
            agent = {
                "VPN_SENTINEL_INTERVAL": "2",
                "VPN_SENTINEL_OPENVPN_MANAGEMENT": "/run/openvpn/management.sock" if kind == "openvpn" else "",
            }
            if name == "told":
                agent |= {"VPN_SENTINEL_GLUETUN_URL": "http://127.0.0.1:8000", "VPN_SENTINEL_GLUETUN_API_KEY": KEY}
            made[name] = Stand(lab, name, number, folder, agent=agent, lan=True)
            ends.callback(made[name].stop)
            made[name].start_server()
        gluetuns.append(made["told"].site.gluetun(port=45678))
        gluetuns[-1].protect(key=KEY)
        ends.callback(gluetuns[-1].stop)
        for stand in made.values():
            stand.start_agent()
        for stand in made.values():
            stand.wait_state("protected", 30)
        yield made


@pytest.fixture
def gluetun(stands: Stands, gluetuns: list[Gluetun]) -> Gluetun:
    gluetuns[-1].say(port=45678, status="running")
    return gluetuns[-1]


def newest(stand: Stand) -> dict[str, Any]:
    now = time.time()
    seen = stand.observations(now - 20, now + 1)
    return dict(max(seen, key=lambda o: o["at"])) if seen else {}


def claims(stand: Stand) -> dict[str, dict[str, Any]]:
    """What the newest observation that the server holds says of each source."""
    return {c["source"]: c for c in seen_in(newest(stand)).get("claims", ())}


def seen_in(row: dict[str, Any]) -> dict[str, Any]:
    return dict(row.get("body", {}))


def evidence(stand: Stand, code: str) -> dict[str, str]:
    return next((dict(f["evidence"]) for f in stand.status().get("findings", []) if f["code"] == code), {})


def test_row_10_an_idle_tunnel_is_protected_whatever_its_handshake(stands: Stands) -> None:
    stand = stands["told"]
    stand.settle()
    source = stand.site.site.vpn or ""
    endpoint, port = stand.site.endpoint or ("", 0)
    claim = until(lambda: claims(stand).get(source), 20, f"a claim of {source}")
    assert claim is not None
    assert claim["endpoint"].startswith(f"{endpoint}:{port}")
    if source == "openvpn":
        assert claim["status"] == "CONNECTED"
    else:
        first = claim["handshake_age"]
        assert first is not None
        until(lambda: claims(stand)[source]["handshake_age"] > first, 20, "an older handshake")
    assert stand.status()["state"] == "protected"


_BOTH_WAYS = """
import asyncio
from vpn_sentinel.agent.introspect.wireguard import read_device
for folders in (["/run/wireguard"], []):
    print(asyncio.run(read_device("wg0", kernel=True, folders=folders)))
"""


def test_the_program_wg_tells_what_the_socket_tells(stands: Stands) -> None:
    site = stands["told"].site
    if site.site.vpn != "wireguard":
        pytest.skip("OpenVPN has no such program")
    stands["told"].settle()
    told = site.run([sys.executable, "-c", _BOTH_WAYS], check=True).stdout.splitlines()
    socket, program = (line.partition("rx_bytes")[0] for line in told)  # pulses go on between the two
    assert socket == program
    assert str(site.endpoint[0] if site.endpoint else "") in socket


def test_row_37_another_forwarded_port_is_in_the_observation(stands: Stands, gluetun: Gluetun) -> None:
    stand = stands["told"]
    stand.settle()
    until(lambda: seen_in(newest(stand)).get("forwarded_port") == 45678, 20, "the forwarded port")
    gluetun.say(port=45999)
    until(lambda: seen_in(newest(stand)).get("forwarded_port") == 45999, 20, "the other forwarded port")
    assert stand.status()["state"] == "protected"
    claim = claims(stand)["gluetun"]
    assert (claim["status"], claim["address"]) == ("running", stand.site.exit4)
    forbidden = {"/v1/vpn/settings", "/v1/openvpn/status"}
    assert all(asked.startswith("GET ") and asked.split()[1] not in forbidden for asked in gluetun.asked())


def test_rows_7_44_gluetun_says_running_and_nothing_is_forwarded(stands: Stands, gluetun: Gluetun) -> None:
    stand = stands["told"]
    stand.settle()
    until(lambda: claims(stand).get("gluetun", {}).get("status") == "running", 20, "gluetun's claim")
    stand.site.no_forwarding()
    stand.wait_state("down", 15)
    until(lambda: "no_forwarding" in stand.codes(), 10, "no_forwarding")
    facts = evidence(stand, "no_forwarding")
    assert facts["gluetun_says"] == "running"
    assert facts["gateway"] in (stand.site.resolvers[0], stand.site.gateway4)
    gluetun.say(status="crashed")
    stand.site.half_open()
    until(lambda: evidence(stand, "no_traffic").get("gluetun_says") == "crashed", 20, "no_traffic")


def test_row_34_a_captive_portal_is_named(stands: Stands) -> None:
    stand = stands["open"]
    stand.settle()
    stand.site.captive_portal()
    stand.wait_state("down", 15)
    until(lambda: "captive_portal" in stand.codes(), 10, "captive_portal")
    assert "leaking" not in [m["new"] for m in stand.history()]


def test_row_35_a_site_that_shuns_vpn_exits_is_marked_as_flaky(stands: Stands) -> None:
    stand = stands["open"]
    stand.settle()
    stand.site.drop_destination("1.1.1.1", "2606:4700:4700::1111")
    until(lambda: "canary_flaky" in stand.codes(), 30, "canary_flaky")
    assert stand.status()["state"] == "protected"
    stand.settle()
    until(lambda: "canary_flaky" not in stand.codes(), 30, "no canary_flaky any more")
