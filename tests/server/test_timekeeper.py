"""A clock that is set, forward and back, by an hour and by years: nothing lasts longer or shorter for that."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from tests.conftest import ManualClock
from tests.server.test_tracker import DEAD, HOME, LEAK, POLICY, START, WELL, Seam, canary, running
from vpn_sentinel.domain.notice import Kind, Notice
from vpn_sentinel.domain.observation import Observation, Path, Trigger
from vpn_sentinel.runtime.clock import SteadyClock
from vpn_sentinel.server.ingest.session import Sessions
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.notify import outbox as deliveries
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.outbox_rows import delivery_rows
from vpn_sentinel.server.store.schema import incidents, observations, outbox, tokens, transitions, tunnels
from vpn_sentinel.server.store.store import Store
from vpn_sentinel.server.tracking.inputs import ReportBatch, TimedObservation
from vpn_sentinel.server.tracking.sites import Sites
from vpn_sentinel.server.tracking.tracker import Tracker
from vpn_sentinel.server.watch.overdue import RETURN_GRACE_S, Overdue
from vpn_sentinel.server.watch.presence import Presence
from vpn_sentinel.server.watch.retention import Retention
from vpn_sentinel.server.watch.timekeeper import Timekeeper, database_time
from vpn_sentinel.wire.messages import Hello, Report, Reports

HOUR, YEARS = 3600.0, 10 * 365 * 86400.0
STEPS = pytest.mark.parametrize(
    "by", [-HOUR, HOUR, -YEARS, YEARS], ids=["an hour back", "an hour on", "10 years back", "10 years on"]
)
SILENT_AFTER = 91.0


class Server:
    """One that goes by `counts`, the clock that is set; `passed` are seconds since the start that really passed."""

    def __init__(self, store: Store, counts: ManualClock, settle_s: float = 0.0) -> None:
        self.store, self.counts, self.seqs = Seam(store), counts, 0
        self.clock = SteadyClock(counts)
        self.keeper = Timekeeper(self.store, self.clock, self._now, settle_s=settle_s)
        self.sites = Sites(clock_moved=lambda: self.keeper.moved)
        self.tracker = Tracker(
            self.store, self.clock, Hub(), POLICY, channels=("telegram",), sites=self.sites,
            clock_moved=lambda: self.keeper.moved,
        )  # fmt: skip
        self.used = 0.0  # processor time, in seconds
        presence = Presence(self.clock, lambda: self.used)
        self.overdue = Overdue(self.store, self.tracker, self.clock, presence, self.keeper.follow)

    async def _now(self) -> float:
        return self.counts.wall()

    async def runs(self, seconds: float) -> None:
        """So much time passes, with the server's look each second."""
        for _ in range(int(seconds)):
            self.counts.now += 1.0
            await self.overdue.tick()

    async def set(self, by: float) -> None:
        self.counts.set_by += by
        await self.overdue.tick()

    def arrival(self, *rounds: tuple[float, Observation], **more: Any) -> ReportBatch:
        """A message of rounds, each with its age."""
        now = self.clock.wall()
        first, self.seqs = self.seqs + 1, self.seqs + len(rounds)
        given: dict[str, Any] = {
            "tunnel": "nl", "received_at": now, "silent_after": SILENT_AFTER, "interval": 30.0, "version": "2.0.0",
            "spool": "s1", "policy": POLICY,
            "observations": tuple(
                TimedObservation(seq=first + i, at=now - a, observation=o) for i, (a, o) in enumerate(rounds)
            ),
        }  # fmt: skip
        return ReportBatch(**{**given, **more})

    async def takes(self, *seen: Observation, **more: Any) -> None:
        for one in seen:
            await self.tracker.submit(self.arrival((0.0, one), **more))

    async def row(self, name: str = "nl") -> Any:
        (found,) = await self.store.read(select(tunnels).where(tunnels.c.name == name))
        return found

    async def state(self) -> str:
        return str((await self.row()).state)

    async def told(self) -> list[str]:
        return [r.kind for r in await self.store.read(select(outbox.c.kind).order_by(outbox.c.id))]


@pytest.fixture
async def server(store: Store, clock: ManualClock) -> AsyncIterator[Server]:
    server = Server(store, clock)
    await server.keeper.start()
    await server.overdue.tick()
    async with running(server.tracker):
        yield server


