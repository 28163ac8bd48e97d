"""The one transaction, on both engines: what is acknowledged is there, with all that follows from it."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from sqlalchemy import Executable, Row, insert, select, update

from tests.conftest import ManualClock
from vpn_sentinel.domain.observation import (
    Answer,
    Canary,
    Link,
    Observation,
    Path,
    Place,
    Probe,
    ResolverSighting,
    Trigger,
)
from vpn_sentinel.domain.policy import IPNetwork, Policy
from vpn_sentinel.server.api.present import client_status
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.store import queries
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.schema import incidents, observations, outbox, transitions, tunnels
from vpn_sentinel.server.store.store import C, Decide, Store, StoreUnavailable, TunnelRow
from vpn_sentinel.server.tracking.group_commit import Busy
from vpn_sentinel.server.tracking.inputs import ReportBatch, TimedObservation
from vpn_sentinel.server.tracking.report_sources import ReportSources
from vpn_sentinel.server.tracking.tracker import Tracker

START = 1_800_000_000.0
POLICY = Policy(home_networks=(ip_network("91.10.20.0/24"),), grace_down=4.0, grace_recovery=4.0)
EXIT, OTHER_EXIT, HOME = "146.70.1.2", "146.70.9.9", "91.10.20.30"
UP = Link(name="wg0", present=True, up=True)


def canary(address: str | None, path: Path = Path.TUNNEL, probe: Probe = Probe.DEFAULT) -> Canary:
    answer = Answer.ANSWERED if address else Answer.LOST
    seen = ip_address(address) if address else None
    return Canary(probe=probe, target="echo", family=4, answer=answer, path=path, address=seen)


def saw(address: str = EXIT) -> Observation:
    return Observation(trigger=Trigger.TIMER, link=UP, canaries=(canary(address),))


WELL = saw()
LEAK = saw(HOME)
DEAD = Observation(trigger=Trigger.TIMER, link=UP, canaries=(canary(None),))
BLIND = Observation(trigger=Trigger.TIMER, link=UP)


class Seam:
    """A store in front of the real one: counts transactions, and fails or waits when a test says so."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.transactions: list[list[str]] = []
        self.failure: Exception | None = None
        self.late_failure: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def read(self, statement: Executable) -> Sequence[Row[Any]]:
        return await self._store.read(statement)

    async def write(self, *statements: Executable) -> list[Sequence[Row[Any]]]:
        return await self._store.write(*statements)

    async def transact(self, names: Sequence[str], now: float, decide: Decide[C], *, create: bool) -> C:
        self.transactions.append(list(names))
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure

        def decide_and_fail(rows: Mapping[str, TunnelRow]) -> C:
            decided = decide(rows)
            if self.late_failure is not None:
                raise self.late_failure
            return decided

        return await self._store.transact(names, now, decide_and_fail, create=create)

    async def ping(self) -> None:
        await self._store.ping()

    async def close(self) -> None:
        await self._store.close()


class Watch:
    """A running tracker, the clock it goes by, and what its database holds."""

    def __init__(
        self, store: Store, clock: ManualClock, policy: Policy = POLICY, own: tuple[IPNetwork, ...] = ()
    ) -> None:
        self.store = Seam(store)
        self.clock = clock
        self.hub = Hub()
        self.woken = 0
        self.tracker = Tracker(
            self.store, clock, self.hub, policy, channels=("telegram", "webhook"), on_commit=self._wake,
            own_address=lambda: own,
        )  # fmt: skip

    def _wake(self) -> None:
        self.woken += 1

    def arrival(self, *rounds: tuple[int, float, Observation], **more: Any) -> ReportBatch:
        """What an agent's message brought: rounds with their number and their age."""
        now = self.clock.wall()
        given: dict[str, Any] = {
            "tunnel": "nl", "received_at": now, "silent_after": 91.0, "interval": 30.0, "version": "2.0.0",
            "spool": "s1", "policy": Policy(),
            "observations": tuple(
                TimedObservation(seq=seq, at=now - age, observation=seen) for seq, age, seen in rounds
            ),
        }  # fmt: skip
        return ReportBatch(**{**given, **more})

    async def take(self, *rounds: tuple[int, float, Observation], **more: Any) -> None:
        await self.tracker.submit(self.arrival(*rounds, **more))

    async def keepalive(self, seen: Observation, **more: Any) -> None:
        await self.take((0, 0.0, seen), spool=None, policy=None, **more)

    async def rows(self, table: Any, *columns: Any) -> list[tuple[Any, ...]]:
        found = select(*(columns or (table,)))
        order = table.c.id if "id" in table.c else table.c.seq
        return [tuple(r) for r in await self.store.read(found.order_by(order))]

    async def row(self, name: str = "nl") -> Row[Any]:
        (found,) = await self.store.read(select(tunnels).where(tunnels.c.name == name))
        return found

    async def shown(self) -> dict[str, str | None]:
        """Where the replaced system's interface says that the tunnel comes out."""
        tunnel = await queries.tunnel_named(self.store, "nl")
        assert tunnel is not None
        status = client_status(tunnel)
        return {"ip": status.ip, "location": status.location, "provider": status.provider}

    async def moves(self) -> list[tuple[float, str, str]]:
        """Transitions as (seconds since the start, from, to), in the order of their time."""
        found = await self.store.read(select(transitions).order_by(transitions.c.at, transitions.c.id))
        return [(r.at - START, r.old, r.new) for r in found]

    async def spans(self) -> list[tuple[float, float | None, str]]:
        """Incidents as (opened, closed, worst), in seconds since the start."""
        found = await self.store.read(select(incidents).order_by(incidents.c.opened_at))
        return [(r.opened_at - START, None if r.closed_at is None else r.closed_at - START, r.worst) for r in found]

    async def kinds(self, channel: str = "telegram") -> list[str]:
        found = select(outbox.c.kind).where(outbox.c.channel == channel).order_by(outbox.c.id)
        return [r.kind for r in await self.store.read(found)]


