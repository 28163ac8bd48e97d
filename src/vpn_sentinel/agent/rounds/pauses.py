"""Stretches in which this process did not run: stopped (SIGSTOP, a frozen container), or the machine was suspended.

Waits that ended in such a stretch say nothing of the network: answers could not be read, and none may have been asked
for. CLOCK_BOOTTIME runs on in all of them (clock_gettime(2)).
"""

import logging
from collections.abc import Callable
from typing import Final

from vpn_sentinel.runtime.clock import tick

log = logging.getLogger(__name__)

SIGN_EVERY_S: Final = 0.5  # seconds between two signs of life
MIN_PAUSE_S: Final = 2.0  # seconds beyond that which no busy machine explains


class Pauses:
    """Notices that time went by without us; `paused` is told once for each stretch."""

    def __init__(self, boottime: Callable[[], float], paused: Callable[[], None] = lambda: None) -> None:
        """`boottime` is a clock in seconds that runs on while the machine is suspended."""
        self._boottime = boottime
        self._paused = paused
        self._last = boottime()
        self._ended = float("-inf")

    def ended_since(self, since: float) -> bool:
        """Whether a pause ended after `since`, also one that `run` has not noticed yet."""
        self._note()
        return self._ended >= since

    async def run(self) -> None:
        self._last = self._boottime()
        while True:
            await tick(SIGN_EVERY_S)
            self._note()

    def _note(self) -> None:
        now = self._boottime()
        away = now - self._last - SIGN_EVERY_S
        self._last = now
        if away > MIN_PAUSE_S:
            self._ended = now
            log.warning("this process did not run for a while", extra={"seconds": round(away)})
            self._paused()
