"""Passed deadlines become silence, unless it was for us that nobody was heard.

Three things look alike to who holds a deadline against the time. They are told apart in `Overdue.tick`, in this order:

- *The clock was set.* No time has passed that it does not know of: `timekeeper` moves all that is open with it.
- *The loop was kept busy* (`presence`). It was there and had too much to do. Whoever sends it work can keep it late, so
  that excuses little, and moves nothing: deadlines wait `MAX_EXCUSED_S` seconds within a minute at most, in which
  reports that came in time can be read.
- *Absence*: no server was there to hear anybody. Each tick says "alive" in the database; when the last one is long ago,
  less what the loop was late by, all deadlines move by the length of that gap before any of them is looked at: our
  fault is never the user's alarm.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

from sqlalchemy import case, exists, insert, select, update

from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.part_health import PartHealth
from vpn_sentinel.server.store.schema import meta, tunnels
from vpn_sentinel.server.store.store import Store, StoreUnavailable
from vpn_sentinel.server.tracking.tracker import Tracker
from vpn_sentinel.server.watch.presence import Missed, Presence

log = logging.getLogger(__name__)

_TICK_S: Final = 1.0
_MIN_SLEEP_S: Final = 0.1
# A gap between two ticks that is longer than this was an outage: of the process, the machine or the database.
MIN_OUTAGE_S: Final = 8.0
# After an outage agents need a while to come back: they wait up to half a minute between tries.
RETURN_GRACE_S: Final = 45.0
_MAX_PER_SWEEP: Final = 500
# Seconds by which deadlines may wait, in a minute, because the loop was held.
MAX_EXCUSED_S: Final = 5.0
_WINDOW_S: Final = 60.0

Follow = Callable[[Tracker], Awaitable[bool]]


async def _steady(_: Tracker) -> bool:
    """A clock that nobody sets."""
    return False


class Overdue:
    """Sweeps deadlines once a second. Any number of replicas may do so: see `Tracker.sweep`.

    `follow` brings the clock to what it should say, before anything is held against it: see `Timekeeper.follow`.
    """

    def __init__(
        self, store: Store, tracker: Tracker, clock: Clock, presence: Presence, follow: Follow = _steady
    ) -> None:
        self._store = store
        self._tracker = tracker
        self._clock = clock
        self._presence = presence
        self._follow = follow
        self._missed = Missed()  # as of the last tick that got through
        self._excused: deque[tuple[float, float]] = deque()  # when, and by how many seconds
        self._said: str | None = None
        self._started = False
        self._ticked_at = clock.boottime()
        self._next = 0.0  # when the next deadline passes, at the latest a tick from the last one

    def healthy(self) -> PartHealth:
        """For /health/ready: whether deadlines are watched, and if not why, in a word."""
        since = self._clock.boottime() - self._ticked_at
        if since <= MIN_OUTAGE_S:
            return PartHealth(ok=True)
        return PartHealth(ok=False, detail=f"not watched for {since:.0f} s: {self._said or 'stuck'}")

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
            # A deadline that passes before the next tick is looked at when it does: a loop that is kept busy takes long
            # enough for what follows.
            await asyncio.sleep(min(_TICK_S, max(_MIN_SLEEP_S, self._next - self._clock.wall())))

    async def tick(self) -> None:
        """Say that the server is alive, forgive its own outage, and make overdue tunnels silent."""
        await self._follow(self._tracker)
        now = self._clock.wall()
        missed = self._presence.look()
        lately = missed.since(self._missed)
        if not self._started:  # it was busy with nothing but its own start
            lately = Missed(away=lately.away)
        alive, found = await self._read(now)
        forgiven = await self._forgive(alive, now, lately)
        grace = self._grace(lately.held)
        self._started, self._missed = True, missed
        if forgiven:
            _, found = await self._read(now)
        while due := [name for name, deadline in found if deadline <= now - grace]:
            if await self._follow(self._tracker):
                now = self._clock.wall()  # another server had moved these already, but not yet this one its time
            else:
                await self._tracker.sweep(due, now, grace)
            _, found = await self._read(now)
        self._next = min((deadline + grace for _, deadline in found), default=now + _TICK_S)
        # After what is urgent; a server that dies in between has been away for a moment longer.
        if alive is None:
            await self._store.write(insert(meta).values(key="alive", value=repr(now)))
        elif not forgiven and now - float(alive) >= _TICK_S:
            await self._store.write(update(meta).where(meta.c.key == "alive").values(value=repr(now)))

    async def _read(self, now: float) -> tuple[str | None, list[tuple[str, float]]]:
        """When somebody was last alive, and which deadlines have passed or soon do, the earliest first."""
        soon = tunnels.c.deadline <= now + _TICK_S
        alive = select(meta.c.value).where(meta.c.key == "alive").scalar_subquery()
        one = select(alive.label("alive")).subquery()
        asked = select(one.c.alive, tunnels.c.name, tunnels.c.deadline).select_from(one.outerjoin(tunnels, soon))
        found = await self._store.read(asked.order_by(tunnels.c.deadline).limit(_MAX_PER_SWEEP))
        return found[0].alive, [(r.name, r.deadline) for r in found if r.name is not None]

    def _grace(self, held: float) -> float:
        """By how many seconds deadlines wait now, when the loop was held for so long before this tick."""
        ticks = self._clock.boottime()
        while self._excused and self._excused[0][0] <= ticks - _WINDOW_S:
            self._excused.popleft()
        granted = sum(seconds for _, seconds in self._excused)
        if held > 0 and granted < MAX_EXCUSED_S:
            self._excused.append((ticks, min(held, MAX_EXCUSED_S - granted)))
            granted += self._excused[-1][1]
        return granted

    async def _forgive(self, alive: str | None, now: float, missed: Missed) -> bool:
        """Move all deadlines by the absence before `now`, when somebody was `alive` last; whether there was one.

        `missed` is what this server missed since its last tick.
        """
        if alive is None:
            return False
        last = float(alive)
        # A server that starts was away however briefly, unless a replica watched meanwhile.
        bearable = MIN_OUTAGE_S if self._started else 2 * _TICK_S
        gap = now - last - missed.late
        if gap < bearable:
            return False  # one that lies ahead is of a server that moved with the clock before this one
        later = tunnels.c.deadline + gap
        least = now + RETURN_GRACE_S
        # One transaction: a server that dies in between must not leave the outage counted and the deadlines where they
        # were. Replicas that start together wait for each other's row, and only the first finds its condition true.
        ours = meta.c.key == "alive", meta.c.value == alive
        moved = case((later >= least, later), else_=least)
        *_, claimed = await self._store.write(
            select(meta.c.key).where(*ours).with_for_update(),
            update(tunnels).where(tunnels.c.deadline.is_not(None), exists().where(*ours)).values(deadline=moved),
            update(meta).where(*ours).values(value=repr(now)).returning(meta.c.key),
        )
        if not claimed:
            return True
        extra = {"seconds": f"{gap:.0f}", "why": self._why(gap, missed.away)}
        log.info("nobody could be heard for a while: each tunnel gets that time more before it is silent", extra=extra)
        return True

    def _why(self, gap: float, away: float) -> str:
        if not self._started:
            return "this server was not running"
        if away > gap / 2:
            return "this server was stopped, or its machine slept"
        return "the database did not answer"
