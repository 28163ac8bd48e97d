"""The agent's own health over HTTP, for container engines and people: tied to the last success, not to the process.

200 or 503, with the same JSON each time; any other path is a 404. `/client/health` may be left out in front.

- `/client/health`, `/health`, `/`: rounds are made and, within the last quarter of an hour, reports arrived.
- `/client/health/ready`, `/ready`: both are recent.
- `/client/health/startup`, `/startup`: the first round is done.
"""

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.settings import SettingError

_LIMIT: Final = 2.0  # seconds for a request
_MOST: Final = 4096  # bytes of its head
_UPLINK_GRACE: Final = 900.0  # seconds: a restart of the agent does not bring a server back
_ROUND_SLACK: Final = 30.0  # seconds a round may take when nothing answers


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
        rounds_at = 3 * self._interval + _ROUND_SLACK
        looking = _within(now, signs.last_round if signs.last_round is not None else signs.started, rounds_at)
        connected = _within(now, signs.last_ack, rounds_at)
        heard = _within(now, signs.last_ack if signs.last_ack is not None else signs.started, _UPLINK_GRACE + rounds_at)
        match path.removeprefix("/client/health"):
            case "" | "/health" | "/":
                well = looking and heard
            case "/ready":
                well = signs.last_round is not None and looking and connected
            case "/startup":
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
        """Start to listen. Raises SettingError when the port is not to be had."""
        try:
            return await asyncio.start_server(self._connected, host, port, limit=_MOST)
        except OSError as e:
            # The loop's own text repeats the address.
            why = os.strerror(e.errno) if e.errno else str(e)
            raise SettingError("VPN_SENTINEL_HEALTH_PORT", f"cannot listen on {host} port {port}: {why}") from e

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_LIMIT):
                request = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n", 1)[0].decode("latin-1")
                writer.write(self._response(request))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, EOFError, asyncio.LimitOverrunError):
            writer.transport.abort()

    def _response(self, request: str) -> bytes:
        method, _, rest = request.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if method not in ("GET", "HEAD"):
            return _http(405, {"status": "method not allowed"}, body=True)
        status, said = self.answer(path)
        return _http(status, said, body=method == "GET")


def _within(now: float, then: float | None, seconds: float) -> bool:
    return then is not None and now - then <= seconds


def _ago(now: float, then: float | None) -> float | None:
    return None if then is None else round(now - then, 1)


def _http(status: int, said: dict[str, object], *, body: bool) -> bytes:
    phrase = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 503: "Service Unavailable"}[status]
    text = json.dumps(said).encode()
    head = (
        f"HTTP/1.1 {status} {phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n"
        "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (text if body else b"")
