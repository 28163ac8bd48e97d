"""PostgreSQL, through SQLAlchemy's asyncpg engine; the hot path talks to asyncpg itself."""

import logging
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import asyncpg
from sqlalchemy import Executable, Row, text
from sqlalchemy.exc import DBAPIError, InterfaceError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from vpn_sentinel.server.store import rows
from vpn_sentinel.server.store.address import PostgresAddress
from vpn_sentinel.server.store.connecting import engine, os_error_text
from vpn_sentinel.server.store.store import PING, C, Decide, StoreUnavailable, TunnelRow

log = logging.getLogger(__name__)

# How long a transaction waits for rows that another session holds. Other servers hold them for the time of a commit; a
# person's open transaction may last, and everything that waits for this commit waits with it.
_LOCK_TIMEOUT_S: Final = 1.0
_REMEDY: Final = "end the session: SELECT pid, query FROM pg_stat_activity WHERE state = 'idle in transaction'"
# SQLSTATEs caused by what a session takes over when it opens, and keeps: whether it may write (the server was a
# standby, or a default of the database) and its search path for tables.
_READ_ONLY_STATE: Final = "25006"
_SESSION_STATES: Final = frozenset({_READ_ONLY_STATE, "42P01", "3F000"})
_IF_FREE: Final = "FOR UPDATE SKIP LOCKED"


class PostgresStore:
    """See `store.Store`.

    Rows that are free are locked at once, which waits for nobody. Only for what is left may two servers wait for each
    other, and no longer than `_LOCK_TIMEOUT_S`. A row that is still held is not waited for again until it was free.
    """

    def __init__(self, address: PostgresAddress) -> None:
        self._engine = engine(address, pool_size=4, max_overflow=4, pool_pre_ping=True, pool_timeout=5.0)
        self._locked: set[str] = set()  # tunnels whose rows were waited for in vain

    async def read(self, statement: Executable) -> Sequence[Row[Any]]:
        async with self._translated(), self._engine.connect() as connection:
            return (await connection.execute(statement)).all()

    async def write(self, *statements: Executable) -> list[Sequence[Row[Any]]]:
        async with self._translated(), self._engine.begin() as connection:
            results = [await connection.execute(s) for s in statements]
            return [r.all() if r.returns_rows else [] for r in results]

    async def transact(self, names: Sequence[str], now: float, decide: Decide[C], *, create: bool) -> C:
        async with self._translated(), self._engine.connect() as connection:
            driver: asyncpg.Connection[Any] = (await connection.get_raw_connection()).driver_connection
            async with driver.transaction():
                found = await _load(driver, names, _IF_FREE)
                locked = await self._add_missing(driver, names, found, now, create=create)
                changes = decide(found)
                changes.locked = frozenset(locked)
                for sql, values in changes.batches:
                    await driver.executemany(rows.numbered(sql), values)
            self._log_locked(names, locked)
            return changes

    async def _add_missing(
        self, driver: "asyncpg.Connection[Any]", names: Sequence[str], found: dict[str, TunnelRow], now: float,
        *, create: bool,
    ) -> set[str]:  # fmt: skip
        """Add to `found` what it lacks of `names`: with `create` those that are new, and those that another session
        holds, once it lets go. Returns those that it goes on holding.
        """
        if not (missing := sorted(n for n in names if n not in found)):
            return set()
        there = {
            r["name"] for r in await driver.fetch("SELECT name FROM tunnels WHERE name = ANY($1::text[])", missing)
        }
        if create and (new := [n for n in missing if n not in there]):
            # Another replica may insert the same name now: the later INSERT waits for the other's commit, does nothing,
            # and the row of the other is then read and locked here.
            await driver.executemany(rows.numbered(rows.NEW_TUNNEL), [rows.new_tunnel(n, now) for n in new])
            there.update(new)
            found |= await _load(driver, new, _IF_FREE)
        if waited := sorted(there - self._locked - found.keys()):
            found |= await _wait_for(driver, waited)
        return there - found.keys()

    def _log_locked(self, names: Collection[str], locked: set[str]) -> None:
        """Remember which rows are locked, and log each once."""
        for name in sorted(locked - self._locked):
            log.warning(
                "another session of the database holds a tunnel's row: nothing of it is stored until that ends",
                extra={"tunnel": name, "remedy": _REMEDY},
            )
        for name in sorted(self._locked.intersection(names).difference(locked)):
            log.info("a tunnel's row is free again", extra={"tunnel": name})
        self._locked.difference_update(names)
        self._locked.update(locked)

    async def ping(self) -> None:
        await self.write(text(PING))

    async def close(self) -> None:
        await self._engine.dispose()

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        """Turn every failure of the connection or the server into StoreUnavailable, whose text holds no address."""
        try:
            yield
        except (DBAPIError, InterfaceError) as e:
            raise await self._unavailable(e.orig or e) from e
        except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as e:
            raise await self._unavailable(e) from e
        except (PoolTimeout, TimeoutError) as e:
            raise StoreUnavailable("timeout", "no connection or no answer in time") from e
        except OSError as e:
            raise StoreUnavailable("unreachable", os_error_text(e) or type(e).__name__) from e

    async def _unavailable(self, error: BaseException) -> StoreUnavailable:
        """The error to raise. Where the session may be the cause, all sessions that are open now are dropped."""
        state = getattr(error, "sqlstate", None)
        if state in _SESSION_STATES:
            await self._engine.dispose()
        return StoreUnavailable("read_only" if state == _READ_ONLY_STATE else "database_error", type(error).__name__)


async def _load(driver: "asyncpg.Connection[Any]", names: Sequence[str], lock: str) -> dict[str, TunnelRow]:
    sql = f"SELECT {rows.TUNNEL_COLUMNS} FROM tunnels WHERE name = ANY($1::text[]) ORDER BY id {lock}"  # noqa: S608
    return {r["name"]: TunnelRow(*r.values()) for r in await driver.fetch(sql, list(names))}


async def _wait_for(driver: "asyncpg.Connection[Any]", names: Sequence[str]) -> dict[str, TunnelRow]:
    """The rows called `names`, locked as soon as those who hold them let go; none if that takes too long.

    Two servers may wait for each other here; the database ends that by either timeout, whichever is shorter there.
    """
    try:
        async with driver.transaction():  # a savepoint: what is locked already stays so
            await driver.execute(f"SET LOCAL lock_timeout = {1000 * _LOCK_TIMEOUT_S:.0f}")
            found = await _load(driver, names, "FOR UPDATE")
            await driver.execute("SET LOCAL lock_timeout = DEFAULT")
    except (asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError):
        return {}
    return found
