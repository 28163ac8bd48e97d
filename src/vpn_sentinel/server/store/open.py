"""Opens a store: the engine that its address names, migrated to the newest schema."""

import asyncio
import logging
import sqlite3
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, create_engine, delete, event, insert, pool, select
from sqlalchemy.exc import SQLAlchemyError

from vpn_sentinel.server.store.address import PostgresAddress, parse
from vpn_sentinel.server.store.connecting import CONNECT_ERRORS, engine, failure_text
from vpn_sentinel.server.store.postgres import PostgresStore
from vpn_sentinel.server.store.schema import meta
from vpn_sentinel.server.store.sqlite import SqliteStore
from vpn_sentinel.server.store.sqlitefile import LOCK_TIMEOUT_S, FileLock, lock_file, lock_for_server, prepare, unusable
from vpn_sentinel.server.store.store import Store, StoreUnavailable, StoreUnusable

log = logging.getLogger(__name__)

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
# Replicas that start together migrate one after the other behind this advisory lock ("vpn-sentinel" in digits).
_MIGRATION_LOCK_ID: Final = 8_767_362_846
_RETRY_INTERVAL_S: Final = 0.1
# The key of `meta` under which a loss of data is recorded until people are notified.
DAMAGE_KEY: Final = "damage"
# The encodings that hold every text; the second stores bytes unchanged.
_SUPPORTED_ENCODINGS: Final = ("UTF8", "SQL_ASCII")


async def open_store(url: str, *, serving: bool = False) -> Store:
    """Migrate the database at `url` to the newest schema and return its store. Raises StoreUnusable.

    `serving`: for a server, which needs exclusive use of a SQLite file. Otherwise the file may be in use by a running
    server; it is then opened without a migration.
    """
    if url.startswith("sqlite:///"):
        return await _open_sqlite(Path(url.removeprefix("sqlite:///")), serving=serving)
    try:
        address = parse(url)
    except ValueError as e:
        msg = f"VPN_SENTINEL_DATABASE_URL: {e}"
        raise StoreUnusable(msg) from e
    for unsupported in address.unsupported:
        # The name is in the sentence, because a command prints no fields.
        log.warning("the database's address asks for %s, which is not checked here", unsupported)
    trouble = ""
    try:
        await _migrate_postgres(address)
    except (SQLAlchemyError, *CONNECT_ERRORS) as e:
        trouble = failure_text(e, address)
    if trouble:  # raised outside `except`, so that no chained exception shows the address
        msg = f"database at {address.where}: {trouble}"
        raise StoreUnusable(msg)
    return PostgresStore(address)


async def _open_sqlite(path: Path, *, serving: bool) -> Store:
    held = await asyncio.to_thread(lock_for_server if serving else lock_file, path)
    release = held.release if held is not None else _no_release
    try:
        damage = await asyncio.to_thread(_prepare_sqlite, path, held)
    except BaseException:
        release()
        raise
    store = SqliteStore(str(path), release if serving else _no_release)
    if damage:
        await _record_damage(store, damage)
    if not serving:
        release()
    return store


def _no_release() -> None:
    """In place of a lock's release, where no lock is held."""


class _OldSchema(StoreUnusable):
    """The schema is old, and only the process that holds the file's lock may migrate it."""


def _prepare_sqlite(path: Path, held: FileLock | None) -> str:
    damage = prepare(path, alone=held is not None)
    waits = LOCK_TIMEOUT_S if held is None else 0.0
    while True:
        try:
            _migrate_sqlite(path, alone=held is not None)
        except _OldSchema:
            # The process that holds the lock may be a server that is starting, and is migrating the file now.
            if waits <= 0:
                raise
            waits -= _RETRY_INTERVAL_S
            time.sleep(_RETRY_INTERVAL_S)
        else:
            return damage


async def _record_damage(store: Store, damage: str) -> None:
    """Log what the write-ahead log lost, and record it for the next server that starts, which notifies people."""
    try:
        alive = await store.read(select(meta.c.value).where(meta.c.key == "alive"))
        if alive:
            end = datetime.fromtimestamp(float(alive[0].value), UTC)
            damage += f"; what is left ends at {end:%Y-%m-%d %H:%M:%S} UTC"
        await store.write(
            delete(meta).where(meta.c.key == DAMAGE_KEY), insert(meta).values(key=DAMAGE_KEY, value=damage)
        )
    except StoreUnavailable as e:  # on a full disk the server still watches
        log.warning("the loss cannot be recorded", extra={"reason": e.reason})
    log.error(damage)


def _migrate_sqlite(path: Path, *, alone: bool) -> None:
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        poolclass=pool.NullPool,
        connect_args={"isolation_level": None, "timeout": 10.0},
    )

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # Python's sqlite3 begins a transaction only with the first INSERT or UPDATE: each CREATE before it was
        # committed on its own, and a migration that was killed in between could never be completed.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if alone else "BEGIN")

    try:
        with engine.begin() as connection:
            _upgrade(connection, may_write=alone)
    except SQLAlchemyError as e:
        cause = getattr(e, "orig", None)
        if isinstance(cause, sqlite3.Error):
            raise unusable(path, cause) from e
        msg = f"database {path}: {e}"
        raise StoreUnusable(msg) from e
    finally:
        engine.dispose()


async def _migrate_postgres(address: PostgresAddress) -> None:
    opened = engine(address, poolclass=pool.NullPool)
    try:
        async with opened.begin() as connection:
            encoding = (await connection.exec_driver_sql("SHOW server_encoding")).scalar_one()
            if encoding not in _SUPPORTED_ENCODINGS:
                msg = (
                    f"database at {address.where}: its encoding is {encoding}, which does not hold every name of a "
                    "place: make one with ENCODING 'UTF8'"
                )
                raise StoreUnusable(msg)
            await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK_ID})")
            await connection.run_sync(_upgrade)
    finally:
        await opened.dispose()


def _upgrade(connection: Connection, *, may_write: bool = True) -> None:
    """Run all missing migrations in the current transaction of `connection`. Raises StoreUnusable."""
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
    if not may_write:
        msg = f"the database's schema ({here}) is older than this program, and a server runs on it: restart that first"
        raise _OldSchema(msg)
    command.upgrade(config, "head")
