"""The only place that reads a clock. Everything else is handed a `Clock`, so a test can say what time it is."""

import time
from typing import Protocol


class Clock(Protocol):
    def wall(self) -> float:
        """Seconds since the Unix epoch. May jump: use it for what people read and what rows keep."""
        ...

    def boottime(self) -> float:
        """Seconds since the machine started, suspended time included. Never jumps: use it for durations."""
        ...


class SystemClock:
    """The machine's clocks; `boottime` is `CLOCK_BOOTTIME` of clock_gettime(2)."""

    def wall(self) -> float:
        return time.time()

    def boottime(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)
