"""The lease to poll. Telegram allows one poller at a time for a token, so one of the servers of a database polls.

The lease is the row `bot_poller` of `meta`: {"holder", "until", "offset"} as JSON, times in seconds since the epoch.
The offset of the last poll is in the same row, so only the holder can change it.
"""

from typing import Final

import msgspec
from sqlalchemy import exists, insert, literal, select, update

from vpn_sentinel.server.store.schema import meta
from vpn_sentinel.server.store.store import Store

KEY: Final = "bot_poller"
# No lease is longer; a row with a longer one was written with a wrong clock.
_MAX_LEASE_S: Final = 60.0


class LeaseRow(msgspec.Struct, frozen=True):
    """The row. `offset` is the first update that has not been answered, None when all earlier ones are confirmed."""

    holder: str = ""
    until: float = 0.0
    offset: int | None = None


_decode = msgspec.json.Decoder(LeaseRow).decode


class PollerLease:
    """One server's lease. `offset` may be changed while it is held; the next `acquire` stores it."""

    def __init__(self, store: Store, holder: str) -> None:
        self._store = store
        self._holder = holder
        self._own_value: str | None = None
        self._free_at = 0.0
        self.offset: int | None = None

    @property
    def free_at(self) -> float:
        """When the lease of another server may become free."""
        return self._free_at

    async def acquire(self, now: float, until: float) -> bool:
        """Take the lease when it is free, or renew it; whether it is ours until `until`. Raises StoreUnavailable.

        Survives the race of two servers for a free lease: the UPDATE names the exact old value, so only the first finds
        it. (On PostgreSQL the second waits for the first's commit and checks again.) Both may find no row at all and
        insert one: the primary key stops the second, which raises StoreUnavailable and tries again later.
        """
        if self._own_value is None:
            [*found] = await self._store.read(select(meta.c.value).where(meta.c.key == KEY))
            if not found:
                absent = select(literal(KEY), literal("{}")).where(~exists().where(meta.c.key == KEY))
                await self._store.write(insert(meta).from_select(["key", "value"], absent))
            old = found[0].value if found else "{}"
            seen = _read(old)
            if seen.holder != self._holder and now < seen.until < now + _MAX_LEASE_S:
                self._free_at = seen.until
                return False
            self.offset = max(self.offset or 0, seen.offset or 0) or None
            self._own_value = old
        self._free_at = until
        return await self._swap(LeaseRow(self._holder, until, self.offset))

    async def release(self) -> None:
        """Free the lease for another server. Raises StoreUnavailable."""
        if self._own_value is not None:
            await self._swap(LeaseRow("", 0.0, self.offset))
            self._own_value = None

    async def _swap(self, new: LeaseRow) -> bool:
        text = msgspec.json.encode(new).decode()
        old, self._own_value = self._own_value, None  # after a failure the row may have changed or not: read it again
        statement = update(meta).where(meta.c.key == KEY, meta.c.value == old).values(value=text).returning(meta.c.key)
        [changed] = await self._store.write(statement)
        if changed:
            self._own_value = text
        return bool(changed)


def _read(value: str) -> LeaseRow:
    try:
        return _decode(value)
    except (ValueError, RecursionError):
        return LeaseRow()
