"""Who may read: callers with a shared key, from an allowed address.

The guard covers the whole application; a route opts out explicitly.
"""

import math
from typing import Any, Final

from litestar.connection import ASGIConnection
from litestar.exceptions import NotAuthorizedException, PermissionDeniedException, TooManyRequestsException
from litestar.handlers import BaseRouteHandler
from litestar.types import Guard

from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.server.access import Access, TooManyWrongKeys, key_from
from vpn_sentinel.server.client import client_address, headers_of, inside
from vpn_sentinel.server.settings import ServerSettings

# Put in a route's `opt` to open it to everyone.
OPEN: Final = {"open": True}


def shared_key(access: Access, settings: ServerSettings) -> Guard:
    """A guard that asks for a shared key: 401 without one, 403 with a wrong one or with a tunnel's own token.

    Before that 403 for an address that is not on the allow-list, and 429 after too many wrong keys.
    """

    async def guard(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        if handler.opt.get("open") is True:
            return
        headers = headers_of(connection.scope)
        ip = address_of(connection, headers, settings)
        if settings.allowed_ips and (ip is None or not inside(ip, settings.allowed_ips)):
            raise PermissionDeniedException(
                detail=f"The address {ip or 'that a proxy hides'} is not on the allow-list."
            )
        key = key_from(headers)
        if key is None:
            raise NotAuthorizedException(detail="A key is needed, in X-API-Key or as a bearer token.")
        try:
            caller = await access.admit(key, ip)
        except TooManyWrongKeys as e:
            retry = {"Retry-After": str(max(1, math.ceil(e.retry_after)))}
            raise TooManyRequestsException(detail="Too many wrong keys from this address.", headers=retry) from e
        if caller is None:
            raise PermissionDeniedException(detail="This key is not known.")
        if not caller.shared:
            raise PermissionDeniedException(detail="A tunnel's own token may report, not read: use a shared key.")

    return guard


def address_of(
    connection: ASGIConnection[Any, Any, Any, Any], headers: dict[str, str], settings: ServerSettings
) -> IPAddress | None:
    """The real address of a request: see `client.client_address`. None also on a Unix socket, which has none."""
    try:
        remote = connection.client.host if connection.client else ""
        return client_address(remote, headers.get("x-forwarded-for"), settings.trusted_proxies)
    except ValueError:
        return None
