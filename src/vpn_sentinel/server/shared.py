"""One answer for all who ask for it at once, so that many cost little more than one, and hold nobody else up."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """`make` runs once at a time, and once in a turn of the loop. Who asks gets what was begun after that, and never
    older. All who wait for it get it in one turn.
    """

    def __init__(self, make: Callable[[], Awaitable[T]]) -> None:
        self._make = make
        self._over: asyncio.Event | None = None  # of what is being made
        self._begun = self._done = 0
        self._made: T

    async def get(self) -> T:
        """Raises what `make` raises; the next who waits tries anew."""
        wanted = self._begun + 1
        while self._done < wanted:
            if self._over is not None:
                await self._over.wait()
                continue
            self._over = asyncio.Event()
            try:
                await asyncio.sleep(0)  # for all who ask in this turn
                self._begun = number = self._begun + 1
                self._made = await self._make()
                self._done = number
            finally:
                self._over.set()
                self._over = None
        return self._made
