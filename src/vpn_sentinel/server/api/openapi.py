"""The OpenAPI document: Litestar describes its own routes, and this module adds those of `ingest.router`."""

import re
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
from vpn_sentinel.wire import keepalive, rest
from vpn_sentinel.wire.problem import Problem

_REFUSALS: Final = {
    "400": "The body is not JSON, or has no name; or a parameter is not valid: the detail names it.",
    "401": "No key was sent.",
    "403": "The key is wrong, or the address or the name is not allowed for it.",
    "404": "Nothing has this name; or, for `whoami`, your address is not known.",
    "413": "The body is too large.",
    "415": "The body is not of type application/json.",
    "422": "A value in the JSON is not valid; the detail names the field.",
    "429": "Too many requests; Retry-After says when to try again.",
    "503": "The database cannot be reached; Retry-After says when to try again.",
}
# Clients that are generated from the document have its names: there, `FindingBody` is a `Finding`.
_BODIES: Final = "|".join(name.removesuffix("Body") for name in vars(rest) if name.endswith("Body"))
_NAME_OF_BODY: Final = re.compile(rf'(?<=["/])({_BODIES})Body(?=")'.encode())
_REPORT_CODES: Final = ("400", "401", "403", "413", "415", "422", "429", "503")
_KEY_CODES: Final = ("401", "403", "429", "503")


def openapi_route(
    api_path: str, routes: Sequence[HTTPRouteHandler], dependencies: Mapping[str, Provide]
) -> HTTPRouteHandler:
    """The route that serves the document of `routes` at `/schema/openapi.json`, open to everyone.

    The framework's own route for it would add others: `/schema` and everything below it.
    """

    @cache
    def rendered() -> bytes:  # it does not change while the server runs
        known = Litestar(
            route_handlers=routes,
            path=api_path,
            dependencies=dependencies,
            openapi_config=_config(),
            logging_config=None,
        )
        document = msgspec.json.encode(_completed(known.openapi_schema.to_schema(), api_path, routes))
        return _NAME_OF_BODY.sub(rb"\1", document)

    @get("/schema/openapi.json", opt=OPEN, include_in_schema=False, sync_to_thread=False)
    def openapi() -> Response[bytes]:
        return Response(rendered(), media_type="application/vnd.oai.openapi+json")

    return openapi


def _config() -> OpenAPIConfig:
    return OpenAPIConfig(
        title="VPN Sentinel",
        version=__version__,
        summary="The state and history of the watched tunnels, and the messages about them.",
        components=Components(
            security_schemes={
                "key": SecurityScheme(type="apiKey", name="X-API-Key", security_scheme_in="header"),
                "bearer": SecurityScheme(type="http", scheme="bearer"),
            }
        ),
        security=[{"key": []}, {"bearer": []}],
    )


def _completed(schema: dict[str, Any], api_path: str, routes: Sequence[HTTPRouteHandler]) -> dict[str, Any]:
    """The document with our error answers, which the framework does not know, and the routes of `ingest.router`."""
    types = (keepalive.Keepalive, keepalive.Received, Problem)
    where = "#/components/schemas/{name}"
    (body, received, problem), shapes = msgspec.json.schema_components(types, ref_template=where)

    def refusals(codes: Iterable[str]) -> dict[str, Any]:
        content = {"application/problem+json": {"schema": problem}}
        return {code: {"description": _REFUSALS[code], "content": content} for code in codes}

    paths = dict(schema["paths"])
    for route in routes:
        for path in (f"{api_path}{path.replace(':str', '')}" for path in route.paths):
            operation = paths[path]["get"]
            is_open = route.opt.get("open") is True
            codes = ("404",) if is_open else (*_KEY_CODES, *_parameter_codes(operation.get("parameters", [])))
            answers = {"200": operation["responses"]["200"], **refusals(sorted(codes))}
            paths[path] = {"get": {**operation, "responses": answers, **({"security": []} if is_open else {})}}
    paths[f"{api_path}/keepalive"] = {
        "post": {
            "summary": "Report as the replaced system's client did",
            "operationId": "Keepalive",
            "tags": ["reports"],
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
            "responses": {
                "200": {"description": "Stored.", "content": {"application/json": {"schema": received}}},
                **refusals(_REPORT_CODES),
            },
        }
    }
    components = schema.get("components", {})
    return {
        **schema,
        "paths": paths,
        "components": {**components, "schemas": {**components.get("schemas", {}), **shapes}},
    }


def _parameter_codes(parameters: Iterable[Mapping[str, Any]]) -> set[str]:
    return {"404" if parameter["in"] == "path" else "400" for parameter in parameters}
