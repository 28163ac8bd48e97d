"""Who may read: a shared key, and nobody else. It guards the whole application; a route opts out by name."""

from typing import Any, Final

from litestar.connection import ASGIConnection
from litestar.exceptions import NotAuthorizedException, PermissionDeniedException
from litestar.handlers import BaseRouteHandler
from litestar.types import Guard

from vpn_sentinel.server.access import Access, key_from

# Put in a route's `opt` to open it to everyone.
OPEN: Final = {"open": True}


def shared_key(access: Access) -> Guard:
    """A guard that asks for a shared key: 401 without one, 403 with a wrong one or with a tunnel's own token."""

    async def guard(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        if handler.opt.get("open") is True:
            return
        key = key_from(connection.headers)
        if key is None:
            raise NotAuthorizedException(detail="A key is needed, in X-API-Key or as a bearer token.")
        caller = await access.caller(key)
        if caller is None:
            raise PermissionDeniedException(detail="This key is not known.")
        if not caller.shared:
            raise PermissionDeniedException(detail="A tunnel's own token may report, not read: use a shared key.")

    return guard
