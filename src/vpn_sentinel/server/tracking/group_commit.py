"""Group commit: inputs that wait at the same time are committed together, so durability costs one fsync a batch."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.server.store.store import StoreUnavailable
from vpn_sentinel.server.tracking.inputs import Input, ReportBatch

log = logging.getLogger(__name__)

# Inputs in one transaction; bounds how long a reader of the same rows waits.
_MAX_BATCH: Final = 256
# A batch with this many observations takes no further input: judging them blocks the event loop.
_MAX_OBSERVATIONS: Final = 256
# Inputs of one kind that may wait; beyond it the server answers "busy" rather than let the queue grow.
_MAX_QUEUED: Final = 5000


class Busy(Exception):
    """Too many inputs wait; the sender tries again later."""


@dataclass(slots=True)
class _Queued:
    input: Input
    done: "asyncio.Future[None]"


class GroupCommit:
    """`commit` stores a batch of inputs, all of them or none; it raises when none was stored.

    `busy` is held while something is committed.
    """

    def __init__(self, commit: Callable[[Sequence[Input]], Awaitable[None]]) -> None:
        self._commit_batch = commit
        self._reports: list[_Queued] = []
        self._checks: list[_Queued] = []
        self._wake = asyncio.Event()
        self.busy = asyncio.Lock()

    async def put(self, entering: Input) -> None:
        """Return when `entering` is committed. Raises StoreUnavailable, or Busy when too many wait."""
        queue = self._reports if isinstance(entering, ReportBatch) else self._checks
        if len(queue) >= _MAX_QUEUED:
            raise Busy
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(_Queued(entering, done))
        self._wake.set()
        await done

    def amend(self, change: Callable[[Input], Input]) -> None:
        """Replace each waiting input by what `change` returns for it."""
        for waiting in (*self._reports, *self._checks):
            waiting.input = change(waiting.input)

    async def run(self) -> None:
        """Commit what waits, for ever. On cancellation, every waiting `put` raises StoreUnavailable."""
        try:
            while True:
                await self._wake.wait()
                for queue in (self._reports, self._checks):
                    async with self.busy:
                        if batch := _first(queue):
                            del queue[: len(batch)]
                            await self._commit(batch)
                if not self._reports and not self._checks:
                    self._wake.clear()
        finally:
            closing = StoreUnavailable("closing", "the server is shutting down")
            _settle([*self._reports, *self._checks], closing)

    async def _commit(self, batch: list[_Queued]) -> None:
        try:
            await self._commit_batch([w.input for w in batch])
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
            _settle(batch, None)


def _first(queue: Sequence[_Queued]) -> list[_Queued]:
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
