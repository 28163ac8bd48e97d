"""A webhook: the notice as JSON, posted to an address of the owner's choice.

Body (fields may be added, none is removed):

    {"kind", "tunnel", "state", "was", "at", "began", "outage_seconds", "exit", "old_exit", "port", "old_port",
     "role", "site", "place", "provider", "timezone", "resolvers": [text], "details": [text], "text",
     "findings": [{"code", "severity", "message", "evidence": {text: text}, "advice"}]}

`at` and `began` are ISO 8601 in UTC; unknown values are null or empty. Headers: `X-Sentinel-Delivery` is the same for
every attempt of one notice; `X-Sentinel-Signature: t=SECONDS,v1=HEX`, when a secret is set, holds the HMAC-SHA256 over
`SECONDS.BODY`. Any 2xx counts as delivered. Redirects are not followed, and the answer's body is never read. After a
refusal of the body itself (400, 413, 422) a short one is sent: the same fields, without findings, details and
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
from vpn_sentinel.server.notify.failures import connection_error, retry_after
from vpn_sentinel.server.notify.guard import ForbiddenAddressError
from vpn_sentinel.server.settings import WebhookSettings
from vpn_sentinel.wire.codec import encode

SEND_TIMEOUT_S: Final = 10.0
# The state of the tunnel after a notice of this kind.
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
    """`http` must be a `guard.guarded_client`. `timeout_s` is the time that one delivery may take."""

    name = "webhook"

    def __init__(
        self, http: httpx.AsyncClient, webhook: WebhookSettings, clock: Clock, timeout_s: float = SEND_TIMEOUT_S
    ) -> None:
        self._http = http
        self._webhook = webhook
        self._clock = clock
        self._timeout_s = timeout_s

    async def send(self, notice: Notice, delivery_id: int) -> None:
        """Raises a DeliveryError."""
        reason = ""
        for form in (body(notice), short_body(notice)):
            try:
                return await self._post(encode(form), delivery_id)
            except PermanentError as e:
                reason = e.reason
        raise SetupError(reason)  # both were refused, so the message is not the cause

    async def _post(self, content: bytes, delivery_id: int) -> None:
        """Raises a DeliveryError, a PermanentError where the status can be about the body."""
        headers = {"Content-Type": "application/json", "X-Sentinel-Delivery": str(delivery_id)}
        if self._webhook.secret is not None:
            headers["X-Sentinel-Signature"] = signature(self._webhook.secret.reveal(), content, int(self._clock.wall()))
        failure: DeliveryError | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                # The address may hold a credential, so it stays out of any variable a traceback could show.
                async with self._http.stream(
                    "POST", self._webhook.url.reveal(), content=content, headers=headers
                ) as answer:
                    wait = retry_after(answer.headers.get("Retry-After"), self._clock.wall())
                    failure = _failure(answer.status_code, wait)
        except ForbiddenAddressError:
            failure = SetupError("private_address")
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, UnicodeError) as e:
            failure = connection_error(e)
        if failure is not None:
            raise failure


def body(notice: Notice) -> dict[str, Any]:
    """The notice as receivers get it."""
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
    """The notice without fields that can be long or unusual."""
    short = body(replace(notice, findings=(), details=(), resolvers=(), place="", provider=""))
    return {**short, "text": text.brief(notice)}


def signature(secret: str, content: bytes, at: int) -> str:
    """`t=SECONDS,v1=HEX`; a receiver checks the HMAC and that the time is recent, so a copy cannot be replayed."""
    mac = hmac.new(secret.encode(), f"{at}.".encode() + content, "sha256")
    return f"t={at},v1={mac.hexdigest()}"


def _failure(status: int, wait: float | None) -> DeliveryError | None:
    """The error for a status, None for success. 400, 413 and 422 can be about the body, all others the receiver."""
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
