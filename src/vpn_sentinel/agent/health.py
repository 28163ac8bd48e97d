"""The agent's own health over HTTP, for container engines and people: it depends on recent success, not on the process.

200 or 503 with the same JSON, which holds only times and a state; any other path is a 404. The prefix `/client/health`
is optional.

- `/client/health`, `/health`, `/`: rounds succeed and, within the last quarter of an hour, reports arrived.
- `/client/health/ready`, `/ready`: both are recent.
- `/client/health/startup`, `/startup`: the first round is done.

One request a connection. Clients cannot slow the agent down: a request's head is small and must come soon, and where
all connections are in use, the oldest is closed.
"""

import asyncio
import errno
import json
import os
import socket
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_address
from typing import Final

from vpn_sentinel.runtime.addresses import is_host_of
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.settings import SettingError

REQUEST_TIMEOUT_S: Final = 2.0  # for a request and its response
MAX_HEAD_BYTES: Final = 4096
MAX_CONNECTIONS: Final = 32  # at once
_ADDRESS_ERRNOS: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL)
_BACKLOG: Final = 1024  # connections that the kernel queues; others try again after a second (tcp(7), SYN)
# Accepted in one iteration of the event loop: each is answered before `MAX_CONNECTIONS` others can push it out.
_ACCEPTED_PER_ITERATION: Final = 4
_UPLINK_GRACE_S: Final = 900.0  # so long, since a restart of the agent does not bring a server back
_ROUND_SLACK_S: Final = 30.0  # a round may take so long when nothing answers
ROUTES: Final[Mapping[str, str]] = {
    "/": "alive",
    "/health": "alive",
    "/client/health": "alive",
    "/ready": "ready",
    "/client/health/ready": "ready",
    "/startup": "startup",
    "/client/health/startup": "startup",
}
_ALLOW: Final = {"Allow": "GET, HEAD, OPTIONS"}


@dataclass(frozen=True, slots=True)
class HealthFacts:
    """Times by a monotonic clock in seconds, None for never."""

    started: float
    last_round: float | None
    last_ack: float | None
    state: str | None
    pending: int


class Health:
    def __init__(self, facts: Callable[[], HealthFacts], clock: Clock, interval: float) -> None:
        self._facts = facts
        self._clock = clock
        self._interval = interval

    def answer(self, path: str) -> tuple[int, dict[str, object]]:
        """HTTP status and body for a path, 404 for an unknown one."""
        facts = self._facts()
        now = self._clock.boottime()
        max_round_age_s = 3 * self._interval + _ROUND_SLACK_S
        rounds_recent = _within(
            now,
            facts.last_round if facts.last_round is not None else facts.started,
            max_round_age_s,
        )
        connected = _within(now, facts.last_ack, max_round_age_s)
        reported_recently = _within(
            now,
            facts.last_ack if facts.last_ack is not None else facts.started,
            _UPLINK_GRACE_S + max_round_age_s,
        )
        match None if "//" in path else ROUTES.get(_without_slash(path)):
            case "alive":
                is_healthy = rounds_recent and reported_recently
            case "ready":
                is_healthy = facts.last_round is not None and rounds_recent and connected
            case "startup":
                is_healthy = facts.last_round is not None
            case _:
                return 404, {"status": "not found"}
        return (200 if is_healthy else 503), {
            "status": "healthy" if is_healthy else "unhealthy",
            "state": facts.state,
            "last_round_seconds_ago": _ago(now, facts.last_round),
            "last_report_seconds_ago": _ago(now, facts.last_ack),
            "waiting_reports": facts.pending,
        }

    async def serve(self, host: str, port: int) -> asyncio.Server:
        """Start to listen. Raises SettingError when that is not possible.

        On loopback the Host header must be `localhost` or an address; else any host name is accepted.
        """
        names = {"localhost"} if ip_address(host).is_loopback else None
        open_: OrderedDict[asyncio.StreamWriter, None] = OrderedDict()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            open_[writer] = None
            if len(open_) > MAX_CONNECTIONS:
                open_.popitem(last=False)[0].transport.abort()
            try:
                await self._answer(reader, writer, names)
            finally:
                open_.pop(writer, None)

        try:
            server = await asyncio.start_server(
                connected, host, port, limit=MAX_HEAD_BYTES, backlog=_ACCEPTED_PER_ITERATION
            )
        except OSError as e:
            # The event loop's own text would repeat the address.
            why = os.strerror(e.errno) if e.errno else str(e)
            if e.errno in _ADDRESS_ERRNOS:
                raise SettingError("VPN_SENTINEL_HEALTH_HOST", f"cannot listen on {host}: {why}") from e
            raise SettingError("VPN_SENTINEL_HEALTH_PORT", f"cannot listen on {host} port {port}: {why}") from e
        for bound in server.sockets:
            # asyncio accepts up to `backlog` connections in one iteration; listen(2) again lets the kernel queue more.
            with socket.fromfd(bound.fileno(), bound.family, bound.type) as duplicate:
                duplicate.listen(_BACKLOG)
        return server

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, names: set[str] | None) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._response(head.decode("latin-1").split("\r\n"), names))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, EOFError, asyncio.LimitOverrunError):
            writer.transport.abort()

    def _response(self, lines: list[str], names: set[str] | None) -> bytes:
        method, _, rest = lines[0].partition(" ")
        target, _, version = rest.partition(" ")
        if not method or not target.startswith("/") or not version.startswith("HTTP/1."):
            return _http(400, {"status": "not a request"})
        hosts = [line.partition(":")[2].strip() for line in lines[1:] if line.lower().startswith("host:")]
        if names is not None and not all(is_host_of(host, names) for host in hosts):
            return _http(421, {"status": "this answers to localhost and to addresses"})
        status, content = self.answer(target.partition("?")[0])
        if status != 404 and method == "OPTIONS":
            return _http(204, None, _ALLOW)
        if status != 404 and method not in ("GET", "HEAD"):
            return _http(405, {"status": "method not allowed"}, _ALLOW)
        return _http(status, content, body=method != "HEAD")


def _without_slash(path: str) -> str:
    """A path without one trailing slash."""
    return path[:-1] if path.endswith("/") and path != "/" else path


def _within(now: float, then: float | None, seconds: float) -> bool:
    return then is not None and now - then <= seconds


def _ago(now: float, then: float | None) -> float | None:
    return None if then is None else round(now - then, 1)


def _http(
    status: int,
    content: Mapping[str, object] | None,
    extra_fields: Mapping[str, str] | None = None,
    *,
    body: bool = True,
) -> bytes:
    """A response with `content` as JSON; None is no content. Pages of other origins cannot use it, not even as an
    image.
    """
    text = b"" if content is None else json.dumps(content).encode()
    fields = {
        **({} if content is None else {"Content-Type": "application/json", "Content-Length": str(len(text))}),
        **(extra_fields or {}),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Connection": "close",
    }
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{k}: {v}" for k, v in fields.items()), "", ""]
    return "\r\n".join(lines).encode() + (text if body else b"")
