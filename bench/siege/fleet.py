"""Many honest reports a second over WebSockets: `python -m bench.siege.fleet PORT KEY COUNT`.

A tunnel does as its agent does: it makes a report when one is due, has one message on its way at a time, sends what
waited meanwhile in the next one, connects anew, and sends again what was not acknowledged. So each report is due at its
time, however slow the answers are, and its time is from when it was made until it was acknowledged.

For each line of input, a JSON object of `rate` in reports a second or of `flight`, messages that are kept on their way
without a rate, a window of time begins. Of a window that is over, one JSON line is printed once all of its reports are
acknowledged, or after `PATIENCE`: the fields of `Told`. Once the input ends, and what waits is sent or that time is
over, the last line is of the whole time: `made`, `lost`.
"""

import asyncio
import contextlib
import itertools
import json
import math
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import uvloop

from bench.siege.attacks import frame, upgrade
from bench.siege.honest import NETWORKS, hello, item, reports

PATIENCE: Final = 30.0  # seconds until a report counts as unanswered
SLOW: Final = 0.05  # seconds
_INTERVAL: Final = 10.0  # as each tunnel's agent says of itself; silence is told by it
_AT_ONCE: Final = 100  # reports in one message, as an agent sends them
_SPOOL: Final = 500  # reports that wait at one tunnel; then they are lost
_TICK: Final = 0.002
_CONNECTED: Final = 5.0  # seconds within which all begin to connect
_AGAIN: Final = 0.5  # seconds before it connects anew
_CONNECT: Final = 20.0


class Histogram:
    """Durations in seconds, by steps of 5 % from 10 µs up: of bounded size, however many there are."""

    _LEAST, _STEP = 1e-5, math.log(1.05)

    def __init__(self, steps: Iterable[tuple[int, int]] = (), worst: float = 0.0) -> None:
        self._steps, self.worst = Counter(dict(steps)), worst

    def add(self, seconds: float, count: int = 1) -> None:
        self._steps[max(0, math.ceil(math.log(max(seconds, self._LEAST) / self._LEAST) / self._STEP))] += count
        self.worst = max(self.worst, seconds)

    def take(self, other: "Histogram") -> None:
        self._steps.update(dict(other.steps()))
        self.worst = max(self.worst, other.worst)

    def at(self, share: float) -> float:
        """Below this are so many of them, to 5 %; 0 where there are none."""
        left = share * self._steps.total()
        for step in sorted(self._steps):
            left -= self._steps[step]
            if left <= 0:
                return min(self.worst, self._LEAST * math.exp(step * self._STEP))
        return 0.0

    def steps(self) -> list[tuple[int, int]]:
        return sorted(self._steps.items())


@dataclass(kw_only=True)
class Told:
    """What became of a window's reports: how long they took, and how late this process itself was to make them.

    `slow` are the seconds of the window in which more than one in a hundred took longer than `SLOW`; `cut` are
    connections that were lost. Windows are numbered from 0, which ends with the first line of input.
    """

    number: int = 0
    seconds: float = 0.0
    made: int = 0
    unanswered: int = 0
    cut: int = 0
    worst: float = 0.0
    took: list[tuple[int, int]] = field(default_factory=list)
    behind: float = 0.0
    slow: list[int] = field(default_factory=list)


class Window:
    def __init__(self, number: int) -> None:
        self.number, self.began, self.over = number, time.monotonic(), asyncio.Event()
        self.made, self.open, self.cut = 0, 0, 0
        self.took, self.behind = Histogram(), Histogram()
        self._seconds: Counter[int] = Counter()
        self._slow: Counter[int] = Counter()
        self._closed = False

    def make(self) -> None:
        self.made += 1
        self.open += 1

    def acknowledged(self, made: float, now: float) -> None:
        self.open -= 1
        self._note(made, now - made)
        if self._closed and not self.open:
            self.over.set()

    def _note(self, made: float, took: float) -> None:
        self.took.add(took)
        second = int(made - self.began)
        self._seconds[second] += 1
        self._slow[second] += took > SLOW

    async def told(self) -> Told:
        """Close it, and wait for its last acknowledgement."""
        seconds, self._closed = time.monotonic() - self.began, True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                if self.open:
                    await self.over.wait()
        unanswered = self.open
        if unanswered:
            self.took.add(PATIENCE, unanswered)
        slow = [second for second, many in sorted(self._slow.items()) if many * 100 > self._seconds[second]]
        return Told(
            number=self.number, seconds=seconds, made=self.made, unanswered=unanswered, cut=self.cut, slow=slow,
            worst=self.took.worst, took=self.took.steps(), behind=self.behind.at(0.99),
        )  # fmt: skip


