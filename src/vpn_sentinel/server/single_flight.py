"""One result for all callers that ask at the same time, so that many calls cost little more than one."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """`make` runs once at a time, and at most once in an iteration of the event loop. A caller never gets a result
    whose making began before it asked. All that wait for a result get it in the same iteration.
    """

    def __init__(self, make: Callable[[], Awaitable[T]]) -> None:
        self._make = make
        self._finished: asyncio.Event | None = None  # of the run of `make` that is under way
        self._begun = self._done = 0
        self._made: T

    async def get(self) -> T:
        """Raises what `make` raises; the next caller that waits runs it again."""
        wanted = self._begun + 1
        while self._done < wanted:
            if self._finished is not None:
                await self._finished.wait()
                continue
            self._finished = asyncio.Event()
            try:
                await asyncio.sleep(0)  # so that all callers of this iteration share the run
                self._begun = number = self._begun + 1
                self._made = await self._make()
                self._done = number
            finally:
                self._finished.set()
                self._finished = None
        return self._made
