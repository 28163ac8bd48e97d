"""The checks before a report is read: address, key, rate and size."""

import math
from dataclasses import dataclass
from typing import Any, Final

from vpn_sentinel.domain.counted import counted
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.access import Access, Caller, TooManyWrongKeys, key_from
from vpn_sentinel.server.client import client_address, client_of, headers_of, inside
from vpn_sentinel.server.rate_limit import RateLimit
from vpn_sentinel.server.settings import ServerSettings
from vpn_sentinel.wire import limits

Headers = dict[str, str]
# A reason may repeat the sender's own text, which must not make it as long.
_MAX_DETAIL_CHARS: Final = 300


class Refusal(Exception):
    """A request is refused. `detail` is for its sender; `retry_after` in seconds where trying again can help.

    `refused_reports` is the fingerprint of the message of reports that is invalid, "" where that is not the reason.
    """

    def __init__(self, status: int, detail: str, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail[:_MAX_DETAIL_CHARS]
        self.retry_after = retry_after
        self.refused_reports = ""


@dataclass(frozen=True, slots=True)
class AdmittedPeer:
    """An admitted caller, its real address (None: unknown), and its headers (lower-case names)."""

    caller: Caller
    address: IPAddress | None
    headers: Headers

    def client(self, name: str) -> str:
        """The key of the rate limit: the client, or, where its address is unknown, what reports as `name`."""
        return f"unknown {name[:100]}" if self.address is None else client_of(self.address)


class Admission:
    def __init__(self, settings: ServerSettings, access: Access, clock: Clock) -> None:
        self._settings = settings
        self._access = access
        self._clock = clock
        self._rate = RateLimit(settings.rate_limit)

    async def admit(self, scope: Any) -> AdmittedPeer:
        """Admit a caller that may report. Raises Refusal (401, 403, 429)."""
        headers = headers_of(scope)
        address = self.address(scope, headers)
        if self._settings.allowed_ips and (address is None or not inside(address, self._settings.allowed_ips)):
            raise Refusal(403, f"the address {address or 'that a proxy hides'} is not on the allow-list")
        key = key_from(headers)
        if key is None:
            raise Refusal(401, "a key is needed: send it in the header X-API-Key")
        try:
            caller = await self._access.admit(key, address)
        except TooManyWrongKeys as e:
            raise Refusal(429, str(e), e.retry_after) from e
        if caller is None:
            raise Refusal(403, "this key is not known here")
        return AdmittedPeer(caller, address, headers)

    async def recheck(self, peer: AdmittedPeer) -> None:
        """Raises Refusal (403) when the key of `peer` was revoked after it was admitted."""
        if await self._access.caller(key_from(peer.headers)) is None:
            raise Refusal(403, "this key is not known here any more")

    def address(self, scope: Any, headers: Headers) -> IPAddress | None:
        """The real address of a request: see `client.client_address`."""
        client = scope.get("client")
        if client is None:
            raise Refusal(400, "the connection has no address")
        return client_address(client[0], headers.get("x-forwarded-for"), self._settings.trusted_proxies)

    def rate_limit(self, key: str) -> None:
        """Raises Refusal (429) when `key` exceeds the reports a minute."""
        wait = self._rate.wait(key, self._clock.boottime())
        if wait:
            per_minute = self._settings.rate_limit
            raise Refusal(429, f"more than {counted(per_minute, 'report')} a minute from here", wait)


async def json_body(receive: Any, headers: Headers) -> bytes:
    """Read a JSON body. Raises Refusal (400, 413, 415)."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refusal(415, "send application/json")
    announced = headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > limits.MAX_BODY_BYTES:
        raise Refusal(413, f"a body takes at most {limits.MAX_BODY_BYTES} bytes")
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refusal(400, "the connection closed before the body was complete")
        part = message.get("body", b"")
        size += len(part)
        if size > limits.MAX_BODY_BYTES:
            raise Refusal(413, f"a body takes at most {limits.MAX_BODY_BYTES} bytes")
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts) if len(parts) > 1 else parts[0]


def retry_header(seconds: float | None) -> list[tuple[bytes, bytes]]:
    return [] if seconds is None else [(b"retry-after", str(max(1, math.ceil(seconds))).encode())]
