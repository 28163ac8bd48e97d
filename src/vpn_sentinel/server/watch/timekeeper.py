"""The server's time, and what happens when the clock is set. See docs/adr/0011-a-clock-that-is-set.md.

The server's time goes on without a jump (`runtime.clock.SteadyClock`). Once a second it is compared with the reference
clock: the database's where servers may share one, else the system's. When that was set, all times that are still open
move by as much, in one transaction, and the server's time with them: graces, deadlines and leases end when they would
have. Times of what is over stay.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from sqlalchemy import and_, case, exists, func, or_, select, text, update

from vpn_sentinel.runtime.clock import SteadyClock
from vpn_sentinel.server.notify.outbox import NOTICE_WINDOW_S
from vpn_sentinel.server.store.schema import incidents, meta, outbox, tokens, transitions, tunnels
from vpn_sentinel.server.store.store import Store
from vpn_sentinel.server.tracking.tracker import Tracker
from vpn_sentinel.server.watch.overdue import MIN_OUTAGE_S, RETURN_GRACE_S

log = logging.getLogger(__name__)

# A smaller difference is followed, and nothing is moved.
MIN_STEP_S: Final = 1.0
# Each server compares its clock once a second, so after this time all have seen the change.
SETTLE_S: Final = 1.5
# The row of `meta` with the total by which the clock has been set, and when last.
MOVED_KEY: Final = "moved"
_MOVED: Final = select(meta.c.value).where(meta.c.key == MOVED_KEY)
_TUNNEL: Final = (tunnels.c.created_at, tunnels.c.since, tunnels.c.seen_at, tunnels.c.last_seen)


class Timekeeper:
    """`now` reads the reference clock, in seconds since the epoch. `moved` is the total by which it has been set and
    `clock` has followed: a memory that was written earlier is shifted by the difference. For `settle_s` seconds after a
    change was seen nothing is committed: by then all servers have seen it, and none writes old times.
    """

    def __init__(
        self, store: Store, clock: SteadyClock, now: Callable[[], Awaitable[float]], *, settle_s: float = 0.0
    ) -> None:
        self._store = store
        self._clock = clock
        self._now = now
        self._settle_s = settle_s
        self.moved = 0.0

    async def start(self) -> None:
        """Set the server's time before anything else reads it. When the clock was set back while no server ran, open
        times move back too; when it was set forward, that cannot be distinguished from an absence. Raises
        StoreUnavailable.
        """
        if not await self._store.read(_MOVED):
            add = text("INSERT INTO meta (key, value) VALUES (:key, :never) ON CONFLICT (key) DO NOTHING")
            await self._store.write(add.bindparams(key=MOVED_KEY, never=_text(0.0, 0.0)))
        behind = await self._behind()
        if abs(behind) >= MIN_OUTAGE_S:
            log.warning("the database's clock is used, not this server's", extra={"seconds": f"{behind:+.0f}"})
        self._clock.move(behind)
        while True:
            self.moved = await self._total()
            rows = await self._store.read(select(meta.c.value).where(meta.c.key == "alive"))
            gap = self._clock.wall() - float(rows[0].value) if rows else 0.0
            if gap > -MIN_STEP_S:
                return
            now = self._clock.wall()
            if await self._move(by := float(round(gap)), now, now + RETURN_GRACE_S):
                self.moved += by
                self._log_step(by)
                return

    async def follow(self, tracker: Tracker) -> bool:
        """Compare the time with the reference clock, and move all open times when that was set; returns whether it was.

        Raises StoreUnavailable.
        """
        went = False
        while True:
            if await self._total() != self.moved:  # another server was first
                async with tracker.paused() as move:
                    await self._adopt(move)
                went = True
            behind = await self._behind()
            if abs(behind) < MIN_STEP_S:
                self._clock.move(behind)
                return went
            # Whole seconds: sums of them are exact, and times that were equal stay so.
            by = float(round(behind))
            async with tracker.paused() as move:
                await asyncio.sleep(self._settle_s)
                now = self._clock.wall() + by
                # A resumed machine looks like one whose clock was set forward; then its agents have to reconnect.
                await self._move(by, now, now + RETURN_GRACE_S if by >= MIN_OUTAGE_S else 0.0)
                await self._adopt(move)
            went = True

    async def _total(self) -> float:
        return (await moved_so_far(self._store))[0]

    async def _adopt(self, move: Callable[[float], None]) -> None:
        """Move this process's clock and knowledge by what the database was moved by."""
        by = await self._total() - self.moved
        self.moved += by
        self._clock.move(by)
        move(by)
        self._log_step(by)

    async def _behind(self) -> float:
        asked = self._clock.boottime()
        return self._clock.behind(await self._now(), asked)

    def _log_step(self, by: float) -> None:
        log.warning("the clock was set: all open times move with it", extra={"seconds": f"{by:+.0f}"})

    async def _move(self, by: float, now: float, earliest: float) -> bool:
        """Move all open times in the database, unless another server has done so; `now` is the time after the change.

        Afterwards no deadline is before `earliest`.

        Survives the race of two servers: the second waits for the first's row lock, and finds its condition false.
        """
        ((was,),) = await self._store.read(_MOVED)
        if _parsed(was)[0] != self.moved:
            return False
        ours = meta.c.key == MOVED_KEY, meta.c.value == was
        first = exists().where(*ours)
        rows = await self._store.read(select(meta.c.value).where(meta.c.key == "alive"))
        alive = repr(float(rows[0].value) + by) if rows else ""
        deadline = tunnels.c.deadline + by
        row = {column.key: case((column == 0.0, 0.0), else_=column + by) for column in _TUNNEL}
        there = tunnels.c.id == transitions.c.tunnel_id, tunnels.c.since == transitions.c.at
        latest = select(transitions.c.id).select_from(tunnels).join(transitions, and_(*there))
        delivery_times = {
            column.key: column + by for column in (outbox.c.created_at, outbox.c.due_at, outbox.c.leased_until)
        }
        *_, claimed = await self._store.write(
            select(meta.c.key).where(*ours).with_for_update(),
            # A tunnel's present state and the transition to it have the same time.
            update(transitions).where(first, transitions.c.id.in_(latest)).values(at=transitions.c.at + by),
            update(tunnels).where(first).values(**row),
            update(tunnels)
            .where(first, tunnels.c.deadline.is_not(None))
            .values(deadline=case((deadline >= earliest, deadline), else_=earliest)),
            update(incidents)
            .where(first, incidents.c.closed_at.is_(None))
            .values(opened_at=incidents.c.opened_at + by),
            # Recent deliveries count for the limit of notices of a tunnel: within a minute, up to a minute ago.
            update(outbox)
            .where(first, or_(outbox.c.settled_at.is_(None), outbox.c.settled_at > now - by - 2 * NOTICE_WINDOW_S))
            .values(**delivery_times, settled_at=outbox.c.settled_at + by),
            # Compared with the time of the tunnel's last report.
            update(tokens).where(first, tokens.c.revoked_at.is_not(None)).values(revoked_at=tokens.c.revoked_at + by),
            update(meta).where(first, meta.c.key == "alive").values(value=alive),
            update(meta).where(*ours).values(value=_text(self.moved + by, now)).returning(meta.c.key),
        )
        return bool(claimed)


async def moved_so_far(store: Store) -> tuple[float, float]:
    """The total by which the clock has been set, in seconds, and when last; 0.0 for never. Raises StoreUnavailable."""
    rows = await store.read(_MOVED)
    return _parsed(rows[0].value) if rows else (0.0, 0.0)


async def database_time(store: Store) -> float:
    """PostgreSQL's clock, in seconds since the epoch. Raises StoreUnavailable."""
    (row,) = await store.read(select(func.extract("epoch", func.clock_timestamp())))
    return float(row[0])


def _parsed(text: str) -> tuple[float, float]:
    total, at = text.split()
    return float(total), float(at)


def _text(total: float, at: float) -> str:
    return f"{total!r} {at!r}"
