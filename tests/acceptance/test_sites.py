"""A site with a reference agent beside its tunnel, and a second way to the server over the LAN."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from lab import Lab, Site, until
from tests.acceptance.stand import INTERVAL, KEY, Stand, once
from vpn_sentinel.agent.sensors.interruptions import MAX_INTERRUPTION_S

pytestmark = pytest.mark.acceptance

SITE = "attic"
CALM = 12.0
PORTS = (41000, 42000)


class Attic(Stand):
    """A stand whose agent belongs to a site, with two ways to the server and a forwarded port from a file."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        home = lab.site("attic")
        self.port_file = folder / "port"
        urls = f"http://{lab.server4}:5000,http://{home.server_lan}:5000"
        more = {
            "VPN_SENTINEL_URL": urls,
            "VPN_SENTINEL_SITE": SITE,
            "VPN_SENTINEL_FORWARDED_PORT": str(self.port_file),
            "VPN_SENTINEL_HOME_NETWORKS": "",  # the reference agent knows
        }
        super().__init__(lab, "attic", 0, folder, agent=more)
        self.server_settings |= {"VPN_SENTINEL_FLAP_CALM": str(CALM)}
        self.beside: Any = None

    def start_reference(self) -> None:
        assert self.site.reference is not None
        env = {
            **self.agent_settings,
            "VPN_SENTINEL_CLIENT_ID": "beside",
            "VPN_SENTINEL_DATA_DIR": str(self.folder / "reference"),
        }
        command = [sys.executable, "-m", "vpn_sentinel", "agent", "--role", "reference"]
        self.beside = self.site.reference.spawn(command, env=env, log="reference-attic")

    def stop(self) -> None:
        if self.beside is not None:
            self.beside.stop()
        super().stop()

    def tunnel(self, name: str = "attic") -> dict[str, Any]:
        return next((t for t in self.api("/tunnels")["tunnels"] if t["name"] == name), {})


@pytest.fixture(scope="module")
def attic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attic]:
    with ExitStack() as ends:
        site = Site(
            "attic", vpn="wireguard", provider="nl", kill_switch=True, kill_switch_lan=True, lan_server=True,
            reference=True,
        )  # fmt: skip
        lab = ends.enter_context(Lab([site]))
        made = Attic(lab, tmp_path_factory.mktemp("attic"))
        ends.callback(made.stop)
        made.start_server()
        made.start_reference()
        made.start_agent()
        made.wait_state("protected", 20)
        made.wait_message("connected", 0, 10)
        made.wait_message("works", 0, 20)
        yield made


def test_a_site_shows_its_home_connection_apart(attic: Attic) -> None:
    seen = attic.tunnel("beside")
    assert (seen["role"], seen["site"], seen["state"]) == ("reference", SITE, "protected")
    assert seen["exit"]["ipv4"] == attic.site.home4
    assert (attic.tunnel()["role"], attic.tunnel()["site"]) == ("tunnel", SITE)
    assert attic.api("/summary")["total"] == 1


@pytest.mark.parametrize("fault", ["link_down", "delete_tunnel", "block_endpoint", "no_forwarding", "half_open"])
def test_down_is_told_by_the_second_way(attic: Attic, fault: str) -> None:
    took, message = once(attic, getattr(attic.site, fault), "is down", 15, hold=3.0)
    print(f"{fault}: told after {took:.2f} s")
    assert took < 6
    assert "leak" not in message["plain"].lower()
    assert attic.status()["ip"] == attic.site.exit4  # reports over the LAN are no exit
    transition = attic.history()[-1]
    assert attic.seconds(transition["decided_at"]) - attic.seconds(transition["at"]) < 5


def test_row_33_home_internet_down_is_told_apart_behind_a_kill_switch(attic: Attic) -> None:
    before = attic.settle()
    began = time.time()
    attic.site.home_internet_down()
    said = attic.wait_message("Home internet of attic is down", before, 15)
    print(f"told after {float(said['time']) - began:.2f} s: {said['plain']}")
    until(lambda: "uplink_down" in attic.codes(), 20, "uplink_down", interval=0.1)
    assert attic.status()["state"] == "down"
    attic.site.heal()
    attic.wait_message("works again", before, 40)
    told = attic.messages()[before : attic.settle()]
    # Once, and not for each of the site's tunnels.
    down, well = (m["plain"].splitlines()[0] for m in told)
    assert down == "🟠 Home internet of attic is down"
    assert well.startswith("🟢 Home internet of attic works again")


def test_row_43_the_new_home_address_must_not_leak_at_once(attic: Attic) -> None:
    attic.settle()
    renewed = attic.site.renew_home_address()
    until(
        lambda: attic.tunnel("beside").get("exit", {}).get("ipv4") == renewed, 20, "the renewed address", interval=0.1
    )
    before = len(attic.messages())
    attic.site.set_kill_switch(False)
    attic.site.delete_tunnel()
    attic.wait_message("is LEAKING", before, 10)  # by the first packet that the leak watch saw
    until(lambda: f"the home address {renewed}" in str(attic.status()), 10, "the new address as home", interval=0.1)
    attic.settle()


def test_row_37_38_a_forwarded_port_is_tried_from_outside_and_its_change_is_told(attic: Attic) -> None:
    before = attic.settle()
    closed, open_ = PORTS
    attic.site.close_port(closed)
    attic.site.open_port(open_)
    listener = attic.site.spawn([sys.executable, "-m", "http.server", str(open_)], log="listener")
    try:
        attic.port_file.write_text(f"{closed}\n")
        until(lambda: attic.tunnel().get("forwarded_port") == closed, 40, "the port to be known", interval=0.2)
        attic.wait_message("degraded", before, 90)
        assert attic.codes() >= {"port_closed"}
        attic.port_file.write_text(f"{open_}\n")
        told = attic.wait_message("another forwarded port", before, 40)
        assert f"{closed} → {open_}" in told["plain"]
        attic.wait_state("protected", 90)
        until(
            lambda: (attic.tunnel()["port_check"] or {}).get("answer") == "answered", 60, "an open port", interval=0.2
        )
        assert attic.tunnel()["port_check"]["address"] == attic.site.exit4
    finally:
        attic.port_file.unlink()
        listener.stop()
        attic.site.heal()


def test_row_42_a_tunnel_that_comes_and_goes_is_one_open_incident(attic: Attic) -> None:
    attic.settle()
    before = len(attic.messages())
    for _ in range(2):
        told = len(attic.messages())
        attic.site.block_endpoint()
        attic.wait_message("is down", told, 20)
        time.sleep(MAX_INTERRUPTION_S)  # where it is shorter, two of them are loss as well, and told as that
        attic.site.heal()
        attic.wait_message("is protected again", told, 40)
    told = len(attic.messages())
    attic.site.block_endpoint()
    attic.wait_message("is down", told, 20)
    until(lambda: "flapping" in attic.codes(), 10, "flapping", interval=0.1)
    for _ in range(2):  # now it comes and goes, and nobody hears of it
        attic.site.heal()
        time.sleep(INTERVAL)
        attic.site.block_endpoint()
        time.sleep(INTERVAL + MAX_INTERRUPTION_S)
    attic.site.heal()
    attic.wait_state("protected", 60)
    until(lambda: not attic.owed(), 10, "nothing owed", interval=0.1)
    lines = [m["plain"].splitlines()[0] for m in attic.messages()[before:]]
    assert [line[0] for line in lines] == ["🟠", "🟢"] * 3, lines
    assert "comes and goes" in attic.messages()[before + 4]["plain"]
    assert KEY not in str(lines)
