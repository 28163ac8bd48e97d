"""Every error as RFC 9457 problem details, without internal information."""

import logging
from http import HTTPStatus
from typing import Any, Final

from litestar import Request, Response
from litestar.exceptions import HTTPException

from vpn_sentinel.server.store.store import StoreUnavailable
from vpn_sentinel.wire import problem as wire
from vpn_sentinel.wire.codec import encode

log = logging.getLogger(__name__)

# A caller may try again after this time while the database is down.
_RETRY_AFTER_S: Final = 2

Answer = Response[bytes]
_Request = Request[Any, Any, Any]


def problem(status: int, detail: str, headers: dict[str, str] | None = None) -> Answer:
    body = encode(wire.problem(status, detail))
    return Response(body, status_code=status, media_type=wire.CONTENT_TYPE, headers=dict([wire.MARK]) | (headers or {}))


def on_http_exception(_: _Request, error: HTTPException) -> Answer:
    """A refusal by the framework or a handler. Its detail is ours or the framework's; inputs are not repeated."""
    headers = dict(error.headers or {})
    if error.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return problem(error.status_code, "The server could not answer.", headers)
    if error.status_code == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    return problem(error.status_code, _detail(error), headers)


def on_store_unavailable(_: _Request, error: StoreUnavailable) -> Answer:
    return problem(
        HTTPStatus.SERVICE_UNAVAILABLE,
        f"The database {error.public_text}. Try again.",
        {"Retry-After": str(_RETRY_AFTER_S)},
    )


def on_error(request: _Request, error: Exception) -> Answer:
    """A defect: the caller learns only that the server failed, and the log shows the exception."""
    log.error("request failed", extra={"path": request.url.path}, exc_info=error)
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "The server could not answer.")


HANDLERS: Final[dict[Any, Any]] = {
    HTTPException: on_http_exception,
    StoreUnavailable: on_store_unavailable,
    Exception: on_error,
}


def _detail(error: HTTPException) -> str:
    """Which parameter is wrong and why, when the framework knows."""
    faults = [
        f"{str(e.get('key', '?')).rstrip('_')}: {e.get('message', 'not valid')}"
        for e in error.extra or []
        if isinstance(e, dict)
    ]
    return "; ".join(faults) or str(error.detail)
