"""Opening a store: the right engine for its address, migrated to the newest schema."""

import asyncio
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine, pool
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine

from vpn_sentinel.server.store.postgres import PostgresStore
from vpn_sentinel.server.store.sqlite import SqliteStore, prepare_file
from vpn_sentinel.server.store.store import Store, StoreUnusable

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
# Replicas that start together migrate one after the other behind this advisory lock ("vpn-sentinel" in digits).
_LOCK: Final = 8_767_362_846


async def open_store(url: str) -> Store:
    """Migrate the database at `url` to the newest schema and return its store. Raises StoreUnusable."""
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///"))
        await asyncio.to_thread(prepare_file, path)
        await asyncio.to_thread(_migrate_sqlite, path)
        return SqliteStore(str(path))
    try:
        where = make_url(url)
    except ArgumentError as e:
        msg = "VPN_SENTINEL_DATABASE_URL is not an address of a database"
        raise StoreUnusable(msg) from e
    try:
        await _migrate_postgres(url)
    except (OSError, SQLAlchemyError, TimeoutError) as e:
        why = getattr(e, "orig", None) or e
        msg = f"database at {where.host or 'the local socket'}: {' '.join(str(why).split()) or type(why).__name__}"
        raise StoreUnusable(msg) from e
    return PostgresStore(url)


def _migrate_sqlite(path: Path) -> None:
    engine = create_engine(f"sqlite:///{path}", poolclass=pool.NullPool)
    try:
        with engine.begin() as connection:
            _upgrade(connection)
    except SQLAlchemyError as e:
        msg = f"database {path}: {getattr(e, 'orig', None) or e}"
        raise StoreUnusable(msg) from e
    finally:
        engine.dispose()


async def _migrate_postgres(url: str) -> None:
    engine = create_async_engine(
        url.replace("postgresql://", "postgresql+asyncpg://", 1), poolclass=pool.NullPool, connect_args={"timeout": 5.0}
    )
    try:
        async with engine.begin() as connection:
            await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
            await connection.run_sync(_upgrade)
    finally:
        await engine.dispose()


def _upgrade(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    here = MigrationContext.configure(connection).get_current_revision()
    script = ScriptDirectory.from_config(config)
    if here == script.get_current_head():
        return
    try:
        if here is not None:
            script.get_revision(here)
    except CommandError as e:
        msg = f"the database's schema {here} is newer than this program: upgrade the program"
        raise StoreUnusable(msg) from e
    command.upgrade(config, "head")
