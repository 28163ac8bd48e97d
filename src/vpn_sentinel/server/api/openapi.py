"""The OpenAPI document: Litestar describes its own routes, this module adds those that are answered in front of it."""

from typing import Any, Final

import msgspec
from litestar import Request, Router
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme

from vpn_sentinel import __version__
from vpn_sentinel.server.api.guard import OPEN
from vpn_sentinel.server.api.problems import as_problem
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


class _Document(JsonRenderPlugin):
    """Renders the document once: nothing in it changes while the server runs."""

    def __init__(self, api_path: str) -> None:
        super().__init__(path="/openapi.json")
        self._api_path = api_path
        self._rendered: bytes | None = None

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        if self._rendered is None:
            self._rendered = self.render_json(request, _with_ingest(openapi_schema, self._api_path))
        return self._rendered


def document(api_path: str) -> OpenAPIConfig:
    """The configuration that serves the document at `/schema/openapi.json` below `api_path`, open to everyone."""
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
        render_plugins=[_Document(api_path)],
        openapi_router=Router(
            "/schema", route_handlers=[], include_in_schema=False, opt=OPEN, after_request=as_problem
        ),
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
