"""Both engines, behind the one door."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from sqlalchemy import Engine, event, insert, select
from sqlalchemy.engine import make_url

from vpn_sentinel.server.store import rows
from vpn_sentinel.server.store.address import parse
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.postgres import PostgresStore
from vpn_sentinel.server.store.schema import meta, tunnels
from vpn_sentinel.server.store.sqlite import SqliteStore
from vpn_sentinel.server.store.store import Changes, Store, StoreUnavailable, TunnelRow

Found = Mapping[str, TunnelRow]


def save(*changed: TunnelRow) -> Changes:
    return Changes([(rows.SAVE_TUNNEL, [rows.saved_tunnel(row) for row in changed])])


def leaking(found: Found) -> Changes:
    found["nl"].state = "leaking"
    return save(found["nl"])


async def states(store: Store) -> dict[str, str]:
    return {r.name: r.state for r in await store.read(select(tunnels))}


@asynccontextmanager
async def opened(store: Store) -> AsyncIterator[Store]:
    try:
        yield store
    finally:
        await store.close()


async def test_what_is_written_is_read(store: Store) -> None:
    await store.write(insert(meta).values(key="a", value="1"))
    assert [tuple(r) for r in await store.read(select(meta))] == [("a", "1")]


async def test_ping_answers_every_time_and_leaves_what_is_there(store: Store) -> None:
    await store.write(insert(meta).values(key="a", value="1"))
    await store.ping()
    await store.ping()
    assert [r.value for r in await store.read(select(meta).where(meta.c.key == "a"))] == ["1"]
    assert await states(store) == {}


async def test_transact_creates_and_saves(store: Store) -> None:
    await store.transact(["nl"], 5.0, leaking, create=True)
    assert await states(store) == {"nl": "leaking"}


async def test_without_create_nothing_is_created(store: Store) -> None:
    await store.transact(["nl"], 5.0, lambda _: Changes(), create=True)
    seen: list[set[str]] = []

    def decide(found: Found) -> Changes:
        seen.append(set(found))
        return Changes()

    await store.transact(["nl", "ch"], 6.0, decide, create=False)
    assert seen == [{"nl"}]
    assert await states(store) == {"nl": "pending"}


async def test_a_decision_that_fails_writes_nothing(store: Store) -> None:
    def decide(found: Found) -> Changes:
        raise LookupError(found["nl"].name)

    with pytest.raises(LookupError, match="nl"):
        await store.transact(["nl"], 5.0, decide, create=True)
    assert await states(store) == {}
    await store.transact(["nl"], 6.0, leaking, create=True)
    assert await states(store) == {"nl": "leaking"}


async def test_a_batch_that_fails_takes_those_before_it_back(store: Store) -> None:
    await store.transact(["nl"], 5.0, lambda _: Changes(), create=True)

    def decide(found: Found) -> Changes:
        return Changes([*leaking(found).batches, ("INSERT INTO nowhere VALUES (?)", [(1,)])])

    with pytest.raises(StoreUnavailable) as failed:
        await store.transact(["nl", "ch"], 6.0, decide, create=True)
    assert failed.value.reason == "database_error"
    assert await states(store) == {"nl": "pending"}
    await store.transact(["nl"], 7.0, leaking, create=False)
    assert await states(store) == {"nl": "leaking"}


async def test_several_statements_are_written_together_or_not_at_all(store: Store) -> None:
    one = insert(meta).values(key="a", value="1")
    with pytest.raises(StoreUnavailable):
        await store.write(one, one)  # the key is taken
    assert await store.read(select(meta)) == []


async def test_what_many_decide_at_once_on_one_name_adds_up(store: Store, database_url: str) -> None:
    """As two servers on one database do it; the first of all has to create the tunnel."""

    def decide(found: Found) -> Changes:
        for row in found.values():
            row.seq += 1
        return save(*found.values())

    async def add(each: Store) -> None:
        while (await each.transact(["nl"], 5.0, decide, create=True)).locked:
            """The others held it for too long."""

    async with opened(await open_store(database_url)) as other, asyncio.TaskGroup() as group:
        for each in [store, other] * 10:
            group.create_task(add(each))
    assert [r.seq for r in await store.read(select(tunnels))] == [20]


# --- when the database is not there, or takes no more -----------------------------------------------------------------


@contextmanager
def no_room() -> Iterator[None]:
    """Databases opened meanwhile cannot grow: SQLite raises the limit by itself to what is already in use."""

    def limit(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA max_page_count = 1")

    event.listen(Engine, "connect", limit)
    try:
        yield
    finally:
        event.remove(Engine, "connect", limit)


async def refused(work: Callable[[], Any]) -> StoreUnavailable:
    with pytest.raises(StoreUnavailable) as failed:
        await work()
    return failed.value


@pytest.fixture
async def database(tmp_path: Path) -> Path:
    """The file of a SQLite database that nobody has open."""
    path = tmp_path / "data" / "sentinel.db"
    await (await open_store(f"sqlite:///{path}")).close()
    return path


async def test_a_full_disk_is_said(database: Path) -> None:
    with no_room():
        async with opened(SqliteStore(str(database))) as store:
            big = insert(meta).values(key="a", value="x" * 1_000_000)
            assert (await refused(lambda: store.write(big))).reason == "disk_full"
            assert await store.read(select(meta)) == []
            await store.write(insert(meta).values(key="a", value="little"))


async def test_a_full_disk_stops_a_decision(database: Path) -> None:
    def decide(found: Found) -> Changes:
        found["nl"].place = "x" * 1_000_000
        return save(found["nl"])

    with no_room():
        async with opened(SqliteStore(str(database))) as store:
            failed = await refused(lambda: store.transact(["nl"], 5.0, decide, create=True))
            assert failed.reason == "disk_full"
            assert await states(store) == {}
            await store.transact(["nl"], 6.0, leaking, create=True)
            assert await states(store) == {"nl": "leaking"}


async def test_a_read_only_database_can_be_read_and_fails_its_ping(database: Path) -> None:
    with database.open("r+b") as file:
        file.seek(18)
        file.write(b"\x03")  # a version that may be read, not written (sqlite.org/fileformat2.html, 1.3.3)
    async with opened(SqliteStore(str(database))) as store:
        assert await states(store) == {}
        assert (await refused(store.ping)).reason == "read_only"
        assert (await refused(lambda: store.transact(["nl"], 5.0, leaking, create=True))).reason == "read_only"


async def test_a_data_folder_that_is_gone(database: Path) -> None:
    shutil.rmtree(database.parent)
    async with opened(SqliteStore(str(database))) as store:
        assert (await refused(store.ping)).reason == "database_error"
        assert (await refused(lambda: store.read(select(meta)))).reason == "database_error"
        assert (await refused(lambda: store.transact(["nl"], 5.0, leaking, create=True))).reason == "database_error"


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_a_database_that_was_dropped(store: Store, database_url: str) -> None:
    await store.ping()
    where = make_url(database_url)
    cluster = await asyncpg.connect(host=str(where.query["host"]), user=where.username, database="postgres")
    try:
        await cluster.execute(f'DROP DATABASE "{where.database}" WITH (FORCE)')
    finally:
        await cluster.close()
    assert (await refused(store.ping)).reason == "database_error"
    assert (await refused(lambda: store.read(select(meta)))).reason == "database_error"
    assert (await refused(lambda: store.transact(["nl"], 5.0, leaking, create=True))).reason == "database_error"


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
async def test_a_session_that_opened_while_nothing_could_be_written_is_not_kept(
    store: Store, database_url: str
) -> None:
    """A failover behind one name, or maintenance: read-only is what a session takes over as it opens."""
    where = make_url(database_url)
    name = where.database
    cluster = await asyncpg.connect(host=str(where.query["host"]), user=where.username, database="postgres")
    try:
        await cluster.execute(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
        await cluster.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
        assert (await refused(lambda: store.transact(["nl"], 5.0, leaking, create=True))).reason == "read_only"
        assert await states(store) == {}  # by a session that will know no better
        await cluster.execute(f'ALTER DATABASE "{name}" RESET default_transaction_read_only')
    finally:
        await cluster.close()
    assert (await refused(store.ping)).reason == "read_only"
    await store.transact(["nl"], 6.0, leaking, create=True)
    assert await states(store) == {"nl": "leaking"}


@pytest.mark.parametrize("by", ["socket", "network"])
async def test_a_server_that_is_not_there(by: str, tmp_path: Path, free_port: int) -> None:
    where = {"socket": f"/x?host={tmp_path}", "network": f"127.0.0.1:{free_port}/x"}[by]
    async with opened(PostgresStore(parse(f"postgresql://sentinel:hush@{where}"))) as store:
        for work in (store.ping, lambda: store.transact(["nl"], 5.0, leaking, create=True)):
            failed = await refused(work)
            assert failed.reason == "unreachable"
            assert "hush" not in str(failed)
