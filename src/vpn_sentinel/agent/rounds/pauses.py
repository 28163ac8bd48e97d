"""Pauses in which this process did not run: it was stopped (SIGSTOP, a frozen container), or the machine was suspended.

A timeout that ended in a pause tells nothing about the network: answers could not be read, and perhaps nothing was
sent. CLOCK_BOOTTIME goes on in all of them (clock_gettime(2)).
"""

import logging
from collections.abc import Callable
from typing import Final

from vpn_sentinel.runtime.clock import tick

log = logging.getLogger(__name__)

TICK_S: Final = 0.5
MIN_PAUSE_S: Final = 2.0  # beyond a tick; a busy machine does not explain more


class Pauses:
    """Notices pauses of this process; `paused` is called once for each."""

    def __init__(self, boottime: Callable[[], float], paused: Callable[[], None] = lambda: None) -> None:
        """`boottime` is a clock in seconds that goes on while the machine is suspended."""
        self._boottime = boottime
        self._paused = paused
        self._last = boottime()
        self._ended_at = float("-inf")

    def ended_since(self, since: float) -> bool:
        """Whether a pause ended after `since`, also one that `run` has not noticed yet."""
        self._note()
        return self._ended_at >= since

    async def run(self) -> None:
        self._last = self._boottime()
        while True:
            await tick(TICK_S)
            self._note()

    def _note(self) -> None:
        now = self._boottime()
        away = now - self._last - TICK_S
        self._last = now
        if away > MIN_PAUSE_S:
            self._ended_at = now
            log.warning("this process did not run for a while", extra={"seconds": round(away)})
            self._paused()