@asynccontextmanager
async def running(tracker: Tracker) -> AsyncIterator[None]:
    task = asyncio.create_task(tracker.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.fixture
async def watch(store: Store, clock: ManualClock) -> AsyncIterator[Watch]:
    watch = Watch(store, clock)
    async with running(watch.tracker):
        yield watch


async def yielded(times: int = 5) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


# -- what is taken


async def test_what_is_acknowledged_is_in_the_database(watch: Watch) -> None:
    seen = replace(
        WELL,
        resolvers=(
            ResolverSighting(
                method="akamai", nameserver=ip_address("10.64.0.1"), answer=Answer.ANSWERED,
                egress=ip_address("9.9.9.9"),
            ),
        ),
        places=(
            Place(ip=ip_address(EXIT), source="ipinfo", country="NL"),
            Place(ip=ip_address(EXIT), source="mmdb", country="NL", city="Amsterdam", asn=9009, org="M247"),
            Place(ip=ip_address("9.9.9.9"), source="mmdb", country="US", org="Quad9"),
        ),
    )  # fmt: skip
    await watch.take((1, 2.0, seen))
    row = await watch.row()
    assert (row.state, row.since, row.last_seen, row.deadline) == ("protected", START - 2, START, START + 91)
    assert (row.source, row.version, row.interval, row.spool, row.seq) == ("agent", "2.0.0", 30.0, "s1", 1)
    assert (row.exit4, row.exit6) == (EXIT, None)
    assert json.loads(row.place)["city"] == "Amsterdam"
    assert json.loads(row.resolvers) == [{"ip": "9.9.9.9", "country": "US", "org": "Quad9"}]
    ((_, spool, seq, at, received_at, state, body),) = await watch.rows(observations)
    assert (spool, seq, at, received_at, state) == ("s1", 1, START - 2, START, "protected")
    assert json.loads(body)["canaries"][0]["address"] == EXIT


async def test_what_a_round_does_not_know_stays_as_it_was(watch: Watch) -> None:
    await watch.take((1, 0.0, replace(WELL, places=(Place(ip=ip_address(EXIT), source="mmdb", country="NL"),))))
    watch.clock.now += 1
    await watch.take((2, 0.0, DEAD))
    row = await watch.row()
    assert (row.exit4, json.loads(row.place)["country"]) == (EXIT, "NL")


async def test_home_is_never_shown_with_the_place_of_the_vpn(watch: Watch) -> None:
    told = tuple(
        Place(ip=ip_address(a), source="mmdb", country=c, city=city, org=org, asn=1)
        for a, c, city, org in ((EXIT, "NL", "Amsterdam", "31173 Services AB"), (HOME, "DE", "Munich", "Fibre GmbH"))
    )
    await watch.take((1, 0.0, replace(WELL, places=told[:1])))
    watch.clock.now += 1
    await watch.take((2, 0.0, LEAK))
    shown = await watch.shown()
    assert shown == {"ip": HOME, "location": None, "provider": None}
    watch.clock.now += 1
    await watch.take((3, 0.0, DEAD))  # knows of no exit: what was known of home stays unknown
    assert await watch.shown() == shown
    await watch.take((4, 0.0, replace(LEAK, places=told)))
    assert await watch.shown() == {"ip": HOME, "location": "Munich, DE", "provider": "Fibre GmbH"}
    await watch.take((5, 0.0, replace(WELL, places=told)))
    assert await watch.shown() == {"ip": EXIT, "location": "Amsterdam, NL", "provider": "31173 Services AB"}


async def test_reports_that_wait_together_are_committed_together(watch: Watch) -> None:
    watch.store.gate.clear()
    first = asyncio.create_task(watch.take((1, 0.0, WELL), tunnel="first"))
    await yielded()
    rest = [asyncio.create_task(watch.take((1, 0.0, WELL), tunnel=f"t{i:03}")) for i in range(300)]
    await yielded()
    assert not first.done()
    watch.store.gate.set()
    await asyncio.gather(first, *rest)
    assert [len(names) for names in watch.store.transactions] == [1, 256, 44]
    assert len(await watch.rows(tunnels)) == 301


async def test_long_messages_are_committed_a_few_at_a_time(watch: Watch) -> None:
    """Each observation is judged, which keeps the interpreter from all else: 51,200 at once would be seconds of it."""
    rounds = [(n, 0.0, WELL) for n in range(1, 201)]
    watch.store.gate.clear()
    first = asyncio.create_task(watch.take((1, 0.0, WELL), tunnel="first"))
    await yielded()
    rest = [asyncio.create_task(watch.take(*rounds, tunnel=f"t{i}")) for i in range(8)]
    await yielded()
    watch.store.gate.set()
    await asyncio.gather(first, *rest)
    assert [len(names) for names in watch.store.transactions] == [1, 2, 2, 2, 2]
    assert len(await watch.rows(tunnels)) == 9


async def test_messages_of_one_tunnel_in_one_batch_follow_each_other(watch: Watch) -> None:
    watch.store.gate.clear()
    early = asyncio.create_task(watch.take((1, 0.0, WELL), tunnel="other"))
    await yielded()
    ours = [asyncio.create_task(watch.take((n, 10.0 - n, LEAK if n == 2 else WELL))) for n in (1, 2, 3)]
    await yielded()
    watch.store.gate.set()
    await asyncio.gather(early, *ours)
    assert watch.store.transactions == [["other"], ["nl"]]
    assert (await watch.row()).seq == 3
    assert [m for m in await watch.moves() if m[2] == "leaking"] == [(-8.0, "protected", "leaking")]


@pytest.mark.parametrize(("seen", "told"), [(WELL, ["recovered"]), (DEAD, [])], ids=["well", "dead"])
async def test_what_an_agent_saw_just_before_it_connected(watch: Watch, seen: Observation, told: list[str]) -> None:
    """One that was started again looks around first: that all is well is told at once, trouble is looked at anew."""
    await watch.take((1, 0.0, WELL))
    watch.clock.now += 100
    await watch.tracker.sweep(["nl"], watch.clock.now)
    watch.clock.now += 60
    await watch.take((1, 1.0, seen), spool="s2", connected_at=watch.clock.now - 0.1)
    assert await watch.kinds() == ["connected", "silent", *told]


async def test_each_transition_is_logged_once_it_is_stored(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rounds = ((1, 9.0, WELL), (2, 8.0, LEAK), (3, 7.0, WELL), (4, 0.0, WELL))
    await watch.take(*rounds)
    await watch.take(*rounds)
    said = [vars(r) for r in caplog.records if r.name.endswith("tracker")]
    assert [(r["levelname"], r["tunnel"], r["was"], r["state"], r["codes"]) for r in said] == [
        ("WARNING", "nl", "protected", "leaking", "ip_leak"),
        ("INFO", "nl", "leaking", "protected", ""),
    ]


async def test_a_replay_changes_nothing(watch: Watch) -> None:
    rounds = ((1, 30.0, WELL), (2, 20.0, LEAK), (3, 10.0, WELL), (4, 0.0, WELL))
    await watch.take(*rounds)
    before = [await watch.rows(t) for t in (tunnels, observations, transitions, incidents, outbox)]
    await watch.take(*rounds)
    await watch.take(*rounds[:2])
    assert [await watch.rows(t) for t in (tunnels, observations, transitions, incidents, outbox)] == before


async def test_only_what_is_new_of_a_message_is_taken(watch: Watch) -> None:
    await watch.take((1, 1.0, WELL), (2, 0.0, WELL))
    await watch.take((2, 0.0, LEAK), (5, 0.0, WELL))
    assert [r[0] for r in await watch.rows(observations, observations.c.seq)] == [1, 2, 5]
    assert (await watch.row()).state == "protected"


async def test_a_new_spool_begins_again_at_one(watch: Watch) -> None:
    await watch.take((7, 0.0, WELL), spool="s1")
    await watch.take((1, 0.0, WELL), spool="s2")
    found = await watch.store.read(select(observations.c.spool, observations.c.seq).order_by(observations.c.spool))
    assert [tuple(r) for r in found] == [("s1", 7), ("s2", 1)]
    assert ((await watch.row()).spool, (await watch.row()).seq) == ("s2", 1)


async def codes(watch: Watch) -> list[str]:
    return [f["code"] for f in json.loads((await watch.row()).findings)]


async def test_two_agents_under_one_name_are_told(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    def said() -> list[tuple[str, str]]:
        return [(r.__dict__["tunnel"], r.__dict__["remedy"]) for r in caplog.records if "several agents" in r.message]

    await watch.take((1, 0.0, WELL), spool="s1")
    await watch.take((1, 0.0, WELL), spool="s2")  # its data were lost, say
    await watch.take((2, 0.0, WELL), spool="s1")  # or it is replaced by another, and both ran for a moment
    await watch.take((2, 0.0, WELL), spool="s2")
    assert (said(), await codes(watch)) == ([], [])
    for seq in range(3, 6):
        for spool in ("s1", "s2"):
            watch.clock.now += 30
            await watch.take((seq, 0.0, WELL), spool=spool)
    assert said() == [("nl", "give each its own VPN_SENTINEL_CLIENT_ID")]
    assert ((await watch.row()).state, await codes(watch)) == ("degraded", ["name_shared"])

    for seq in range(6, 16):  # one of them has ended
        watch.clock.now += 60
        await watch.take((seq, 0.0, WELL), spool="s1")
    assert ((await watch.row()).state, await codes(watch)) == ("protected", [])


async def test_an_agent_and_an_old_client_under_one_name_are_two(watch: Watch) -> None:
    for seq in range(1, 8):
        watch.clock.now += 30
        await watch.take((seq, 0.0, WELL))
        watch.clock.now += 30
        await watch.keepalive(WELL)
    assert ((await watch.row()).state, await codes(watch)) == ("degraded", ["name_shared"])

    for _ in range(12):  # the agent has ended
        watch.clock.now += 60
        await watch.keepalive(WELL)
    assert ((await watch.row()).state, await codes(watch)) == ("protected", [])


@pytest.mark.parametrize("many", [3, 20])
async def test_a_whole_fleet_under_one_name_is_told(watch: Watch, many: int) -> None:
    for seq in range(1, 8):
        for n in range(many):
            watch.clock.now += 30 / many
            await watch.take((seq, 0.0, WELL), spool=f"s{n}")
    assert ((await watch.row()).state, await codes(watch)) == ("degraded", ["name_shared"])


async def test_a_slow_agent_and_a_quick_one_under_one_name_are_two(watch: Watch) -> None:
    for round_ in range(6):
        await watch.take((round_ + 1, 0.0, WELL), spool="slow", interval=300.0, silent_after=901.0)
        for n in range(10):
            watch.clock.now += 30
            await watch.take((10 * round_ + n + 1, 0.0, WELL), spool="quick")
    assert ((await watch.row()).state, await codes(watch)) == ("degraded", ["name_shared"])


def test_a_clock_that_is_set_back_keeps_no_name_shared() -> None:
    senders, at = ReportSources(), START
    for _ in range(6):
        for spool, before in (("s1", "s2"), ("s2", "s1")):
            at += 30
            senders = senders.with_report(spool, before, at, 30.0, was_shared=False)
    assert senders.are_several(at)
    at -= 3600
    senders = senders.moved(-3600.0).with_report("s2", "s2", at, 30.0, was_shared=True)
    assert senders.are_several(at)
    assert not senders.with_report("s2", "s2", at + 301, 30.0, was_shared=True).are_several(at + 301)


def test_a_message_that_is_tried_again_is_one() -> None:
    senders = ReportSources()
    for spool, before in 4 * (("s1", "s2"), ("s2", "s1")):
        senders = senders.with_report(spool, before, START, 30.0, was_shared=False)
        assert not senders.are_several(START)


async def test_a_report_whose_commit_failed_leaves_no_mark(watch: Watch) -> None:
    for _ in range(2):
        watch.clock.now += 30
        await watch.keepalive(WELL, version="1.0")
    watch.store.late_failure = StoreUnavailable("disk_full", "the disk is full")
    with pytest.raises(StoreUnavailable):
        await watch.keepalive(WELL, version="1.1")
    watch.store.late_failure = None
    watch.clock.now += 30
    await watch.keepalive(WELL, version="1.1")
    assert (await watch.row()).version == "1.1"


async def test_the_same_again_counts_anew_after_another_replica_was_told_otherwise(
    watch: Watch, store: Store, clock: ManualClock
) -> None:
    other = Watch(store, clock)
    async with running(other.tracker):
        for version, replica in (("1.0", watch), ("1.0", watch), ("1.1", other), ("1.0", watch)):
            clock.now += 30
            await replica.keepalive(WELL, version=version)
    assert (await watch.row()).version == "1.0"


async def test_a_leak_whose_commit_failed_is_told_when_it_is_sent_again(watch: Watch) -> None:
    await watch.take((1, 0.0, WELL))
    watch.clock.now += 1
    watch.store.late_failure = StoreUnavailable("disk_full", "the disk is full")
    with pytest.raises(StoreUnavailable):
        await watch.take((2, 0.0, LEAK))
    assert await watch.kinds() == ["connected"]
    watch.store.late_failure = None
    await watch.take((2, 0.0, LEAK))
    assert await watch.kinds() == ["connected", "leaking"]


async def test_agents_that_lose_their_data_again_and_again_are_one(watch: Watch) -> None:
    for n in range(12):
        await watch.take((1, 0.0, WELL), (2, 0.0, WELL), spool=f"s{n}")
        watch.clock.now += 10
    assert await codes(watch) == []


async def test_an_agent_that_is_replaced_is_none_of_two(watch: Watch) -> None:
    """A rolling update starts the new one before the old one ends, and is mended by another at once."""
    began, numbers = watch.clock.now, dict[str, int]()
    said = [(0, "a"), (30, "a"), (60, "a")]
    said += [(second, "ab"[second % 2]) for second in range(70, 90)]  # with one key for both, each hears of losses
    said += [(120, "b"), (150, "b"), (170, "c"), (171, "c"), (186, "b"), (200, "c"), (216, "b"), (220, "c"), (250, "c")]
    for second, spool in said:
        watch.clock.now = began + second
        numbers[spool] = numbers.get(spool, 0) + 1
        await watch.take((numbers[spool], 0.0, WELL), spool=spool)
        assert await codes(watch) == []


async def test_copies_of_one_host_are_two_agents_and_each_is_judged(watch: Watch) -> None:
    """A copied disk has the same spool, and goes on with numbers that the other uses as well."""
    greeted = watch.clock.wall()
    watch.clock.now += 60
    for seq in range(1, 101):
        await watch.take((seq, 0.0, WELL), connected_at=greeted)
    watch.clock.now += 10
    await watch.take((90, 60.0, LEAK), connected_at=greeted)  # of before its session: one that was on its way twice
    assert (await watch.row()).state == "protected"
    await watch.take((50, 0.0, LEAK), connected_at=greeted)
    assert (await watch.row()).state == "leaking"
    for n in range(1, 10):
        watch.clock.now += 20
        await watch.take((100 + n, 0.0, WELL), connected_at=greeted)
        watch.clock.now += 20
        await watch.take((50 + n, 0.0, WELL), connected_at=greeted)
    assert ((await watch.row()).state, await codes(watch)) == ("degraded", ["name_shared"])


async def test_a_server_that_starts_anew_goes_on_knowing_that_agents_are_two(
    watch: Watch, store: Store, clock: ManualClock
) -> None:
    for seq in range(1, 6):
        for spool in ("s1", "s2"):
            watch.clock.now += 30
            await watch.take((seq, 0.0, WELL), spool=spool)
    assert (await watch.row()).state == "degraded"
    again = Watch(store, clock)
    async with running(again.tracker):
        for seq in range(6, 10):
            for spool in ("s1", "s2"):
                clock.now += 30
                await again.take((seq, 0.0, WELL), spool=spool)
                assert (await again.row()).state == "degraded"


async def test_keepalives_are_numbered_by_their_time(watch: Watch) -> None:
    for _ in range(3):
        await watch.keepalive(WELL, dns_loc="NL", dns_colo="AMS")
    watch.clock.now += 30
    await watch.take((1, 0.0, WELL))
    watch.clock.now += 30
    await watch.keepalive(WELL)
    ms = int(START * 1000)
    found = await watch.store.read(select(observations.c.seq).where(observations.c.spool == "keepalive"))
    assert sorted(r.seq for r in found) == [ms, ms + 1, ms + 2, ms + 60_000]
    assert (await watch.row()).source == "keepalive"


async def test_a_late_report_is_dated_when_it_was_seen(watch: Watch) -> None:
    await watch.take((1, 50.0, WELL), (2, 40.0, LEAK), (3, 0.0, LEAK))
    assert await watch.moves() == [(-50.0, "pending", "protected"), (-40.0, "protected", "leaking")]
    decided = {r[0] for r in await watch.rows(transitions, transitions.c.decided_at)}
    assert decided == {START}


# -- what follows


async def test_trouble_after_its_grace_and_its_end(watch: Watch) -> None:
    await watch.take((1, 0.0, WELL))
    for seq, seen in enumerate([DEAD] * 6 + [WELL] * 6, start=2):
        watch.clock.now += 1
        await watch.take((seq, 0.0, seen))
    assert await watch.moves() == [
        (0.0, "pending", "protected"), (1.0, "protected", "down"), (7.0, "down", "protected"),
    ]  # fmt: skip
    assert await watch.spans() == [(1.0, 7.0, "down")]
    assert await watch.kinds() == ["connected", "down", "recovered"]
    assert await watch.kinds("webhook") == await watch.kinds()


@pytest.mark.parametrize(("seen", "state"), [(DEAD, "down"), (BLIND, "unverified")])
async def test_a_server_clock_that_is_set_back_holds_up_no_grace(watch: Watch, seen: Observation, state: str) -> None:
    await watch.take((1, 0.0, WELL))
    watch.clock.now -= 3600
    for seq in range(2, 22):
        watch.clock.now += 1
        await watch.take((seq, 0.0, seen))
    assert (await watch.row()).state == state
    assert (await watch.kinds())[1:] == [state]
    for seq in range(22, 32):
        watch.clock.now += 1
        await watch.take((seq, 0.0, WELL))
    assert (await watch.kinds())[1:] == [state, "recovered"]


@pytest.mark.parametrize("jump", [-3600.0, 3600.0])
async def test_a_server_clock_that_jumps_makes_no_trouble_of_a_healthy_tunnel(watch: Watch, jump: float) -> None:
    await watch.take((1, 0.0, WELL))
    watch.clock.now += jump
    for seq in range(2, 8):
        watch.clock.now += 1
        await watch.take((seq, 0.0, WELL))
    assert await watch.kinds() == ["connected"]
    assert (await watch.row()).state == "protected"


async def test_a_silence_across_a_clock_that_is_set_back_ends_with_the_next_report(watch: Watch) -> None:
    await watch.take((1, 0.0, WELL))
    await watch.tracker.sweep(["nl"], (await watch.row()).deadline + 1)
    watch.clock.now -= 3600
    await watch.take((2, 5.0, WELL))
    assert (await watch.row()).state == "protected"
    assert await watch.kinds() == ["connected", "silent", "recovered"]


async def test_an_incident_takes_the_worst_and_only_one_is_open(watch: Watch) -> None:
    await watch.take((1, 9.0, WELL), (2, 8.0, DEAD), (3, 4.0, DEAD), (4, 3.0, LEAK), (5, 2.0, DEAD))
    assert await watch.spans() == [(-8.0, None, "leaking")]
    watch.clock.now += 100
    await watch.take((6, 50.0, WELL), (7, 46.0, WELL), (8, 40.0, LEAK))
    assert await watch.spans() == [(-8.0, 50.0, "leaking"), (60.0, None, "leaking")]


async def test_a_tunnel_that_was_never_well_opens_an_incident_too(watch: Watch) -> None:
    await watch.take((1, 0.0, LEAK))
    assert await watch.spans() == [(0.0, None, "leaking")]
    assert await watch.kinds() == ["leaking"]


async def test_the_database_itself_forbids_a_second_open_incident(watch: Watch) -> None:
    await watch.take((1, 0.0, LEAK))
    (found,) = await watch.store.read(select(incidents))
    second = {"tunnel_id": found.tunnel_id, "opened_at": START + 1, "worst": "down", "findings": "[]"}
    with pytest.raises(StoreUnavailable):
        await watch.store.write(insert(incidents).values(second))


async def test_what_is_owed_is_written_with_what_made_it_true(watch: Watch) -> None:
    place = Place(ip=ip_address(EXIT), source="mmdb", country="NL", city="Amsterdam", asn=9009, org="M247")
    assert watch.woken == 0
    await watch.take((1, 0.0, replace(WELL, places=(place,))))
    assert watch.woken == 1
    rows = await watch.store.read(select(outbox).order_by(outbox.c.id))
    assert [(r.channel, r.tunnel, r.kind, r.due_at, r.leased_until, r.attempt, r.settled_at) for r in rows] == [
        (channel, "nl", "connected", START, 0, 0, None) for channel in ("telegram", "webhook")
    ]
    body = json.loads(rows[0].body)
    assert (body["exit"], body["place"], body["provider"]) == (EXIT, "Amsterdam, NL", "M247 AS9009")
    await watch.take((2, 0.0, WELL))
    assert watch.woken == 1  # nothing more was owed


async def test_nothing_is_owed_by_a_transaction_that_failed(watch: Watch) -> None:
    watch.store.failure = StoreUnavailable("disk_full", "no space left")
    with pytest.raises(StoreUnavailable, match="disk_full"):
        await watch.take((1, 0.0, LEAK))
    for table in (tunnels, observations, transitions, incidents, outbox):
        assert await watch.rows(table) == []
    assert watch.woken == 0
    watch.store.failure = None
    await watch.take((1, 0.0, LEAK))
    assert await watch.kinds() == ["leaking"]


async def test_a_place_is_told_only_of_the_address_that_is_told(watch: Watch) -> None:
    await watch.take((1, 1.0, WELL))
    leaving = replace(LEAK, places=(Place(ip=ip_address(HOME), source="mmdb", city="Munich", country="DE"),))
    await watch.take((2, 0.0, leaving))
    (leak,) = await watch.store.read(select(outbox.c.body).where(outbox.c.kind == "leaking").limit(1))
    body = json.loads(leak.body)
    assert (body["exit"], body["place"]) == (EXIT, "")
    assert body["findings"][0]["evidence"]["address"] == HOME


async def test_another_exit_is_told_with_both(watch: Watch) -> None:
    await watch.take((1, 1.0, WELL))
    await watch.take((2, 0.0, saw(OTHER_EXIT)))
    (changed, *_) = await watch.store.read(select(outbox.c.body).where(outbox.c.kind == "address_changed"))
    body = json.loads(changed.body)
    assert (body["old_exit"], body["exit"]) == (EXIT, OTHER_EXIT)
    assert (await watch.row()).exit4 == OTHER_EXIT


async def test_whoever_listens_hears_of_what_changed(watch: Watch) -> None:
    with watch.hub.listen() as listener:
        await watch.take((1, 0.0, WELL))
        assert await anext(aiter(listener.changes())) == {"nl"}


# -- silence


async def test_silence_and_its_end(watch: Watch) -> None:
    await watch.take((1, 0.0, WELL))
    await watch.tracker.sweep(["nl"], START + 91)
    row = await watch.row()
    assert (row.state, row.since, row.deadline) == ("silent", START + 91, None)
    assert json.loads(row.findings)[0]["evidence"] == {"silent_for_seconds": "91"}
    assert await watch.spans() == [(91.0, None, "silent")]
    watch.clock.now += 200
    await watch.take((2, 0.0, WELL))
    assert await watch.spans() == [(91.0, 200.0, "silent")]
    assert await watch.kinds() == ["connected", "silent", "recovered"]
    assert (await watch.row()).deadline == START + 200 + 91


async def test_a_deadline_that_has_not_passed_or_moved_is_no_silence(watch: Watch) -> None:
    await watch.take((1, 0.0, WELL))
    await watch.tracker.sweep(["nl", "nobody"], START + 90.9)
    assert (await watch.row()).state == "protected"
    assert await watch.moves() == [(0.0, "pending", "protected")]


async def test_a_tunnel_that_was_never_judged_becomes_silent_too(watch: Watch) -> None:
    await watch.take((1, 0.0, BLIND))
    assert (await watch.row()).state == "pending"
    await watch.tracker.sweep(["nl"], (await watch.row()).deadline + 1)
    row = await watch.row()
    assert (row.state, row.deadline) == ("silent", None)
    assert await watch.kinds() == ["silent"]


async def test_the_silence_of_an_old_client_that_could_not_be_judged_is_told(store: Store, clock: ManualClock) -> None:
    watch = Watch(store, clock, Policy())  # no home network is declared, and the own address is not known
    said = Observation(trigger=Trigger.KEEPALIVE, reported_from=ip_address(HOME))
    async with running(watch.tracker):
        await watch.keepalive(said)
        assert (await watch.row()).state == "pending"
        await watch.tracker.sweep(["nl"], (await watch.row()).deadline + 1)
        assert ((await watch.row()).state, (await watch.row()).deadline) == ("silent", None)
        assert await watch.kinds() == ["silent"]
        assert [s[2] for s in await watch.spans()] == ["silent"]
        watch.clock.now += 100
        for _ in range(3):
            await watch.keepalive(said)
            watch.clock.now += 10
        assert await watch.kinds() == ["silent", "unverified"]


@pytest.mark.parametrize(("came_from", "state"), [(HOME, "leaking"), ("192.168.1.9", "protected")])
async def test_memory_proves_the_leak_of_an_agent_that_starts_with_an_empty_folder(
    store: Store, clock: ManualClock, came_from: str, state: str
) -> None:
    watch = Watch(store, clock, policy=Policy())
    async with running(watch.tracker):
        well = replace(WELL, interfaces=("eth0", "wg0"))
        await watch.take((1, 0.0, well), peer=ip_address(EXIT))
        watch.clock.now += 5
        lost = Observation(trigger=Trigger.START, interfaces=("eth0",), canaries=(canary(HOME, Path.UNKNOWN),))
        await watch.take((1, 0.0, lost), spool="new", peer=ip_address(came_from))
        assert (await watch.row()).state == state
        watch.clock.now += 20
        await watch.take((2, 0.0, lost), spool="new", peer=ip_address(came_from))
        assert (await watch.row()).state == ("leaking" if state == "leaking" else "unverified")


async def test_a_tunnel_that_cannot_be_seen_any_more_is_told_once(watch: Watch) -> None:
    await watch.take((1, 0.0, WELL))
    for n in range(4):
        watch.clock.now += 10.0
        await watch.take((2 + n, 0.0, BLIND))
    row = await watch.row()
    assert row.state == "unverified"
    assert "nothing_seen" in row.findings
    assert await watch.kinds() == ["connected", "unverified"]
    assert [s[2] for s in await watch.spans()] == ["unverified"]
    for n in range(2):
        watch.clock.now += 10.0
        await watch.take((10 + n, 0.0, WELL))
    assert (await watch.row()).state == "protected"
    assert await watch.kinds() == ["connected", "unverified", "recovered"]


async def test_a_replay_makes_a_silence_void_and_the_truth_takes_its_place(watch: Watch) -> None:
    await watch.take((1, 0.0, WELL))
    await watch.tracker.sweep(["nl"], START + 91)
    watch.clock.now += 200
    await watch.take((2, 170.0, WELL), (3, 100.0, DEAD), (4, 96.0, DEAD), (5, 10.0, WELL), (6, 6.0, WELL))
    assert await watch.moves() == [
        (0.0, "pending", "protected"), (100.0, "protected", "down"), (190.0, "down", "protected"),
    ]  # fmt: skip
    assert await watch.spans() == [(100.0, 190.0, "down")]
    assert await watch.kinds() == ["connected", "silent", "recovered"]
    (ended, *_) = await watch.store.read(select(outbox.c.body).where(outbox.c.kind == "recovered"))
    body = json.loads(ended.body)
    assert (body["was"], body["began"] - START, body["at"] - START) == ("down", 91.0, 190.0)


async def test_an_outage_from_before_a_void_silence_stays_one_incident(watch: Watch) -> None:
    await watch.take((1, 0.0, LEAK))
    await watch.tracker.sweep(["nl"], START + 91)
    watch.clock.now += 200
    await watch.take((2, 150.0, LEAK), (3, 80.0, LEAK), (4, 10.0, WELL), (5, 6.0, WELL))
    assert await watch.spans() == [(0.0, 190.0, "leaking")]
    assert await watch.moves() == [(0.0, "pending", "leaking"), (190.0, "leaking", "protected")]


async def test_an_agent_that_died_in_a_silence_was_silent_all_the_same(watch: Watch) -> None:
    await watch.take((1, 0.0, WELL))
    await watch.tracker.sweep(["nl"], START + 91)
    watch.clock.now += 1000
    # It saw the tunnel once more before it died, could not say so, and was started again much later.
    await watch.take((2, 970.0, WELL), (3, 0.5, WELL))
    silent = 30.0 + 91.0
    assert await watch.moves() == [
        (0.0, "pending", "protected"), (silent, "protected", "silent"), (999.5, "silent", "protected"),
    ]  # fmt: skip
    assert await watch.spans() == [(silent, 999.5, "silent")]


async def test_a_replay_in_parts_tells_when_it_has_caught_up(watch: Watch) -> None:
    await watch.take((1, 0.0, WELL))
    await watch.tracker.sweep(["nl"], START + 91)
    watch.clock.now += 200
    await watch.take((2, 170.0, WELL), (3, 100.0, DEAD), (4, 96.0, DEAD), caught_up=False)
    assert await watch.kinds() == ["connected", "silent"]
    await watch.take((5, 10.0, WELL), (6, 6.0, WELL))
    assert await watch.kinds() == ["connected", "silent", "recovered"]


async def test_a_row_of_another_version_does_not_keep_the_others_from_being_watched(
    watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    await watch.take((1, 0.0, WELL), tunnel="bad")
    await watch.take((1, 0.0, WELL), tunnel="good")
    await watch.store.write(update(tunnels).where(tunnels.c.name == "bad").values(memory='{"state": "paused"}'))
    await watch.tracker.sweep(["bad", "good"], START + 91)
    assert ((await watch.row("good")).state, (await watch.row("good")).deadline) == ("silent", None)
    bad = await watch.row("bad")
    assert (bad.state, bad.deadline, bad.memory) == ("protected", START + 91 + 300, '{"state": "paused"}')
    assert "a deadline could not be judged" in caplog.text


# -- what goes wrong


async def test_whoever_waits_for_a_database_that_is_gone_is_told(watch: Watch) -> None:
    watch.store.gate.clear()
    first = asyncio.create_task(watch.take((1, 0.0, WELL), tunnel="a"))
    await yielded()
    rest = [asyncio.create_task(watch.take((1, 0.0, WELL), tunnel=n)) for n in "bcd"]
    await yielded()
    watch.store.failure = StoreUnavailable("unreachable", "connection refused")
    watch.store.gate.set()
    ended = await asyncio.gather(first, *rest, return_exceptions=True)
    assert [type(e) for e in ended] == [StoreUnavailable] * 4
    assert [len(names) for names in watch.store.transactions] == [1, 3]  # none was tried again on its own
    watch.store.failure = None
    await watch.take((1, 0.0, WELL), tunnel="a")


async def test_a_report_that_trips_the_program_takes_no_other_with_it(
    watch: Watch, caplog: pytest.LogCaptureFixture
) -> None:
    poison = watch.arrival((1, 0.0, WELL), tunnel="bad", policy="no policy")
    watch.store.gate.clear()
    first = asyncio.create_task(watch.take((1, 0.0, WELL), tunnel="first"))
    await yielded()
    waiting = [
        asyncio.create_task(watch.take((1, 0.0, WELL), tunnel="a")),
        asyncio.create_task(watch.tracker.submit(poison)),
        asyncio.create_task(watch.take((1, 0.0, WELL), tunnel="b")),
    ]
    await yielded()
    watch.store.gate.set()
    ended = await asyncio.gather(first, *waiting, return_exceptions=True)
    assert [type(e) for e in ended] == [type(None), type(None), AttributeError, type(None)]
    assert sorted(r[0] for r in await watch.rows(tunnels, tunnels.c.name)) == ["a", "b", "first"]
    assert "a report could not be judged" in caplog.text


async def test_a_sender_that_goes_away_harms_nobody(watch: Watch) -> None:
    watch.store.gate.clear()
    gone = asyncio.create_task(watch.take((1, 0.0, WELL), tunnel="a"))
    stays = asyncio.create_task(watch.take((1, 0.0, WELL), tunnel="b"))
    await yielded()
    gone.cancel()
    watch.store.gate.set()
    await stays
    assert gone.cancelled()
    assert len(await watch.rows(tunnels)) == 2


async def test_more_than_can_wait_are_sent_away(store: Store, clock: ManualClock) -> None:
    watch = Watch(store, clock)  # nobody commits
    waiting = [asyncio.create_task(watch.take((1, 0.0, WELL))) for _ in range(5000)]
    await yielded()
    with pytest.raises(Busy):
        await watch.take((1, 0.0, WELL))
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)


async def test_a_server_that_goes_tells_whoever_waits(store: Store, clock: ManualClock) -> None:
    watch = Watch(store, clock)
    watch.store.gate.clear()
    async with running(watch.tracker):
        inside = asyncio.create_task(watch.take((1, 0.0, WELL), tunnel="a"))
        await yielded()
        behind = asyncio.create_task(watch.take((1, 0.0, WELL), tunnel="b"))
        await yielded()
    ended = await asyncio.gather(inside, behind, return_exceptions=True)
    assert [str(e) for e in ended] == ["closing: the server is shutting down"] * 2


# -- whose rules count


def beside(address: str) -> Canary:
    return canary(address, Path.OUTSIDE, Probe.PHYSICAL)


async def test_a_home_that_was_seen_beside_the_tunnel_must_not_be_seen_outside(
    store: Store, clock: ManualClock
) -> None:
    watch = Watch(store, clock, Policy())
    async with running(watch.tracker):
        await watch.take((1, 1.0, replace(WELL, canaries=(*WELL.canaries, beside("77.1.2.3")))))
        memory = json.loads((await watch.row()).memory)
        assert memory["home"] == ["77.1.2.3/32"]
        # By another way that the agent cannot name, from an address that only this tunnel's past tells to be home.
        await watch.take((2, 0.0, replace(WELL, canaries=(canary("77.1.2.3", Path.UNKNOWN),))))
        assert (await watch.row()).state == "leaking"


async def test_only_the_last_eight_homes_are_remembered(store: Store, clock: ManualClock) -> None:
    watch = Watch(store, clock, Policy())
    async with running(watch.tracker):
        for n in range(10):
            await watch.take((n + 1, 0.0, replace(WELL, canaries=(*WELL.canaries, beside(f"77.1.2.{n}")))))
        assert json.loads((await watch.row()).memory)["home"] == [f"77.1.2.{n}/32" for n in range(2, 10)]


async def test_the_agents_rules_and_the_servers_add_up(store: Store, clock: ManualClock) -> None:
    watch = Watch(store, clock, replace(POLICY, expected_countries=("SE",)))
    places = tuple(Place(ip=ip_address(EXIT), source=s, country="NL") for s in ("mmdb", "ipinfo"))
    said = Policy(home_networks=(ip_network("77.1.2.0/24"),), expected_countries=("NL",))
    async with running(watch.tracker):
        await watch.take((1, 3.0, replace(WELL, places=places)), policy=said)
        assert (await watch.row()).state == "protected"
        await watch.take((2, 2.0, saw("77.1.2.3")), policy=said)
        assert (await watch.row()).state == "leaking"
        await watch.take((1, 1.0, LEAK), policy=said, tunnel="other")
        assert (await watch.row("other")).state == "leaking"


@pytest.mark.parametrize(
    ("policy", "own", "state"),
    [
        (Policy(), ("91.10.20.30/32",), "leaking"),  # as the replaced system had it
        (Policy(), (), "pending"),
        (Policy(home_networks=(ip_network("77.0.0.0/8"),)), ("91.10.20.30/32",), "protected"),
    ],
    ids=["the server's own", "not known", "declared"],
)
async def test_the_home_of_an_old_client(
    store: Store, clock: ManualClock, policy: Policy, own: tuple[str, ...], state: str
) -> None:
    watch = Watch(store, clock, policy, tuple(ip_network(n) for n in own))
    said = Observation(trigger=Trigger.KEEPALIVE, canaries=(canary(HOME, Path.UNKNOWN),))
    async with running(watch.tracker):
        await watch.keepalive(said)
        assert (await watch.row()).state == state


async def test_an_old_client_shows_where_it_came_from(watch: Watch) -> None:
    await watch.keepalive(Observation(trigger=Trigger.KEEPALIVE, reported_from=ip_address(EXIT)))
    assert ((await watch.row()).exit4, (await watch.row()).exit6) == (EXIT, None)
    await watch.keepalive(Observation(trigger=Trigger.KEEPALIVE, reported_from=ip_address("2a0d::2")))
    assert ((await watch.row()).exit4, (await watch.row()).exit6) == (None, "2a0d::2")


@pytest.mark.parametrize(
    ("more", "seen", "state", "codes"),
    [
        ({"skew": 59.0}, WELL, "protected", []),
        ({"skew": 61.0}, WELL, "protected", ["clock_skew"]),
        ({"skew": -3600.0, "thinned": 4}, WELL, "protected", ["clock_skew", "observations_lost"]),
        ({"skew": 61.0}, LEAK, "leaking", ["ip_leak", "clock_skew"]),
        ({"skew": 61.0}, BLIND, "pending", ["nothing_seen", "clock_skew"]),
    ],
)
async def test_the_receiver_adds_what_only_it_knows(
    watch: Watch, more: dict[str, Any], seen: Observation, state: str, codes: list[str]
) -> None:
    await watch.take((1, 0.0, seen), **more)
    row = await watch.row()
    assert (row.state, [f["code"] for f in json.loads(row.findings)]) == (state, codes)


# -- replicas


@pytest.fixture
async def replicas(request: pytest.FixtureRequest, clock: ManualClock) -> AsyncIterator[list[Watch]]:
    """Two servers on one PostgreSQL database."""
    url = request.getfixturevalue("postgres").new_database()
    stores = [await open_store(url) for _ in range(2)]
    yield [Watch(s, clock) for s in stores]
    for opened in stores:
        await opened.close()


async def test_of_two_replicas_that_sweep_the_same_tunnel_one_makes_the_transition(replicas: list[Watch]) -> None:
    """Both have chosen the same rows before either begins: the loser waits for the row, and finds its deadline gone."""
    one, two = replicas
    names = [f"t{i:02}" for i in range(20)]
    async with running(one.tracker):
        await asyncio.gather(*(one.take((1, 0.0, WELL), tunnel=n) for n in names))
    for _ in range(5):
        later = START + 91
        await asyncio.gather(*(w.tracker.sweep(names, later) for w in (one, two) for _ in range(3)))
    silent = select(transitions.c.tunnel_id).where(transitions.c.new == "silent")
    assert len(await one.store.read(silent)) == len(names)
    for channel in ("telegram", "webhook"):
        assert (await one.kinds(channel)).count("silent") == len(names)
    assert len(await one.spans()) == len(names)


async def test_a_report_that_overtakes_a_sweep_keeps_the_tunnel_alive(
    replicas: list[Watch], clock: ManualClock
) -> None:
    one, two = replicas
    async with running(one.tracker):
        await one.take((1, 0.0, WELL))
        clock.now = START + 91
        two.store.gate.clear()
        sweep = asyncio.create_task(two.tracker.sweep(["nl"], clock.now))  # has seen the passed deadline
        await yielded()
        await one.take((2, 0.0, WELL))
        two.store.gate.set()
        await sweep
    assert (await one.row()).state == "protected"
    assert await one.kinds() == ["connected"]


async def test_two_replicas_that_hear_of_the_same_new_tunnels_make_one_row_each(replicas: list[Watch]) -> None:
    names = [f"t{i:02}" for i in range(30)]
    async with running(replicas[0].tracker), running(replicas[1].tracker):
        await asyncio.gather(
            *(
                w.take((1, 0.0, WELL), tunnel=n)
                for w, order in zip(replicas, (names, names[::-1]), strict=True)
                for n in order
            )
        )
    assert sorted(r[0] for r in await replicas[0].rows(tunnels, tunnels.c.name)) == names
    assert await replicas[0].kinds() == ["connected"] * len(names)


async def test_two_replicas_that_take_the_same_message_store_it_once(replicas: list[Watch]) -> None:
    rounds = ((1, 9.0, WELL), (2, 8.0, LEAK), (3, 7.0, WELL), (4, 0.0, WELL))
    async with running(replicas[0].tracker), running(replicas[1].tracker):
        await asyncio.gather(*(w.take(*rounds) for w in replicas for _ in range(3)))
    assert len(await replicas[0].rows(observations)) == 4
    assert await replicas[0].moves() == [
        (-9.0, "pending", "protected"), (-8.0, "protected", "leaking"), (-7.0, "leaking", "protected"),
    ]  # fmt: skip
    assert await replicas[0].kinds() == ["leaking", "recovered"]
