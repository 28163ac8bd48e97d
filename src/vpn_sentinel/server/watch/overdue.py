"""Passed deadlines become silence; the server's own outages do not.

Each tick says "alive" in the database. When the last one is long ago, no server was there to hear anybody, so all
deadlines move by the length of that gap before any of them is looked at: our fault is never the user's alarm.
"""

import asyncio
import logging
from typing import Final

from sqlalchemy import insert, select, update

from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.store.schema import meta, tunnels
from vpn_sentinel.server.store.store import Store, StoreUnavailable
from vpn_sentinel.server.tracker import Tracker

log = logging.getLogger(__name__)

_TICK: Final = 1.0
# A gap between two ticks that is longer than this was an outage: of the process, the machine or the database.
OUTAGE: Final = 8.0
# After an outage agents need a while to come back: they wait up to half a minute between tries.
RETURN: Final = 45.0
_AT_ONCE: Final = 500


class Overdue:
    """Sweeps deadlines once a second. Any number of replicas may do so: see `Tracker.sweep`."""

    def __init__(self, store: Store, tracker: Tracker, clock: Clock) -> None:
        self._store = store
        self._tracker = tracker
        self._clock = clock
        self._said: str | None = None

    async def run(self) -> None:
        while True:
            try:
                await self.tick()
            except StoreUnavailable as e:
                if self._said != e.reason:
                    self._said = e.reason
                    log.error("deadlines cannot be watched", extra={"reason": e.reason})  # noqa: TRY400 - said without a trace
            else:
                if self._said is not None:
                    log.info("deadlines are watched again", extra={"after": self._said})
                    self._said = None
            await asyncio.sleep(_TICK)

    async def tick(self) -> None:
        """Say that the server is alive, forgive its own outage, and make overdue tunnels silent."""
        now = self._clock.wall()
        await self._alive(now)
        while True:
            found = await self._store.read(
                select(tunnels.c.name).where(tunnels.c.deadline <= now).order_by(tunnels.c.deadline).limit(_AT_ONCE)
            )
            if not found:
                return
            await self._tracker.sweep([r.name for r in found], now)

    async def _alive(self, now: float) -> None:
        rows = await self._store.read(select(meta.c.value).where(meta.c.key == "alive"))
        if not rows:
            await self._store.write(insert(meta).values(key="alive", value=repr(now)))
            return
        last = float(rows[0].value)
        if -OUTAGE <= now - last < OUTAGE:
            if now - last >= _TICK:
                await self._store.write(update(meta).where(meta.c.key == "alive").values(value=repr(now)))
            return
        # Of replicas that start together, only the one whose condition still holds moves the deadlines.
        claim = update(meta).where(meta.c.key == "alive", meta.c.value == rows[0].value).values(value=repr(now))
        claimed = await self._store.write(claim.returning(meta.c.key))
        if not claimed[0]:
            return
        gap = max(0.0, now - last)
        later = tunnels.c.deadline + gap
        least = now + RETURN
        await self._store.write(
            update(tunnels).where(tunnels.c.deadline.is_not(None), later >= least).values(deadline=later),
            update(tunnels).where(tunnels.c.deadline < least).values(deadline=least),
        )
        log.info("deadlines moved by the server's own absence", extra={"seconds": f"{gap:.0f}"})
