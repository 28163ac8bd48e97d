"""Who may call what: every route of every port of a running server, by every method and every kind of key.

The table is written by hand; the routes come from the applications, so that one without a line fails. Tokens have no
expiry, so there is no column for one: a key is right until it is revoked.
"""

import asyncio
import gc
import itertools
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from litestar import Litestar
from sqlalchemy import insert

from tests.conftest import ManualClock
from tests.server.sample import settings, tunnel
from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.server.access import Access, create_token, revoke_token
from vpn_sentinel.server.api import health
from vpn_sentinel.server.api.app import build_api
from vpn_sentinel.server.api.services import ApiServices
from vpn_sentinel.server.app import serve
from vpn_sentinel.server.dashboard.app import DashboardServices, build_dashboard
from vpn_sentinel.server.ingest.keepalive import Keepalives
from vpn_sentinel.server.ingest.router import ReportRouter
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.settings import ServerSettings
from vpn_sentinel.server.store.schema import tunnels
from vpn_sentinel.server.store.store import Store

NAME = "seedbox-nl"
# Each row's five figures are of callers with these, in this order.
KEYS = ("no key", "the tunnel's token", "a shared key", "a revoked key", "a wrong key")
METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE")
Row = dict[str, str]


def everybody(status: int) -> str:
    return " ".join([str(status)] * len(KEYS))


def reads(statuses: str) -> Row:
    others = dict.fromkeys(("POST", "PUT", "PATCH", "DELETE"), everybody(405))
    return {"GET": statuses, "HEAD": statuses, "OPTIONS": everybody(204), **others}


def takes(statuses: str) -> Row:
    others = dict.fromkeys(("GET", "HEAD", "PUT", "PATCH", "DELETE"), everybody(405))
    return {"POST": statuses, "OPTIONS": everybody(204), **others}


REPORT, READ, OPEN = "401 200 200 403 403", "401 403 200 403 403", everybody(200)
TABLE: dict[str, dict[str, Row]] = {
    "api": {
        "/api/v1/keepalive": takes(REPORT),
        "/api/v1/agent": takes(REPORT),
        "/api/v1/status": reads(READ),
        "/api/v1/whoami": reads(OPEN),
        "/api/v1/tunnels": reads(READ),
        "/api/v1/tunnels/{name}": reads(READ),
        "/api/v1/tunnels/{name}/history": reads(READ),
        "/api/v1/incidents": reads(READ),
        "/api/v1/deliveries": reads(READ),
        "/api/v1/summary": reads(READ),
        "/api/v1/events": reads(READ),
        "/api/v1/schema/openapi.json": reads(OPEN),
    },
    "health": {
        "/health": reads(OPEN),
        "/health/ready": reads(OPEN),
        "/health/startup": reads(OPEN),
        "/metrics": reads(OPEN),
    },
    "dashboard": {
        "/": reads(OPEN),
        "/dashboard": reads(OPEN),
        "/tunnels/{name}": reads(OPEN),
        "/live": reads(OPEN),
        "/static/{name}": reads(OPEN),
    },
}
# What is no route, and must not become one by being near to one.
NOWHERE = {
    "api": ("/", "/api", "/api/v1", "/api/v1/schema", "/api/v1/schema/x", "/api/v1/nothing", "/api/v1/agent/x", "*"),
    "health": ("/", "/metrics/x", "/health/live", "/api/v1/status"),
    "dashboard": ("/static", "/tunnels", "/tunnels/x/history", "/metrics", "/api/v1/status"),
}
BODIES: dict[str, Any] = {
    "/api/v1/keepalive": {"client_id": NAME},
    "/api/v1/agent": {
        "type": "exchange",
        "hello": {
            "type": "hello", "protocol": 1, "client_id": NAME, "spool": "s1", "version": "2.0.0", "interval": 30.0,
            "wall": time.time(),
        },
        "reports": {"type": "reports", "items": []},
    },
}  # fmt: skip
HANDSHAKE = "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"


