"""One channel's deliveries, one after another: lease, send, settle.

One at a time, so that they keep their order, a lease need not outlast a batch, and a crash repeats at most one.
"""

import asyncio
import contextlib
import logging
import random
import traceback
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

from vpn_sentinel.runtime.backoff import backoff
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.notify import outbox, retry
from vpn_sentinel.server.notify.channel import Channel, DeliveryError, PermanentError, TransientError
from vpn_sentinel.server.notify.metrics import NotifyMetrics
from vpn_sentinel.server.notify.outbox import DeliveryOutcome, LeasedDelivery, Result
from vpn_sentinel.server.notify.reasons import reason_text
from vpn_sentinel.server.store.store import Store, StoreUnavailable

log = logging.getLogger(__name__)

LEASE_S: Final = 60.0
# Must stay below the lease: a worker that sends for longer does not hold the row any more.
SEND_TIMEOUT_S: Final = 45.0
# Deliveries that another server wrote before it died are found after this time; those of this server wake the worker.
MAX_IDLE_S: Final = 30.0
# While a channel fails, one delivery, due or not, finds out at least this often whether it works again.
PROBE_INTERVAL_S: Final = 30.0

# Waits until the event is set, or for this many seconds.
WaitFor = Callable[[asyncio.Event, float], Awaitable[None]]


