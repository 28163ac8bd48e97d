"""The part of the API that reads: typed answers, one guard for all routes, problem details for errors."""

from litestar import Litestar
from litestar.di import Provide
from litestar.types import Message, Scope

from vpn_sentinel.server.api.events import TunnelEncoder
from vpn_sentinel.server.api.guard import shared_key
from vpn_sentinel.server.api.openapi import openapi_route
from vpn_sentinel.server.api.problems import HANDLERS
from vpn_sentinel.server.api.routes import ROUTES
from vpn_sentinel.server.api.services import ApiServices


def build_api(services: ApiServices) -> Litestar:
    """The application under `settings.api_path`. Reports (`/keepalive`, `/agent`) are answered by `ingest.router`."""
    encoder = TunnelEncoder(services.store)
    dependencies = {
        "services": Provide(lambda: services, sync_to_thread=False),
        "encoder": Provide(lambda: encoder, sync_to_thread=False),
    }
    path = services.settings.api_path
    return Litestar(
        route_handlers=[*ROUTES, openapi_route(path, ROUTES, dependencies)],
        path=path,
        guards=[shared_key(services.access, services.settings)],
        dependencies=dependencies,
        exception_handlers=HANDLERS,
        openapi_config=None,
        before_send=[_headers],
        logging_config=None,
        request_max_body_size=0,
    )


async def _headers(message: Message, _: Scope) -> None:
    """Headers of every answer: it is data for one caller, not a page, and not to be cached."""
    if message["type"] == "http.response.start":
        headers = [(k, v) for k, v in message.get("headers", []) if k.lower() != b"cache-control"]
        message["headers"] = [*headers, (b"cache-control", b"no-store"), (b"x-content-type-options", b"nosniff")]
