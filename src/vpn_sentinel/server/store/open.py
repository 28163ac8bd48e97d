"""Opening a store: the right engine for its address, migrated to the newest schema."""

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
from vpn_sentinel.server.store.connecting import CONNECT_ERRORS, engine, said
from vpn_sentinel.server.store.postgres import PostgresStore
from vpn_sentinel.server.store.schema import meta
from vpn_sentinel.server.store.sqlite import SqliteStore
from vpn_sentinel.server.store.sqlitefile import LOCK_TIMEOUT_S, Held, hold, hold_for_a_server, prepare, unusable
from vpn_sentinel.server.store.store import Store, StoreUnavailable, StoreUnusable

log = logging.getLogger(__name__)

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
# Replicas that start together migrate one after the other behind this advisory lock ("vpn-sentinel" in digits).
_LOCK: Final = 8_767_362_846
_BEAT: Final = 0.1
# The key of `meta` under which stands what was lost, until people are told.
DAMAGE: Final = "damage"
# Those that hold every text; the second holds bytes as they come.
_ENCODINGS: Final = ("UTF8", "SQL_ASCII")


async def open_store(url: str, *, serving: bool = False) -> Store:
    """Migrate the database at `url` to the newest schema and return its store. Raises StoreUnusable.

    `serving`: for a server, which has a SQLite file to itself. Without it the file may be a running server's, and is
    then opened as it is.
    """
    if url.startswith("sqlite:///"):
        return await _open_sqlite(Path(url.removeprefix("sqlite:///")), serving=serving)
    try:
        address = parse(url)
    except ValueError as e:
        msg = f"VPN_SENTINEL_DATABASE_URL: {e}"
        raise StoreUnusable(msg) from e
    for unmet in address.unmet:
        # In the sentence itself: what a command prints has no fields.
        log.warning("the database's address asks for %s, which is not checked here", unmet)
    trouble = ""
    try:
        await _migrate_postgres(address)
    except (SQLAlchemyError, *CONNECT_ERRORS) as e:
        trouble = said(e, address)
    if trouble:  # raised here, where no error that knows the address hangs on to it
        msg = f"database at {address.where}: {trouble}"
        raise StoreUnusable(msg)
    return PostgresStore(address)


async def _open_sqlite(path: Path, *, serving: bool) -> Store:
    held = await asyncio.to_thread(hold_for_a_server if serving else hold, path)
    release = held.release if held is not None else _nothing
    try:
        damage = await asyncio.to_thread(_prepare_sqlite, path, held)
    except BaseException:
        release()
        raise
    store = SqliteStore(str(path), release if serving else _nothing)
    if damage:
        await _note(store, damage)
    if not serving:
        release()
    return store


def _nothing() -> None:
    """For whoever holds nothing."""


class _OldSchema(StoreUnusable):
    """One that only whoever holds the file may change."""


def _prepare_sqlite(path: Path, held: Held | None) -> str:
    damage = prepare(path, alone=held is not None)
    waits = LOCK_TIMEOUT_S if held is None else 0.0
    while True:
        try:
            _migrate_sqlite(path, alone=held is not None)
        except _OldSchema:
            # Whoever holds the file may be a server that starts, and migrates it at this moment.
            if waits <= 0:
                raise
            waits -= _BEAT
            time.sleep(_BEAT)
        else:
            return damage


async def _note(store: Store, damage: str) -> None:
    """Say what the log lost, and have the next server that starts tell people."""
    try:
        alive = await store.read(select(meta.c.value).where(meta.c.key == "alive"))
        if alive:
            end = datetime.fromtimestamp(float(alive[0].value), UTC)
            damage += f"; what is left ends at {end:%Y-%m-%d %H:%M:%S} UTC"
        await store.write(delete(meta).where(meta.c.key == DAMAGE), insert(meta).values(key=DAMAGE, value=damage))
    except StoreUnavailable as e:  # a full disk is no reason not to watch
        log.warning("what was lost cannot be noted", extra={"reason": e.reason})
    log.error(damage)


def _migrate_sqlite(path: Path, *, alone: bool) -> None:
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        poolclass=pool.NullPool,
        connect_args={"isolation_level": None, "timeout": 10.0},
    )

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # Python's own transaction begins with the first INSERT or UPDATE: each CREATE before that was one of its own,
        # and what was killed in between never started again.
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
            if encoding not in _ENCODINGS:
                msg = (
                    f"database at {address.where}: its encoding is {encoding}, which does not hold every name of a "
                    "place: make one with ENCODING 'UTF8'"
                )
                raise StoreUnusable(msg)
            await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
            await connection.run_sync(_upgrade)
    finally:
        await opened.dispose()


def _upgrade(connection: Connection, *, may_write: bool = True) -> None:
    """Everything that is needed, in the transaction that `connection` is in. Raises StoreUnusable."""
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
