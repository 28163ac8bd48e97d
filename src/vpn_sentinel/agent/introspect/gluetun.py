"""The state of gluetun, from its control server and its health server.

Only read-only routes are requested, and none that shows settings. A route that is refused or missing is not requested
for a minute; status and forwarded port are requested every few seconds, the others when the status changes and once a
minute.
"""

import asyncio
import base64
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vpn_sentinel.agent.net.http import Client, HttpError, Response, json_in
from vpn_sentinel.agent.net.urls import address_in, split
from vpn_sentinel.domain.observation import Claim
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.backoff import backoff
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.wire import limits

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S: Final = 2.0
LOOK_EVERY_S: Final = (6.0, 9.0)  # while it answers
RETRY_AFTER_S: Final = 60.0  # for routes that are missing, refused, or seldom change
STATUS, ADDRESS, DNS = "/v1/vpn/status", "/v1/publicip/ip", "/v1/dns/status"
PORT, OLD_PORT = "/v1/portforward", "/v1/openvpn/portforwarded"
CONTROL: Final = "http://127.0.0.1:8000"
HEALTH: Final = "http://127.0.0.1:9999/"


@dataclass(frozen=True, slots=True)
class Login:
    """A key, or a user with a password; neither where gluetun's default role allows these routes."""

    key: Secret = Secret("")  # noqa: RUF009 - never changes
    user: str = ""
    password: Secret = Secret("")  # noqa: RUF009

    def headers(self) -> dict[str, str]:
        if self.key:
            return {"X-API-Key": self.key.reveal()}
        if self.user:
            pair = f"{self.user}:{self.password.reveal()}".encode()
            return {"Authorization": "Basic " + base64.b64encode(pair).decode()}
        return {}


