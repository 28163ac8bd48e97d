"""The tunnel device's own counters, once a second: the sign of a stall.

/proc/net/dev costs some 20 µs to read and needs no privilege. A device that goes on sending while nothing comes back
is a reason to look at once; what it means is for the round to find out.
"""

from collections.abc import Awaitable, Callable
from io import FileIO
from typing import Final

from vpn_sentinel.runtime.clock import Clock, tick

READ_EVERY_S: Final = 1.0  # seconds
STALL_AFTER_S: Final = 2.0  # seconds that a device sends and receives nothing
# Seconds between two such signs: somebody's one-way traffic on a quiet tunnel looks the same.
SIGNS_APART_S: Final = 30.0


class Stall:
    """Notices a device that goes on sending while nothing comes in; no I/O, no clock."""

    def __init__(self) -> None:
        self._last: tuple[float, int, int] | None = None
        self._alive = 0.0  # when something came in last, or the device sent nothing
        self._signed: float | None = None

    def forget(self) -> None:
        """The device is gone, or another one took its name."""
        self._last = None

    def step(self, now: float, rx: int, tx: int) -> bool:
        """Take one reading at `now` (seconds); whether it shows a stall that was not told of yet."""
        last = self._last
        if last is not None and (rx < last[1] or tx < last[2] or not now > last[0]):
            last = None  # made anew: its counters began again
        self._last = (now, rx, tx)
        if last is None or rx > last[1] or tx == last[2]:
            self._alive = now
            return False
        if now - self._alive < STALL_AFTER_S or (self._signed is not None and now - self._signed < SIGNS_APART_S):
            return False
        self._signed = now
        return True


def counters(text: bytes, interface: str) -> tuple[int, int] | None:
    """(received, sent) bytes of one interface in /proc/net/dev (proc_pid_net(5)); None when it is not there."""
    name = interface.encode() + b":"
    for line in text.splitlines():
        if line.lstrip().startswith(name):
            words = line.partition(b":")[2].split()
            digits = len(words) > 8 and words[0].isdigit() and words[8].isdigit()
            return (int(words[0]), int(words[8])) if digits else None
    return None


class StallWatch:
    """Reads the counters of the interface that `tunnel` names at that moment, and calls `on_change` at a stall."""

    def __init__(
        self,
        tunnel: Callable[[], str | None],
        on_change: Callable[[], None],
        clock: Clock,
        *,
        path: str = "/proc/net/dev",
        sleep: Callable[[float], Awaitable[None]] = tick,
    ) -> None:
        self.stall = Stall()
        self._tunnel = tunnel
        self._on_change = on_change
        self._clock = clock
        self._path = path
        self._sleep = sleep
        self._name: str | None = None

    async def run(self) -> None:
        """Read once a second, for ever; returns where there is no such file."""
        try:
            file = FileIO(self._path)  # kept open: what /proc holds does not block
        except OSError:
            return
        with file:
            while True:
                self.read(file)
                await self._sleep(READ_EVERY_S)

    def read(self, file: FileIO) -> None:
        name = self._tunnel()
        if name != self._name:
            self._name = name
            self.stall.forget()
        file.seek(0)
        found = None if name is None else counters(file.readall(), name)
        if found is None:
            self.stall.forget()
        elif self.stall.step(self._clock.boottime(), *found):
            self._on_change()
