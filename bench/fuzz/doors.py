"""Targets whose input is what a client of the server sends: to its three ports, each as it is served."""

import asyncio
import re
from typing import Any

from prometheus_client import CollectorRegistry

from bench.fuzz.target import ENDS, Loop, Target, Try, Wire, check, scratch
from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.runtime.settings import Source
from vpn_sentinel.server.access import Access
from vpn_sentinel.server.api.app import build_api
from vpn_sentinel.server.api.health import HealthServices, build_health
from vpn_sentinel.server.api.services import ApiServices
from vpn_sentinel.server.dashboard.app import DashboardServices, build_dashboard
from vpn_sentinel.server.ingest.admission import Admission
from vpn_sentinel.server.ingest.keepalive import Keepalives
from vpn_sentinel.server.ingest.router import ReportRouter
from vpn_sentinel.server.ingest.session import Sessions
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.part_health import PartHealth
from vpn_sentinel.server.serving import EmbeddedServer, embedded
from vpn_sentinel.server.settings import ServerSettings
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.tracking.tracker import Tracker

KEY = "a-shared-key-of-the-fuzzer"
HANDSHAKE = (
    f"GET /api/v1/agent HTTP/1.1\r\nHost: a\r\nX-API-Key: {KEY}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
).encode()
_STATUS = re.compile(rb"(?:^|\r\n\r\n)HTTP/1\.1 (\d{3}) ")
_TURNS = 40  # of the loop, until what is asked is answered or waits for more


class Watched:
    """The application, whose statuses are looked at: also of answers that nobody waits for any more."""

    def __init__(self, app: Any, usual: tuple[int, ...] = ()) -> None:
        self._app, self._usual = app, usual
        self.bad: list[int] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def watched(message: Any) -> None:
            status = message.get("status", 0)
            if status >= 500 and status not in self._usual:
                self.bad.append(status)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            self.bad.append(500)
            raise


class House:
    """A whole server but for its sockets."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.loop.loop.run_until_complete(self._build())
        ENDS.callback(lambda: self.loop(self._close()))

    async def _build(self) -> None:
        folder = scratch()
        env = {"DATA_DIR": str(folder), "API_KEY": KEY, "SERVER_RATE_LIMIT_REQUESTS": "1000000"}
        settings = ServerSettings.read(Source({f"VPN_SENTINEL_{name}": value for name, value in env.items()}))
        clock, hub, registry = SystemClock(), Hub(), CollectorRegistry()
        self._store = store = await open_store(f"sqlite:///{folder}/fuzz.db")
        access = Access(store, clock, settings.api_key)
        tracker = Tracker(store, clock, hub, settings.policy)
        self._running = asyncio.create_task(tracker.run())
        admission = Admission(settings, access, clock)
        sessions = Sessions(tracker, store, clock, echo_secret=bytes(32), echo_port=5000, missed=3)
        keepalives = Keepalives(admission, tracker, clock, settings.keepalive_timeout)
        api = build_api(ApiServices(store=store, access=access, hub=hub, settings=settings, clock=clock))
        dashboard = build_dashboard(DashboardServices(store=store, hub=hub, settings=settings, clock=clock))
        services = HealthServices(store=store, clock=clock, registry=registry, dispatcher=lambda: PartHealth(ok=True))
        self.apps = (
            Watched(ReportRouter(admission, keepalives, sessions, api, settings.api_path, per_client=10_000_000)),
            Watched(build_health(services), (503,)),
            Watched(dashboard),
        )
        self.doors = [self._door(app, side=n > 0) for n, app in enumerate(self.apps)]

    async def _close(self) -> None:
        self._running.cancel()
        await asyncio.wait([self._running])
        await self._store.close()

    def _door(self, app: Watched, *, side: bool) -> EmbeddedServer:
        server = embedded(app, side=side)
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        return server

    async def talk(self, door: int, pieces: list[bytes]) -> None:
        """One connection from its beginning to its end."""
        server = self.doors[door]
        slot = server.connection_limit.enter("127.0.0.1", 0.0, lambda: None)
        assert slot is not None
        protocol = server.protocol(slot)
        wire = Wire(protocol)
        protocol.connection_made(wire)
        for piece in pieces:
            if wire.is_closing():
                break
            wire.get_protocol().data_received(piece)
            await asyncio.sleep(0)
        for _ in range(_TURNS):
            if wire.is_closing() or not server.server_state.tasks:
                break
            await asyncio.sleep(0)
        wire.lose()
        if server.server_state.tasks:
            await asyncio.wait(server.server_state.tasks, timeout=5.0)
            await asyncio.sleep(0)
        check(not server.server_state.tasks, "a request outlives its connection")
        check(not server.server_state.connections, "a connection is not forgotten")
        check(not server.connection_limit.open, "a slot is not given back")
        bad = [*self.apps[door].bad, *(int(s) for s in _STATUS.findall(wire.written) if s[:1] == b"5")]
        self.apps[door].bad.clear()
        check(not bad, f"answered with {bad}")


def requests() -> Try:
    """The first byte chooses the port, the second how large the pieces are in which the rest comes; 0 is at once."""
    house = House()

    def one(data: bytes) -> None:
        head, sent = data[:2].ljust(2, b"\0"), data[2:]
        size = head[1] or max(1, len(sent))
        house.loop(house.talk(head[0] % 3, [sent[at : at + size] for at in range(0, len(sent), size)]))

    return one


def frames() -> Try:
    """What comes behind the handshake of an agent's WebSocket, in pieces as large as the first byte says."""
    house = House()

    def one(data: bytes) -> None:
        size, sent = (data[:1] or b"\0")[0] or max(1, len(data)), data[1:]
        house.loop(house.talk(0, [HANDSHAKE, *(sent[at : at + size] for at in range(0, len(sent), size))]))

    return one


TARGETS = {
    "requests": Target(
        modules=(
            "server.connection", "server.request_stream", "server.request_normalizer",
            "server.ingest.router", "server.ingest.admission", "server.ingest.keepalive",
            "server.api.params", "server.api.health",
        ),
        make=requests,
    ),
    "frames": Target(modules=("server.connection", "server.websocket", "server.ingest.router"), make=frames),
}  # fmt: skip