async def wait_for(event: asyncio.Event, seconds: float) -> None:
    """Wait for `event`, at most `seconds`."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


class Worker:
    """Delivers the notices of one channel. `last_step_at` is the boot time of its last step."""

    def __init__(
        self,
        store: Store,
        channel: Channel,
        clock: Clock,
        metrics: NotifyMetrics,
        wait_for: WaitFor,
        rng: random.Random,
    ) -> None:
        self._store = store
        self._channel = channel
        self._clock = clock
        self._metrics = metrics
        self._wait_for = wait_for
        self._rng = rng
        self._wake_event = asyncio.Event()
        self._stored_event = asyncio.Event()  # something was written, so the database works
        self._failing: str | None = None
        self._logged_defect: tuple[str, str] | None = None
        self._tried_at = float("-inf")
        self._blocked_until = float("-inf")
        self._only_alarms_until = float("-inf")
        self._store_lost = False
        self._store_backoff = self._fresh_backoff()
        self.last_step_at = clock.boottime()

    def wake(self) -> None:
        """Check at once: something that may be due was stored."""
        self._store_backoff = self._fresh_backoff()
        self._wake_event.set()
        self._stored_event.set()

    @property
    def failing(self) -> str | None:
        """Why the latest attempt failed, None when it did not."""
        return self._failing

    async def run(self) -> None:
        """Deliver until cancelled."""
        await self._retry_until_stored(lambda: outbox.make_due_now(self._store, self._channel.name, self._clock.wall()))
        while True:
            self.last_step_at = self._clock.boottime()
            self._wake_event.clear()  # before the query: a delivery stored from here on sets it again
            if (wait := await self._step()) > 0:
                await self._wait_for(self._wake_event, wait)

    async def _step(self) -> float:
        """Deliver one notice, if one is due. Returns the seconds until the next step."""
        ticks = self._clock.boottime()
        if (wait := self._blocked_until - ticks) > 0:
            return min(wait, MAX_IDLE_S)
        only_alarms_for = self._only_alarms_until - ticks
        probe = 0.0 if self._failing is None else self._tried_at + PROBE_INTERVAL_S - ticks
        early = self._failing is not None and probe <= 0
        try:
            now = self._clock.wall()
            leased = await outbox.lease(
                self._store, now, now + LEASE_S, 1, self._channel.name, urgent=only_alarms_for > 0, early=early
            )
            due = None if leased else await outbox.next_due(self._store, self._channel.name, now)
        except StoreUnavailable as e:
            return self._store_failed(e)
        self._store_works()
        if leased:
            return await self._deliver(leased[0])
        if due is None:
            return MAX_IDLE_S
        # Never zero: a row that another server just leased looks due for a moment.
        wait = max(due - now, only_alarms_for, 0.2)
        return min(wait, probe if probe > 0 else MAX_IDLE_S, MAX_IDLE_S)

    async def _deliver(self, delivery: LeasedDelivery) -> float:
        failure = await self._send(delivery)
        now, self._tried_at = self._clock.wall(), self._clock.boottime()
        outcome = (
            DeliveryOutcome(result=Result.DONE) if failure is None else retry.after(failure, delivery, now, self._rng)
        )
        # Until this is written nothing else is sent: a message that was sent and not settled would be sent again.
        await self._retry_until_stored(lambda: outbox.settle(self._store, delivery, outcome, now))
        self._metrics.tried(self._channel.name, outcome)
        self._log_outcome(delivery, outcome)
        if failure is None:
            self._logged_defect, self._only_alarms_until = None, float("-inf")
            if self._failing is not None:
                self._failing = None
                await self._retry_until_stored(lambda: outbox.make_due_now(self._store, self._channel.name, now))
            return 0.0
        if isinstance(failure, PermanentError):
            return 0.0
        self._failing = failure.reason
        wait = 0.0 if outcome.due_at is None else outcome.due_at - now
        if isinstance(failure, TransientError) and failure.retry_after is not None:
            if failure.binding:
                self._blocked_until = self._tried_at + wait
            else:
                self._only_alarms_until = self._tried_at + wait
        return min(wait, PROBE_INTERVAL_S)

    async def _send(self, delivery: LeasedDelivery) -> DeliveryError | None:
        try:
            notice = delivery.notice()
        except (ValueError, RecursionError):
            if (outline := delivery.outline()) is None:
                return PermanentError("unreadable")
            notice = outline
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await self._channel.send(notice, delivery.id)
        except DeliveryError as e:
            return e
        except TimeoutError:
            return TransientError("timeout")
        except Exception as e:  # noqa: BLE001 - a bug in one channel or one notice must not stop the others
            # Its text could hold a URL with a token; its type and its location cannot.
            reason = f"bug_{type(e).__name__}"
            self._log_defect(reason, _innermost(e))
            return TransientError(reason)
        return None

    def _log_defect(self, reason: str, place: str) -> None:
        if (reason, place) != self._logged_defect:
            known = {"channel": self._channel.name, "reason": reason, "place": place}
            log.error("a defect keeps a notice from being sent, please report it", extra=known)
        self._logged_defect = (reason, place)

    def _log_outcome(self, delivery: LeasedDelivery, outcome: DeliveryOutcome) -> None:
        """Log one line when a failure begins, changes or ends, and one for each notice that is given up."""
        channel = self._channel.name
        known = {"channel": channel, "delivery": delivery.id, "tunnel": delivery.tunnel, "kind": delivery.kind}
        if outcome.given_up:
            why = {"reason": outcome.reason, "why": reason_text(channel, outcome.reason)}
            log.error("notice given up", extra={**known, **why, "attempts": delivery.attempt})
        elif outcome.result is Result.DONE:
            if self._failing is not None:
                log.info("notices are delivered again", extra={"channel": channel})
        elif outcome.reason != self._failing:
            why = {"reason": outcome.reason, "why": reason_text(channel, outcome.reason)}
            log.warning("notice not delivered, will be tried again", extra={**known, **why})

    async def _retry_until_stored(self, write: Callable[[], Awaitable[None]]) -> None:
        """Write, and try again for as long as the database is unavailable."""
        while True:
            self._stored_event.clear()
            try:
                await write()
            except StoreUnavailable as e:
                self.last_step_at = self._clock.boottime()
                await self._wait_for(self._stored_event, self._store_failed(e))
            else:
                self._store_works()
                return

    def _store_failed(self, error: StoreUnavailable) -> float:
        if not self._store_lost:
            log.warning("no database, deliveries wait", extra={"channel": self._channel.name, "reason": error.reason})
        self._store_lost = True
        return next(self._store_backoff)

    def _store_works(self) -> None:
        if self._store_lost:
            log.info("database is back, deliveries go on", extra={"channel": self._channel.name})
            self._store_lost, self._store_backoff = False, self._fresh_backoff()

    def _fresh_backoff(self) -> Iterator[float]:
        return backoff(0.5, 15.0, rng=self._rng)


def _innermost(error: BaseException) -> str:
    """Where it was raised, as file:line. Without the source line and locals, which could hold a secret."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return f"{frame.f_code.co_filename}:{line}"
