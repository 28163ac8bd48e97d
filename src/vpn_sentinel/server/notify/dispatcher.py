"""Runs the deliveries: one worker for each channel, so that a slow one delays no other, and a check of the queue."""

import asyncio
import logging
import random
from collections.abc import Mapping
from typing import Final

from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.notify import outbox, retry
from vpn_sentinel.server.notify.channel import Channel
from vpn_sentinel.server.notify.metrics import NotifyMetrics
from vpn_sentinel.server.notify.reasons import reason_text
from vpn_sentinel.server.notify.text import duration
from vpn_sentinel.server.notify.worker import SEND_TIMEOUT_S, WaitFor, Worker, wait_for
from vpn_sentinel.server.part_health import PartHealth
from vpn_sentinel.server.store.store import Store, StoreUnavailable

log = logging.getLogger(__name__)

_QUEUE_CHECK_INTERVAL_S: Final = 15.0
# A channel that is not set up here may be another server's, which delivers its notices within this time.
_OTHER_SERVER_GRACE_S: Final = 60.0
# A worker makes a step at least every MAX_IDLE_S, and spends at most SEND_TIMEOUT_S in one delivery.
_MAX_STALL_S: Final = 2 * SEND_TIMEOUT_S


class Dispatcher:
    """Runs until cancelled; survives a lost database. Any number of servers may run one on the same database."""

    def __init__(
        self,
        store: Store,
        channels: Mapping[str, Channel],
        clock: Clock,
        metrics: NotifyMetrics,
        *,
        wait_for: WaitFor = wait_for,
        rng: random.Random | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._wait_for = wait_for
        rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._workers = {
            name: Worker(store, channel, clock, metrics, wait_for, rng) for name, channel in channels.items()
        }
        self._pending: tuple[outbox.Pending, ...] = ()
        self._unconfigured: frozenset[str] = frozenset()

    @property
    def channels(self) -> tuple[str, ...]:
        """The names of the channels that are set up."""
        return tuple(self._workers)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for name, worker in self._workers.items():
                group.create_task(worker.run(), name=f"notify {name}")
            group.create_task(self._watch_queue(), name="notify queue")

    def wake(self) -> None:
        """Call after a commit that put a delivery into the outbox."""
        for worker in self._workers.values():
            worker.wake()

    def healthy(self) -> PartHealth:
        """For /health/ready, from memory: whether every worker makes steps, and what is pending, in words.

        A failing channel does not make it unhealthy, since a restart of this server would not help.
        """
        now = self._clock.boottime()
        idle = max((now - w.last_step_at for w in self._workers.values()), default=0.0)
        if idle > _MAX_STALL_S:
            return PartHealth(ok=False, detail=f"no delivery has been worked on for {duration(idle)}")
        known = ((name, w.failing) for name, w in self._workers.items() if w.failing is not None)
        failing = "".join(f"; {name} fails: {reason_text(name, reason)}" for name, reason in known)
        pending = [d for d in self._pending if d.channel in self._workers]
        if not pending:  # as of the last check; a channel that fails has pending ones, perhaps not counted yet
            return PartHealth(ok=True, detail=failing.removeprefix("; ") or "nothing is pending")
        oldest = self._clock.wall() - min(d.since for d in pending)
        detail = f"{sum(d.count for d in pending)} pending, the oldest for {duration(oldest)}{failing}"
        return PartHealth(ok=True, detail=detail)

    async def _watch_queue(self) -> None:
        never = asyncio.Event()
        while True:
            try:
                await self._check_queue()
            except StoreUnavailable as e:
                log.debug("queue not read", extra={"reason": e.reason})  # the workers log it as a warning, once
            await self._wait_for(never, _QUEUE_CHECK_INTERVAL_S)

    async def _check_queue(self) -> None:
        now = self._clock.wall()
        self._pending = tuple(await outbox.pending(self._store))
        self._metrics.set_pending(self._pending, now)
        unconfigured = frozenset(d.channel for d in self._pending if d.channel not in self._workers)
        for channel in sorted(unconfigured - self._unconfigured):
            log.warning("notices are pending for a channel that is not set up", extra={"channel": channel})
        self._unconfigured = unconfigured
        if unconfigured:
            if moved := await outbox.reassign(self._store, self._workers, now - _OTHER_SERVER_GRACE_S, now):
                log.info("notices for a channel that is not set up go to another one", extra={"count": moved})
                self.wake()
            lost = await outbox.expire(self._store, self._workers, now - retry.KEEP_TRYING_S, now)
            if lost:
                log.error("notices given up", extra={"reason": "no_channel", "count": lost})
