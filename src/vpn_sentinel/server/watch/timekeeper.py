"""One clock for all that lasts, and what happens when it is set. See docs/adr/0011-a-clock-that-is-set.md.

The server's time goes on without a jump (`runtime.clock.SteadyClock`). Once a second it is held against the clock that
counts: the database's where servers may share one, else the system's. When that was set, all that is still open moves
by as much, in one transaction, and the server's time with it: graces, deadlines and leases end when they would have.
What is over keeps the time that it was given.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from sqlalchemy import and_, case, exists, func, or_, select, text, update

from vpn_sentinel.runtime.clock import SteadyClock
from vpn_sentinel.server.notify.outbox import WINDOW_S
from vpn_sentinel.server.store.schema import incidents, meta, outbox, tokens, transitions, tunnels
from vpn_sentinel.server.store.store import Store
from vpn_sentinel.server.tracking.tracker import Tracker
from vpn_sentinel.server.watch.overdue import MIN_OUTAGE_S, RETURN_GRACE_S

log = logging.getLogger(__name__)

# A clock that is off by less is followed, and nothing is moved: seconds.
MIN_STEP_S: Final = 1.0
# Each server looks once a second.
SETTLE_S: Final = 1.5
# The row of `meta`: by how much the clock has been set, all in all, and when last.
MOVED: Final = "moved"
_MOVED: Final = select(meta.c.value).where(meta.c.key == MOVED)
_TUNNEL: Final = (tunnels.c.created_at, tunnels.c.since, tunnels.c.seen_at, tunnels.c.last_seen)


class Timekeeper:
    """`now` asks the clock that counts, in seconds since the epoch. `moved` is by how much it has been set, all in all,
    as far as `clock` goes along: what a memory that was written then lacks. For `patience` seconds after it was seen to
    be set nothing is committed: where there are other servers, each has seen it by then, and none writes old times.
    """

    def __init__(
        self, store: Store, clock: SteadyClock, now: Callable[[], Awaitable[float]], *, patience: float = 0.0
    ) -> None:
        self._store = store
        self._clock = clock
        self._now = now
        self._patience = patience
        self.moved = 0.0

    async def start(self) -> None:
        """Take over the time before anything else asks for it. A clock that was set back while no server ran moves
        what is open back too; one that was set forward then cannot be told from an absence. Raises StoreUnavailable.
        """
        if not await self._store.read(_MOVED):
            add = text("INSERT INTO meta (key, value) VALUES (:key, :never) ON CONFLICT (key) DO NOTHING")
            await self._store.write(add.bindparams(key=MOVED, never=_text(0.0, 0.0)))
        behind = await self._behind()
        if abs(behind) >= MIN_OUTAGE_S:
            log.warning("the database's clock counts, not this server's", extra={"seconds": f"{behind:+.0f}"})
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
                self._say(by)
                return

    async def follow(self, tracker: Tracker) -> bool:
        """Hold the time against the clock that counts, and move all that is open when that was set; whether it was.

        Raises StoreUnavailable.
        """
        went = False
        while True:
            if await self._total() != self.moved:  # another server was first
                async with tracker.paused() as move:
                    await self._go_along(move)
                went = True
            behind = await self._behind()
            if abs(behind) < MIN_STEP_S:
                self._clock.move(behind)
                return went
            # Whole seconds: sums of them are exact, and times that were equal stay so.
            by = float(round(behind))
            async with tracker.paused() as move:
                await asyncio.sleep(self._patience)
                now = self._clock.wall() + by
                # A machine that was paused wakes up like one whose clock was set forward: its agents have to come back.
                await self._move(by, now, now + RETURN_GRACE_S if by >= MIN_OUTAGE_S else 0.0)
                await self._go_along(move)
            went = True

    async def _total(self) -> float:
        return (await moved_so_far(self._store))[0]

    async def _go_along(self, move: Callable[[float], None]) -> None:
        """Move what is known here by what the database was moved by."""
        by = await self._total() - self.moved
        self.moved += by
        self._clock.move(by)
        move(by)
        self._say(by)

    async def _behind(self) -> float:
        asked = self._clock.boottime()
        return self._clock.behind(await self._now(), asked)

    def _say(self, by: float) -> None:
        log.warning("the clock was set: all that is open moves with it", extra={"seconds": f"{by:+.0f}"})

    async def _move(self, by: float, now: float, least: float) -> bool:
        """Move what is open in the database, unless another server has done it meanwhile; `now` is as it will be.

        No deadline is before `least` then.

        Survives the race of two servers: the second waits for the first's row, and finds its condition false.
        """
        ((was,),) = await self._store.read(_MOVED)
        if _parsed(was)[0] != self.moved:
            return False
        ours = meta.c.key == MOVED, meta.c.value == was
        first = exists().where(*ours)
        rows = await self._store.read(select(meta.c.value).where(meta.c.key == "alive"))
        alive = repr(float(rows[0].value) + by) if rows else ""
        deadline = tunnels.c.deadline + by
        row = {column.key: case((column == 0.0, 0.0), else_=column + by) for column in _TUNNEL}
        there = tunnels.c.id == transitions.c.tunnel_id, tunnels.c.since == transitions.c.at
        latest = select(transitions.c.id).select_from(tunnels).join(transitions, and_(*there))
        owed = {column.key: column + by for column in (outbox.c.created_at, outbox.c.due_at, outbox.c.leased_until)}
        *_, claimed = await self._store.write(
            select(meta.c.key).where(*ours).with_for_update(),
            # The state that a tunnel is in, and how it came there, tell the same time.
            update(transitions).where(first, transitions.c.id.in_(latest)).values(at=transitions.c.at + by),
            update(tunnels).where(first).values(**row),
            update(tunnels)
            .where(first, tunnels.c.deadline.is_not(None))
            .values(deadline=case((deadline >= least, deadline), else_=least)),
            update(incidents)
            .where(first, incidents.c.closed_at.is_(None))
            .values(opened_at=incidents.c.opened_at + by),
            # What was told lately says how much more may be told of a tunnel: within a minute, up to a minute ago.
            update(outbox)
            .where(first, or_(outbox.c.settled_at.is_(None), outbox.c.settled_at > now - by - 2 * WINDOW_S))
            .values(**owed, settled_at=outbox.c.settled_at + by),
            # Held against when the tunnel was heard last.
            update(tokens).where(first, tokens.c.revoked_at.is_not(None)).values(revoked_at=tokens.c.revoked_at + by),
            update(meta).where(first, meta.c.key == "alive").values(value=alive),
            update(meta).where(*ours).values(value=_text(self.moved + by, now)).returning(meta.c.key),
        )
        return bool(claimed)


async def moved_so_far(store: Store) -> tuple[float, float]:
    """By how many seconds the clock has been set, all in all, and when last; 0.0 for never. Raises StoreUnavailable."""
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
