"""The tunnel device's counters, read once a second to detect a stall.

Reading /proc/net/dev costs some 20 µs and needs no privilege. A device that continues to send while it receives nothing
is a reason for a round at once, which finds out what it means.
"""

from collections.abc import Awaitable, Callable
from io import FileIO
from typing import Final

from vpn_sentinel.runtime.clock import Clock, tick

READ_EVERY_S: Final = 1.0
STALL_AFTER_S: Final = 2.0  # of sending without receiving
# Between two reports: one-way traffic on an otherwise idle tunnel looks the same.
STALLS_APART_S: Final = 30.0


class Stall:
    """Detects a device that continues to send while it receives nothing; no I/O, no clock."""

    def __init__(self) -> None:
        self._last: tuple[float, int, int] | None = None
        self._alive = 0.0  # last time that it received something, or sent nothing
        self._reported_at: float | None = None

    def forget(self) -> None:
        """The device is gone, or another one took its name."""
        self._last = None

    def step(self, now: float, rx: int, tx: int) -> bool:
        """Process one reading at `now` (seconds); returns whether it shows a stall that was not reported yet."""
        last = self._last
        if last is not None and (rx < last[1] or tx < last[2] or not now > last[0]):
            last = None  # the device was recreated, and its counters reset
        self._last = (now, rx, tx)
        if last is None or rx > last[1] or tx == last[2]:
            self._alive = now
            return False
        if now - self._alive < STALL_AFTER_S or (
            self._reported_at is not None and now - self._reported_at < STALLS_APART_S
        ):
            return False
        self._reported_at = now
        return True


def counters(text: bytes, interface: str) -> tuple[int, int] | None:
    """(received, sent) bytes of one interface in /proc/net/dev (proc_pid_net(5)); None when it does not exist."""
    name = interface.encode() + b":"
    for line in text.splitlines():
        if line.lstrip().startswith(name):
            words = line.partition(b":")[2].split()
            digits = len(words) > 8 and words[0].isdigit() and words[8].isdigit()
            return (int(words[0]), int(words[8])) if digits else None
    return None


class StallWatch:
    """Reads the counters of the interface that `tunnel` returns, and calls `on_change` at a stall."""

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
            file = FileIO(self._path)  # kept open: reading /proc does not block
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
