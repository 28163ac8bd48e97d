"""What a site's reference agent gives its tunnels, what pulses show, and forwarded ports: on both engines."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from sqlalchemy import select

from tests.conftest import ManualClock
from tests.server.test_tracker import DEAD, EXIT, START, WELL, Watch, canary, running, yielded
from vpn_sentinel.domain.observation import (
    Action,
    Answer,
    Link,
    Observation,
    Outcome,
    Path,
    PortCheck,
    Probe,
    Quality,
    Trigger,
)
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.server.store.schema import actions, observations
from vpn_sentinel.server.store.store import Store
from vpn_sentinel.server.tracking.inputs import PortCheckResult, PulseObservation
from vpn_sentinel.server.tracking.sites import HOME_KEPT_S, Sites, Span
from vpn_sentinel.server.tracking.tracker import Tracker

OLD_HOME, NEW_HOME = ip_address("91.10.33.7"), ip_address("91.10.99.8")
HOME_DOWN = Observation(trigger=Trigger.CANARY, canaries=(canary(None, Path.OUTSIDE),))
CLOSED_UP = Observation(trigger=Trigger.CANARY, link=Link(name="wg0", present=True, up=True), canaries=(canary(None),))


def at_home(address: object) -> Observation:
    """A reference agent's round that came out at `address`."""
    return Observation(trigger=Trigger.TIMER, canaries=(canary(str(address), Path.OUTSIDE),))


class Site(Watch):
    """One site, "attic", with a tunnel "nl" and a reference agent "beside"."""

    seq = 0

    def __init__(self, store: Store, clock: ManualClock, policy: Policy) -> None:
        super().__init__(store, clock, policy)
        self.pulsed: dict[str, Span] = {}
        self.tracker = Tracker(
            self.store, clock, self.hub, policy, channels=("telegram",), on_commit=self._wake,
            sites=Sites(self.pulsed.get),
        )  # fmt: skip

    async def tunnel(self, *seen: Observation, **more: Any) -> None:
        await self._says("nl", seen, {"site": "attic", **more})

    async def reference(self, *seen: Observation, **more: Any) -> None:
        await self._says("beside", seen, {"site": "attic", "role": "reference", **more})

    async def _says(self, name: str, seen: tuple[Observation, ...], more: dict[str, Any]) -> None:
        rounds = []
        for n, each in enumerate(seen):
            self.seq += 1
            rounds.append((self.seq, float(len(seen) - 1 - n), each))
        await self.take(*rounds, tunnel=name, **more)

    async def codes(self, name: str = "nl") -> list[str]:
        return [c for c in (await self.row(name)).findings.split('"') if c.islower() and "_" in c]


@pytest.fixture
async def site(store: Store, clock: ManualClock) -> AsyncIterator[Site]:
    made = Site(store, clock, Policy())
    async with running(made.tracker):
        yield made


async def test_a_reference_agent_is_judged_as_the_home_connection(site: Site) -> None:
    await site.reference(at_home(OLD_HOME))
    row = await site.row("beside")
    assert (row.state, row.role, row.site, row.exit4) == ("protected", "reference", "attic", str(OLD_HOME))
    for _ in range(4):
        site.clock.now += 1
        await site.reference(HOME_DOWN)
    assert (await site.row("beside")).state == "down"
    assert "uplink_down" in await site.codes("beside")


async def test_a_new_home_address_must_not_leak_at_once_and_the_old_one_for_a_day(site: Site) -> None:
    await site.tunnel(WELL)
    await site.reference(at_home(OLD_HOME))
    site.clock.now += 10
    await site.reference(at_home(NEW_HOME))
    for address in (NEW_HOME, OLD_HOME):
        await site.tunnel(replace(WELL, canaries=(canary(str(address)),)))
        assert (await site.row()).state == "leaking", address
        for _ in range(6):
            site.clock.now += 1
            await site.tunnel(WELL)
        assert (await site.row()).state == "protected"
    site.clock.now += HOME_KEPT_S + 60
    await site.reference(at_home(NEW_HOME))
    site.clock.now += 1
    await site.tunnel(replace(WELL, canaries=(canary(str(OLD_HOME)),)))
    assert (await site.row()).state == "protected"


