"""The rows of docs/reference/situations.md in the lab, on real tunnels: the verdict, and what people hear of it.

Each test reads as a timeline: the fault at 0 s, then what must be true by when. Times come from the stand-in's clock.
"""

import time
from typing import Any

import pytest

from lab import until
from tests.acceptance.stand import INTERVAL, Stand, once

pytestmark = pytest.mark.acceptance

Stands = dict[str, Stand]
LEAK = 2.0
DOWN = 15.0
SILENT = 3 * INTERVAL + 2.0


def went_down_at(stand: Stand, since: float) -> dict[str, Any]:
    """The `down` in the history that began nearest after `since`; a silence must not stand there any more."""
    moves = [m for m in stand.history() if stand.seconds(m["at"]) > since - 1]
    assert "silent" not in [m["new"] for m in moves], moves
    return next(m for m in moves if m["new"] == "down")


def silent_then_down(stand: Stand, fault, code: str) -> None:
    """A fault that cuts the report off: an alarm *silent*; after the repair the history says *down* with true times."""
    before = stand.settle()
    began = time.time()
    fault()
    message = stand.wait_message("silent", before, SILENT + 2)
    assert float(message["time"]) - began < SILENT
    stand.quiet(before + 1, 5)
    repaired = time.time()
    stand.settle()
    down = went_down_at(stand, began)
    assert abs(stand.seconds(down["at"]) - began) < 3.0
    assert code in [f["code"] for f in down["findings"]]
    recovered = stand.wait_message("again", before + 1, 5)
    assert "down" in recovered["plain"]
    stand.quiet(before + 2, 3)
    back = [m for m in stand.history() if m["new"] == "protected"][-1]
    assert abs(stand.seconds(back["at"]) - repaired) < 20


# --- healthy tunnels stay quiet ---------------------------------------------------------------------------------------


def test_rows_1_2_17_25_26_healthy_tunnels_are_protected_and_quiet(stands: Stands) -> None:
    for stand in stands.values():
        stand.settle()
    counts = {name: len(stand.messages()) for name, stand in stands.items()}
    time.sleep(3 * INTERVAL)
    for name, stand in stands.items():
        assert stand.status()["state"] == "protected", stand.status()
        assert len(stand.messages()) == counts[name], [m["plain"] for m in stand.messages()[counts[name] :]]
    assert "killswitch_open" not in stands["closed"].codes()
    assert "killswitch_open" in stands["open"].codes()
    assert not stands["public"].codes() & {"dns_leak", "resolver_unexpected"}
    assert not stands["dropped"].codes() & {"ipv6_leak"}
    tunnel = stands["names"].api("/tunnels/names")
    assert tunnel["exit"]["ipv6"] == stands["names"].site.exit6


# --- dead tunnels -----------------------------------------------------------------------------------------------------


def test_row_3_link_down_behind_a_kill_switch(stands: Stands) -> None:
    silent_then_down(stands["closed"], stands["closed"].site.link_down, "tunnel_down")


def test_row_4_tunnel_deleted_behind_a_kill_switch(stands: Stands) -> None:
    silent_then_down(stands["closed"], stands["closed"].site.delete_tunnel, "tunnel_down")


def test_row_6_vpn_server_unreachable_without_a_kill_switch(stands: Stands) -> None:
    silent_then_down(stands["open"], stands["open"].site.block_endpoint, "no_traffic")


def test_row_33_home_internet_down(stands: Stands) -> None:
    silent_then_down(stands["open"], stands["open"].site.home_internet_down, "uplink_down")


# --- leaks ------------------------------------------------------------------------------------------------------------


def test_row_5_tunnel_deleted_without_a_kill_switch(stands: Stands) -> None:
    stand = stands["open"]
    took, message = once(stand, stand.site.delete_tunnel, "leaking", LEAK + 3)
    assert took < LEAK
    assert "outside the tunnel" in message["plain"] or stand.site.home4 in message["plain"]
    assert "ip_leak" in stand.codes()
    # A packet that was seen to leave may tell it first; the canaries behind it name the home address.
    until(lambda: stand.site.home4 in str(stand.status()["findings"]), 5, "the address that leaks")


def test_row_15_resolver_outside_the_tunnel(stands: Stands) -> None:
    stand = stands["names"]
    once(stand, stand.site.resolver_outside, "leaking", 15)
    assert "dns_leak" in stand.codes()
    assert "ip_leak" not in stand.codes()


def test_row_18_public_resolver_outside_the_tunnel(stands: Stands) -> None:
    stand = stands["names"]
    once(stand, stand.site.public_outside, "leaking", 15)
    assert "dns_leak" in stand.codes()


