"""The only place that reads a clock. Everything else is handed a `Clock`, so a test can say what time it is."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    def wall(self) -> float:
        """Seconds since the Unix epoch. May jump: use it for what people read and what rows keep."""
        ...

    def boottime(self) -> float:
        """Seconds since the machine started, suspended time included. Never jumps: use it for durations."""
        ...


class SteadyClock:
    """A clock whose `wall` goes on without a jump when the system's is set, until it is told to `move` too."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset = clock.wall() - clock.boottime()

    def wall(self) -> float:
        return self._clock.boottime() + self._offset

    def boottime(self) -> float:
        return self._clock.boottime()

    def behind(self, wall: float, asked: float) -> float:
        """By how many seconds it is behind another clock, which said `wall` between the boot time `asked` and now.

        As little as that proves, 0.0 where both may be right: the answer was some time on its way.
        """
        least, most = wall - self._clock.boottime(), wall - asked
        return min(max(self._offset, least), most) - self._offset

    def move(self, by: float) -> None:
        self._offset += by


class SystemClock:
    """The machine's clocks; `boottime` is `CLOCK_BOOTTIME` of clock_gettime(2)."""

    def wall(self) -> float:
        return time.time()

    def boottime(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)


async def tick(every: float) -> None:
    """Wait for the next multiple of `every` seconds by the loop's clock.

    Tasks that wait so wake the process together, and not each by itself.
    """
    await asyncio.sleep(every - asyncio.get_running_loop().time() % every)
