"""Group commit: inputs that wait at the same time are committed together, so durability costs one fsync a batch."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Final

from vpn_sentinel.server.store.store import StoreUnavailable, TunnelLocked
from vpn_sentinel.server.tracking.inputs import Input, ReportBatch

log = logging.getLogger(__name__)

# Inputs in one transaction; bounds how long a reader of the same rows waits.
_MAX_BATCH: Final = 256
# A batch with this many observations takes no further input: judging them blocks the event loop.
_MAX_OBSERVATIONS: Final = 256
# Inputs of one kind that may wait; beyond it the server answers "busy" rather than let the queue grow.
_MAX_QUEUED: Final = 5000
# How often what meets a locked row is tried again, and for how long: less than an agent waits for its answer (3 s).
_LOCKED_RETRY_S: Final = 0.25
_MAX_LOCKED_S: Final = 1.5


class Busy(Exception):
    """Too many inputs wait; the sender tries again later."""


@dataclass(slots=True)
class _Queued:
    """An input and its caller. At `given_up_at`, by the loop's clock, the caller is told that the tunnel's row is
    locked; it is infinite until the row was first found locked.
    """

    input: Input
    done: "asyncio.Future[None]"
    given_up_at: float = inf


class GroupCommit:
    """A queue whose waiting inputs are committed together.

    `commit` stores a batch of inputs; it raises when none was stored. It returns the tunnels whose rows another
    session holds: all was stored but theirs. Their reports are tried again while the others go on; what the server
    found out itself is refused at once, since it is found again.

    `busy` is held while something is committed.
    """

    def __init__(self, commit: Callable[[Sequence[Input]], Awaitable[Collection[str]]]) -> None:
        self._commit_batch = commit
        self._reports: list[_Queued] = []
        self._own_findings: list[_Queued] = []  # pulses and port checks
        self._locked: list[_Queued] = []  # reports
        self._retry: asyncio.TimerHandle | None = None  # while some are in it
        self._wake = asyncio.Event()
        self.busy = asyncio.Lock()

    async def put(self, item: Input) -> None:
        """Return when `item` is committed. Raises StoreUnavailable, or Busy when too many wait."""
        queue = self._reports if isinstance(item, ReportBatch) else self._own_findings
        if len(queue) + len(self._locked) >= _MAX_QUEUED:
            raise Busy
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(_Queued(item, done))
        self._wake.set()
        await done

    def amend(self, change: Callable[[Input], Input]) -> None:
        """Replace each waiting input by what `change` returns for it."""
        for waiting in (*self._reports, *self._own_findings, *self._locked):
            waiting.input = change(waiting.input)

    async def run(self) -> None:
        """Commit what waits, for ever. On cancellation, every waiting `put` raises StoreUnavailable."""
        try:
            while True:
                await self._wake.wait()
                for queue in (self._reports, self._own_findings):
                    async with self.busy:
                        if batch := _next_batch(queue):
                            del queue[: len(batch)]
                            await self._commit(batch)
                if not self._reports and not self._own_findings:
                    self._wake.clear()
        finally:
            closing = StoreUnavailable("closing", "the server is shutting down")
            if self._retry is not None:
                self._retry.cancel()
            _settle([*self._reports, *self._own_findings, *self._locked], closing)

    async def _commit(self, batch: list[_Queued]) -> None:
        try:
            locked = await self._commit_batch([w.input for w in batch])
        except StoreUnavailable as e:
            _settle(batch, e)
        except asyncio.CancelledError:
            _settle(batch, StoreUnavailable("closing", "the server is shutting down"))
            raise
        except Exception as e:
            if len(batch) == 1:
                log.exception("a report could not be judged", extra={"tunnel": batch[0].input.tunnel})
                _settle(batch, e)
                return
            # One report that raises an unexpected exception must not make the others of its batch fail.
            for waiting in batch:
                await self._commit([waiting])
        else:
            _settle((w for w in batch if w.input.tunnel not in locked), None)
            if locked:
                self._put_off([w for w in batch if w.input.tunnel in locked])

    def _put_off(self, batch: Sequence[_Queued]) -> None:
        """Try these again soon, unless that has gone on for long enough."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for waiting in batch:
            patience = _MAX_LOCKED_S if isinstance(waiting.input, ReportBatch) else 0.0
            waiting.given_up_at = min(waiting.given_up_at, now + patience)
        _settle((w for w in batch if w.given_up_at <= now), TunnelLocked())
        self._locked += (w for w in batch if w.given_up_at > now)
        if self._locked and self._retry is None:
            self._retry = loop.call_later(_LOCKED_RETRY_S, self._try_again)

    def _try_again(self) -> None:
        self._reports += self._locked
        self._locked.clear()
        self._retry = None
        self._wake.set()


def _next_batch(queue: Sequence[_Queued]) -> list[_Queued]:
    """The next batch: the earliest inputs, at least one of any size, and more while the observations are few."""
    batch, room = list[_Queued](), _MAX_OBSERVATIONS
    for waiting in queue[:_MAX_BATCH]:
        if room <= 0:
            break
        batch.append(waiting)
        room -= len(waiting.input.observations) if isinstance(waiting.input, ReportBatch) else 1
    return batch


def _settle(batch: Iterable[_Queued], error: Exception | None) -> None:
    """Answer the callers that wait; one that was cancelled meanwhile needs no answer."""
    for waiting in batch:
        if waiting.done.done():
            continue
        if error is None:
            waiting.done.set_result(None)
        else:
            waiting.done.set_exception(error)