@STEPS
async def test_a_leak_that_is_healed_is_over_after_its_grace(server: Server, by: float) -> None:
    await server.takes(WELL, LEAK)
    await server.runs(20)
    await server.takes(LEAK)
    await server.set(by)
    await server.takes(WELL)
    await server.runs(POLICY.grace_recovery - 1)
    await server.takes(WELL)
    assert await server.state() == "leaking"
    await server.runs(1)
    await server.takes(WELL)
    assert await server.state() == "protected"
    assert await server.told() == ["connected", "leaking", "recovered"]
    (span,) = await server.store.read(select(incidents))
    assert (span.closed_at - span.opened_at, span.worst) == (20.0, "leaking")
    (moved,) = await server.store.read(select(transitions.c.at).where(transitions.c.new == "leaking"))
    assert moved.at == span.opened_at == START + by


@STEPS
async def test_a_grace_that_runs_ends_when_it_would_have(server: Server, by: float) -> None:
    await server.takes(WELL)
    await server.runs(10)
    await server.takes(DEAD)
    await server.runs(2)
    await server.set(by)
    await server.takes(DEAD)
    assert await server.state() == "protected"
    await server.runs(POLICY.grace_down - 2)
    await server.takes(DEAD)
    row = await server.row()
    assert (row.state, row.since) == ("down", START + 10 + by)


@STEPS
async def test_a_grace_goes_on_over_a_clock_that_is_set_again_and_again(server: Server, by: float) -> None:
    await server.takes(WELL)
    await server.runs(10)
    for step in (by, -by, by):
        await server.takes(DEAD)
        await server.runs(1)
        await server.set(step)
    await server.takes(DEAD)
    assert await server.state() == "protected"
    await server.runs(1)
    await server.takes(DEAD)
    assert await server.state() == "down"


@STEPS
async def test_a_silence_falls_when_it_is_due(server: Server, by: float) -> None:
    await server.takes(WELL)
    await server.runs(40)
    await server.set(by)
    # Its agents may have to come back: a machine that was paused looks the same as one whose clock was set forward.
    left = SILENT_AFTER - 40 if by < 0 else max(RETURN_GRACE_S, SILENT_AFTER - 40)
    await server.runs(left - 1)
    assert await server.state() == "protected"
    await server.runs(1)
    assert await server.state() == "silent"
    assert (await server.row()).since == START + SILENT_AFTER + by


async def test_a_machine_that_was_paused_lets_its_agents_come_back(server: Server) -> None:
    await server.takes(WELL)
    await server.runs(SILENT_AFTER - 1)
    await server.set(HOUR)  # the hours of the world went on, those of the machine did not
    await server.runs(RETURN_GRACE_S - 1)
    assert await server.state() == "protected"
    await server.runs(1)
    assert await server.state() == "silent"


@STEPS
async def test_an_agent_that_reports_on_is_not_taken_for_one_that_was_off(server: Server, by: float) -> None:
    await server.takes(WELL)
    await server.runs(30)
    await server.set(by)
    await server.takes(WELL)
    assert [r.new for r in await server.store.read(select(transitions.c.new))] == ["protected"]


@STEPS
async def test_a_silence_that_a_replay_voids_leaves_nothing_behind(server: Server, by: float) -> None:
    await server.takes(WELL)
    await server.runs(SILENT_AFTER + 1)
    assert await server.state() == "silent"
    await server.set(by)
    await server.runs(5)
    await server.tracker.submit(server.arrival((60.0, WELL), (0.0, WELL), connected_at=server.clock.wall() - 10))
    assert await server.state() == "protected"
    assert [r.new for r in await server.store.read(select(transitions.c.new))] == ["protected"]
    assert await server.store.read(select(incidents)) == []
    assert (await server.told())[-1] == "recovered"


@STEPS
async def test_what_is_leased_and_what_is_due_later_stays_so_long(server: Server, by: float) -> None:
    await server.takes(LEAK)
    await server.runs(1)
    now = server.clock.wall()
    (leased,) = await deliveries.lease(server.store, now, now + 60, 1)
    await server.runs(10)
    await server.set(by)
    await server.runs(49)
    assert await deliveries.lease(server.store, server.clock.wall(), server.clock.wall() + 60, 1) == []
    await server.runs(1)
    now = server.clock.wall()
    (again,) = await deliveries.lease(server.store, now, now + 60, 1)
    assert (again.id, again.attempt) == (leased.id, 2)
    assert now - again.created_at == 61.0  # as old as it is: nothing is given up sooner, or never

    later = deliveries.DeliveryOutcome(result=deliveries.Result.TRANSIENT, due_at=now + 300)
    await deliveries.settle(server.store, again, later, now)
    await server.set(-by)
    assert await deliveries.next_due(server.store, "telegram", server.clock.wall()) == server.clock.wall() + 300