@dataclass
class Running:
    """A server and its keys, by their kind."""

    ports: dict[str, int]
    keys: dict[str, str | None]
    _asked: Iterable[int] = itertools.count(1)

    async def ask(
        self, port: str, method: str, path: str, *, key: str = KEYS[0], host: str = "localhost", more: str = "",
        after: bytes = b"",
    ) -> bytes:  # fmt: skip
        """All that comes back, or the head alone of an answer that does not end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.ports[port])
        given, n = self.keys[key], next(iter(self._asked))
        # Every request from an address of its own, or keys that are wrong would use up its guesses.
        head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nX-Forwarded-For: 20.0.{n >> 8}.{n & 255}\r\n"
        body = json.dumps(BODIES[path.rstrip("/")]).encode() if method == "POST" and path.rstrip("/") in BODIES else b""
        head += f"X-API-Key: {given}\r\n" if given else ""
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
        head += more or ("" if after else "Connection: close\r\n")
        try:
            async with asyncio.timeout(10):
                writer.write(head.encode() + b"\r\n" + body + after)
                answer = await reader.readuntil(b"\r\n\r\n")
                endless = method == "GET" and b"text/event-stream" in answer
                return answer if endless or b" 101 " in answer else answer + await reader.read()
        finally:
            writer.transport.abort()

    async def status(self, port: str, method: str, path: str, **how: Any) -> int:
        return int((await self.ask(port, method, path, **how))[9:12])

    async def statuses(self, port: str, method: str, path: str, **how: Any) -> str:
        """By kind of key."""
        return " ".join([str(await self.status(port, method, path, key=key, **how)) for key in self.keys])


def chosen(folder: Path) -> ServerSettings:
    found = []
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            found.append(probe.getsockname()[1])
    return settings(
        DATA_DIR=str(folder),
        SERVER_HOST="127.0.0.1",
        SERVER_API_PORT=str(found[0]),
        SERVER_HEALTH_HOST="127.0.0.1",
        SERVER_HEALTH_PORT=str(found[1]),
        SERVER_DASHBOARD_PORT=str(found[2]),
        TRUSTED_PROXIES="127.0.0.1",
        TRACE_URL="http://127.0.0.1:9",
    )


@pytest.fixture
def collector() -> Iterator[None]:
    """A server tunes the garbage collector of its process, which here is the tests'."""
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.fixture
async def server(tmp_path: Path, collector: None) -> AsyncIterator[Running]:
    config, stop = chosen(tmp_path), asyncio.Event()
    opened: asyncio.Future[Store] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(serve(config, SystemClock(), stop, lambda _: None, started=opened.set_result))
        store = await opened
        now = time.time()
        await store.write(insert(tunnels).values([tunnel(NAME, "protected", now)]))
        revoked = await create_token(store, "old", shared=True, now=now)
        await revoke_token(store, "old", now)
        keys = {
            KEYS[0]: None,
            KEYS[1]: await create_token(store, NAME, shared=False, now=now),
            KEYS[2]: await create_token(store, "reader", shared=True, now=now),
            KEYS[3]: revoked,
            KEYS[4]: "vs_wrong-key-of-somebody",
        }
        yield Running({"api": config.api_port, "health": config.health_port, "dashboard": config.dashboard_port}, keys)
        stop.set()


def routes_of(app: Litestar) -> set[str]:
    return {re.sub(r":[a-z]+", "", route.path) for route in app.routes}


def filled_in(path: str) -> str:
    return path.replace("{name}", "live.js" if path.startswith("/static") else NAME)


EVERY = [(port, path) for port, rows in TABLE.items() for path in rows]


