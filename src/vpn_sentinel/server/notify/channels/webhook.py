"""A webhook: the notice as JSON, posted to an address of the owner's choice.

Body (fields may be added, none is taken away):

    {"kind", "tunnel", "state", "was", "at", "began", "outage_seconds", "exit", "old_exit", "place", "provider",
     "timezone", "resolvers": [text], "details": [text], "text",
     "findings": [{"code", "severity", "message", "evidence": {text: text}, "advice"}]}

`at` and `began` are ISO 8601 in UTC; what is not known is null or empty. Headers: `X-Sentinel-Delivery` is the same for
every try of one notice; `X-Sentinel-Signature: t=SECONDS,v1=HEX`, when a secret is set, holds the HMAC-SHA256 over
`SECONDS.BODY`. Any 2xx is taken as delivered. Redirects are not followed, and the answer's body is never read. A body
that is refused as such (400, 413, 422) is sent once more as a short one: the same fields, without findings, details and
resolvers, and `text` in two lines.
"""

import asyncio
import hmac
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Final

import httpx

from vpn_sentinel.domain.notice import Kind, Notice
from vpn_sentinel.domain.verdict import State
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.notify import text
from vpn_sentinel.server.notify.channel import DeliveryError, PermanentError, SetupError, TransientError
from vpn_sentinel.server.notify.failures import before_an_answer, retry_after
from vpn_sentinel.server.notify.guard import ForbiddenAddressError
from vpn_sentinel.server.settings import WebhookSettings
from vpn_sentinel.wire.codec import encode

SEND_TIMEOUT_S: Final = 10.0
# The state in which a notice of this kind leaves its tunnel.
_STATE: Final[Mapping[Kind, State]] = {
    Kind.CONNECTED: State.PROTECTED,
    Kind.ADDRESS_CHANGED: State.PROTECTED,
    Kind.RECOVERED: State.PROTECTED,
    Kind.LEAKING: State.LEAKING,
    Kind.DOWN: State.DOWN,
    Kind.DEGRADED: State.DEGRADED,
    Kind.SILENT: State.SILENT,
    Kind.UNVERIFIED: State.UNVERIFIED,
}


class WebhookChannel:
    """`http` must be guarded: `guard.guarded_client`. `limit` is how many seconds one delivery may take."""

    name = "webhook"

    def __init__(
        self, http: httpx.AsyncClient, webhook: WebhookSettings, clock: Clock, limit: float = SEND_TIMEOUT_S
    ) -> None:
        self._http = http
        self._webhook = webhook
        self._clock = clock
        self._limit = limit

    async def send(self, notice: Notice, delivery_id: int) -> None:
        """Raises a DeliveryError."""
        reason = ""
        for said in (body(notice), short_body(notice)):
            try:
                return await self._post(encode(said), delivery_id)
            except PermanentError as e:
                reason = e.reason
        raise SetupError(reason)  # both were refused: it is not the message, then

    async def _post(self, content: bytes, delivery_id: int) -> None:
        """Raises a DeliveryError, a PermanentError where the status can be about the body."""
        headers = {"Content-Type": "application/json", "X-Sentinel-Delivery": str(delivery_id)}
        if self._webhook.secret is not None:
            headers["X-Sentinel-Signature"] = signature(self._webhook.secret.reveal(), content, int(self._clock.wall()))
        failure: DeliveryError | None = None
        try:
            async with asyncio.timeout(self._limit):
                # The address may hold a credential, so it stays out of any variable a traceback could show.
                async with self._http.stream(
                    "POST", self._webhook.url.reveal(), content=content, headers=headers
                ) as answer:
                    wait = retry_after(answer.headers.get("Retry-After"), self._clock.wall())
                    failure = _failure(answer.status_code, wait)
        except ForbiddenAddressError:
            failure = SetupError("private_address")
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, UnicodeError) as e:
            failure = before_an_answer(e)
        if failure is not None:
            raise failure


def body(notice: Notice) -> dict[str, Any]:
    """The notice as receivers see it."""
    return {
        "kind": notice.kind,
        "tunnel": notice.tunnel,
        "state": _STATE.get(notice.kind),
        "was": notice.was,
        "at": _iso(notice.at),
        "began": None if notice.began is None else _iso(notice.began),
        "outage_seconds": None if notice.outage is None else round(notice.outage, 3),
        "exit": notice.exit,
        "old_exit": notice.old_exit,
        "port": notice.port,
        "old_port": notice.old_port,
        "role": notice.role,
        "site": notice.site,
        "place": notice.place,
        "provider": notice.provider,
        "timezone": notice.timezone,
        "resolvers": notice.resolvers,
        "findings": [
            {"code": f.code, "severity": f.severity, "message": f.message, "evidence": f.evidence, "advice": f.advice}
            for f in notice.findings
        ],
        "details": notice.details,
        "text": text.plain(notice),
    }


def short_body(notice: Notice) -> dict[str, Any]:
    """The notice without what can be long or odd in it."""
    said = body(replace(notice, findings=(), details=(), resolvers=(), place="", provider=""))
    return {**said, "text": text.brief(notice)}


def signature(secret: str, content: bytes, at: int) -> str:
    """`t=SECONDS,v1=HEX`; a receiver checks the HMAC and that the time is near, so that a copy cannot be replayed."""
    mac = hmac.new(secret.encode(), f"{at}.".encode() + content, "sha256")
    return f"t={at},v1={mac.hexdigest()}"


def _failure(status: int, wait: float | None) -> DeliveryError | None:
    """What a status means. 400, 413 and 422 can be about the body; every other one is about the receiver."""
    match status:
        case _ if 200 <= status < 300:
            return None
        case HTTPStatus.TOO_MANY_REQUESTS:
            return TransientError("rate_limited", retry_after=wait, binding=True)
        case HTTPStatus.REQUEST_TIMEOUT | HTTPStatus.TOO_EARLY:
            return TransientError("server_error")
        case _ if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return TransientError("server_error", retry_after=wait)
        case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN | HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            return SetupError("auth")
        case HTTPStatus.BAD_REQUEST | HTTPStatus.REQUEST_ENTITY_TOO_LARGE | HTTPStatus.UNPROCESSABLE_ENTITY:
            return PermanentError(f"http_{status}")
        case HTTPStatus.NOT_FOUND | HTTPStatus.GONE | HTTPStatus.METHOD_NOT_ALLOWED:
            return SetupError("not_found")
        case _ if 300 <= status < 400:
            return SetupError("redirect")
        case _:
            return SetupError(f"http_{status}")


def _iso(at: float) -> str | None:
    try:
        return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):
        return None