@STEPS
async def test_what_a_channel_was_told_before_is_not_handed_to_it_from_another(server: Server, by: float) -> None:
    server.tracker = Tracker(server.store, server.clock, Hub(), POLICY, channels=("mail", "telegram"))
    async with running(server.tracker):
        await server.takes(LEAK)
    now = server.clock.wall()
    (told,) = await deliveries.lease(server.store, now, now + 60, 1, "telegram")
    await deliveries.settle(server.store, told, deliveries.DeliveryOutcome(result=deliveries.Result.DONE), now)
    await server.set(by)
    await server.runs(61)
    now = server.clock.wall()
    assert await deliveries.reassign(server.store, ["telegram"], now - 60, now) == 0


@STEPS
async def test_of_a_tunnel_of_which_enough_was_told_the_rest_waits_as_long(server: Server, by: float) -> None:
    await server.runs(120)
    now = server.clock.wall()
    (owed,) = delivery_rows(Notice(kind=Kind.DOWN, tunnel="nl", at=now), ["telegram"], now)
    told = [{**owed, "settled_at": now - 50.0 - i, "outcome": "done"} for i in range(deliveries.MAX_NOTICES_PER_WINDOW)]
    await server.store.write(insert(outbox).values(told))
    await server.store.write(insert(outbox).values(owed))
    await server.set(by)
    now = server.clock.wall()
    assert await deliveries.next_due(server.store, "telegram", now) == now + 10
    assert await deliveries.lease(server.store, now, now + 60, 1) == []
    assert len(await deliveries.lease(server.store, now + 10, now + 70, 1)) == 1


@STEPS
async def test_what_waits_to_be_committed_goes_with_the_clock(server: Server, by: float) -> None:
    await server.takes(WELL)
    gate = server.store.gate
    gate.clear()
    first = asyncio.create_task(server.takes(WELL))
    await asyncio.sleep(0.01)
    then = asyncio.create_task(server.takes(WELL, tunnel="se", spool="s2"))
    await asyncio.sleep(0.01)
    server.counts.set_by += by
    setting = asyncio.create_task(server.overdue.tick())
    await asyncio.sleep(0.01)
    gate.set()
    await asyncio.gather(first, then, setting)
    row = await server.row("se")
    assert (row.last_seen, row.deadline) == (START + by, START + by + SILENT_AFTER)
    assert (await server.row()).last_seen == START + by
    await server.runs(SILENT_AFTER - 1)
    assert await server.state() == "protected"


@STEPS
async def test_a_reference_agent_keeps_its_word(server: Server, by: float) -> None:
    reference = {"tunnel": "home", "spool": "s2", "role": "reference", "site": "flat"}
    seen = Observation(trigger=Trigger.TIMER, canaries=(canary(HOME, Path.OUTSIDE),), interfaces=("eth0",))
    lost = replace(seen, canaries=(canary(None, Path.OUTSIDE),))
    await server.takes(seen, **reference)
    await server.runs(5)
    await server.set(by)
    now = server.clock.wall()
    assert [str(n) for n in server.sites.view().homes("flat")] == [HOME + "/32"]
    assert server.sites.view().up("flat", now, now - 5, now - 5) is True
    await server.sites.load(server.store, now)
    assert server.sites.view().up("flat", now, now - 5, now - 5) is True
    fresh = Sites(clock_moved=lambda: server.keeper.moved)
    await fresh.load(server.store, now)
    assert fresh.view().up("flat", now, now - 5, now - 5) is True
    assert fresh.view().has_working_reference("flat", now)
    await server.takes(lost, **reference)
    assert server.sites.view().up("flat", server.clock.wall(), now - 5, now) is False


@STEPS
async def test_a_session_under_way_tells_of_the_clock_as_it_is_now(server: Server, by: float) -> None:
    sessions = Sessions(server.tracker, server.store, server.clock, echo_secret=b"e" * 32, echo_port=1, missed=3)
    hello = Hello(protocol=1, client_id="nl", spool="s1", version="2", interval=30.0, wall=START + by)
    greeted = sessions.ticks()

    async def codes(seq: int) -> str:
        reports = Reports(items=[Report(seq=seq, age=0.0, observation=WELL)])
        await sessions.store(hello, reports, greeted, None)
        return str((await server.row()).findings)

    assert "clock_skew" in await codes(1)  # the agent's clock is right, the server's is not yet
    await server.runs(3)
    await server.set(by)
    assert "clock_skew" not in await codes(2)


