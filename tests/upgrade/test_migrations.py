"""Every schema that was ever released becomes today's, with its data; today's migrations make what `schema` says."""

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, insert, select, text
from sqlalchemy.ext.asyncio import create_async_engine

import vpn_sentinel.server.store as store_package
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.schema import meta, metadata
from vpn_sentinel.server.store.store import StoreUnusable

MIGRATIONS = Path(store_package.__file__).parent / "migrations"


def differences(connection: Connection) -> list[object]:
    return list(compare_metadata(MigrationContext.configure(connection), metadata))


async def test_the_migrations_make_the_schema(database_url: str) -> None:
    await (await open_store(database_url)).close()
    if database_url.startswith("sqlite"):
        engine = create_engine(database_url)
        with engine.connect() as connection:
            found = differences(connection)
        engine.dispose()
    else:
        there = create_async_engine(database_url.replace("postgresql://", "postgresql+asyncpg://"))
        async with there.connect() as connection_:
            found = await connection_.run_sync(differences)
        await there.dispose()
    assert found == []


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
