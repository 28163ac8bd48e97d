"""Tells people when the server has more to do than it can: a watcher that is kept busy watches badly, and says so."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, Gauge
from sqlalchemy import insert

from vpn_sentinel.domain.notice import Kind, Notice
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.store.outbox_rows import delivery_rows
from vpn_sentinel.server.store.schema import outbox
from vpn_sentinel.server.store.store import Store, StoreUnavailable
from vpn_sentinel.server.watch.presence import Presence

log = logging.getLogger(__name__)

_LOOK_INTERVAL_S: Final = 1.0
_WINDOW_S: Final = 60.0
# Seconds of a minute by which the loop may be late in all; more, and people are told.
MAX_LATE_S: Final = 15.0
# So long it must have been below that before they are told that it is over.
CALM_S: Final = 300.0
_ADVICE: Final = (
    "While this lasts, a tunnel that falls silent may be told some seconds late.",
    "What to do: see in the log and in /metrics who sends so much, and give this machine more processor time.",
)


class Overload:
    """`channels` are the names of those that are told; `on_commit` is called after a commit that owes them a notice."""

    def __init__(
        self,
        store: Store,
        channels: Sequence[str],
        clock: Clock,
        presence: Presence,
        registry: CollectorRegistry,
        on_commit: Callable[[], None],
    ) -> None:
        self._store = store
        self._channels = channels
        self._clock = clock
        self._presence = presence
        self._on_commit = on_commit
        self._minute: deque[tuple[float, float]] = deque()  # when the loop was late, and by how many seconds
        self._missed = presence.look()
        self._began: float | None = None  # boot time, as `_over_at`
        self._over_at = 0.0
        self._owes: Notice | None = None
        self._gauge = Gauge(
            "vpn_sentinel_loop_lag_seconds",
            "By how much the server's event loop was late; the longest of the last minute.",
            registry=registry,
        )

    async def run(self) -> None:
        self._missed = self._presence.look()  # its own start is over
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_INTERVAL_S)

    async def look(self) -> None:
        """Note how late the loop is, and tell people when that lasts, and when it is over."""
        missed = self._presence.look()
        ticks, now = self._clock.boottime(), self._clock.wall()
        self._minute.append((ticks, missed.since(self._missed).late))
        self._missed = missed
        while self._minute[0][0] <= ticks - _WINDOW_S:
            self._minute.popleft()
        self._gauge.set(max(seconds for _, seconds in self._minute))
        total = sum(seconds for _, seconds in self._minute)
        if total >= MAX_LATE_S:
            self._over_at = ticks + CALM_S
            if self._began is None:
                self._began = ticks
                said = f"In the last minute its work was late by {total:.0f} seconds in all."
                log.warning("the server has too much to do", extra={"late_seconds": f"{total:.1f}"})
                self._owes = Notice(kind=Kind.SERVER_OVERLOADED, at=now, details=(said, *_ADVICE))
        elif self._began is not None and ticks >= self._over_at:
            lasted = ticks - self._began
            log.info("the server keeps up again", extra={"after_seconds": f"{lasted:.0f}"})
            ended = Notice(kind=Kind.SERVER_RECOVERED, at=now, began=now - lasted)
            # Nobody hears the end of what nobody could be told.
            self._owes, self._began = ended if self._owes is None else None, None
        if self._owes is not None:
            await self._tell(self._owes, now)

    async def _tell(self, notice: Notice, now: float) -> None:
        try:
            if deliveries := delivery_rows(notice, self._channels, now):
                await self._store.write(insert(outbox).values(deliveries))
                self._on_commit()
        except StoreUnavailable as e:
            log.debug("not told yet", extra={"reason": e.reason})  # others say aloud that the database is away
        else:
            self._owes = None