def test_row_21_transparent_proxy_at_home(stands: Stands) -> None:
    stand = stands["names"]
    before = stand.settle()
    # The proxy sees only what passes it: queries to a public resolver, beside the tunnel.
    stand.site.transparent_proxy("home")
    stand.site.public_outside()
    message = stand.wait_message("leaking", before, 15)
    assert "nameserver" in message["plain"] or "DNS" in message["plain"]
    assert "dns_leak" in stand.codes()
    stand.quiet(before + 1, 6)


def test_row_24_ipv6_default_route_outside_the_tunnel(stands: Stands) -> None:
    stand = stands["names"]
    took, _ = once(stand, stand.site.ipv6_outside, "leaking", 10)
    assert took < LEAK
    assert stand.codes() >= {"ipv6_leak"}
    assert "ip_leak" not in stand.codes()


# --- what is no leak --------------------------------------------------------------------------------------------------


def test_row_19_provider_resolver_in_another_country(stands: Stands) -> None:
    stand = stands["names"]
    before = stand.settle()
    stand.site.resolver_elsewhere()
    stand.quiet(before, 4 * INTERVAL)
    assert stand.status()["state"] == "protected"
    assert not stand.codes() & {"dns_leak", "resolver_unexpected"}


def test_row_11_exit_hops_within_its_network(stands: Stands) -> None:
    stand = stands["open"]
    old = stand.site.exit4
    _, message = once(stand, stand.site.move_exit, "address", 20)
    assert stand.status()["state"] == "protected"
    assert old in message["plain"]
    assert stand.site.exit4 in message["plain"]


def test_row_12_exit_hops_to_a_country_outside_the_policy(stands: Stands) -> None:
    stand = stands["open"]
    once(stand, lambda: stand.site.move_exit(country="other"), "degraded", 60)
    assert stand.codes() >= {"country_mismatch"}
    assert not stand.codes() & {"ip_leak", "dns_leak"}


def test_row_36_geolocation_services_refuse(stands: Stands) -> None:
    stand = stands["open"]
    before = stand.settle()
    lab = stand.lab
    lab.service("ipinfo").fail(429)
    lab.service("ipapi").fail(403)
    lab.service("ipwhois").fail("garbage")
    try:
        stand.site.move_exit()
        stand.wait_message("address", before, 20)
        assert stand.status()["state"] == "protected"
        assert stand.status()["country"] == "NL"
        assert not stand.codes() & {"country_mismatch"}
        stand.quiet(before + 1, 2 * INTERVAL)
    finally:
        for name in ("ipinfo", "ipapi", "ipwhois"):
            lab.service(name).heal()


# --- agents and servers that go away ----------------------------------------------------------------------------------


def test_row_39_agent_killed(stands: Stands) -> None:
    stand = stands["closed"]
    before = stand.settle()
    began = time.time()
    stand.agent.kill()
    message = stand.wait_message("silent", before, SILENT + 2)
    assert float(message["time"]) - began < SILENT
    assert stand.status()["state"] == "silent"
    assert not stand.codes() & {"ip_leak", "dns_leak", "tunnel_down"}
    stand.start_agent()
    stand.wait_message("again", before + 1, 20)
    stand.quiet(before + 2, 4)


def test_row_40_server_unreachable_while_the_tunnel_is_fine(stands: Stands) -> None:
    stand = stands["closed"]
    stand.settle()
    before = len(stand.messages())
    stand.server.stop()
    gone = time.time()
    time.sleep(4 * INTERVAL)
    stand.start_server()
    stand.wait_message("started", before, 10)
    stand.wait_state("protected", 20)

    def replayed() -> list[dict[str, Any]]:
        return stand.observations(gone, gone + 4 * INTERVAL)

    until(lambda: len(replayed()) >= 3, 20, "what the agent saw meanwhile", interval=0.2)
    seen = replayed()
    assert {o["state"] for o in seen} == {"protected"}
    stand.quiet(before + 1, 2 * INTERVAL)
    assert not [m for m in stand.history() if stand.seconds(m["at"]) > gone]


def test_row_41_server_killed_and_started(stands: Stands) -> None:
    stand = stands["closed"]
    stand.settle()
    before, history, state = len(stand.messages()), stand.history(), stand.status()
    stand.server.kill()
    stand.server.wait(5)
    stand.start_server()
    stand.wait_message("started", before, 10)
    stand.quiet(before + 1, 4 * INTERVAL)
    assert stand.history() == history
    assert stand.status()["since"] == state["since"]
    assert stand.status()["state"] == "protected"
