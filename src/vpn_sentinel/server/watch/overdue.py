"""Passed deadlines become silence; the server's own outages do not.

Each tick says "alive" in the database. When the last one is long ago, no server was there to hear anybody, so all
deadlines move by the length of that gap before any of them is looked at: our fault is never the user's alarm.
"""

import asyncio
import logging
from typing import Final

from sqlalchemy import case, exists, insert, select, update

from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.store.schema import meta, outbox, tunnels
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
        self._started = False
        self._ticked_at = clock.boottime()

    def healthy(self) -> tuple[bool, str]:
        """For /health/ready: whether deadlines are watched, and if not why, in a word."""
        since = self._clock.boottime() - self._ticked_at
        return (True, "") if since <= OUTAGE else (False, f"not watched for {since:.0f} s: {self._said or 'stuck'}")

    async def run(self) -> None:
        while True:
            try:
                await self.tick()
            except StoreUnavailable as e:
                if self._said != e.reason:
                    self._said = e.reason
                    log.error("deadlines cannot be watched", extra={"reason": e.reason})  # noqa: TRY400 - said without a trace
            else:
                self._ticked_at = self._clock.boottime()
                if self._said is not None:
                    log.info("deadlines are watched again", extra={"after": self._said})
                    self._said = None
            await asyncio.sleep(_TICK)

    async def tick(self) -> None:
        """Say that the server is alive, forgive its own outage, and make overdue tunnels silent."""
        now = self._clock.wall()
        await self._alive(now)
        self._started = True
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
        # A server that starts was away however briefly, unless a replica watched meanwhile.
        bearable = OUTAGE if self._started else 2 * _TICK
        if -bearable <= now - last < bearable:
            if now - last >= _TICK:
                await self._store.write(update(meta).where(meta.c.key == "alive").values(value=repr(now)))
            return
        gap = now - last
        later = tunnels.c.deadline + gap
        least = now + RETURN
        # One transaction: a server that dies in between must not leave the outage counted and the deadlines where they
        # were. Replicas that start together wait for each other's row, and only the first finds its condition true.
        ours = meta.c.key == "alive", meta.c.value == rows[0].value
        moved = case((later >= least, later), else_=least)
        # A clock that was set back would have what is owed wait until it has caught up with itself.
        c = outbox.c
        waiting = c.settled_at.is_(None), (c.due_at > now) | (c.leased_until > now), exists().where(*ours)
        due, leased = (case((t > now, t + min(gap, 0.0)), else_=t) for t in (c.due_at, c.leased_until))
        *_, claimed = await self._store.write(
            select(meta.c.key).where(*ours).with_for_update(),
            update(tunnels).where(tunnels.c.deadline.is_not(None), exists().where(*ours)).values(deadline=moved),
            update(outbox).where(*waiting).values(due_at=due, leased_until=leased),
            update(meta).where(*ours).values(value=repr(now)).returning(meta.c.key),
        )
        if not claimed:
            return
        log.info("deadlines moved by the server's own absence", extra={"seconds": f"{gap:.0f}"})
