"""The agent's own health over HTTP, for container engines and people: tied to the last success, not to the process.

200 or 503, with the same JSON each time, of times and a state alone; any other path is a 404. `/client/health` may be
left out in front.

- `/client/health`, `/health`, `/`: rounds are made and, within the last quarter of an hour, reports arrived.
- `/client/health/ready`, `/ready`: both are recent.
- `/client/health/startup`, `/startup`: the first round is done.

One request a connection. Nobody who calls here may hold the agent up: a head is small and comes soon, and where all
places are taken, the oldest connection yields.
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

REQUEST_TIMEOUT_S: Final = 2.0  # seconds for a request and its answer
MAX_HEAD_BYTES: Final = 4096  # bytes of its head
MAX_CONNECTIONS: Final = 32  # connections at once
_NO_SUCH_ADDRESS: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL)
_BACKLOG: Final = 1024  # that the kernel holds; who finds no room tries again after a second (tcp(7), SYN)
# Taken in one turn of the loop: who is among them is answered before `MAX_CONNECTIONS` others came.
_ACCEPTED_PER_TURN: Final = 4
_UPLINK_GRACE_S: Final = 900.0  # seconds: a restart of the agent does not bring a server back
_ROUND_SLACK_S: Final = 30.0  # seconds a round may take when nothing answers
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
class Signs:
    """Times by a clock that never jumps, None for never."""

    started: float
    last_round: float | None
    last_ack: float | None
    state: str | None
    pending: int


class Health:
    def __init__(self, signs: Callable[[], Signs], clock: Clock, interval: float) -> None:
        self._signs = signs
        self._clock = clock
        self._interval = interval

    def answer(self, path: str) -> tuple[int, dict[str, object]]:
        """HTTP status and body for a path, 404 for one that is none of ours."""
        signs = self._signs()
        now = self._clock.boottime()
        rounds_at = 3 * self._interval + _ROUND_SLACK_S
        looking = _within(now, signs.last_round if signs.last_round is not None else signs.started, rounds_at)
        connected = _within(now, signs.last_ack, rounds_at)
        heard = _within(
            now, signs.last_ack if signs.last_ack is not None else signs.started, _UPLINK_GRACE_S + rounds_at
        )
        match None if "//" in path else ROUTES.get(_plain(path)):
            case "alive":
                well = looking and heard
            case "ready":
                well = signs.last_round is not None and looking and connected
            case "startup":
                well = signs.last_round is not None
            case _:
                return 404, {"status": "not found"}
        return (200 if well else 503), {
            "status": "healthy" if well else "unhealthy",
            "state": signs.state,
            "last_round_seconds_ago": _ago(now, signs.last_round),
            "last_report_seconds_ago": _ago(now, signs.last_ack),
            "waiting_reports": signs.pending,
        }

    async def serve(self, host: str, port: int) -> asyncio.Server:
        """Start to listen. Raises SettingError when the port is not to be had.

        On loopback it answers to `localhost` and to addresses alone, else to whatever name the network calls it by.
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
            server = await asyncio.start_server(connected, host, port, limit=MAX_HEAD_BYTES, backlog=_ACCEPTED_PER_TURN)
        except OSError as e:
            # The loop's own text repeats the address.
            why = os.strerror(e.errno) if e.errno else str(e)
            if e.errno in _NO_SUCH_ADDRESS:
                raise SettingError("VPN_SENTINEL_HEALTH_HOST", f"cannot listen on {host}: {why}") from e
            raise SettingError("VPN_SENTINEL_HEALTH_PORT", f"cannot listen on {host} port {port}: {why}") from e
        for bound in server.sockets:
            # asyncio takes as many in one turn as it lets wait; the same socket may be told of more (listen(2)).
            with socket.fromfd(bound.fileno(), bound.family, bound.type) as same:
                same.listen(_BACKLOG)
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
        status, said = self.answer(target.partition("?")[0])
        if status != 404 and method == "OPTIONS":
            return _http(204, None, _ALLOW)
        if status != 404 and method not in ("GET", "HEAD"):
            return _http(405, {"status": "method not allowed"}, _ALLOW)
        return _http(status, said, body=method != "HEAD")


def _plain(path: str) -> str:
    """A path without the one slash that may stand at its end."""
    return path[:-1] if path.endswith("/") and path != "/" else path


def _within(now: float, then: float | None, seconds: float) -> bool:
    return then is not None and now - then <= seconds


def _ago(now: float, then: float | None) -> float | None:
    return None if then is None else round(now - then, 1)


def _http(
    status: int, said: Mapping[str, object] | None, more: Mapping[str, str] | None = None, *, body: bool = True
) -> bytes:
    """An answer with `said` as JSON; None is no content. No other site's page may use it, not even as an image."""
    text = b"" if said is None else json.dumps(said).encode()
    fields = {
        **({} if said is None else {"Content-Type": "application/json", "Content-Length": str(len(text))}),
        **(more or {}),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Connection": "close",
    }
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{k}: {v}" for k, v in fields.items()), "", ""]
    return "\r\n".join(lines).encode() + (text if body else b"")
