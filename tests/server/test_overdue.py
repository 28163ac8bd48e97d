"""Deadlines: passed ones become silence, and the server's own absence moves them all."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from sqlalchemy import insert, select, update

from tests.conftest import ManualClock, until
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.store import rows
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.schema import meta, outbox, transitions, tunnels
from vpn_sentinel.server.store.store import Changes, Store, StoreUnavailable
from vpn_sentinel.server.tracking.tracker import Tracker
from vpn_sentinel.server.watch.overdue import MAX_EXCUSED_S, MIN_OUTAGE_S, RETURN_GRACE_S, Overdue
from vpn_sentinel.server.watch.presence import Presence

START = 1_800_000_000.0


class Server:
    """One that only watches deadlines, by its own clock."""

    def __init__(self, store: Store, clock: ManualClock) -> None:
        self.store = store
        self.clock = clock
        self.tracker = Tracker(store, clock, Hub(), Policy(), channels=("telegram",))
        self.used = 0.0  # processor time, in seconds
        self.presence = Presence(clock, lambda: self.used)
        self.overdue = Overdue(store, self.tracker, clock, self.presence)

    async def tick(self, at: float) -> None:
        self.clock.now = START + at
        await self.overdue.tick()
        self.presence._due = self.clock.now + 1.0  # it sleeps until the next

    async def busy(self, at: float) -> None:
        """A tick that comes late, because the loop had something else to do all the time."""
        self.used += START + at - self.clock.now
        await self.tick(at)

    async def ticks(self, since: float, until: float) -> None:
        for second in range(int(until - since) + 1):
            await self.tick(since + second)

    async def knows(self, **deadlines: float | None) -> None:
        """Tunnels that are protected, and when each is due, in seconds since the start."""
        protected = '{"state": "protected", "since": 1799999000.0, "told": "protected"}'

        def decide(found):
            for name, deadline in deadlines.items():
                row = found[name]
                row.state, row.memory, row.last_seen = "protected", protected, START - 10
                row.deadline = None if deadline is None else START + deadline
            return Changes([(rows.SAVE_TUNNEL, [rows.saved_tunnel(r) for r in found.values()])])

        await self.store.transact(list(deadlines), START, decide, create=True)

    async def deadlines(self) -> dict[str, float | None]:
        found = await self.store.read(select(tunnels.c.name, tunnels.c.deadline))
        return {r.name: None if r.deadline is None else r.deadline - START for r in found}

    async def silent(self) -> list[str]:
        found = select(tunnels.c.name).where(tunnels.c.state == "silent").order_by(tunnels.c.name)
        return [r.name for r in await self.store.read(found)]

    async def alive(self) -> float:
        (row,) = await self.store.read(select(meta.c.value).where(meta.c.key == "alive"))
        return float(row.value) - START


@pytest.fixture
async def server(store: Store, clock: ManualClock) -> Server:
    server = Server(store, clock)
    await server.tick(0.0)
    return server


class Dying:
    """A store whose every write gets through its statements and is never committed."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.read, self.transact = store.read, store.transact

    async def write(self, *statements):
        nowhere = insert(meta).values(key="alive", value="twice")  # breaks the primary key, and so the transaction
        return await self._store.write(*statements, nowhere)


async def test_a_passed_deadline_becomes_silence_once(server: Server) -> None:
    await server.knows(early=3.0, late=6.0, never=None)
    await server.ticks(1, 4)
    assert await server.silent() == ["early"]
    await server.ticks(5, 12)
    assert await server.silent() == ["early", "late"]
    assert await server.deadlines() == {"early": None, "late": None, "never": None}
    assert len(await server.store.read(select(outbox.c.id))) == 2


async def test_more_tunnels_than_one_sweep_takes_become_silent_in_one_tick(server: Server) -> None:
    await server.knows(**{f"t{i:04}": 1.0 for i in range(1001)})
    await server.tick(2.0)
    assert len(await server.silent()) == 1001


