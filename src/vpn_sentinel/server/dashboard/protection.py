"""Protects a page without a login from other sites, by response headers and a check of the Host header."""

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
    """The request names another host."""

    status_code = 421


async def add_headers(message: Message, _: Scope) -> None:
    """Add the protecting headers to every answer, errors included; answers are not cached unless they say otherwise."""
    if message["type"] == "http.response.start":
        headers = list(message.get("headers", []))
        if not any(name.lower() == b"cache-control" for name, _ in headers):
            headers.append((b"cache-control", b"no-store"))
        message["headers"] = [*headers, *_HEADERS]


def known_host(public_url: str | None) -> Guard:
    """A guard against DNS rebinding: a site whose own name resolves to this server must not be able to read the pages.

    The browser would send that name. Addresses and `localhost` cannot be rebound, and `public_url` is ours.
    """
    # The host in `public_url` may be an IPv6 address; `hostname` has it without brackets.
    ours = {"localhost"} | ({urlsplit(public_url).hostname or ""} if public_url else set())

    def guard(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        if not is_host_of(connection.headers.get("host", ""), ours):
            raise Misdirected(
                detail="This page answers to addresses, to localhost and to the host of VPN_SENTINEL_PUBLIC_URL only."
            )

    return guard
