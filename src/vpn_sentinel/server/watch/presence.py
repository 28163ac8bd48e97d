"""Was this process there, and did its loop turn? Two things that look alike from within a loop that comes late.

*Away*: it did not run at all: it was stopped (SIGSTOP, a frozen container), or the machine was suspended. Nobody could
be heard; CLOCK_BOOTTIME runs on meanwhile (clock_gettime(2)). *Late*: it ran, and something kept its event loop from
turning; whoever sends us work can bring that about, so it must not excuse as much.

A thread that only looks at the clock tells them apart: it stands still when the process does, and goes on while the
loop is busy or waits for a processor's share. One call that holds the interpreter's lock stops the thread too, but uses
up processor time, which a stopped process does not. (The agent's `pauses` makes no such difference: either way, a wait
that ended meanwhile says nothing of the network.) A clock that is set is neither: see `timekeeper`.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from vpn_sentinel.runtime.clock import Clock

LOOK_INTERVAL_S: Final = 0.25  # seconds between two looks
MIN_HELD_S: Final = 1.0
# Seconds beyond that which no busy machine explains.
_MIN_AWAY_S: Final = 2.0
# A process that used a greater part of a stretch was there.
_MAX_IDLE_SHARE: Final = 0.25


class Missed(NamedTuple):
    """Seconds that a loop missed, all in all.

    `held` is the part of `late` that was more than `MIN_HELD_S` seconds at once: so long a report can have waited
    unread.
    """

    away: float = 0.0
    late: float = 0.0
    held: float = 0.0

    def since(self, then: "Missed") -> "Missed":
        return Missed(self.away - then.away, self.late - then.late, self.held - then.held)


class Presence:
    def __init__(self, clock: Clock, used: Callable[[], float] = time.process_time) -> None:
        """`used` is the processor time of the whole process so far, in seconds."""
        self._boottime = clock.boottime
        self._used = used
        self._lock = threading.Lock()
        self._seen = (clock.boottime(), used())
        self._due = self._seen[0] + LOOK_INTERVAL_S  # when the loop should look next
        self._away = 0.0
        self._missed = Missed()

    def look(self) -> Missed:
        """What was missed so far. Called by the loop, which is late by what it was not away."""
        self._beat()
        now, away, missed = self._boottime(), self._away, self._missed
        late = 0.0
        if now > self._due:
            late = max(0.0, now - self._due - (away - missed.away))
            self._due = now
        self._missed = Missed(away, missed.late + late, missed.held + (late if late > MIN_HELD_S else 0.0))
        return self._missed

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        with self._watched():
            while True:
                self._due = self._boottime() + LOOK_INTERVAL_S
                await asyncio.sleep(LOOK_INTERVAL_S)
                self.look()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(LOOK_INTERVAL_S):
                self._beat()

        thread = threading.Thread(target=watch, name="presence", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _beat(self) -> None:
        """From either side, whichever comes first after a stretch in which both stood still."""
        with self._lock:
            (then, used), self._seen = self._seen, (self._boottime(), self._used())
            gap = self._seen[0] - then
            if gap > LOOK_INTERVAL_S + _MIN_AWAY_S and self._seen[1] - used < _MAX_IDLE_SHARE * gap:
                self._away += gap
