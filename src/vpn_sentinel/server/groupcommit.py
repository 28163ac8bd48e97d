"""Group commit: what waits together is committed together, so durability costs one fsync a batch."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.server.store.store import StoreUnavailable
from vpn_sentinel.server.works import Arrival, Work

log = logging.getLogger(__name__)

# Works that one transaction takes at most: bounds how long a reader of the same rows waits.
_BATCH: Final = 256
# Observations after which it takes no further work: each is judged, which keeps the interpreter from all else.
_OBSERVATIONS: Final = 256
# Works of one kind that wait at most; beyond it the server says "busy" rather than grow.
_MOST: Final = 5000


class Busy(Exception):
    """More works wait than can be taken; the sender tries again later."""


@dataclass(slots=True)
class _Waiting:
    work: Work
    done: "asyncio.Future[None]"


class GroupCommit:
    """`take` commits works, all arrivals or none of them; it raises when nothing of them was stored."""

    def __init__(self, take: Callable[[Sequence[Work]], Awaitable[None]]) -> None:
        self._take = take
        self._arrivals: list[_Waiting] = []
        self._notes: list[_Waiting] = []
        self._arrived = asyncio.Event()
        # Held while something is committed.
        self.busy = asyncio.Lock()

    async def put(self, work: Work) -> None:
        """Return when `work` is committed. Raises StoreUnavailable, or Busy when too many wait."""
        queue = self._arrivals if isinstance(work, Arrival) else self._notes
        if len(queue) >= _MOST:
            raise Busy
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(_Waiting(work, done))
        self._arrived.set()
        await done

    def amend(self, change: Callable[[Work], Work]) -> None:
        """Change what waits."""
        for waiting in (*self._arrivals, *self._notes):
            waiting.work = change(waiting.work)

    async def run(self) -> None:
        """Commit what waits, for ever. On cancellation whoever waits is told that the server is going."""
        try:
            while True:
                await self._arrived.wait()
                for queue in (self._arrivals, self._notes):
                    async with self.busy:
                        if batch := _first(queue):
                            del queue[: len(batch)]
                            await self._commit(batch)
                if not self._arrivals and not self._notes:
                    self._arrived.clear()
        finally:
            closing = StoreUnavailable("closing", "the server is shutting down")
            _settle([*self._arrivals, *self._notes], closing)

    async def _commit(self, batch: list[_Waiting]) -> None:
        try:
            await self._take([w.work for w in batch])
        except StoreUnavailable as e:
            _settle(batch, e)
        except asyncio.CancelledError:
            _settle(batch, StoreUnavailable("closing", "the server is shutting down"))
            raise
        except Exception as e:
            if len(batch) == 1:
                log.exception("a report could not be judged", extra={"tunnel": batch[0].work.tunnel})
                _settle(batch, e)
                return
            # One report that trips the program must not take the others of its batch with it.
            for waiting in batch:
                await self._commit([waiting])
        else:
            _settle(batch, None)


def _first(queue: Sequence[_Waiting]) -> list[_Waiting]:
    """What is committed next: the earliest, one of any size and more while they are few."""
    batch, left = list[_Waiting](), _OBSERVATIONS
    for waiting in queue[:_BATCH]:
        if left <= 0:
            break
        batch.append(waiting)
        left -= len(waiting.work.observations) if isinstance(waiting.work, Arrival) else 1
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
