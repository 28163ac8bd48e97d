"""PostgreSQL, through SQLAlchemy's asyncpg engine; the hot path talks to asyncpg itself."""

from collections.abc import AsyncIterator, Sequence
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

# SQLSTATEs caused by what a session takes over when it opens, and keeps: whether it may write (the server was a
# standby, or a default of the database) and its search path for tables.
_READ_ONLY_STATE: Final = "25006"
_SESSION_STATES: Final = frozenset({_READ_ONLY_STATE, "42P01", "3F000"})


class PostgresStore:
    """See `store.Store`. Rows are locked in the order of their ids, so replicas cannot deadlock each other."""

    def __init__(self, address: PostgresAddress) -> None:
        self._engine = engine(address, pool_size=4, max_overflow=4, pool_pre_ping=True, pool_timeout=5.0)

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
                found = await _load(driver, names)
                if create and (missing := sorted(n for n in names if n not in found)):
                    # Another replica may insert the same name now: the later INSERT waits for the other's commit, does
                    # nothing, and the row of the other is then read and locked here.
                    await driver.executemany(rows.numbered(rows.NEW_TUNNEL), [rows.new_tunnel(n, now) for n in missing])
                    found |= await _load(driver, missing)
                changes = decide(found)
                for sql, values in changes.batches:
                    await driver.executemany(rows.numbered(sql), values)
            return changes

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


async def _load(driver: "asyncpg.Connection[Any]", names: Sequence[str]) -> dict[str, TunnelRow]:
    sql = f"SELECT {rows.TUNNEL_COLUMNS} FROM tunnels WHERE name = ANY($1::text[]) ORDER BY id FOR UPDATE"  # noqa: S608
    return {r["name"]: TunnelRow(*r.values()) for r in await driver.fetch(sql, list(names))}
