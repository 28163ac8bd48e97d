"""Stand-ins for what lies beyond the process: time that a test moves, and an HTTP server that answers as told."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any


class Time:
    """A clock, and everything that waits on it. Nothing passes but what the test lets pass."""

    def __init__(self, wall: float = 1_800_000_000.0) -> None:
        self.now = wall
        self.asleep: list[tuple[float, asyncio.Event, asyncio.Event | None]] = []
        self._changed = asyncio.Event()

    def wall(self) -> float:
        return self.now

    def boottime(self) -> float:
        return self.now - 1_000_000_000.0

    async def sleep(self, seconds: float) -> None:
        await self.wait_for(asyncio.Event(), seconds)

    async def wait_for(self, alarm: asyncio.Event, seconds: float) -> None:
        """Sleep until the test's time or `alarm` comes."""
        up = asyncio.Event()
        entry = (self.now + seconds, up, alarm)
        self.asleep.append(entry)
        self._changed.set()
        waits = [asyncio.create_task(up.wait()), asyncio.create_task(alarm.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            self.asleep.remove(entry)
            self._changed.set()

    async def quiet(self, sleepers: int) -> None:
        """Return once so many tasks sleep, none of them about to wake."""
        async with asyncio.timeout(10):
            while True:
                await asyncio.sleep(0)
                if len([e for e in self.asleep if not e[1].is_set() and not (e[2] and e[2].is_set())]) >= sleepers:
                    return
                self._changed.clear()
                if len(self.asleep) < sleepers:
                    await self._changed.wait()

    async def pass_(self, seconds: float, sleepers: int) -> None:
        """Let time pass, waking each sleeper at its minute, and come to rest again."""
        end = self.now + seconds
        while True:
            await self.quiet(sleepers)
            due = min((until for until, up, _ in self.asleep if not up.is_set()), default=end + 1)
            if due > end:
                self.now = end
                return
            self.now = max(self.now, due)
            for until, up, _ in self.asleep:
                if until <= self.now:
                    up.set()
            self._changed.set()
            await asyncio.sleep(0)

    async def jump(self, seconds: float, sleepers: int) -> None:
        """Let time pass in one leap, as for a machine that slept, and come to rest again."""
        await self.quiet(sleepers)
        self.now += seconds
        await self.pass_(0, sleepers)


@dataclass
class Asked:
    """A request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    """What to say: a status with a body, or bytes that are no HTTP, or (both None) nothing until the caller goes."""

    status: int | None = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None


Decide = Callable[[Asked], Answer | Awaitable[Answer]]


class StandIn:
    """An HTTP/1.1 server. `answers` are given in turn; when they are used up, `default` decides."""

    def __init__(self, default: Decide | None = None) -> None:
        self.asked: list[Asked] = []
        self.answers: list[Answer] = []
        self.default: Decide = default or (lambda asked: Answer())
        self.arrived = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""
        self.port = 0

    async def __aenter__(self) -> "StandIn":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def got(self, count: int) -> list[Asked]:
        """The requests, once there are so many."""
        async with asyncio.timeout(10):
            while len(self.asked) < count:
                self.arrived.clear()
                await self.arrived.wait()
        return self.asked

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except asyncio.CancelledError:
            pass  # asyncio logs a cancelled connection as an error
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ", 2)
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        asked = Asked(method, path, headers, body)
        said = self.answers.pop(0) if self.answers else self.default(asked)
        self.asked.append(asked)
        self.arrived.set()
        answer = said if isinstance(said, Answer) else await said
        if answer.raw is not None:
            writer.write(answer.raw)
            await writer.drain()
            return False
        if answer.status is None:
            await reader.read()
            return False
        lines = {"Content-Length": str(len(answer.body)), "Content-Type": "application/json", **answer.headers}
        top = f"HTTP/1.1 {answer.status} X\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items())
        writer.write(top.encode("latin-1") + b"\r\n" + answer.body)
        await writer.drain()
        return True


def telegram_ok(result: object = True) -> Answer:
    return Answer(body=json.dumps({"ok": True, "result": result}).encode())


def telegram_error(status: int, description: str = "", **parameters: object) -> Answer:
    said = {"ok": False, "error_code": status, "description": description, "parameters": parameters}
    return Answer(status, json.dumps(said).encode())