async def test_a_row_that_cannot_be_judged_does_not_stop_the_tick(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    await server.knows(bad=1.0, good=1.0)
    await server.store.write(update(tunnels).where(tunnels.c.name == "bad").values(memory="{"))
    await server.tick(2.0)
    assert await server.silent() == ["good"]
    assert (await server.deadlines())["bad"] == 2.0 + 300.0
    assert "a deadline could not be judged" in caplog.text


async def test_a_silence_that_cannot_be_told_yet_is_told_whole_later(server: Server) -> None:
    await server.knows(bad=1.0)
    row = tunnels.c.name == "bad"
    await server.store.write(update(tunnels).where(row).values(place='{"height": 1.5}'))  # of a newer version
    await server.tick(2.0)
    assert await server.silent() == []
    await server.store.write(update(tunnels).where(row).values(place="{}"))
    await server.tracker.sweep(["bad"], START + 303.0)
    assert await server.silent() == ["bad"]
    assert [r.new for r in await server.store.read(select(transitions.c.new))] == ["silent"]
    assert [r.kind for r in await server.store.read(select(outbox.c.kind))] == ["silent"]


async def test_each_tick_says_that_the_server_is_alive(server: Server) -> None:
    assert await server.alive() == 0.0
    await server.tick(0.5)
    assert await server.alive() == 0.0  # not worth a write yet
    await server.tick(1.0)
    assert await server.alive() == 1.0


async def test_the_servers_own_absence_moves_all_deadlines_by_its_length(server: Server) -> None:
    await server.knows(soon=5.0, far=3000.0, never=None)
    await server.tick(1000.0)
    # What would be due at once gets the time that agents need to come back.
    assert await server.deadlines() == {"soon": 1000.0 + RETURN_GRACE_S, "far": 4000.0, "never": None}
    assert await server.silent() == []
    await server.ticks(1001, 1000 + RETURN_GRACE_S - 1)
    assert await server.silent() == []
    await server.tick(1000 + RETURN_GRACE_S)
    assert await server.silent() == ["soon"]


async def test_an_absence_that_is_shorter_than_an_outage_moves_nothing(server: Server) -> None:
    await server.knows(soon=5.0, far=100.0)
    await server.tick(MIN_OUTAGE_S - 0.1)
    assert await server.deadlines() == {"soon": None, "far": 100.0}


async def test_a_loop_that_is_kept_busy_was_not_absent(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Who sends more than can be taken cannot put off that a silence is told: a few seconds, and nobody else's."""
    caplog.set_level("INFO")
    await server.knows(early=5.0, soon=18.0, far=3000.0)
    await server.busy(20.0)
    assert await server.silent() == ["early"]
    assert await server.deadlines() == {"early": None, "soon": 18.0, "far": 3000.0}
    await server.ticks(21, 22)
    assert await server.silent() == ["early"]
    await server.tick(18.0 + MAX_EXCUSED_S)
    assert await server.silent() == ["early", "soon"]
    assert not [r for r in caplog.records if "no reports could be received" in r.message]


async def test_freezes_again_and_again_move_a_deadline_by_seconds_in_all(server: Server) -> None:
    await server.knows(nl=30.0, far=3000.0)
    for at in range(9, 37, 9):
        await server.busy(at)
    assert await server.silent() == ["nl"]
    assert await server.deadlines() == {"nl": None, "far": 3000.0}


async def test_what_was_granted_is_over_after_a_minute(server: Server) -> None:
    await server.busy(20.0)
    await server.knows(first=21.0, second=90.0)
    await server.ticks(21, 25)
    assert await server.silent() == []
    await server.ticks(26, 89)
    assert await server.silent() == ["first"]
    await server.tick(90.0)
    assert await server.silent() == ["first", "second"]


async def test_of_a_gap_only_what_was_not_work_is_absence(server: Server) -> None:
    """Stopped while it was busy: the two are told apart by the part, not by the whole."""
    await server.knows(far=3000.0)
    for second in range(1, 13):  # the thread looks on meanwhile
        server.clock.now = START + second
        server.presence._read_clock()
    await server.tick(112.0)
    (far,) = (await server.deadlines()).values()
    assert far == pytest.approx(3100.0, abs=1.5)


async def test_a_server_that_was_late_beside_a_running_one_moves_nothing(server: Server, clock: ManualClock) -> None:
    await server.knows(far=3000.0)
    beside = Server(server.store, clock)
    await beside.tick(0.5)
    for second in range(1, 20):
        await server.tick(second)
    beside.used += 20.0
    await beside.tick(20.0)
    assert await server.deadlines() == {"far": 3000.0}


async def stopped(server: Server) -> Server:
    return server


async def restarted(server: Server) -> Server:
    return Server(server.store, server.clock)


async def without_its_database(server: Server) -> Server:
    """It ran all the time; no tick got through."""
    for _ in range(1000):
        server.clock.now += 1.0
        server.presence._read_clock()
        server.presence._due = server.clock.now
    return server


@pytest.mark.parametrize(
    ("was", "why"),
    [
        (stopped, "this server was stopped, or its machine slept"),
        (restarted, "this server was not running"),
        (without_its_database, "the database did not answer"),
    ],
)
async def test_the_log_says_why_deadlines_were_moved(
    server: Server, caplog: pytest.LogCaptureFixture, was: Callable[[Server], Awaitable[Server]], why: str
) -> None:
    caplog.set_level("INFO")
    await (await was(server)).tick(1000.0)
    [said] = [r for r in caplog.records if "no reports could be received" in r.message]
    assert (said.__dict__["why"], said.__dict__["seconds"]) == (why, "1000")


async def test_a_silent_tunnel_is_told_while_the_loop_is_kept_busy(store: Store) -> None:
    """By work that holds the loop for 0.2 seconds, again and again: four fifths of all time."""
    clock = SystemClock()
    told = asyncio.Event()
    tracker = Tracker(store, clock, Hub(), Policy(), channels=("telegram",), on_commit=told.set)
    presence = Presence(clock)
    overdue = Overdue(store, tracker, clock, presence)
    server = Server(store, ManualClock())
    deadline = clock.wall() + 3.0

    async def holds_the_loop() -> None:
        while True:
            time.sleep(0.2)  # noqa: ASYNC251
            await asyncio.sleep(0.05)

    async with asyncio.TaskGroup() as group:
        await server.knows(nl=deadline - START)
        running = [group.create_task(work) for work in (presence.run(), overdue.run(), holds_the_loop())]
        async with asyncio.timeout(3.0 + 2.0):
            await told.wait()
        assert clock.wall() >= deadline
        for task in running:
            task.cancel()
    assert await server.silent() == ["nl"]
    assert presence.sample().away == 0.0


async def test_a_restart_counts_as_absence(server: Server, clock: ManualClock) -> None:
    await server.knows(nl=5.0)
    restarted = Server(server.store, clock)
    await restarted.tick(600.0)
    assert await restarted.silent() == []
    assert await restarted.deadlines() == {"nl": 600.0 + RETURN_GRACE_S}


async def test_a_server_that_starts_was_away_however_briefly(server: Server, clock: ManualClock) -> None:
    await server.knows(nl=5.0)
    restarted = Server(server.store, clock)
    await restarted.tick(4.0)
    assert await restarted.deadlines() == {"nl": 4.0 + RETURN_GRACE_S}


async def test_a_server_that_starts_beside_a_running_one_was_not_missed(server: Server, clock: ManualClock) -> None:
    await server.knows(nl=5.0)
    await server.tick(3.0)
    beside = Server(server.store, clock)
    await beside.tick(4.0)
    assert await beside.deadlines() == {"nl": 5.0}


async def test_a_start_that_the_database_refused_is_still_a_start(server: Server, clock: ManualClock) -> None:
    await server.knows(nl=5.0)
    restarted = Server(Dying(server.store), clock)  # type: ignore[arg-type]
    with pytest.raises(StoreUnavailable):
        await restarted.tick(4.0)
    restarted.overdue._store = server.store  # the database is back
    await restarted.tick(5.0)
    assert await restarted.deadlines() == {"nl": 5.0 + RETURN_GRACE_S}


async def test_an_outage_is_counted_with_the_deadlines_or_not_at_all(server: Server) -> None:
    """A server that dies in the middle of forgiving finds, when it is back, the outage still to be forgiven."""

    await server.knows(nl=5.0)
    dying = Server(Dying(server.store), server.clock)  # type: ignore[arg-type]
    with pytest.raises(StoreUnavailable):
        await dying.tick(1000.0)
    assert (await server.deadlines(), await server.alive()) == ({"nl": 5.0}, 0.0)
    await server.tick(1001.0)
    assert await server.deadlines() == {"nl": 1001.0 + RETURN_GRACE_S}


@pytest.fixture
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[list[Server]]:
    """Two servers on one PostgreSQL database."""
    url = request.getfixturevalue("postgres").new_database()
    stores = [await open_store(url) for _ in range(2)]
    yield [Server(s, ManualClock()) for s in stores]
    for opened in stores:
        await opened.close()


class Late:
    """A store whose writes wait until every server has read what it decides by."""

    def __init__(self, store: Store, barrier: asyncio.Barrier) -> None:
        self._store, self._barrier = store, barrier
        self.read, self.transact = store.read, store.transact

    async def write(self, *statements):
        await self._barrier.wait()
        return await self._store.write(*statements)


async def test_of_replicas_that_start_together_one_moves_the_deadlines(pair: list[Server]) -> None:
    await pair[0].tick(0.0)
    await pair[0].knows(far=3000.0)
    barrier = asyncio.Barrier(2)
    late = [Server(Late(s.store, barrier), s.clock) for s in pair]  # type: ignore[arg-type]
    # At the very same moment, so that even what they write is the same.
    await asyncio.gather(*(s.tick(1000.0) for s in late))
    assert await pair[0].deadlines() == {"far": 4000.0}


async def test_replicas_that_tick_together_tell_of_a_silence_once(pair: list[Server]) -> None:
    await pair[0].tick(0.0)
    await pair[0].knows(**{f"t{i:02}": 1.0 for i in range(20)})
    await asyncio.gather(*(s.tick(1.5) for s in pair for _ in range(3)))
    assert len(await pair[0].silent()) == 20
    assert len(await pair[0].store.read(select(outbox.c.id))) == 20


async def test_a_database_that_is_gone_is_said(clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    class Gone:
        asked = 0

        async def read(self, statement: object) -> list[object]:
            self.asked += 1
            raise StoreUnavailable("unreachable", "connection refused")

    gone = Gone()
    overdue = Overdue(gone, None, clock, Presence(clock))  # type: ignore[arg-type]
    task = asyncio.create_task(overdue.run())
    await until(lambda: gone.asked)
    task.cancel()
    await asyncio.wait([task])
    assert [r.message for r in caplog.records] == ["deadlines cannot be watched"]


async def test_health_says_when_deadlines_are_not_watched(store: Store, clock: ManualClock) -> None:
    overdue = Overdue(store, Tracker(store, clock, Hub(), Policy()), clock, Presence(clock))
    assert overdue.healthy() == (True, "")
    clock.now += 60
    assert overdue.healthy() == (False, "not watched for 60 s: stuck")
