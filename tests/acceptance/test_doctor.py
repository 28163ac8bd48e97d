"""`vpn-sentinel doctor` beside a real tunnel: what holds is ok, what was broken is a gap with its fix."""

import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lab import Lab, Site, until
from tests.acceptance.stand import Stand

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module", params=["wireguard", "openvpn"])
def stands(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Stand]]:
    """A site with a kill switch and one without, each with its server; no agent runs."""
    folder = tmp_path_factory.mktemp("doctor")
    with ExitStack() as ends:
        sites = [
            Site(name, vpn=request.param, provider="nl", kill_switch=name == "closed") for name in ("closed", "open")
        ]
        lab = ends.enter_context(Lab(sites))
        made = {}
        for number, site in enumerate(sites):
            made[site.name] = Stand(lab, site.name, number, folder)
            ends.callback(made[site.name].stop)
            made[site.name].start_server()
        yield made


def doctor(stand: Stand, **more: str) -> tuple[int, dict[str, dict[str, str]]]:
    env = {**stand.agent_settings, **{f"VPN_SENTINEL_{k}": v for k, v in more.items()}}
    done = stand.site.run([sys.executable, "-m", "vpn_sentinel", "doctor", "--json"], env=env, timeout=15, check=False)
    assert done.stderr == ""
    return done.returncode, {c["name"]: c for c in json.loads(done.stdout)["checks"]}


def states(found: dict[str, dict[str, str]], *names: str) -> dict[str, str]:
    return {name: found[name]["state"] for name in names}


def resolvers(found: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    return [check for name, check in found.items() if name.startswith("resolver ")]


def test_all_is_well(stands: dict[str, Stand]) -> None:
    stand = stands["closed"]
    status, found = doctor(stand)
    gaps = {name: check for name, check in found.items() if check["state"] == "gap"}
    assert (gaps, status) == ({}, 0)
    assert stand.site.vpn_interface is not None
    assert stand.site.endpoint is not None
    assert stand.site.vpn_interface in found["tunnel"]["found"]
    assert str(stand.site.exit4) in found["way out"]["found"]
    assert "refuses" in found["kill switch"]["found"]
    assert str(stand.site.endpoint[0]) in found["leak watch"]["found"] or "known by" in found["leak watch"]["found"]
    names = (
        "tunnel",
        "route IPv4",
        "kill switch",
        "home addresses",
        "leak watch",
        "server",
        "pulse",
        "clock",
        "places",
    )
    assert set(states(found, *names).values()) == {"ok"}
    assert all(check["state"] == "ok" for check in resolvers(found))
    assert stand.status() == {}, "it left no trace on the server"


def test_each_fault_is_a_gap_with_its_fix(stands: dict[str, Stand]) -> None:
    stand = stands["open"]
    site = stand.site
    status, found = doctor(stand)
    assert (status, found["kill switch"]["state"]) == (1, "gap")
    assert "firewall" in found["kill switch"]["fix"]
    site.ipv6_outside()
    site.resolver_outside()
    until(lambda: doctor(stand)[1]["route IPv6"]["state"] == "gap", 10, "IPv6 beside the tunnel")
    _, found = doctor(stand, API_KEY="wrong-key-0123456789", URL=f"{stand.url},http://{stand.lab.server4}:1")
    assert states(found, "route IPv4", "route IPv6", "server", "server 2") == {
        "route IPv4": "ok", "route IPv6": "gap", "server": "gap", "server 2": "gap",
    }  # fmt: skip
    assert "refuses the key" in found["server"]["found"]
    assert [check["state"] for check in resolvers(found)] == ["gap"]
    site.heal()
    site.block_endpoint()
    _, found = doctor(stand)
    assert states(found, "tunnel", "way out", "server") == {"tunnel": "ok", "way out": "gap", "server": "gap"}
    site.heal()
    site.delete_tunnel()
    _, found = doctor(stand)
    assert states(found, "tunnel", "kill switch", "way out") == {
        "tunnel": "gap", "kill switch": "unknown", "way out": "gap",
    }  # fmt: skip
    assert site.home4 in found["way out"]["found"]
    site.heal()
    status, found = doctor(stand)
    assert {n for n, c in found.items() if c["state"] == "gap"} == {"kill switch"}
