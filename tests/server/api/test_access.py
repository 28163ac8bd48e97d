"""Every route, every kind of caller. A route that is added is in this test by being added."""

import asyncio
from dataclasses import replace

import httpx
import pytest
from litestar import Litestar
from litestar.routes import HTTPRoute

from tests.conftest import ManualClock
from tests.server.sample import KEY, settings
from vpn_sentinel.server.api.app import build_api
from vpn_sentinel.server.api.services import ApiServices


def every_route(api: Litestar) -> list[tuple[str, str]]:
    """Method and path of all routes, with a name in the place of parameters; streams excepted, they do not end."""
    found: list[tuple[str, str]] = []
    for route in api.routes:
        assert isinstance(route, HTTPRoute), f"{route.path}: a kind of route that this test does not know"
        path = route.path_format.replace("{name}", "seedbox-nl")
        found += [(str(method), path) for method in sorted(route.methods)]
    return found


def open_to_all(method: str, path: str) -> bool:
    return method == "GET" and path in ("/api/v1/whoami", "/api/v1/schema/openapi.json")


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


def caller_of(api: Litestar, address: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(api, client=(address, 1234), raise_app_exceptions=False)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://sentinel.test/api/v1")


async def test_guessing_is_slowed_on_every_route(
    api: Litestar, filled: dict[str, int], clock: ManualClock, hub
) -> None:
    hub.close()
    closed = [(m, p) for m, p in every_route(api) if not open_to_all(m, p)]
    for n, (method, path) in enumerate(closed):
        async with caller_of(api, f"198.51.100.{n}") as guesser:
            seen = [
                (await guesser.request(method, f"http://sentinel.test{path}", headers={"X-API-Key": f"wrong-{k}"}))
                for k in range(21)
            ]
            assert [r.status_code for r in seen] == [403] * 20 + [429], path
            assert (seen[-1].headers["retry-after"], seen[-1].headers["content-type"]) == (
                "60",
                "application/problem+json",
            )
            right = await guesser.get("/status", headers={"X-API-Key": KEY})
            assert right.status_code == 429, "the right key is told from a wrong one in the middle of a flood"
    clock.now += 60
    async with caller_of(api, "198.51.100.0") as reader:
        assert (await reader.get("/status", headers={"X-API-Key": KEY})).status_code == 200
        for k in range(30):
            await reader.get("/status", headers={"X-API-Key": f"wrong-{k}"})
        assert (await reader.get("/status", headers={"X-API-Key": KEY})).status_code == 200


async def test_the_allow_list_holds_on_every_route(services: ApiServices, filled: dict[str, int], hub) -> None:
    hub.close()
    config = settings(SERVER_ALLOWED_IPS="10.0.0.0/8", TRUSTED_PROXIES="172.17.0.0/16")
    api = build_api(replace(services, settings=config))
    wrong = {}
    for address, forwarded, allowed in (
        ("146.70.1.2", None, False),
        ("10.1.2.3", None, True),
        ("172.17.0.2", "10.1.2.3", True),
        ("172.17.0.2", "146.70.1.2", False),
        ("146.70.1.2", "10.1.2.3", False),
        ("172.17.0.2", None, False),
    ):
        headers = {"X-API-Key": KEY} | ({"X-Forwarded-For": forwarded} if forwarded else {})
        async with caller_of(api, address) as client:
            for method, path in every_route(api):
                got = (await client.request(method, f"http://sentinel.test{path}", headers=headers)).status_code
                if (got != 403) != (allowed or open_to_all(method, path)):
                    wrong[address, forwarded, method, path] = got
    assert wrong == {}


async def test_who_has_no_address_is_not_on_the_allow_list(services: ApiServices, filled: dict[str, int]) -> None:
    api = build_api(replace(services, settings=settings(SERVER_ALLOWED_IPS="10.0.0.0/8")))
    async with caller_of(api, "") as client:
        assert (await client.get("/status", headers={"X-API-Key": KEY})).status_code == 403


async def test_every_line_of_a_proxy_counts(services: ApiServices) -> None:
    api = build_api(replace(services, settings=settings(TRUSTED_PROXIES="172.17.0.0/16")))
    async with caller_of(api, "172.17.0.2") as client:
        lines = [("X-Forwarded-For", "1.2.3.4, 146.70.1.7"), ("X-Forwarded-For", "172.17.0.9")]
        assert (await client.get("/whoami", headers=lines)).json()["ip"] == "146.70.1.7"
        assert (await client.get("/whoami", headers=[*lines, ("X-Forwarded-For", "146.70.1.8")])).json()[
            "ip"
        ] == "146.70.1.8"


async def test_who_is_hidden_by_a_proxy_is_told_so(services: ApiServices, filled: dict[str, int]) -> None:
    proxied = {"TRUSTED_PROXIES": "172.17.0.0/16", "SERVER_ALLOWED_IPS": "172.16.0.0/12"}
    async with caller_of(build_api(replace(services, settings=settings(**proxied))), "172.17.0.2") as client:
        for headers in ({}, {"X-Forwarded-For": "unknown"}):
            refused = await client.get("/whoami", headers=headers)
            assert (refused.status_code, "a proxy does not pass it on" in refused.json()["detail"]) == (404, True)
            refused = await client.get("/status", headers={"X-API-Key": KEY, **headers})
            assert refused.status_code == 403
            assert refused.json()["detail"] == "The address that a proxy hides is not on the allow-list."


async def test_a_request_that_is_cut_at_the_end_is_no_defect(
    services: ApiServices, caplog: pytest.LogCaptureFixture
) -> None:
    class Cut:
        async def read(self, _: object) -> None:
            raise asyncio.CancelledError

    async with caller_of(build_api(replace(services, store=Cut())), "192.0.2.1") as client:  # type: ignore[arg-type]
        with pytest.raises(asyncio.CancelledError):
            await client.get("/status", headers={"X-API-Key": KEY})
    assert caplog.records == []
