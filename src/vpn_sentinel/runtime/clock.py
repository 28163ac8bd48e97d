"""The only module that reads a clock. All others get a `Clock`, so a test can set the time."""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    def wall(self) -> float:
        """Seconds since the Unix epoch. May jump: for times that people read and that rows keep."""
        ...

    def boottime(self) -> float:
        """Seconds since the machine started, including suspended time. Never jumps: for durations."""
        ...


class SteadyClock:
    """A clock whose `wall` goes on without a jump when the system's clock is set, until `move` is called."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset = clock.wall() - clock.boottime()

    def wall(self) -> float:
        return self._clock.boottime() + self._offset

    def boottime(self) -> float:
        return self._clock.boottime()

    def behind(self, wall: float, asked: float) -> float:
        """By how many seconds it is behind another clock, which read `wall` between the boot time `asked` and now.

        The smallest difference that this proves, 0.0 where both may be right, since the answer took some time.
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
    """Wait for the next multiple of `every` seconds by the event loop's clock.

    Tasks that wait in this way wake the process together, which costs less than one wake-up each.
    """
    await asyncio.sleep(every - asyncio.get_running_loop().time() % every)