def test_every_route_has_a_line_and_no_other() -> None:
    clock, hub, config = ManualClock(), Hub(), settings()
    nothing: Any = None
    api = build_api(
        ApiServices(store=nothing, access=Access(nothing, clock, None), hub=hub, settings=config, clock=clock)
    )
    router = ReportRouter(nothing, Keepalives(nothing, nothing, clock, 900.0), nothing, api, config.api_path)
    dashboard = build_dashboard(DashboardServices(store=nothing, hub=hub, settings=config, clock=clock))
    assert set(TABLE["api"]) == routes_of(api) | set(router._handlers)
    assert set(TABLE["health"]) == health._PATHS
    assert set(TABLE["dashboard"]) == routes_of(dashboard)
    assert {path: set(row) for rows in TABLE.values() for path, row in rows.items()} == {
        path: set(METHODS) for _, path in EVERY
    }


async def test_each_answers_by_method_and_key_however_it_is_written(server: Running) -> None:
    wrong = {}
    for port, rows in TABLE.items():
        for path, row in rows.items():
            for method, expected in row.items():
                for written in {filled_in(path), filled_in(path).rstrip("/") + "/"}:
                    found = await server.statuses(port, method, written)
                    if found != expected:
                        wrong[port, method, written] = found
    assert wrong == {}


async def test_what_is_no_route_is_none_for_anybody(server: Running) -> None:
    doubled = [(port, f"/{filled_in(path)}") for port, path in EVERY]
    doubled += [(port, f"{filled_in(path)}//") for port, path in EVERY]
    wrong = {}
    for port, path in [*((p, path) for p, paths in NOWHERE.items() for path in paths), *doubled]:
        for method in METHODS:
            for key in (KEYS[0], KEYS[2]):
                if (found := await server.status(port, method, path, key=key)) != 404:
                    wrong[port, method, path, key] = found
    assert wrong == {}


async def test_a_websocket_stands_where_agents_report_and_nowhere_else(server: Running) -> None:
    how = {"more": f"Connection: Upgrade\r\n{HANDSHAKE}"}
    for path in ("/api/v1/agent", "/api/v1/agent/"):
        assert await server.statuses("api", "GET", path, **how) == REPORT.replace("200", "101"), path
    for path in (filled_in(path) for path in TABLE["api"] if path != "/api/v1/agent"):
        assert "101" not in await server.statuses("api", "GET", path, **how), path
    for path in ("//api/v1/agent", "/api/v1//agent", "/api/v1/agent//"):
        assert "101" not in await server.statuses("api", "GET", path, **how), path


async def test_head_is_get_without_the_content(server: Running) -> None:
    after = b"OPTIONS /nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    for port, path in EVERY:
        if TABLE[port][path]["GET"] == everybody(405):
            continue
        answer = await server.ask(port, "HEAD", filled_in(path), key=KEYS[2], after=after)
        first, second, _ = (answer + b"\r\n\r\n").split(b"\r\n\r\n", 2)
        assert second.startswith(b"HTTP/1.1 404 "), f"{path}: something stands between two answers"
        whole = (await server.ask(port, "GET", filled_in(path), key=KEYS[2])).split(b"\r\n\r\n")[0]
        assert fields(first) == fields(whole), path


def fields(head: bytes) -> set[bytes]:
    """Those of a head that do not depend on the moment or on how the content is framed."""
    names = (b"date", b"connection", b"transfer-encoding", b"content-length")
    return {line.lower() for line in head.split(b"\r\n") if line.partition(b":")[0].lower() not in names}


async def test_options_and_refusals_name_the_same_methods(server: Running) -> None:
    for port, path in EVERY:
        may = sorted(m for m, statuses in TABLE[port][path].items() if statuses != everybody(405))
        for method in ("OPTIONS", "DELETE"):
            head, _, body = (await server.ask(port, method, filled_in(path))).partition(b"\r\n\r\n")
            allow = re.search(rb"(?im)^allow: *([^\r]*)", head)
            assert allow is not None, path
            assert sorted(allow[1].decode().split(", ")) == may, path
            assert (method == "OPTIONS") == (body == b""), path
            assert b"access-control" not in head.lower(), path


async def test_the_dashboard_answers_to_no_other_sites_name(server: Running) -> None:
    for method in ("GET", "HEAD"):
        for path in map(filled_in, TABLE["dashboard"]):
            assert await server.status("dashboard", method, path, host="rebound.example") == 421, path