async def test_another_site_does_not_know_this_ones_home(site: Site) -> None:
    await site.reference(at_home(OLD_HOME))
    await site.tunnel(replace(WELL, canaries=(canary(str(OLD_HOME)),)), site="cellar")
    assert (await site.row()).state == "protected"


async def test_home_internet_down_is_not_the_vpns_fault(site: Site) -> None:
    await site.reference(at_home(OLD_HOME))
    await site.tunnel(WELL)
    site.clock.now += 5
    await site.reference(HOME_DOWN)
    await site.tunnel(replace(CLOSED_UP, silent_for=3.0))
    assert (await site.row()).state == "down"
    assert "uplink_down" in await site.codes()


async def test_a_dead_tunnel_beside_a_working_home_is_the_vpns_fault(site: Site) -> None:
    await site.reference(at_home(OLD_HOME))
    await site.tunnel(WELL)
    site.clock.now += 5
    await site.reference(at_home(OLD_HOME))
    await site.tunnel(replace(CLOSED_UP, silent_for=3.0))
    assert "no_traffic" in await site.codes()


async def test_a_pulse_of_the_reference_shows_that_home_is_well(site: Site) -> None:
    await site.reference(at_home(OLD_HOME))
    await site.tunnel(WELL)
    site.clock.now += 5
    site.pulsed["beside"] = (START - 60, site.clock.now - 1)
    await site.tunnel(replace(CLOSED_UP, silent_for=3.0))
    assert (await site.kinds())[-1] == "down"
    assert "no_traffic" in await site.codes()


async def test_pulses_that_only_came_back_say_nothing_of_the_outage(site: Site) -> None:
    """Home was away for half a minute; what comes back first is the tunnel's report, and then the reference's."""
    await site.reference(at_home(OLD_HOME))
    await site.tunnel(WELL)
    told = await site.kinds()
    site.clock.now += 35
    site.pulsed["beside"] = (site.clock.now - 1, site.clock.now)
    beside = replace(canary(None, Path.OUTSIDE), probe=Probe.PHYSICAL)
    dead = replace(CLOSED_UP, canaries=(*CLOSED_UP.canaries, beside), silent_for=3.0)
    await site.take((10, 27.0, dead), (11, 20.0, dead), tunnel="nl", site="attic", caught_up=False)
    assert "uplink_down" in await site.codes()
    assert "no_traffic" not in await site.codes()
    await site.reference(replace(HOME_DOWN, silent_for=3.0), at_home(OLD_HOME))
    assert "down" not in (await site.kinds())[len(told) :]


async def test_a_round_trip_is_allowed_for(site: Site) -> None:
    """The reply to the tunnel's pulse died on its way, and the reference's later pulse was still let out."""
    await site.reference(at_home(OLD_HOME))
    await site.tunnel(WELL)
    told = await site.kinds()
    site.clock.now += 5
    slow = Quality(seconds=60.0, sent=30, lost=0, rtt_ms=400.0)
    began = site.clock.now - 3.0
    site.pulsed["beside"] = (START - 60, began + 0.3)
    await site.tunnel(replace(CLOSED_UP, silent_for=3.0, quality=slow))
    assert await site.kinds() == told


async def test_a_dead_tunnel_waits_for_the_reference_that_home_is_told_once(site: Site) -> None:
    await site.reference(at_home(OLD_HOME))
    await site.tunnel(WELL)
    site.pulsed["beside"] = (START - 60, site.clock.now)
    told = await site.kinds()
    site.clock.now += 5
    await site.tunnel(replace(CLOSED_UP, silent_for=3.0))
    assert (await site.row()).state == "down"
    site.clock.now += 1
    await site.reference(replace(HOME_DOWN, silent_for=2.0))
    await site.tunnel(replace(CLOSED_UP, silent_for=4.0))
    assert await site.kinds() == [*told, "down"]  # of the reference alone
    assert "uplink_down" in await site.codes()


