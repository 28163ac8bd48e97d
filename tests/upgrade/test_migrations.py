"""Every schema that was ever released becomes today's, with its data; today's migrations make what `schema` says."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Executable, create_engine, insert, select, text
from sqlalchemy.ext.asyncio import create_async_engine

import vpn_sentinel.server.store as store_package
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.schema import actions, meta, metadata, transitions, tunnels
from vpn_sentinel.server.store.store import StoreUnusable

MIGRATIONS = Path(store_package.__file__).parent / "migrations"


def differences(connection: Connection) -> list[object]:
    return list(compare_metadata(MigrationContext.configure(connection), metadata))


async def differences_at(url: str) -> list[object]:
    """What the database at `url` has, or lacks, beside `schema`."""
    if url.startswith("sqlite"):
        engine = create_engine(url)
        with engine.connect() as connection:
            found = differences(connection)
        engine.dispose()
        return found
    there = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"))
    async with there.connect() as connection_:
        found = await connection_.run_sync(differences)
    await there.dispose()
    return found


async def test_the_migrations_make_the_schema(database_url: str) -> None:
    await (await open_store(database_url)).close()
    assert await differences_at(database_url) == []


async def test_opening_again_keeps_the_data(database_url: str) -> None:
    first = await open_store(database_url)
    await first.write(insert(meta).values(key="kept", value="yes"))
    await first.close()
    again = await open_store(database_url)
    assert [r.value for r in await again.read(select(meta.c.value).where(meta.c.key == "kept"))] == ["yes"]
    await again.close()


async def test_a_schema_from_the_future_is_refused_in_one_line(database_url: str) -> None:
    store = await open_store(database_url)
    await store.write(text("UPDATE alembic_version SET version_num = '9999'"))
    await store.close()
    with pytest.raises(StoreUnusable, match="newer than this program") as told:
        await open_store(database_url)
    assert "\n" not in str(told.value)


def test_the_migrations_are_one_line() -> None:
    script = ScriptDirectory(str(MIGRATIONS))
    assert len(script.get_heads()) == 1
    assert script.get_bases() == ["0001"]


async def test_a_database_of_the_first_schema_keeps_its_rows(database_url: str) -> None:
    """Built by the first migration alone, with a tunnel and its past in it."""
    await first_schema(database_url)
    store = await open_store(database_url)
    (row,) = await store.read(select(tunnels))
    assert (row.name, row.state, row.seq, row.exit4) == ("nl", "down", 7, "146.70.1.2")
    assert (row.role, row.site, row.policy, row.port, row.port_check) == ("tunnel", "", "", None, "")
    assert len(await store.read(select(transitions))) == 1
    assert list(await store.read(select(actions))) == []
    await store.close()


_ROWS = (
    "INSERT INTO tunnels (name, created_at, state, since, findings, memory, seen_at, source, version, interval,"
    " last_seen, deadline, spool, seq, exit4, exit6, place, resolvers, dns_loc, dns_colo) VALUES ('nl', 1.0, 'down',"
    " 2.0, '[]', '', 3.0, 'agent', '2.0.0', 30.0, 4.0, NULL, 's1', 7, '146.70.1.2', NULL, '{}', '[]', '', '')",
    'INSERT INTO transitions (tunnel_id, at, decided_at, "old", "new", findings)'
    " SELECT id, 2.0, 3.0, 'protected', 'down', '[]' FROM tunnels",
)


def _fill(connection: Connection, revision: str, more: Sequence[Executable]) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, revision)
    for row in (*map(text, _ROWS), *more):
        connection.execute(row)


async def first_schema(url: str) -> None:
    await older_schema(url, "0001")


async def older_schema(url: str, revision: str, more: Sequence[Executable] = ()) -> None:
    """Make a database of that schema, with a tunnel and its past in it, and run `more` in it."""
    if url.startswith("sqlite"):
        engine = create_engine(url)
        with engine.begin() as connection:
            _fill(connection, revision, more)
        engine.dispose()
        return
    there = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"))
    async with there.begin() as connection_:
        await connection_.run_sync(_fill, revision, more)
    await there.dispose()
