"""Port 8081: health checks and metrics. It asks for no login, so it shows no names and no addresses."""

import asyncio
import platform
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, Final, TypeVar

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE_OPENMETRICS
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector

from vpn_sentinel import __version__
from vpn_sentinel.domain.verdict import HARM, State
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.part_health import PartHealth
from vpn_sentinel.server.single_flight import SingleFlight
from vpn_sentinel.server.store import queries
from vpn_sentinel.server.store.store import Store, StoreUnavailable

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

T = TypeVar("T")

# Answers are cached for this time, so that callers cannot overload the database.
_CACHE_S: Final = 1.0
_COUNTS_CACHE_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthServices:
    """`dispatcher` says whether notices can go out, `deadlines` whether they are watched.

    `database_timeout_s` is the time that the database may take to answer. `dns_canary` is None without a DNS zone.
    """

    store: Store
    clock: Clock
    registry: CollectorRegistry
    dispatcher: Callable[[], PartHealth]
    database_timeout_s: float = 2.0
    dns_canary: Callable[[], PartHealth] | None = None
    deadlines: Callable[[], PartHealth] | None = None


class Part(msgspec.Struct, frozen=True, omit_defaults=True):
    ok: bool
    detail: str = ""


class HealthReport(msgspec.Struct, frozen=True):
    """`status` is "ok" or "failing"; `parts` says of each part whether it works, and if not, why."""

    status: str
    parts: dict[str, Part] = {}

    @property
    def ok(self) -> bool:
        return self.status == "ok"


class Readiness:
    """Checks the parts that the server cannot work without."""

    def __init__(self, services: HealthServices) -> None:
        self._services = services
        self._asking = asyncio.Lock()
        self._report = HealthReport("failing")
        self._asked_at = float("-inf")
        self._started = False

    async def report(self) -> HealthReport:
        """The present health, at most one second old. Concurrent callers wait for one answer."""
        async with self._asking:
            if self._services.clock.boottime() - self._asked_at > _CACHE_S:
                parts = {"database": await self._database(), "dispatcher": Part(*self._services.dispatcher())}
                if self._services.deadlines is not None:
                    parts["deadlines"] = Part(*self._services.deadlines())
                if self._services.dns_canary is not None:
                    parts["canary"] = Part(*self._services.dns_canary())
                self._report = HealthReport("ok" if all(p.ok for p in parts.values()) else "failing", parts)
                self._asked_at = self._services.clock.boottime()
            return self._report

    async def started(self) -> HealthReport:
        """Whether the database has answered once since this process started."""
        if not self._started:
            database = (await self.report()).parts["database"]
            if not database.ok:
                return HealthReport("failing", {"database": database})
            self._started = True
        return HealthReport("ok")

    async def _database(self) -> Part:
        try:
            async with asyncio.timeout(self._services.database_timeout_s):
                await self._services.store.ping()
        except TimeoutError:
            return Part(ok=False, detail=f"did not answer within {self._services.database_timeout_s:g} s")
        except StoreUnavailable as e:
            # The exception's own text names hosts and files.
            return Part(ok=False, detail=e.public_text)
        return Part(ok=True)


class TunnelsCollector(Collector):
    """Gauges of the tunnels by state, as last read from the database, and the version that runs."""

    def __init__(self, services: HealthServices) -> None:
        self._store, self._clock, self._database_timeout_s = services.store, services.clock, services.database_timeout_s
        self._asking = asyncio.Lock()
        self._counts: dict[State, int] | None = None
        self._writes = False
        self._asked_at = float("-inf")

    async def refresh(self) -> None:
        """Read the database, unless it was read a moment ago. When it does not answer, there are no gauges."""
        async with self._asking:
            if self._clock.boottime() - self._asked_at <= _COUNTS_CACHE_S:
                return
            self._counts = await self._within(queries.counts(self._store))
            self._writes = await self._within(self._pinged()) or False
            self._asked_at = self._clock.boottime()

    async def _within(self, asked: Coroutine[Any, Any, T]) -> T | None:
        try:
            async with asyncio.timeout(self._database_timeout_s):
                return await asked
        except (TimeoutError, StoreUnavailable):
            return None

    async def _pinged(self) -> bool:
        await self._store.ping()  # a write: with a full disk, reads still work
        return True

    def collect(self) -> Iterable[Metric]:
        build = InfoMetricFamily("vpn_sentinel_build", "What is running.")
        build.add_metric([], {"version": __version__, "python": platform.python_version()})
        yield build
        yield GaugeMetricFamily(
            "vpn_sentinel_database_up", "1 when a write for this scrape succeeded.", value=float(self._writes)
        )
        if self._counts is not None:
            tunnels = GaugeMetricFamily("vpn_sentinel_tunnels", "Tunnels by state.", labels=["state"])
            for state in HARM:
                tunnels.add_metric([state.value], self._counts.get(state, 0))
            yield tunnels

    def describe(self) -> Iterable[Metric]:
        return []


class Metrics:
    """The metrics in both formats of Prometheus; concurrent scrapes share one text of each."""

    def __init__(self, services: HealthServices) -> None:
        self._registry, self._tunnels = services.registry, TunnelsCollector(services)
        services.registry.register(self._tunnels)
        self._plain = SingleFlight(partial(self._text, generate_latest))
        self._openmetrics = SingleFlight(partial(self._text, generate_openmetrics))

    async def answer(self, scope: Scope, send: Send) -> None:
        if any(name == b"accept" and b"application/openmetrics-text" in value for name, value in scope["headers"]):
            await _answer(send, HTTPStatus.OK, CONTENT_TYPE_OPENMETRICS, await self._openmetrics.get())
        else:
            await _answer(send, HTTPStatus.OK, CONTENT_TYPE_PLAIN_0_0_4, await self._plain.get())

    async def _text(self, make: Callable[[Collector], bytes]) -> bytes:
        await self._tunnels.refresh()
        return make(self._registry)


def build_health(services: HealthServices) -> App:
    """A plain ASGI application: it must answer when nothing else does. Only GET, without a body."""
    readiness = Readiness(services)
    metrics = Metrics(services)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})  # before it is accepted, so the answer is 403
            return
        if scope["path"] in _PATHS and scope["method"] != "GET":
            await _json(send, HTTPStatus.METHOD_NOT_ALLOWED, HealthReport("method not allowed"))
            return
        match scope["path"]:
            case "/metrics":
                await metrics.answer(scope, send)
            case "/health":
                await _json(send, HTTPStatus.OK, HealthReport("ok"))
            case "/health/ready":
                await _report(send, await readiness.report())
            case "/health/startup":
                await _report(send, await readiness.started())
            case _:
                await _json(send, HTTPStatus.NOT_FOUND, HealthReport("not found"))

    return app


_PATHS: Final = frozenset({"/health", "/health/ready", "/health/startup", "/metrics"})


async def _report(send: Send, report: HealthReport) -> None:
    await _json(send, HTTPStatus.OK if report.ok else HTTPStatus.SERVICE_UNAVAILABLE, report)


async def _json(send: Send, status: HTTPStatus, report: HealthReport) -> None:
    await _answer(send, status, "application/json", msgspec.json.encode(report))


async def _answer(send: Send, status: HTTPStatus, media_type: str, body: bytes) -> None:
    headers = [
        (b"content-type", media_type.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
    ]
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        headers.append((b"allow", b"GET"))
    if status is HTTPStatus.SERVICE_UNAVAILABLE:
        headers.append((b"retry-after", b"2"))
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