async def test_a_dead_tunnel_is_told_after_all_when_the_reference_says_nothing(site: Site) -> None:
    await site.reference(at_home(OLD_HOME))
    site.clock.now += 1
    await site.tunnel(WELL)
    told = await site.kinds()
    for silent_for in (2.0, 4.0):
        assert await site.kinds() == told
        site.clock.now += 2
        await site.tunnel(replace(CLOSED_UP, silent_for=silent_for))
    assert (await site.row()).state == "down"
    site.clock.now += 2
    await site.tunnel(replace(CLOSED_UP, silent_for=6.0))
    assert await site.kinds() == [*told, "down"]


async def test_a_leak_waits_for_nobody(site: Site) -> None:
    await site.reference(at_home(OLD_HOME))
    await site.tunnel(WELL)
    site.clock.now += 5
    await site.tunnel(replace(WELL, canaries=(canary(str(OLD_HOME)),)))
    assert (await site.kinds())[-1] == "leaking"


async def test_a_reference_that_was_silent_before_says_nothing_of_a_tunnel_that_worked_meanwhile(site: Site) -> None:
    await site.reference(at_home(OLD_HOME))
    site.clock.now += 1000
    await site.tunnel(WELL)
    site.clock.now += 5
    await site.tunnel(replace(CLOSED_UP, silent_for=3.0))
    assert "no_traffic" in await site.codes()


async def test_a_replay_of_an_outage_that_the_reference_was_silent_in_is_the_homes(site: Site) -> None:
    await site.reference(at_home(OLD_HOME))
    await site.tunnel(WELL)
    await site.tracker.sweep(["beside", "nl"], START + 91)
    site.clock.now += 200
    await site.take((10, 150.0, replace(DEAD, silent_for=3.0)), (11, 120.0, DEAD), tunnel="nl", site="attic")
    assert (await site.row()).state == "down"
    assert "uplink_down" in await site.codes()


async def test_a_site_that_falls_silent_together_says_so(site: Site) -> None:
    await site.reference(at_home(OLD_HOME))
    site.clock.now += 3
    await site.tunnel(WELL)
    await site.tracker.sweep(["nl"], START + 95)
    row = await site.row()
    assert row.state == "silent"
    assert "attic" in row.findings
    assert "beside" in row.findings


async def test_one_that_falls_silent_alone_says_nothing_of_its_site(site: Site) -> None:
    await site.tunnel(WELL)
    site.clock.now += 90
    await site.reference(at_home(OLD_HOME))
    await site.tracker.sweep(["nl"], START + 92)
    assert "attic" not in (await site.row()).findings


async def test_who_of_the_site_is_being_stored_is_not_called_silent(site: Site) -> None:
    await site.reference(at_home(OLD_HOME))
    await site.tunnel(WELL)
    site.clock.now += 92
    site.store.gate.clear()  # the database is slow
    stored = asyncio.create_task(site.reference(at_home(OLD_HOME)))
    await yielded()
    swept = asyncio.create_task(site.tracker.sweep(["nl"], START + 92))
    await asyncio.sleep(0.1)
    site.store.gate.set()
    await asyncio.gather(stored, swept)
    row = await site.row()
    assert row.state == "silent"
    assert "attic" not in row.findings


async def test_sites_outlive_a_restart(site: Site, store: Store, clock: ManualClock) -> None:
    await site.reference(at_home(OLD_HOME))
    sites = Sites()
    await sites.load(store, clock.now)
    assert sites.view().homes("attic") == (ip_network(f"{OLD_HOME}/32"),)
    assert sites.view().homes("") == sites.view().homes("cellar") == ()
    assert sites.view().up("attic", clock.now, clock.now, clock.now) is True


# -- pulses


def sighting(site: Site, address: object = EXIT, *, unheard: bool = False, name: str = "nl") -> PulseObservation:
    return PulseObservation(tunnel=name, address=ip_address(str(address)), unheard=unheard, at=site.clock.wall())