class Gluetun:
    """Requests the state repeatedly, stores the last answers, and calls `changed` when status or port change."""

    def __init__(
        self,
        http: Client,
        url: str,
        login: Login,
        changed: Callable[[], None],
        *,
        health: str | None = HEALTH,
        every: tuple[float, float] = LOOK_EVERY_S,
        retry_after: float = RETRY_AFTER_S,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._http = http
        self._url = url
        self._login = login
        self._changed = changed
        self._every = every
        self._retry_after = retry_after
        self._sleep = sleep
        # The health server only listens on the loopback address of gluetun's namespace.
        host = address_in(split(url).host)
        self._health = health if host is not None and host.is_loopback else None
        self._paused_until: dict[str, float] = {}  # by route, in loop time
        self._refused: set[str] = set()
        self._status: str | None = None
        self._error: str | None = None
        self._unhealthy: str | None = None
        self._dns: str | None = None
        self._address: IPAddress | None = None
        self._connecting = False  # it is running, and has not yet queried its address through the tunnel
        self.port: int | None = None
        self._port_route = PORT

    def claim(self) -> Claim | None:
        """None before the first answer. `status` is gluetun's, followed by what does not work."""
        if self._error is not None:
            return Claim(source="gluetun", status=f"error: {self._error}"[: limits.MAX_TEXT_LENGTH])
        if self._status is None:
            return None
        notes = [
            *(["no public address yet"] if self._connecting else []),
            *([f"unhealthy: {self._unhealthy}"] if self._unhealthy else []),
            *([f"DNS {self._dns}"] if self._dns not in (None, "running") else []),
        ]
        status = f"{self._status} ({'; '.join(notes)})" if notes else self._status
        return Claim(source="gluetun", status=status[: limits.MAX_TEXT_LENGTH], address=self._address)

    async def run(self) -> None:
        """Never returns: requests every few seconds while it answers, with back-off while it does not."""
        waits = backoff(self._every[0], 60.0)
        while True:
            before = (self._status, self._error, self.port)
            first = before == (None, None, None)
            await self.look()
            # The first answer is no change, unless it has a port, which should be reported at once.
            if before != (self._status, self._error, self.port) and (not first or self.port is not None):
                self._changed()
            if self._error is None:
                waits = backoff(self._every[0], 60.0)
                await self._sleep(random.uniform(*self._every))  # noqa: S311 - spreads load, guards nothing
            else:
                await self._sleep(next(waits))

    async def look(self) -> None:
        """Request once. If the control server does not answer, the status is an error, and the rest is unknown."""
        try:
            reply = await self._get(STATUS)
        except HttpError as e:
            self._failed(word(str(e)) or "no answer")
            return
        status = word(reply.get("status")) if reply is not None else None
        if status is None:
            self._failed("it refuses to show its status" if STATUS in self._refused else "its answer makes no sense")
            return
        if self._error is not None:
            log.info("gluetun answers", extra={"url": self._url})
        if status != self._status:
            self._paused_until.pop(ADDRESS, None)
            self._paused_until.pop(DNS, None)
        self._error, self._status = None, status
        await self._read_details()

    def _failed(self, why: str) -> None:
        if why != self._error:
            log.warning("gluetun's control server does not serve", extra={"url": self._url, "why": why})
        self._error, self._status, self._address, self.port, self._unhealthy = why, None, None, None, None

    async def _read_details(self) -> None:
        try:
            await self._ask_port()
            if self._due(ADDRESS) and (reply := await self._get(ADDRESS)) is not None:
                text = reply.get("public_ip")
                self._address = address_in(text) if isinstance(text, str) else None
                self._connecting = self._status == "running" and text == ""
                if self._address is not None:
                    self._pause(ADDRESS)
            if self._due(DNS) and (reply := await self._get(DNS)) is not None:
                self._dns = word(reply.get("status"))
                self._pause(DNS)
        except HttpError as e:
            log.debug("gluetun did not answer a request", extra={"why": str(e)})
        await self._ask_health()

    async def _ask_port(self) -> None:
        if not self._due(PORT):
            return
        reply = await self._get(self._port_route)
        if reply is None and self._port_route not in self._refused:
            self._port_route = OLD_PORT if self._port_route == PORT else PORT
            reply = await self._get(self._port_route)
        if reply is None:
            self._pause(PORT)
        else:
            self.port = port_in(reply)

    async def _ask_health(self) -> None:
        if self._health is None or not self._due(self._health):
            return
        try:
            answer = await self._http.get(self._health, limit=ANSWER_TIMEOUT_S)
        except HttpError:
            self._unhealthy = None
            self._pause(self._health)
            return
        self._unhealthy = None if answer.status == 200 else word(answer.body[:200].decode("utf-8", "replace")) or "?"

    def _due(self, route: str) -> bool:
        return asyncio.get_running_loop().time() >= self._paused_until.get(route, 0.0)

    def _pause(self, route: str) -> None:
        self._paused_until[route] = asyncio.get_running_loop().time() + self._retry_after

    async def _get(self, route: str) -> Mapping[str, Any] | None:
        """The JSON object of the answer; None when the route is refused, missing, or answers with something else."""
        answer = await self._http.get(self._url + route, limit=ANSWER_TIMEOUT_S, headers=self._login.headers())
        if answer.status in (401, 403):
            self._pause(route)
            self._log_refused(route)
            return None
        self._refused.discard(route)
        if answer.status != 200:
            self._pause(route)
            return None
        return _object(answer)

    def _log_refused(self, route: str) -> None:
        if route in self._refused:
            return
        self._refused.add(route)
        log.warning(
            "gluetun refuses a request: set VPN_SENTINEL_GLUETUN_API_KEY, or VPN_SENTINEL_GLUETUN_USER and "
            "VPN_SENTINEL_GLUETUN_PASSWORD, and let their role read this route",
            extra={"route": f"GET {route}"},
        )


def _object(answer: Response) -> Mapping[str, Any] | None:
    try:
        reply = json_in(answer.body)
    except ValueError:
        return None
    return reply if isinstance(reply, dict) else None


def word(value: object) -> str | None:
    """A short printable text; None for anything else."""
    if not isinstance(value, str):
        return None
    text = "".join(c if c.isprintable() else " " for c in value).strip()[:80]
    return text or None


def port_in(reply: Mapping[str, Any]) -> int | None:
    """`{"port": N, "ports": […]}`; 0 is none."""
    ports = reply.get("ports")
    for found in (reply.get("port"), *(ports if isinstance(ports, list) else ())):
        if isinstance(found, int) and not isinstance(found, bool) and 0 < found < 2**16:
            return found
    return None


async def found_here(http: Client, *, control: str = CONTROL, health: str = HEALTH) -> bool:
    """Whether something in this namespace answers like gluetun, so that `doctor` can recommend the setting.

    It is never used automatically: any program that listens on this port of a shared namespace could send false data.
    """
    try:
        answer = await http.get(control + STATUS, limit=1.0)
        if answer.status in (401, 403) or "status" in (_object(answer) or {}):
            return True
    except HttpError:
        pass
    try:
        return (await http.get(health, limit=1.0)).status in (200, 500)
    except HttpError:
        return False
