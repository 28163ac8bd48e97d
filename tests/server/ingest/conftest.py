"""The doors for reports, driven by raw ASGI calls: the router as it is wired, a real store behind it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from tests.conftest import ManualClock
from vpn_sentinel.runtime.settings import Source
from vpn_sentinel.server.access import Access
from vpn_sentinel.server.ingest.admission import Admission
from vpn_sentinel.server.ingest.keepalive import Keepalives
from vpn_sentinel.server.ingest.router import ReportRouter
from vpn_sentinel.server.ingest.session import Sessions
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.settings import ServerSettings
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.schema import observations, tunnels
from vpn_sentinel.server.store.store import Store
from vpn_sentinel.server.tracking.tracker import Tracker

KEY = "a-shared-key-of-ours"
EXIT = "146.70.1.2"
SECRET = b"e" * 32


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Socket:
    """The agent's end of a WebSocket."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[Any] = asyncio.Queue()
        self.got: asyncio.Queue[Any] = asyncio.Queue()

    def say(self, message: Any, *, binary: bool = False) -> None:
        text = message if isinstance(message, str) else json.dumps(message)
        self.sent.put_nowait({"type": "websocket.receive", **({"bytes": text.encode()} if binary else {"text": text})})

    async def next(self) -> Any:
        async with asyncio.timeout(5):
            return await self.got.get()

    async def hears(self) -> Any:
        event = await self.next()
        assert event["type"] == "websocket.send", event
        return json.loads(event["text"])


class House:
    """A server without its ports. `framework` notes what went past the router."""

    def __init__(self, store: Store, clock: ManualClock, **env: str) -> None:
        settings = ServerSettings.read(
            Source(env={"VPN_SENTINEL_API_KEY": KEY, **{f"VPN_SENTINEL_{k}": v for k, v in env.items()}})
        )
        self.store, self.clock = store, clock
        self.passed_on: list[str] = []
        self.tracker = Tracker(store, clock, Hub(), settings.policy)
        self.access = Access(store, clock, settings.api_key)
        admission = Admission(settings, self.access, clock)
        sessions = Sessions(self.tracker, store, clock, echo_secret=SECRET, echo_port=5000, missed=3)
        keepalives = Keepalives(admission, self.tracker, clock, settings.keepalive_timeout)
        self.router = ReportRouter(admission, keepalives, sessions, self._framework, settings.api_path)

    async def _framework(self, scope: Any, receive: Any, send: Any) -> None:
        self.passed_on.append(f"{scope['type']} {scope.get('path', '')}")
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    def scope(self, kind: str, path: str, client: tuple[str, int] | None, key: str | None, **headers: str) -> Any:
        given = {"x-api-key": key, **{k.replace("_", "-"): v for k, v in headers.items()}}
        return {
            "type": kind,
            "path": path,
            "client": client,
            "headers": [(k.encode(), v.encode("latin-1")) for k, v in given.items() if v is not None],
        }

    async def post(
        self,
        path: str,
        body: bytes | list[bytes] | dict[str, Any],
        *,
        key: str | None = KEY,
        client: tuple[str, int] | None = (EXIT, 40000),
        method: str = "POST",
        **headers: str,
    ) -> Answer:
        raw = json.dumps(body).encode() if isinstance(body, dict) else body
        parts = raw if isinstance(raw, list) else [raw]
        events = [
            {"type": "http.request", "body": part, "more_body": n < len(parts)} for n, part in enumerate(parts, start=1)
        ]
        waiting = iter([*events, {"type": "http.disconnect"}])
        got: list[Any] = []

        async def receive() -> Any:
            return next(waiting)

        async def send(event: Any) -> None:
            got.append(event)

        scope = self.scope("http", path, client, key, **{"content_type": "application/json", **headers})
        await self.router({**scope, "method": method}, receive, send)
        start, *rest = got
        return Answer(
            start["status"],
            {k.decode(): v.decode() for k, v in start["headers"]},
            b"".join(e["body"] for e in rest),
        )

    async def keepalive(self, body: bytes | dict[str, Any] | None = None, **more: Any) -> Answer:
        said = {"client_id": "nl", "public_ip": EXIT} if body is None else body
        return await self.post("/api/v1/keepalive", said, **more)

    async def exchange(self, body: bytes | dict[str, Any], **more: Any) -> Answer:
        return await self.post("/api/v1/agent", body, **more)

    async def tunnel(self, name: str = "nl") -> Any:
        (row,) = await self.store.read(select(tunnels).where(tunnels.c.name == name))
        return row

    async def stored(self) -> list[int]:
        return [r.seq for r in await self.store.read(select(observations.c.seq).order_by(observations.c.seq))]


Build = Callable[..., House]


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    """One engine: what the two do differently is behind the tracker, and tested there."""
    return f"sqlite:///{tmp_path}/sentinel.db"


@pytest.fixture
async def build(store: Store, clock: ManualClock) -> AsyncIterator[Build]:
    """Makes a house by settings; its tracker runs until the test ends."""
    running: list[asyncio.Task[None]] = []

    def make(front: Store | None = None, **env: str) -> House:
        house = House(front or store, clock, **env)
        running.append(asyncio.create_task(house.tracker.run()))
        return house

    yield make
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)


@pytest.fixture
async def house(build: Build) -> House:
    return build()


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    store = asyncio.run(open_store(f"sqlite:///{tmp_path_factory.mktemp('lobby')}/sentinel.db"))
    yield store
    asyncio.run(store.close())


@pytest.fixture
def lobby(shared_store: Store, clock: ManualClock) -> House:
    """A house for those who do not get past the door: nothing of theirs reaches a database, so one does for all."""
    return House(shared_store, clock)


@pytest.fixture
async def connect() -> AsyncIterator[Callable[..., Socket]]:
    """Opens WebSockets to a house, and hangs up when the test ends."""
    open_: list[tuple[Socket, asyncio.Task[None]]] = []

    def make(
        house: House, *, key: str | None = KEY, denial: bool = True, client: Any = (EXIT, 40000), broken: bool = False
    ) -> Socket:
        socket = Socket()
        scope = house.scope("websocket", "/api/v1/agent", client, key)
        if denial:
            scope["extensions"] = {"websocket.http.response": {}}
        socket.sent.put_nowait({"type": "websocket.connect"})

        async def send(event: Any) -> None:
            if broken and event["type"] == "websocket.send":
                raise OSError("connection reset")
            socket.got.put_nowait(event)

        open_.append((socket, asyncio.create_task(house.router(scope, socket.sent.get, send))))
        return socket

    yield make
    for socket, task in open_:
        socket.sent.put_nowait({"type": "websocket.disconnect", "code": 1006})
        async with asyncio.timeout(5):
            await task
