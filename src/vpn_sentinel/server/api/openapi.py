"""The OpenAPI document: Litestar describes its own routes, this module adds those that are answered in front of it."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

import msgspec
from litestar import Litestar, Response, get
from litestar.di import Provide
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.openapi.spec import Components, SecurityScheme

from vpn_sentinel import __version__
from vpn_sentinel.server.api.guard import OPEN
from vpn_sentinel.wire import keepalive
from vpn_sentinel.wire.problem import Problem

_REFUSALS: Final = {
    "400": "The body is not JSON.",
    "401": "No key was shown.",
    "403": "The key is wrong, or the address or the name is not this caller's.",
    "413": "The body is too large.",
    "415": "The body is not of type application/json.",
    "422": "The JSON says something impossible; the detail names the field.",
    "429": "Too many requests; Retry-After says when to come back.",
    "503": "The database cannot be reached; Retry-After says when to come back.",
}


def described(
    api_path: str, routes: Sequence[HTTPRouteHandler], dependencies: Mapping[str, Provide]
) -> HTTPRouteHandler:
    """The route that serves the document of `routes` at `/schema/openapi.json`, open to everyone.

    The framework's own serving of it would bring further routes: `/schema` and all below it.
    """

    @cache
    def rendered() -> bytes:  # nothing in it changes while the server runs
        known = Litestar(
            route_handlers=routes,
            path=api_path,
            dependencies=dependencies,
            openapi_config=_config(),
            logging_config=None,
        )
        return msgspec.json.encode(_with_ingest(known.openapi_schema.to_schema(), api_path))

    @get("/schema/openapi.json", opt=OPEN, include_in_schema=False, sync_to_thread=False)
    def openapi() -> Response[bytes]:
        return Response(rendered(), media_type="application/vnd.oai.openapi+json")

    return openapi


def _config() -> OpenAPIConfig:
    return OpenAPIConfig(
        title="VPN Sentinel",
        version=__version__,
        summary="What the watched tunnels do, and who was told.",
        components=Components(
            security_schemes={
                "key": SecurityScheme(type="apiKey", name="X-API-Key", security_scheme_in="header"),
                "bearer": SecurityScheme(type="http", scheme="bearer"),
            }
        ),
        security=[{"key": []}, {"bearer": []}],
    )


def _with_ingest(schema: dict[str, Any], api_path: str) -> dict[str, Any]:
    types = (keepalive.Keepalive, keepalive.Received, Problem)
    where = "#/components/schemas/{name}"
    (body, received, problem), shapes = msgspec.json.schema_components(types, ref_template=where)
    refusal = {"content": {"application/problem+json": {"schema": problem}}}
    path = {
        "post": {
            "summary": "Report as the replaced system's client did",
            "operationId": "Keepalive",
            "tags": ["reports"],
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
            "responses": {
                "200": {"description": "Stored.", "content": {"application/json": {"schema": received}}},
                **{code: {"description": said, **refusal} for code, said in _REFUSALS.items()},
            },
        }
    }
    components = schema.get("components", {})
    return {
        **schema,
        "paths": {**schema.get("paths", {}), f"{api_path}/keepalive": path},
        "components": {**components, "schemas": {**components.get("schemas", {}), **shapes}},
    }
