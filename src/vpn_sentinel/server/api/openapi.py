"""The OpenAPI document: Litestar describes its own routes, this module adds those that are answered in front of it."""

from collections.abc import Iterable, Mapping, Sequence
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
    "400": "The body is not JSON, or names nobody; or a parameter cannot be: the detail names it.",
    "401": "No key was shown.",
    "403": "The key is wrong, or the address or the name is not this caller's.",
    "404": "There is none of this name; or, of `whoami`, where you come from is not known.",
    "413": "The body is too large.",
    "415": "The body is not of type application/json.",
    "422": "The JSON says something impossible; the detail names the field.",
    "429": "Too many requests; Retry-After says when to come back.",
    "503": "The database cannot be reached; Retry-After says when to come back.",
}
_OF_REPORTS: Final = ("400", "401", "403", "413", "415", "422", "429", "503")
_OF_KEYS: Final = ("401", "403", "429", "503")


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
        return msgspec.json.encode(_completed(known.openapi_schema.to_schema(), api_path, routes))

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


def _completed(schema: dict[str, Any], api_path: str, routes: Sequence[HTTPRouteHandler]) -> dict[str, Any]:
    """The document with our refusals, of which the framework knows nothing, and what is answered in front of it."""
    types = (keepalive.Keepalive, keepalive.Received, Problem)
    where = "#/components/schemas/{name}"
    (body, received, problem), shapes = msgspec.json.schema_components(types, ref_template=where)

    def refusals(codes: Iterable[str]) -> dict[str, Any]:
        content = {"application/problem+json": {"schema": problem}}
        return {code: {"description": _REFUSALS[code], "content": content} for code in codes}

    paths = dict(schema["paths"])
    for route in routes:
        for path in (f"{api_path}{path.replace(':str', '')}" for path in route.paths):
            asked = paths[path]["get"]
            is_open = route.opt.get("open") is True
            codes = ("404",) if is_open else (*_OF_KEYS, *_of_parameters(asked.get("parameters", [])))
            answers = {"200": asked["responses"]["200"], **refusals(sorted(codes))}
            paths[path] = {"get": {**asked, "responses": answers, **({"security": []} if is_open else {})}}
    paths[f"{api_path}/keepalive"] = {
        "post": {
            "summary": "Report as the replaced system's client did",
            "operationId": "Keepalive",
            "tags": ["reports"],
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
            "responses": {
                "200": {"description": "Stored.", "content": {"application/json": {"schema": received}}},
                **refusals(_OF_REPORTS),
            },
        }
    }
    components = schema.get("components", {})
    return {
        **schema,
        "paths": paths,
        "components": {**components, "schemas": {**components.get("schemas", {}), **shapes}},
    }


def _of_parameters(parameters: Iterable[Mapping[str, Any]]) -> set[str]:
    return {"404" if parameter["in"] == "path" else "400" for parameter in parameters}