class Tunnel(asyncio.Protocol):
    """One agent's end. What waits is (number, when it was made, its window), the oldest first."""

    def __init__(self, fleet: "Fleet", number: int) -> None:
        self._fleet, self._name, self._host = fleet, f"honest-{number}", f"127.200.{number % NETWORKS}.1"
        self._spool, self._hello = deque[tuple[int, float, Window]](), hello(f"honest-{number}", _INTERVAL)
        self._seq, self._buffer, self._upgraded, self._ready = 0, b"", False, False

    async def connect(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_CONNECT):
                    await asyncio.get_running_loop().create_connection(
                        lambda: self, "127.0.0.1", self._fleet.port, local_addr=(self._host, 0)
                    )
            except OSError:  # TimeoutError is
                await asyncio.sleep(_AGAIN)
            else:
                return

    def connection_made(self, transport: Any) -> None:
        self._transport, self._buffer, self._upgraded = transport, b"", False
        transport.write(upgrade(self._fleet.key))

    def connection_lost(self, _exc: Exception | None) -> None:
        self._ready = False
        self._fleet.window.cut += 1
        self._fleet.connect(self, _AGAIN)

    def make(self) -> None:
        """A report is due."""
        if len(self._spool) >= _SPOOL:
            self._fleet.lost += 1
            return
        self._seq += 1
        window = self._fleet.window
        window.make()
        self._spool.append((self._seq, time.monotonic(), window))
        if self._ready:
            self._offer()

    def _offer(self) -> None:
        self._ready, now = False, time.monotonic()
        chosen = [item(seq, age=now - made) for seq, made, _ in itertools.islice(self._spool, _AT_ONCE)]
        self._transport.write(frame(1, reports(chosen, len(self._spool) - len(chosen)).encode()))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._upgraded:
            head, found, rest = self._buffer.partition(b"\r\n\r\n")
            if not found:
                return
            if not head.startswith(b"HTTP/1.1 101"):
                self._transport.abort()
                return
            self._upgraded, self._buffer = True, rest
            self._transport.write(frame(1, self._hello.encode()))
        while (read := unframed(self._buffer)) is not None:
            opcode, payload, self._buffer = read
            self._hear(opcode, payload)

    def _hear(self, opcode: int, payload: bytes) -> None:
        if opcode == 9:
            self._transport.write(frame(10, payload))
        elif opcode == 8:
            self._transport.close()
        elif (said := json.loads(payload))["type"] in ("welcome", "ack"):
            number = said["ack" if said["type"] == "welcome" else "seq"]
            now = time.monotonic()
            while self._spool and self._spool[0][0] <= number:
                _, made, window = self._spool.popleft()
                window.acknowledged(made, now)
            self._ready = True
            if self._spool:
                self._offer()
            elif said["type"] == "ack":
                self._fleet.idle()

    def waits(self) -> int:
        return len(self._spool)


class Fleet:
    def __init__(self, port: int, key: str, count: int) -> None:
        self.port, self.key, self.window, self.lost = port, key, Window(0), 0
        self._made, self._over = 0, False
        self._rate, self._flight, self._due = 0.0, 0, time.monotonic()
        self.tunnels = [Tunnel(self, n) for n in range(count)]
        self._turn = itertools.cycle(self.tunnels)

    def connect(self, tunnel: Tunnel, after: float) -> None:
        async def later() -> None:
            await asyncio.sleep(after)
            await tunnel.connect()

        if not self._over:
            self._group.create_task(later())

    def idle(self) -> None:
        """A message was acknowledged, and nothing waits behind it."""
        if self._flight:
            next(self._turn).make()

    async def _pace(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            now = time.monotonic()
            if not self._rate:
                continue
            if now >= self._due:
                self.window.behind.add(now - self._due)
            while self._due <= now:
                next(self._turn).make()
                self._due += 1 / self._rate

    async def _tell(self, window: Window) -> None:
        print(json.dumps(asdict(await window.told())), flush=True)

    def _begin(self, *, rate: float = 0.0, flight: int = 0) -> None:
        self._group.create_task(self._tell(self.window))
        self._made += self.window.made
        self.window = Window(self.window.number + 1)
        self._rate, self._flight, self._due = rate, flight, time.monotonic()
        for _ in range(flight):
            next(self._turn).make()

    async def run(self) -> None:
        reader, loop = asyncio.StreamReader(), asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        try:
            async with asyncio.TaskGroup() as self._group:
                for n, tunnel in enumerate(self.tunnels):
                    self.connect(tunnel, _CONNECTED * n / len(self.tunnels))
                self._group.create_task(self._pace())
                while line := await reader.readline():
                    self._begin(**json.loads(line))
                self._begin()
                end = time.monotonic() + PATIENCE
                while (left := sum(t.waits() for t in self.tunnels)) and time.monotonic() < end:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
                print(json.dumps({"made": self._made, "lost": self.lost + left}), flush=True)
                raise SystemExit
        finally:
            self._over = True


def unframed(data: bytes) -> tuple[int, bytes, bytes] | None:
    """The opcode and payload of a server's first frame (RFC 6455, section 5.2: not masked), and what follows it.

    None while it is not whole; of 64 KB and more none is sent to an agent.
    """
    if len(data) < 2:
        return None
    begin, size = 2, data[1]
    if size == 126:
        begin, size = 4, int.from_bytes(data[2:4])
    if len(data) < begin + size:
        return None
    return data[0] & 0x0F, data[begin : begin + size], data[begin + size :]


async def main(words: list[str]) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    await Fleet(int(words[0]), words[1], int(words[2])).run()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(main(sys.argv[1:]))
