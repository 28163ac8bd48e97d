"""Group commit: what waits together is committed together, so durability costs one fsync a batch."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.server.store.store import StoreUnavailable
from vpn_sentinel.server.tracking.inputs import Input, ReportBatch

log = logging.getLogger(__name__)

# Inputs that one transaction takes at most: bounds how long a reader of the same rows waits.
_MAX_BATCH: Final = 256
# Observations after which it takes no further input: each is judged, which keeps the interpreter from all else.
_MAX_OBSERVATIONS: Final = 256
# Inputs of one kind that wait at most; beyond it the server says "busy" rather than grow.
_MAX_QUEUED: Final = 5000


class Busy(Exception):
    """More inputs wait than can be taken; the sender tries again later."""


@dataclass(slots=True)
class _Waiting:
    input: Input
    done: "asyncio.Future[None]"


class GroupCommit:
    """`commit` stores a batch of inputs, all of them or none; it raises when nothing of them was stored.

    `busy` is held while something is committed.
    """

    def __init__(self, commit: Callable[[Sequence[Input]], Awaitable[None]]) -> None:
        self._commit_batch = commit
        self._reports: list[_Waiting] = []
        self._checks: list[_Waiting] = []
        self._wake = asyncio.Event()
        self.busy = asyncio.Lock()

    async def put(self, entering: Input) -> None:
        """Return when `entering` is committed. Raises StoreUnavailable, or Busy when too many wait."""
        queue = self._reports if isinstance(entering, ReportBatch) else self._checks
        if len(queue) >= _MAX_QUEUED:
            raise Busy
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(_Waiting(entering, done))
        self._wake.set()
        await done

    def amend(self, change: Callable[[Input], Input]) -> None:
        """Change what waits."""
        for waiting in (*self._reports, *self._checks):
            waiting.input = change(waiting.input)

    async def run(self) -> None:
        """Commit what waits, for ever. On cancellation whoever waits is told that the server is going."""
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

    async def _commit(self, batch: list[_Waiting]) -> None:
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
            # One report that trips the program must not take the others of its batch with it.
            for waiting in batch:
                await self._commit([waiting])
        else:
            _settle(batch, None)


def _first(queue: Sequence[_Waiting]) -> list[_Waiting]:
    """What is committed next: the earliest, one of any size and more while they are few."""
    batch, left = list[_Waiting](), _MAX_OBSERVATIONS
    for waiting in queue[:_MAX_BATCH]:
        if left <= 0:
            break
        batch.append(waiting)
        left -= len(waiting.input.observations) if isinstance(waiting.input, ReportBatch) else 1
    return batch


def _settle(batch: Iterable[_Waiting], error: Exception | None) -> None:
    """Answer whoever waits; one that has gone meanwhile needs no answer."""
    for waiting in batch:
        if waiting.done.done():
            continue
        if error is None:
            waiting.done.set_result(None)
        else:
            waiting.done.set_exception(error)