async def test_pulses_from_home_are_a_leak(site: Site) -> None:
    await site.tunnel(WELL, policy=Policy(home_networks=(ip_network("91.10.20.0/24"),)))
    before = await site.row()
    site.clock.now += 2
    await site.tracker.submit(sighting(site, "91.10.20.30"))
    row = await site.row()
    assert (row.state, row.since) == ("leaking", site.clock.wall())
    assert (row.seq, row.spool, row.last_seen, row.deadline) == (
        before.seq, before.spool, before.last_seen, before.deadline,
    )  # fmt: skip
    found = await site.store.read(select(observations).where(observations.c.spool == "pulse"))
    assert [(r.seq, r.state) for r in found] == [(int(1000 * site.clock.now), "leaking")]
    for _ in range(6):
        site.clock.now += 1
        await site.tunnel(WELL)
    assert (await site.row()).state == "protected"


@pytest.mark.parametrize(("declared", "state"), [(("65.108.77.20/32",), "protected"), ((), "leaking")])
async def test_an_agent_that_reports_beside_its_tunnel_on_purpose_leaks_nothing_by_it(
    site: Site, declared: tuple[str, ...], state: str
) -> None:
    """A host route to the server, let out by the kill switch, so that a dead tunnel can be told of."""
    policy = Policy(home_networks=(ip_network("91.10.20.0/24"),), allowed_outside=tuple(map(ip_network, declared)))
    await site.tunnel(WELL, policy=policy, peer=ip_address("91.10.20.30"))
    site.clock.now += 2
    await site.tracker.submit(sighting(site, "91.10.20.30"))
    assert (await site.row()).state == state


async def test_unheard_pulses_are_a_dead_tunnel_at_once_and_keep_it_from_silence(site: Site) -> None:
    await site.tunnel(WELL)
    site.clock.now += 10
    await site.tracker.submit(sighting(site, unheard=True))
    assert (await site.row()).state == "down"
    site.clock.now += 80
    await site.tracker.submit(sighting(site, unheard=True))
    site.clock.now += 5
    await site.tracker.sweep(["nl"], site.clock.now)
    assert (await site.row()).state == "down"
    site.clock.now += 60
    await site.tracker.sweep(["nl"], site.clock.now)
    assert (await site.row()).state == "silent"


async def test_pulses_that_come_back_before_the_replay_leave_the_silence_to_it(site: Site) -> None:
    await site.tunnel(WELL)
    site.clock.now += 200
    await site.tracker.sweep(["nl"], site.clock.now)
    assert (await site.row()).state == "silent"
    await site.tracker.submit(sighting(site, unheard=True))
    assert (await site.row()).state == "silent"


async def test_the_agents_own_word_stands_against_unheard_pulses(site: Site) -> None:
    await site.tunnel(WELL)
    for _ in range(10):
        site.clock.now += 3
        await site.tracker.submit(sighting(site, unheard=True))
        await site.tunnel(WELL)
    assert (await site.row()).state == "protected"
    assert (await site.kinds()).count("down") == 1
    site.clock.now += 3
    await site.tracker.submit(sighting(site))  # heard again: from here on it counts anew
    site.clock.now += 30
    await site.tracker.submit(sighting(site, unheard=True))
    assert (await site.row()).state == "down"


async def test_pulses_make_no_tunnel_and_say_nothing_of_a_reference_or_a_lan(site: Site) -> None:
    await site.tracker.submit(sighting(site, name="nobody", unheard=True))
    await site.reference(at_home(OLD_HOME))
    await site.tracker.submit(sighting(site, name="beside", unheard=True))
    home = Policy(home_networks=(ip_network("192.168.1.0/24"),))
    await site.tunnel(WELL, policy=home)
    await site.tracker.submit(sighting(site, "192.168.1.10"))
    found = await site.store.read(select(observations.c.spool).where(observations.c.spool == "pulse"))
    assert list(found) == []
    assert (await site.row()).state == "protected"


# -- when trouble began


