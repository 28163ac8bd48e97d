"""Notifies people when the server is overloaded, since it then detects trouble late."""

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

_CHECK_INTERVAL_S: Final = 1.0
_WINDOW_S: Final = 60.0
# When the loop is late by more than this within a minute, in all, people are notified.
MAX_LATE_S: Final = 15.0
# The overload is over once the lateness was below that for this time.
CALM_S: Final = 300.0
_ADVICE: Final = (
    "While this lasts, you may be notified of a silent tunnel some seconds late.",
    "What to do: see in the log and in /metrics who sends so much, and give this machine more CPU time.",
)


class Overload:
    """`channels` are the names of the notified ones; `on_commit` is called after a commit with a notice for them."""

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
        self._minute: deque[tuple[float, float]] = deque()  # when the loop was late, and by how many seconds, lately
        self._missed = presence.sample()
        self._began: float | None = None  # boot time, as `_over_at`
        self._over_at = 0.0
        self._unsent: Notice | None = None
        self._gauge = Gauge(
            "vpn_sentinel_loop_lag_seconds",
            "By how much the server's event loop was late; the longest of the last minute.",
            registry=registry,
        )

    async def run(self) -> None:
        self._missed = self._presence.sample()  # without what was missed during the start
        while True:
            await self.check()
            await asyncio.sleep(_CHECK_INTERVAL_S)

    async def check(self) -> None:
        """Note how late the loop is; notify people when an overload begins and when it is over."""
        missed = self._presence.sample()
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
                detail = f"In the last minute its work was late by {total:.0f} seconds in all."
                log.warning("the server has too much to do", extra={"late_seconds": f"{total:.1f}"})
                self._unsent = Notice(kind=Kind.SERVER_OVERLOADED, at=now, details=(detail, *_ADVICE))
        elif self._began is not None and ticks >= self._over_at:
            lasted = ticks - self._began
            log.info("the server keeps up again", extra={"after_seconds": f"{lasted:.0f}"})
            ended = Notice(kind=Kind.SERVER_RECOVERED, at=now, began=now - lasted)
            # No notice of the end where the one of the beginning could not be stored.
            self._unsent, self._began = ended if self._unsent is None else None, None
        if self._unsent is not None:
            await self._send(self._unsent, now)

    async def _send(self, notice: Notice, now: float) -> None:
        try:
            if deliveries := delivery_rows(notice, self._channels, now):
                await self._store.write(insert(outbox).values(deliveries))
                self._on_commit()
        except StoreUnavailable as e:
            log.debug("notice not stored yet", extra={"reason": e.reason})  # other tasks log that the database is down
        else:
            self._unsent = None
