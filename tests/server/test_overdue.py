"""Deadlines: passed ones become silence, and the server's own absence moves them all."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import insert, select, update

from tests.conftest import ManualClock, until
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.store import rows
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.schema import meta, outbox, tunnels
from vpn_sentinel.server.store.store import Changes, Store, StoreUnavailable
from vpn_sentinel.server.tracker import Tracker
from vpn_sentinel.server.watch.overdue import OUTAGE, RETURN, Overdue

START = 1_800_000_000.0


class Server:
    """One that only watches deadlines, by its own clock."""

    def __init__(self, store: Store, clock: ManualClock) -> None:
        self.store = store
        self.clock = clock
        self.tracker = Tracker(store, clock, Hub(), Policy(), channels=("telegram",))
        self.overdue = Overdue(store, self.tracker, clock)

    async def tick(self, at: float) -> None:
        self.clock.now = START + at
        await self.overdue.tick()

    async def ticks(self, since: float, until: float) -> None:
        for second in range(int(until - since) + 1):
            await self.tick(since + second)

    async def knows(self, **deadlines: float | None) -> None:
        """Tunnels that are protected, and when each is due, in seconds since the start."""
        protected = '{"state": "protected", "since": 1799999000.0, "told": "protected"}'

        def decide(found):  # type: ignore[no-untyped-def]
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

    async def write(self, *statements):  # type: ignore[no-untyped-def]
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
    assert await server.deadlines() == {"soon": 1000.0 + RETURN, "far": 4000.0, "never": None}
    assert await server.silent() == []
    await server.ticks(1001, 1000 + RETURN - 1)
    assert await server.silent() == []
    await server.tick(1000 + RETURN)
    assert await server.silent() == ["soon"]


async def test_an_absence_that_is_shorter_than_an_outage_moves_nothing(server: Server) -> None:
    await server.knows(soon=5.0, far=100.0)
    await server.tick(OUTAGE - 0.1)
    assert await server.deadlines() == {"soon": None, "far": 100.0}


async def test_a_restart_counts_as_absence(server: Server, clock: ManualClock) -> None:
    await server.knows(nl=5.0)
    restarted = Server(server.store, clock)
    await restarted.tick(600.0)
    assert await restarted.silent() == []
    assert await restarted.deadlines() == {"nl": 600.0 + RETURN}


async def test_a_server_that_starts_was_away_however_briefly(server: Server, clock: ManualClock) -> None:
    await server.knows(nl=5.0)
    restarted = Server(server.store, clock)
    await restarted.tick(4.0)
    assert await restarted.deadlines() == {"nl": 4.0 + RETURN}


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
    assert await restarted.deadlines() == {"nl": 5.0 + RETURN}


async def test_a_clock_that_was_set_back_takes_the_deadlines_along(server: Server) -> None:
    await server.tick(1.0)
    await server.knows(nl=91.0, due=-3000.0)
    await server.tick(-3599.0)
    assert await server.deadlines() == {"nl": -3599.0 + 90.0, "due": -3599.0 + RETURN}


async def test_a_clock_that_was_set_back_takes_along_what_is_owed(server: Server) -> None:
    await server.tick(1.0)
    await server.knows(nl=0.5)
    await server.tick(1.0)  # silent, which is owed
    for due, leased in ((1.0, 61.0), (300.0, 0.0), (-5000.0, 0.0)):
        await server.store.write(update(outbox).values(due_at=START + due, leased_until=START + leased))
        await server.tick(1.0)
        await server.tick(-3599.0)
        (row,) = await server.store.read(select(outbox.c.due_at, outbox.c.leased_until))
        moved = tuple(t - 3600.0 if t > -3599.0 else t for t in (due, leased))
        assert (row.due_at - START, row.leased_until - START) == moved


async def test_an_outage_is_counted_with_the_deadlines_or_not_at_all(server: Server) -> None:
    """A server that dies in the middle of forgiving finds, when it is back, the outage still to be forgiven."""

    await server.knows(nl=5.0)
    dying = Server(Dying(server.store), server.clock)  # type: ignore[arg-type]
    with pytest.raises(StoreUnavailable):
        await dying.tick(1000.0)
    assert (await server.deadlines(), await server.alive()) == ({"nl": 5.0}, 0.0)
    await server.tick(1001.0)
    assert await server.deadlines() == {"nl": 1001.0 + RETURN}


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

    async def write(self, *statements):  # type: ignore[no-untyped-def]
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
    await asyncio.gather(*(s.tick(2.0) for s in pair for _ in range(3)))
    assert len(await pair[0].silent()) == 20
    assert len(await pair[0].store.read(select(outbox.c.id))) == 20


async def test_a_database_that_is_gone_is_said(clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    class Gone:
        asked = 0

        async def read(self, statement: object) -> list[object]:
            self.asked += 1
            raise StoreUnavailable("unreachable", "connection refused")

    gone = Gone()
    overdue = Overdue(gone, None, clock)  # type: ignore[arg-type]
    task = asyncio.create_task(overdue.run())
    await until(lambda: gone.asked)
    task.cancel()
    await asyncio.wait([task])
    assert [r.message for r in caplog.records] == ["deadlines cannot be watched"]


async def test_health_says_when_deadlines_are_not_watched(store: Store, clock: ManualClock) -> None:
    overdue = Overdue(store, Tracker(store, clock, Hub(), Policy()), clock)
    assert overdue.healthy() == (True, "")
    clock.now += 60
    assert overdue.healthy() == (False, "not watched for 60 s: stuck")