async def test_trouble_is_dated_when_the_first_canary_went_unanswered(site: Site) -> None:
    await site.tunnel(WELL)
    site.clock.now += 30
    await site.tunnel(replace(DEAD, silent_for=3.0))
    assert (await site.row()).state == "down"
    assert (await site.moves())[-1] == (27.0, "protected", "down")


async def test_trouble_is_never_dated_before_what_said_otherwise(site: Site) -> None:
    await site.tunnel(WELL)
    site.clock.now += 1
    await site.tunnel(replace(DEAD, silent_for=1e9))
    assert (await site.row()).state == "protected"
    site.clock.now += 1.5
    await site.tunnel(replace(DEAD, silent_for=1e9))
    assert (await site.moves())[-1] == (0.0, "protected", "down")


# -- ports and actions


def with_port(port: int | None) -> Observation:
    return replace(WELL, forwarded_port=port)


async def test_a_port_is_tried_only_where_the_tunnels_own_packets_came_from(site: Site) -> None:
    await site.tunnel(with_port(41000), peer=ip_address("192.168.20.10"))
    assert site.tracker.forwarded == {}
    await site.tunnel(with_port(41000), peer=ip_address("146.70.99.99"))
    assert site.tracker.forwarded == {}
    await site.tunnel(with_port(41000), peer=ip_address(EXIT))
    assert site.tracker.forwarded == {"nl": (ip_address(EXIT), 41000)}
    await site.tunnel(with_port(80), peer=ip_address(EXIT))
    assert site.tracker.forwarded == {}
    await site.tracker.submit(sighting(site))
    await site.tunnel(with_port(41000), peer=ip_address("192.168.20.10"))
    assert site.tracker.forwarded == {"nl": (ip_address(EXIT), 41000)}


async def test_a_closed_port_is_trouble_until_it_opens(site: Site) -> None:
    await site.tunnel(with_port(41000))
    check = PortCheck(address=ip_address(EXIT), port=41000, answer=Answer.LOST)
    await site.tracker.submit(PortCheckResult(tunnel="nl", check=check, at=site.clock.wall()))
    assert '"lost"' in (await site.row()).port_check
    site.clock.now += 20
    await site.tunnel(with_port(41000))
    assert (await site.row()).state == "degraded"
    assert "port_closed" in await site.codes()
    opened = replace(check, answer=Answer.ANSWERED)
    await site.tracker.submit(PortCheckResult(tunnel="nl", check=opened, at=site.clock.wall()))
    for _ in range(6):
        site.clock.now += 1
        await site.tunnel(with_port(41000))
    assert (await site.row()).state == "protected"


async def test_another_port_is_told_once_with_both(site: Site) -> None:
    await site.tunnel(with_port(41000))
    await site.tunnel(with_port(None))
    await site.tunnel(with_port(42000))
    await site.tunnel(with_port(42000))
    assert await site.kinds() == ["connected", "port_changed"]
    assert (await site.row()).port == 42000


async def test_what_an_agent_did_is_kept_once(site: Site) -> None:
    did = replace(WELL, actions=(Action(name="contain", outcome=Outcome.DONE, detail="closed", age=2.0),))
    await site.take((1, 0.0, did))
    await site.take((1, 0.0, did))
    found = await site.store.read(select(actions))
    assert [(r.at - START, r.name, r.outcome, r.detail) for r in found] == [(-2.0, "contain", "done", "closed")]


@pytest.mark.parametrize(("ago", "heard"), [(0.8, True), (13.0, False)])
async def test_who_is_silent_and_pulses_runs_and_cannot_report(site: Site, ago: float, heard: bool) -> None:
    """TCP to the server is held back, and UDP passes; one that was killed pulses no more."""
    await site.tunnel(WELL)
    site.clock.now += 92.0
    site.pulsed["nl"] = (0.0, site.clock.wall() - ago)
    await site.tracker.sweep(["nl"], site.clock.wall())
    row = await site.row()
    assert (row.state, row.deadline) == ("silent", None)
    assert ("the agent runs" in row.findings) is heard
    assert ("a dead agent look the same" in row.findings) is not heard