@STEPS
async def test_history_is_as_old_as_it_is(server: Server, by: float) -> None:
    retention = Retention(server.store, server.clock, days=7)
    await server.takes(WELL)
    await server.runs(5)
    await server.set(by)
    await server.takes(WELL)
    assert await retention.prune() == 0
    server.counts.now += 8 * 86400
    await server.overdue.tick()
    await server.takes(WELL)
    await retention.prune()
    # A time that lies in the future is kept until it is past.
    assert len(await server.store.read(select(observations))) == (2 if by < -8 * 86400 else 1)


@STEPS
async def test_a_revoked_token_is_as_old_as_it_is(server: Server, by: float) -> None:
    await server.takes(WELL)
    values = {"name": "nl", "shared": 0, "prefix": "p", "digest": "d", "created_at": START, "revoked_at": START}
    await server.store.write(insert(tokens).values(**values))
    await server.set(by)
    (token,) = await server.store.read(select(tokens.c.revoked_at))
    assert token.revoked_at == (await server.row()).last_seen == START + by


ABSENT = "no reports could be received for a while: all deadlines move by that time"
SET = "the clock was set: all open times move with it"


@pytest.mark.parametrize(
    ("busy", "stopped", "by", "deadline", "said"),
    [
        (20, 0, 0, SILENT_AFTER, []),
        (0, 20, 0, SILENT_AFTER + 20, [ABSENT]),
        (0, 0, 5, SILENT_AFTER + 5, [SET]),
        (20, 0, -HOUR, SILENT_AFTER - HOUR, [SET]),
        (20, 0, 5, SILENT_AFTER + 5, [SET]),
        (0, 20, -HOUR, SILENT_AFTER + 20 - HOUR, [SET, ABSENT]),
        (30, 20, 5, SILENT_AFTER + 20 + 5, [SET, ABSENT]),
    ],
    ids=["busy", "stopped", "set", "busy, set back", "busy, set on", "stopped, set back", "busy, then stopped, set on"],
)
async def test_absence_a_busy_loop_and_a_clock_that_is_set_are_told_apart(
    server: Server, caplog: pytest.LogCaptureFixture, busy: float, stopped: float, by: float, deadline: float, said: Any
) -> None:
    """Also where they come together: what was work excuses nothing, what was absence excuses all."""
    caplog.set_level("INFO")
    await server.takes(WELL)
    await server.runs(1)
    for _ in range(int(busy)):  # the thread looks on meanwhile
        server.counts.now += 1.0
        server.used += 1.0
        server.overdue._presence._read_clock()
    server.counts.now += stopped
    await server.set(by)
    assert (await server.row()).deadline == pytest.approx(START + deadline, abs=1.0)
    assert [r.message for r in caplog.records if r.message in (ABSENT, SET)] == said


async def test_a_clock_that_is_corrected_a_little_is_followed(server: Server) -> None:
    await server.takes(WELL)
    await server.set(0.4)
    assert server.clock.wall() == START + 0.4
    assert (await server.row()).since == START


async def test_a_clock_whose_answer_takes_its_time_moves_nothing_that_is_not_proved(store: Store) -> None:
    slow = ManualClock()
    clock = SteadyClock(slow)

    async def now() -> float:
        said = slow.wall()
        slow.now += 5.0  # on its way back
        return said

    keeper = Timekeeper(store, clock, now)
    await keeper.start()
    assert clock.wall() == slow.wall()


# -- a server that starts


@pytest.fixture
async def engines(database_url: str, clock: ManualClock) -> AsyncIterator[Any]:
    """Starts servers on one database; the clock was set `seconds` forward meanwhile."""
    async with AsyncExitStack() as stack:

        async def start(seconds: float = 0.0, settle_s: float = 0.0) -> Server:
            clock.set_by += seconds
            store = await open_store(database_url)
            stack.push_async_callback(store.close)
            server = Server(store, clock, settle_s)
            await server.keeper.start()
            await server.overdue.tick()
            await stack.enter_async_context(running(server.tracker))
            return server

        yield start


