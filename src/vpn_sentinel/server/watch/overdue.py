"""Turns passed deadlines into silence, unless the server itself was the cause that no report arrived.

A deadline can seem to have passed for three other reasons. `Overdue.tick` distinguishes them, in this order:

- *The clock was set.* No real time has passed: `timekeeper` moves all open times with the clock.
- *The loop was blocked* (`presence`): the server ran and had too much to do. Clients can cause that by sending much, so
  it excuses little and moves nothing: deadlines wait at most `MAX_EXCUSED_S` seconds in a minute, in which reports that
  came in time can be read.
- *Absence*: no server ran. Each tick writes "alive" to the database. When the last one is long ago, less the time by
  which the loop was late, all deadlines move by that gap before any is checked: our own outage must not raise an alarm.
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
from vpn_sentinel.server.watch.presence import MissedTime, Presence

log = logging.getLogger(__name__)

_TICK_S: Final = 1.0
_MIN_SLEEP_S: Final = 0.1
# A gap between two ticks that is longer than this was an outage: of the process, the machine or the database.
MIN_OUTAGE_S: Final = 8.0
# After an outage agents need time to reconnect: they wait up to half a minute between attempts.
RETURN_GRACE_S: Final = 45.0
_MAX_PER_SWEEP: Final = 500
# The most that deadlines may wait in a minute because the loop was blocked.
MAX_EXCUSED_S: Final = 5.0
_WINDOW_S: Final = 60.0

Follow = Callable[[Tracker], Awaitable[bool]]


async def _never_set(_: Tracker) -> bool:
    """For a clock that is never set."""
    return False


class Overdue:
    """Sweeps deadlines once a second. Any number of replicas may do so: see `Tracker.sweep`.

    `follow` corrects the clock before deadlines are compared with it: see `Timekeeper.follow`.
    """

    def __init__(
        self, store: Store, tracker: Tracker, clock: Clock, presence: Presence, follow: Follow = _never_set
    ) -> None:
        self._store = store
        self._tracker = tracker
        self._clock = clock
        self._presence = presence
        self._follow = follow
        self._missed = MissedTime()  # up to the last tick that succeeded
        self._grants: deque[tuple[float, float]] = deque()  # when deadlines were made to wait, and for how many seconds
        self._last_failure: str | None = None
        self._started = False
        self._ticked_at = clock.boottime()
        self._next = 0.0  # when the next deadline passes, at most a tick after the last one

    def healthy(self) -> PartHealth:
        """For /health/ready: whether deadlines are watched, and if not, why."""
        since = self._clock.boottime() - self._ticked_at
        if since <= MIN_OUTAGE_S:
            return PartHealth(ok=True)
        return PartHealth(ok=False, detail=f"not watched for {since:.0f} s: {self._last_failure or 'stuck'}")

    async def run(self) -> None:
        while True:
            try:
                await self.tick()
            except StoreUnavailable as e:
                if self._last_failure != e.reason:
                    self._last_failure = e.reason
                    log.error("deadlines cannot be watched", extra={"reason": e.reason})  # noqa: TRY400 - needs no traceback
            else:
                self._ticked_at = self._clock.boottime()
                if self._last_failure is not None:
                    log.info("deadlines are watched again", extra={"after": self._last_failure})
                    self._last_failure = None
            # A deadline that passes before the next tick is checked when it passes: on a busy loop all that follows
            # takes long enough.
            await asyncio.sleep(min(_TICK_S, max(_MIN_SLEEP_S, self._next - self._clock.wall())))

    async def tick(self) -> None:
        """Note that the server is alive, excuse its own outage, and make overdue tunnels silent."""
        await self._follow(self._tracker)
        now = self._clock.wall()
        missed = self._presence.sample()
        lately = missed.since(self._missed)
        if not self._started:  # the loop was blocked only by the start itself
            lately = MissedTime(away=lately.away)
        alive, found = await self._read(now)
        excused = await self._excuse_absence(alive, now, lately)
        grace = self._grace(lately.blocked)
        self._started, self._missed = True, missed
        if excused:
            _, found = await self._read(now)
        left = set[str]()
        while due := [name for name, deadline in found if deadline <= now - grace and name not in left]:
            if await self._follow(self._tracker):
                now = self._clock.wall()  # another server had moved these deadlines, but this one not yet its clock
            else:
                left |= await self._tracker.sweep(due, now, grace)
            _, found = await self._read(now)
        self._next = min((deadline + grace for name, deadline in found if name not in left), default=now + _TICK_S)
        # Last, because it is not urgent: a server that dies before it only seems to be absent a little longer.
        if alive is None:
            await self._store.write(insert(meta).values(key="alive", value=repr(now)))
        elif not excused and now - float(alive) >= _TICK_S:
            await self._store.write(update(meta).where(meta.c.key == "alive").values(value=repr(now)))

    async def _read(self, now: float) -> tuple[str | None, list[tuple[str, float]]]:
        """When a server was last alive, and the deadlines that have passed or will within a tick, earliest first."""
        soon = tunnels.c.deadline <= now + _TICK_S
        alive = select(meta.c.value).where(meta.c.key == "alive").scalar_subquery()
        one = select(alive.label("alive")).subquery()
        asked = select(one.c.alive, tunnels.c.name, tunnels.c.deadline).select_from(one.outerjoin(tunnels, soon))
        found = await self._store.read(asked.order_by(tunnels.c.deadline).limit(_MAX_PER_SWEEP))
        return found[0].alive, [(r.name, r.deadline) for r in found if r.name is not None]

    def _grace(self, blocked: float) -> float:
        """The seconds that deadlines wait now, after the loop was blocked for `blocked` seconds before this tick."""
        ticks = self._clock.boottime()
        while self._grants and self._grants[0][0] <= ticks - _WINDOW_S:
            self._grants.popleft()
        granted = sum(seconds for _, seconds in self._grants)
        if blocked > 0 and granted < MAX_EXCUSED_S:
            self._grants.append((ticks, min(blocked, MAX_EXCUSED_S - granted)))
            granted += self._grants[-1][1]
        return granted

    async def _excuse_absence(self, alive: str | None, now: float, missed: MissedTime) -> bool:
        """Move all deadlines by the absence before `now`; returns whether there was one.

        A server was `alive` last then. `missed` is what this server missed since its last tick.
        """
        if alive is None:
            return False
        last = float(alive)
        # Before its start a server was absent, however briefly, unless a replica watched meanwhile.
        allowed_gap = MIN_OUTAGE_S if self._started else 2 * _TICK_S
        gap = now - last - missed.late
        if gap < allowed_gap:
            return False  # it is negative when another server has followed the clock before this one
        later = tunnels.c.deadline + gap
        earliest = now + RETURN_GRACE_S
        # One transaction: a server that dies in between must not leave the outage counted and the deadlines unmoved.
        # Replicas that start together wait for each other's row lock, and only the first finds its condition true.
        unchanged = meta.c.key == "alive", meta.c.value == alive
        moved = case((later >= earliest, later), else_=earliest)
        *_, claimed = await self._store.write(
            select(meta.c.key).where(*unchanged).with_for_update(),
            update(tunnels).where(tunnels.c.deadline.is_not(None), exists().where(*unchanged)).values(deadline=moved),
            update(meta).where(*unchanged).values(value=repr(now)).returning(meta.c.key),
        )
        if not claimed:
            return True
        extra = {"seconds": f"{gap:.0f}", "why": self._why(gap, missed.away)}
        log.info("no reports could be received for a while: all deadlines move by that time", extra=extra)
        return True

    def _why(self, gap: float, away: float) -> str:
        if not self._started:
            return "this server was not running"
        if away > gap / 2:
            return "this server was stopped, or its machine slept"
        return "the database did not answer"
