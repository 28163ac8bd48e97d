"""Every route, every kind of caller. A route that is added is in this test by being added."""

import httpx
import pytest
from litestar import Litestar
from litestar.routes import HTTPRoute

from tests.server.sample import KEY


def every_route(api: Litestar) -> list[tuple[str, str]]:
    """Method and path of all routes, with a name in the place of parameters; streams excepted, they do not end."""
    found = []
    for route in api.routes:
        assert isinstance(route, HTTPRoute), f"{route.path}: a kind of route that this test does not know"
        path = route.path_format.replace("{name}", "seedbox-nl").replace("{path}", "x")
        found += [(method, path) for method in sorted(route.methods)]
    return found


def open_to_all(method: str, path: str) -> bool:
    return (method, path) == ("GET", "/api/v1/whoami") or path.startswith("/api/v1/schema")


CALLERS = ["no key", "wrong key", "malformed bearer", "tunnel token", "shared key", "shared token as bearer"]


@pytest.mark.parametrize("who", CALLERS)
async def test_every_route_by_every_caller(
    api: Litestar,
    nobody: httpx.AsyncClient,
    filled: dict[str, int],
    tunnel_token: str,
    shared_token: str,
    who: str,
    hub,
) -> None:
    hub.close()  # so that streams end at once
    headers = {
        "no key": {},
        "wrong key": {"X-API-Key": "wrong-key-of-somebody"},
        "malformed bearer": {"Authorization": f"Basic {KEY}"},
        "tunnel token": {"X-API-Key": tunnel_token},
        "shared key": {"X-API-Key": KEY},
        "shared token as bearer": {"Authorization": f"Bearer {shared_token}"},
    }[who]
    routes = every_route(api)
    assert {path for _, path in routes} >= {
        f"/api/v1/{p}" for p in ("status", "tunnels", "deliveries", "events", "summary")
    }
    wrong = {}
    for method, path in routes:
        response = await nobody.request(method, f"http://sentinel.test{path}", headers=headers)
        if open_to_all(method, path) or who.startswith("shared"):
            ok = response.status_code in (200, 204, 404)
        else:
            ok = response.status_code == (401 if who in ("no key", "malformed bearer") else 403)
            ok = ok and response.headers["content-type"] == "application/problem+json"
        if not ok:
            wrong[method, path] = response.status_code
    assert wrong == {}


async def test_refusal_says_what_to_do(nobody: httpx.AsyncClient, tunnel_token: str) -> None:
    response = await nobody.get("/status")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json() == {
        "type": "about:blank",
        "title": "Unauthorized",
        "status": 401,
        "detail": "A key is needed, in X-API-Key or as a bearer token.",
    }
    response = await nobody.get("/status", headers={"X-API-Key": tunnel_token})
    assert (response.status_code, "shared key" in response.json()["detail"]) == (403, True)
