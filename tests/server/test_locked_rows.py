"""A row that another session holds, as a transaction left open in psql does, is the matter of that tunnel alone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from sqlalchemy import make_url, select

from tests.conftest import until
from tests.server.test_overdue import START, Server, server
from tests.server.test_tracker import running
from vpn_sentinel.domain.observation import Observation, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.server.store import rows
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.schema import observations, tunnels
from vpn_sentinel.server.store.store import Changes, Store, TunnelLocked
from vpn_sentinel.server.tracking.inputs import ReportBatch, TimedObservation
from vpn_sentinel.server.watch.overdue import RETURN_GRACE_S

__all__ = ["server"]
pytestmark = pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
# More than the commit waits for a row, on a machine with something else to do, and less than a statement may take.
SOON_S = 10.0

Session = Any  # asyncpg's, of somebody else


@pytest.fixture
async def psql(database_url: str) -> AsyncIterator[Session]:
    """The session of somebody else."""
    where = make_url(database_url)
    session = await asyncpg.connect(host=str(where.query["host"]), user=where.username, database=where.database)
    yield session
    await session.close()


@asynccontextmanager
async def held(psql: Session, statement: str) -> AsyncIterator[None]:
    """The row that `statement` locks stays so until the body is over."""
    async with psql.transaction():
        await psql.execute(statement)
        yield


OURS = "SELECT 1 FROM tunnels WHERE name = 'held' FOR UPDATE"


def report(server: Server, tunnel: str, seq: int = 1) -> ReportBatch:
    now = server.clock.wall()
    seen = TimedObservation(seq=seq, at=now, observation=Observation(trigger=Trigger.TIMER))
    return ReportBatch(
        tunnel=tunnel, received_at=now, observations=(seen,), silent_after=91.0, interval=30.0, version="2.0.0",
        spool="s1", policy=Policy(),
    )  # fmt: skip


async def stored(server: Server) -> list[str]:
    """Of which tunnels something was stored, by name."""
    found = select(tunnels.c.name).join(observations, observations.c.tunnel_id == tunnels.c.id).order_by(tunnels.c.name)
    return [row.name for row in await server.store.read(found)]


async def test_a_held_row_delays_no_other_silence(
    server: Server, psql: Session, caplog: pytest.LogCaptureFixture
) -> None:
    await server.knows(held=1.0, early=1.0, late=3.0)
    async with held(psql, OURS):
        async with asyncio.timeout(SOON_S):
            await server.ticks(2, 6)
        assert await server.silent() == ["early", "late"]
    assert [r.__dict__["tunnel"] for r in caplog.records if "holds a tunnel's row" in r.message] == ["held"]
    await server.tick(7.0)
    assert await server.silent() == ["early", "held", "late"], "nothing came of it meanwhile"


async def test_a_held_row_delays_no_other_report(server: Server, psql: Session) -> None:
    await server.knows(held=None, other=None)
    async with held(psql, OURS), running(server.tracker):
        refused = asyncio.create_task(server.tracker.submit(report(server, "held")))
        async with asyncio.timeout(SOON_S):
            for seq in range(1, 4):
                await server.tracker.submit(report(server, "other", seq))
            await server.tracker.submit(report(server, "new"))
            with pytest.raises(TunnelLocked):
                await refused
        assert set(await stored(server)) == {"new", "other"}


async def test_what_came_while_its_row_was_held_is_a_sign_of_life(server: Server, psql: Session) -> None:
    await server.knows(held=1.0)
    async with running(server.tracker):
        async with held(psql, OURS):
            server.clock.now = START + 0.5
            with pytest.raises(TunnelLocked):
                await server.tracker.submit(report(server, "held"))
            await server.tick(2.0)
        await server.ticks(3, 4)
        assert await server.silent() == [], "its agent is about to try again"
        await server.tracker.submit(report(server, "held"))
        assert await server.deadlines() == {"held": 4.0 + 91.0}


async def test_an_agent_that_does_not_try_again_is_silent_after_all(server: Server, psql: Session) -> None:
    await server.knows(held=1.0)
    async with running(server.tracker), held(psql, OURS):
        with pytest.raises(TunnelLocked):
            await server.tracker.submit(report(server, "held"))
    await server.ticks(1, RETURN_GRACE_S - 1)
    assert await server.silent() == []
    await server.ticks(RETURN_GRACE_S, RETURN_GRACE_S + 1)
    assert await server.silent() == ["held"]


async def test_a_report_waits_for_a_row_that_is_held_for_a_moment(
    server: Server, psql: Session, caplog: pytest.LogCaptureFixture
) -> None:
    await server.knows(held=None)
    async with running(server.tracker):
        async with held(psql, OURS):
            waiting = asyncio.create_task(server.tracker.submit(report(server, "held")))
            await until(lambda: "holds a tunnel's row" in caplog.text)
            assert not waiting.done()
        await waiting
    assert await stored(server) == ["held"]


@pytest.mark.parametrize(
    "statement",
    [OURS, "UPDATE tunnels SET site = 'x' WHERE name = 'held'", "DELETE FROM tunnels WHERE name = 'held'"],
    ids=["locked", "changed", "deleted"],
)
async def test_what_is_held_is_left_out_whatever_is_done_to_it(
    store: Store, server: Server, psql: Session, statement: str
) -> None:
    await server.knows(held=None, free=None)
    async with held(psql, statement), asyncio.timeout(SOON_S):
        for name in ("new", "newer"):  # the second time it is not waited for
            changed = await store.transact(["free", "held", name], START, down, create=True)
            assert changed.locked == {"held"}
    found = await store.read(select(tunnels.c.name).where(tunnels.c.state == "down").order_by(tunnels.c.name))
    assert [row.name for row in found] == ["free", "new", "newer"]
    assert (await store.transact(["free", "held"], START, down, create=True)).locked == set()


@pytest.mark.parametrize("found_after", ["500ms", "1min"])
async def test_of_two_that_wait_for_each_other_none_fails(
    server: Server, database_url: str, psql: Session, found_after: str
) -> None:
    """Two servers that each hold what the other waits for: the database looks for that after `deadlock_timeout`."""
    await server.knows(held=None, free=None)
    await psql.execute("SET deadlock_timeout = '1min'")
    store = await open_store(f"{database_url}&options=-c%20deadlock_timeout%3D{found_after}")
    async with psql.transaction(), asyncio.timeout(SOON_S):
        await psql.execute(OURS)
        waiting = asyncio.create_task(store.transact(["free", "held"], START, down, create=True))
        while not await psql.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            pass  # it holds the free one, and does not wait for the other yet
        await psql.execute("SELECT 1 FROM tunnels WHERE name = 'free' FOR UPDATE")
        assert (await waiting).locked == {"held"}
    assert (await store.transact(["free", "held"], START, down, create=True)).locked == set()
    await store.close()


def down(found):
    for row in found.values():
        row.state = "down"
    return Changes([(rows.SAVE_TUNNEL, [rows.saved_tunnel(row) for row in found.values()])])
