"""SQLite in WAL mode: one writer thread, so that no write waits for a lock, and readers on connections of their own."""

import asyncio
import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from sqlalchemy import URL, Engine, Executable, Row, create_engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool, StaticPool

from vpn_sentinel.server.store import rows
from vpn_sentinel.server.store.store import PING, C, Decide, StoreUnavailable, TunnelRow

T = TypeVar("T")
log = logging.getLogger(__name__)

_READER_THREADS: Final = 2
_COMMITS_PER_CHECKPOINT: Final = 50  # commits


class SqliteStore:
    """See `store.Store`. Writes run in one thread, in the order of their calls."""

    def __init__(self, path: str, release: Callable[[], None] = lambda: None) -> None:
        """`release` is called when the last connection is closed."""
        self._writer = _engine(path, StaticPool, query_only=False)
        self._reader = _engine(path, QueuePool, query_only=True, pool_size=_READER_THREADS, max_overflow=0)
        self._path = path
        self._release = release
        self._write_thread = ThreadPoolExecutor(1, "store-writer")
        self._checkpoint_thread = ThreadPoolExecutor(1, "store-checkpointer")
        self._commits = 0
        self._read_threads = ThreadPoolExecutor(_READER_THREADS, "store-reader")
        self._long_thread = ThreadPoolExecutor(1, "store-long")

    async def read(self, statement: Executable) -> Sequence[Row[Any]]:
        def run() -> Sequence[Row[Any]]:
            with self._reader.connect() as connection:
                return connection.execute(statement).all()

        return await self._run_in(self._read_threads, run, shielded=False)

    async def write(self, *statements: Executable) -> list[Sequence[Row[Any]]]:
        def run() -> list[Sequence[Row[Any]]]:
            with self._writer.begin() as connection:
                results = [connection.execute(s) for s in statements]
                return [r.all() if r.returns_rows else [] for r in results]

        return await self._run_in(self._write_thread, run)

    async def transact(self, names: Sequence[str], now: float, decide: Decide[C], *, create: bool) -> C:
        return await self._run_in(self._write_thread, lambda: self._transact(names, now, decide, create=create))

    def _transact(self, names: Sequence[str], now: float, decide: Decide[C], *, create: bool) -> C:
        raw = self._writer.raw_connection()
        try:
            cursor = raw.cursor()
            cursor.execute("BEGIN IMMEDIATE")
            try:
                found = _load(cursor, names)
                if create and (missing := [n for n in names if n not in found]):
                    cursor.executemany(rows.NEW_TUNNEL, [rows.new_tunnel(n, now) for n in missing])
                    found |= _load(cursor, missing)
                changes = decide(found)
                for sql, values in changes.batches:
                    cursor.executemany(sql, values)
                cursor.execute("COMMIT")
                self._commits += 1
                if self._commits % _COMMITS_PER_CHECKPOINT == 0:
                    self._checkpoint_thread.submit(self._checkpoint)
            except BaseException:
                if raw.driver_connection is not None and raw.driver_connection.in_transaction:
                    cursor.execute("ROLLBACK")
                raise
            return changes
        finally:
            raw.close()

    async def ping(self) -> None:
        await self.write(text(PING))

    def _checkpoint(self) -> None:
        """Copy committed pages from the WAL into the file, so that the writer need not do it in a commit."""
        try:
            with contextlib.closing(sqlite3.connect(self._path, isolation_level=None)) as connection:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        except sqlite3.Error as e:
            log.debug("no checkpoint was made", extra={"reason": str(e)})  # the writer's own autocheckpoint remains

    async def run_long(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run long work that does not write to this database in a thread and connection of its own: reports go on.

        Cancelling interrupts it. Raises StoreUnavailable.
        """
        try:
            connection = sqlite3.connect(self._path, timeout=10.0, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as e:
            raise _unavailable(e) from e
        cancelled = threading.Event()

        def run() -> T:
            with contextlib.closing(connection):
                if cancelled.is_set():
                    raise sqlite3.OperationalError("interrupted")
                return work(connection)

        try:
            return await self._run_in(self._long_thread, run)
        except asyncio.CancelledError:
            cancelled.set()
            connection.interrupt()
            raise

    async def close(self) -> None:
        def run() -> None:
            self._reader.dispose()
            self._writer.dispose()

        self._long_thread.shutdown()
        self._checkpoint_thread.shutdown()
        await asyncio.get_running_loop().run_in_executor(self._write_thread, run)
        self._read_threads.shutdown()
        self._write_thread.shutdown()
        self._release()

    async def _run_in(self, threads: ThreadPoolExecutor, work: Callable[[], T], *, shielded: bool = True) -> T:
        running = asyncio.get_running_loop().run_in_executor(threads, work)
        try:
            # Shielded: work in a thread cannot be undone, so a cancelled caller must not see it half-done. That does
            # not matter for a read, where a shield would cost one more iteration of a loop that may be busy.
            return await (asyncio.shield(running) if shielded else running)
        except DBAPIError as e:
            raise _unavailable(e.orig) from e
        except sqlite3.Error as e:
            raise _unavailable(e) from e


def _load(cursor: Any, names: Sequence[str]) -> dict[str, TunnelRow]:
    found: dict[str, TunnelRow] = {}
    for start in range(0, len(names), 500):
        part = names[start : start + 500]
        marks = ",".join("?" * len(part))
        cursor.execute(f"SELECT {rows.TUNNEL_COLUMNS} FROM tunnels WHERE name IN ({marks})", part)  # noqa: S608
        for values in cursor.fetchall():
            found[values[1]] = TunnelRow(*values)
    return found


def _unavailable(error: BaseException | None) -> StoreUnavailable:
    code = getattr(error, "sqlite_errorname", "")
    reasons = {
        "SQLITE_FULL": "disk_full",
        "SQLITE_READONLY": "read_only",
        "SQLITE_BUSY": "busy",
        "SQLITE_CORRUPT": "damaged",
    }
    reason = next((r for prefix, r in reasons.items() if code.startswith(prefix)), "database_error")
    return StoreUnavailable(reason, str(error))


def _engine(path: str, pool: type, *, query_only: bool, **options: Any) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=path),  # unchanged: % and ? in a path have no meaning
        poolclass=pool,
        # Transactions begin below: sqlite3's own BEGIN is deferred, and upgrading it to a write can fail (SQLITE_BUSY).
        connect_args={"check_same_thread": False, "isolation_level": None, "timeout": 10.0},
        **options,
    )

    @event.listens_for(engine, "connect")
    def _pragmas(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")
        # Bounds how far the checkpointer may fall behind the writer, in pages of 4 KB.
        connection.execute("PRAGMA wal_autocheckpoint = 8000")
        connection.execute("PRAGMA busy_timeout = 10000")
        connection.execute(f"PRAGMA query_only = {'ON' if query_only else 'OFF'}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN" if query_only else "BEGIN IMMEDIATE")

    return engine
