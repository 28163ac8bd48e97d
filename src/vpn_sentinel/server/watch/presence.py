"""Measures for how long this process did not run, and for how long its event loop was late.

*Away*: the process did not run: it was stopped (SIGSTOP, a frozen container), or the machine was suspended. It could
receive nothing; CLOCK_BOOTTIME goes on meanwhile (clock_gettime(2)). *Late*: it ran, and something blocked its event
loop; clients can cause that, so it must not excuse as much. Inside the loop, both look the same.

A thread that only reads the clock distinguishes them: it stops when the process does, and goes on while the loop is
busy or waits for the CPU. A call that holds the GIL stops the thread too, but uses CPU time, which a stopped process
does not. (The agent's `pauses` need not distinguish them: in both cases, a timeout in that time says nothing about the
network.) A clock that is set is neither: see `timekeeper`.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from vpn_sentinel.runtime.clock import Clock

SAMPLE_INTERVAL_S: Final = 0.25
MIN_BLOCKED_S: Final = 1.0
# A gap longer than the interval by this is not explained by a busy machine alone.
_MIN_AWAY_S: Final = 2.0
# A process that used a greater share of CPU time in the gap was not away.
_MAX_IDLE_SHARE: Final = 0.25


class MissedTime(NamedTuple):
    """The time that the loop missed in all, in seconds.

    `blocked` is the part of `late` that came in pieces of more than `MIN_BLOCKED_S`: reports can have waited that long.
    """

    away: float = 0.0
    late: float = 0.0
    blocked: float = 0.0

    def since(self, then: "MissedTime") -> "MissedTime":
        return MissedTime(self.away - then.away, self.late - then.late, self.blocked - then.blocked)


class Presence:
    def __init__(self, clock: Clock, used: Callable[[], float] = time.process_time) -> None:
        """`used` gives the CPU time of the whole process so far, in seconds."""
        self._boottime = clock.boottime
        self._used = used
        self._lock = threading.Lock()
        self._seen = (clock.boottime(), used())
        self._due = self._seen[0] + SAMPLE_INTERVAL_S  # when the loop should sample next
        self._away = 0.0
        self._missed = MissedTime()

    def sample(self) -> MissedTime:
        """What was missed so far. Call it from the loop: it is late by the gap that it was not away."""
        self._read_clock()
        now, away, missed = self._boottime(), self._away, self._missed
        late = 0.0
        if now > self._due:
            late = max(0.0, now - self._due - (away - missed.away))
            self._due = now
        self._missed = MissedTime(away, missed.late + late, missed.blocked + (late if late > MIN_BLOCKED_S else 0.0))
        return self._missed

    async def run(self) -> None:
        """Sample until cancelled."""
        with self._watched():
            while True:
                self._due = self._boottime() + SAMPLE_INTERVAL_S
                await asyncio.sleep(SAMPLE_INTERVAL_S)
                self.sample()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(SAMPLE_INTERVAL_S):
                self._read_clock()

        thread = threading.Thread(target=watch, name="presence", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _read_clock(self) -> None:
        """Called by the loop and the thread: whichever runs first after both were stopped notes the gap."""
        with self._lock:
            (then, used), self._seen = self._seen, (self._boottime(), self._used())
            gap = self._seen[0] - then
            if gap > SAMPLE_INTERVAL_S + _MIN_AWAY_S and self._seen[1] - used < _MAX_IDLE_SHARE * gap:
                self._away += gap
