"""What keeps other sites out of a page that asks for no login: headers, and a look at the name it was called by."""

from typing import Any, Final
from urllib.parse import urlsplit

from litestar.connection import ASGIConnection
from litestar.exceptions import HTTPException
from litestar.handlers import BaseRouteHandler
from litestar.types import Guard, Message, Scope

from vpn_sentinel.runtime.addresses import is_host_of

_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
)
_HEADERS: Final = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
]


class Misdirected(HTTPException):
    """The request was meant for another host's name."""

    status_code = 421


async def add_headers(message: Message, _: Scope) -> None:
    """Put the protecting headers on every answer, errors included; pages are not kept unless they say otherwise."""
    if message["type"] == "http.response.start":
        headers = list(message.get("headers", []))
        if not any(name.lower() == b"cache-control" for name, _ in headers):
            headers.append((b"cache-control", b"no-store"))
        message["headers"] = [*headers, *_HEADERS]


def known_host(public_url: str | None) -> Guard:
    """A guard against DNS rebinding: a site that points its own name here must not be able to read what is here.

    Its browser would say that name. An address cannot be rebound, `localhost` neither, and `public_url` is ours.
    """
    # `public_url` may hold an IPv6 address, without its brackets.
    ours = {"localhost"} | ({urlsplit(public_url).hostname or ""} if public_url else set())

    def guard(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        if not is_host_of(connection.headers.get("host", ""), ours):
            raise Misdirected(
                detail="This page answers to addresses, to localhost and to the host of VPN_SENTINEL_PUBLIC_URL only."
            )

    return guard
