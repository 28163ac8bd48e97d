"""Old rows go: all of them, no others, and without a look at those that stay."""

from pathlib import Path

from sqlalchemy import Executable, func, insert, select, text
from sqlalchemy.dialects import sqlite

from tests.conftest import ManualClock
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.schema import observations, tunnels
from vpn_sentinel.server.store.store import Changes, Store
from vpn_sentinel.server.watch.retention import Retention

DAY = 86400.0
AT_THE_SAME_TIME = 200  # as in one message of an agent that was cut off


async def fill(store: Store, oldest: float, messages: int) -> None:
    """So many messages, a minute apart."""
    await store.transact(["nl"], oldest, lambda _: Changes([]), create=True)
    (tunnel,) = await store.read(select(tunnels.c.id))
    same = {"tunnel_id": tunnel.id, "spool": "s", "state": "protected", "body": "{}"}
    for n in range(messages):
        at = oldest + 60.0 * n
        rows = [
            same | {"seq": 1 + n * AT_THE_SAME_TIME + k, "at": at, "received_at": at} for k in range(AT_THE_SAME_TIME)
        ]
        await store.write(insert(observations).values(rows))


async def test_what_is_older_goes_and_the_rest_stays(store: Store, clock: ManualClock) -> None:
    await fill(store, clock.wall() - 7 * DAY - 9.5 * 60.0, messages=12)
    retention = Retention(store, clock, days=7)
    assert await retention.prune() == 10 * AT_THE_SAME_TIME
    assert await retention.prune() == 0
    ((left, oldest),) = await store.read(select(func.count(), func.min(observations.c.received_at)))
    assert left == 2 * AT_THE_SAME_TIME
    assert oldest > clock.wall() - 7 * DAY


class Watched:
    """A store that keeps what is written through it."""

    def __init__(self, store: Store) -> None:
        self.statements: list[Executable] = []
        self.read, self._write = store.read, store.write

    async def write(self, *statements: Executable) -> object:
        self.statements += statements
        return await self._write(*statements)


async def test_the_writer_does_not_read_all_that_is_kept(tmp_path: Path, clock: ManualClock) -> None:
    """SQLite has one, and nobody's report is acknowledged meanwhile: a step must not cost more in a larger database."""
    store = await open_store(f"sqlite:///{tmp_path}/sentinel.db")
    try:
        watched = Watched(store)
        await Retention(watched, clock, days=7).prune()  # type: ignore[arg-type]
        for statement in watched.statements:
            words = statement.compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True})  # type: ignore[attr-defined]
            plan = [row.detail for row in await store.read(text(f"EXPLAIN QUERY PLAN {words}"))]
            assert not [line for line in plan if line.startswith("SCAN observations")], words
    finally:
        await store.close()
