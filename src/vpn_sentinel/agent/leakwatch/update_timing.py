"""When to report that packets leak: with the first one, at most once a second while the leak lasts, and at its end."""

import asyncio
from collections.abc import Callable
from typing import Final

MIN_INTERVAL_S: Final = 1.0  # between two updates while packets leak
MARGIN_S: Final = 0.05  # after the moment at which a flow is over


class UpdateTiming:
    def __init__(self, update: Callable[[], None]) -> None:
        self._update = update
        self._updated_at = float("-inf")
        self._next_timer: asyncio.TimerHandle | None = None
        self._end_timer: asyncio.TimerHandle | None = None

    def leaked(self, now: float) -> None:
        """Report a leak at `now`: at once, or when a second has passed since the last update."""
        if self._next_timer is not None:
            return
        wait = self._updated_at + MIN_INTERVAL_S - now
        if wait > 0:
            self._next_timer = asyncio.get_running_loop().call_later(wait, self._update_now)
            return
        self._updated_at = now
        self._update()

    def expect_the_end(self, seconds: float | None) -> None:
        """Report the end of a flow in `seconds`, when it is over unless a further packet comes: the next regular round
        would be later. None: no end is expected any more.
        """
        if self._end_timer is not None:
            self._end_timer.cancel()
        self._end_timer = None
        if seconds is not None:
            self._end_timer = asyncio.get_running_loop().call_later(seconds + MARGIN_S, self._update)

    def close(self) -> None:
        for timer in (self._next_timer, self._end_timer):
            if timer is not None:
                timer.cancel()

    def _update_now(self) -> None:
        self._next_timer = None
        self.leaked(self._updated_at + MIN_INTERVAL_S)
