"""When to tell that packets leak: with the first one, at most once a second while it goes on, and when it is over."""

import asyncio
from collections.abc import Callable
from typing import Final

AGAIN_S: Final = 1.0  # between two tellings while it leaks
MARGIN_S: Final = 0.05  # behind the moment at which a flow is over


class Telling:
    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell
        self._told_at = float("-inf")
        self._later: asyncio.TimerHandle | None = None
        self._over: asyncio.TimerHandle | None = None

    def leaked(self, now: float) -> None:
        """There is something to tell at `now`: at once when nothing was told for a second, else when that is over."""
        if self._later is not None:
            return
        wait = self._told_at + AGAIN_S - now
        if wait > 0:
            self._later = asyncio.get_running_loop().call_later(wait, self._tell_later)
            return
        self._told_at = now
        self._tell()

    def expect_the_end(self, seconds: float | None) -> None:
        """A flow is over in so many seconds, if no packet comes: else the next regular round would tell. None: none."""
        if self._over is not None:
            self._over.cancel()
        self._over = None
        if seconds is not None:
            self._over = asyncio.get_running_loop().call_later(seconds + MARGIN_S, self._tell)

    def close(self) -> None:
        for timer in (self._later, self._over):
            if timer is not None:
                timer.cancel()

    def _tell_later(self) -> None:
        self._later = None
        self.leaked(self._told_at + AGAIN_S)