@STEPS
async def test_a_server_starts_with_a_clock_that_was_set_meanwhile(engines: Any, by: float) -> None:
    server = await engines()
    await server.takes(WELL, LEAK)
    await server.runs(10)
    now = server.clock.wall()
    (leased,) = await deliveries.lease(server.store, now, now + 60, 1, "telegram")
    again = await engines(by)
    again.seqs = server.seqs
    await again.takes(WELL)
    await again.runs(POLICY.grace_recovery)
    await again.takes(WELL)
    assert await again.state() == "protected"
    await again.takes(DEAD)
    await again.runs(POLICY.grace_down)
    await again.takes(DEAD)
    assert await again.state() == "down"
    await again.runs(SILENT_AFTER)
    assert await again.state() == "silent"
    now = again.clock.wall()
    assert [d.id for d in await deliveries.lease(again.store, now, now + 60, 1)] == [leased.id]


async def test_rows_of_the_future_freeze_nothing(engines: Any) -> None:
    """Whoever wrote them, and though the server's own time is right."""
    server = await engines()
    await server.takes(WELL, LEAK)
    later = START + YEARS
    await server.store.write(update(tunnels).values(seen_at=later, since=later, last_seen=later, deadline=later))
    await server.takes(WELL)
    await server.runs(POLICY.grace_recovery)
    await server.takes(WELL)
    assert await server.state() == "protected"
    await server.runs(SILENT_AFTER)
    assert await server.state() == "silent"


# -- several servers


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_of_servers_side_by_side_one_moves_what_is_open(engines: Any) -> None:
    one, two = await engines(), await engines()
    await one.takes(WELL)
    await two.takes(WELL, tunnel="se", spool="s2")
    one.counts.set_by += HOUR
    one.counts.now += 1.0
    await asyncio.gather(one.overdue.tick(), two.overdue.tick())
    await asyncio.gather(one.overdue.tick(), two.overdue.tick())
    rows = {r.name: r.deadline - START - HOUR for r in await one.store.read(select(tunnels))}
    assert rows == {"nl": SILENT_AFTER, "se": SILENT_AFTER}
    assert one.keeper.moved == two.keeper.moved == HOUR
    assert one.clock.wall() == two.clock.wall() == START + HOUR + 1


@STEPS
@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_a_server_that_has_not_seen_it_yet_writes_no_old_times(engines: Any, by: float) -> None:
    one, two = await engines(settle_s=0.3), await engines(settle_s=0.3)
    await two.takes(WELL)
    await one.runs(30)
    one.counts.set_by += by
    first = asyncio.create_task(one.overdue.tick())
    await asyncio.sleep(0.1)
    await two.takes(WELL)  # by the old time still
    second = asyncio.create_task(two.overdue.tick())
    await asyncio.sleep(0.1)
    last = asyncio.create_task(two.takes(WELL))
    await asyncio.gather(first, second, last)
    row = await two.row()
    assert (row.last_seen, row.deadline) == (START + by + 30, START + by + 30 + max(SILENT_AFTER, RETURN_GRACE_S))
    assert one.clock.wall() == two.clock.wall() == START + by + 30
    await one.runs(5)
    await two.overdue.tick()
    assert await one.state() == "protected"
    assert [r.new for r in await one.store.read(select(transitions.c.new))] == ["protected"]


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_servers_side_by_side_go_by_the_databases_clock(database_url: str) -> None:
    """Their own may differ by minutes: a silence is told all the same, and a tunnel that reports is not silent."""
    store = await open_store(database_url)
    try:
        servers = []
        for off in (0.0, 300.0):
            machine = ManualClock(await database_time(store) + off)
            server = Server(store, machine)
            server.keeper = Timekeeper(store, server.clock, lambda: database_time(store))
            server.overdue = Overdue(store, server.tracker, server.clock, Presence(server.clock), server.keeper.follow)
            await server.keeper.start()
            servers.append(server)
        one, two = servers
        assert abs(one.clock.wall() - two.clock.wall()) < 5.0
        assert abs(one.clock.wall() - await database_time(store)) < 5.0
        async with running(one.tracker):
            await one.takes(WELL)
        for _ in range(2):
            for server in servers:
                await server.overdue.tick()
        assert await one.state() == "protected"
        row = await one.row()
        assert row.deadline == row.last_seen + SILENT_AFTER  # nobody takes the other's time for an absence
    finally:
        await store.close()
