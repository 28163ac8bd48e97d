"""What the reading routes answer."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest
from sqlalchemy import delete, insert

from tests.conftest import ManualClock
from tests.server.sample import HTML, KEY
from vpn_sentinel.server.api.app import build_api
from vpn_sentinel.server.api.services import ApiServices
from vpn_sentinel.server.store import queries, schema
from vpn_sentinel.server.store.store import Store, StoreUnavailable


async def get(client: httpx.AsyncClient, path: str, **query: Any) -> Any:
    response = await client.get(path, params=query)
    assert response.status_code == 200, response.text
    return response.json()


async def test_status_speaks_as_the_replaced_system_did(reader: httpx.AsyncClient, filled: dict[str, int]) -> None:
    status = await get(reader, "/status")
    assert set(status) == set(filled)
    assert status["media-nl"] == {
        "last_seen": "2027-01-15T07:59:56+00:00",
        "ip": "203.0.113.7",
        "location": "Amsterdam, North Holland, NL",
        "provider": "Example VPN B.V.",
        "country": "NL",
        "city": "Amsterdam",
        "region": "North Holland",
        "timezone": "Europe/Amsterdam",
        "dns_loc": None,
        "dns_colo": None,
        "client_version": "2.0.0",
        "state": "protected",
        "findings": [
            {
                "code": "killswitch_open",
                "severity": "warning",
                "message": "A packet sent beside the tunnel came out at 198.51.100.23.",
                "advice": "Switch the VPN's kill switch on: without one, traffic leaks when the tunnel goes away.",
                "evidence": {"address": "198.51.100.23"},
            }
        ],
        "since": "2027-01-03T08:00:00+00:00",
    }
    assert status["new-box"]["last_seen"] is None
    assert status["new-box"]["location"] is None


async def test_status_without_tunnels(reader: httpx.AsyncClient) -> None:
    assert await get(reader, "/status") == {}


async def test_a_wrong_parameter_is_called_as_people_call_it(reader: httpx.AsyncClient) -> None:
    refused = await reader.get("/incidents", params={"open": "maybe"})
    assert (refused.status_code, refused.json()["detail"].partition(":")[0]) == (400, "open")


async def test_whoami_believes_only_the_socket(nobody: httpx.AsyncClient) -> None:
    response = await nobody.get("/whoami", headers={"X-Forwarded-For": "203.0.113.99"})
    assert response.json() == {"ip": "192.0.2.1", "version": 4}


async def test_tunnels(reader: httpx.AsyncClient, filled: dict[str, int]) -> None:
    listed = (await get(reader, "/tunnels"))["tunnels"]
    assert [t["name"] for t in listed] == sorted(filled)
    one = await get(reader, "/tunnels/seedbox-nl")
    assert one == next(t for t in listed if t["name"] == "seedbox-nl")
    assert (one["state"], one["exit"]) == ("leaking", {"ipv4": "198.51.100.23", "ipv6": "2001:db8:a::23"})
    assert [f["code"] for f in one["findings"]] == ["ip_leak", "dns_leak"]


async def test_unknown_tunnel(reader: httpx.AsyncClient, filled: dict[str, int]) -> None:
    for path in ("/tunnels/nobody", "/tunnels/nobody/history", "/tunnels/%ff", "/tunnels/%00"):
        response = await reader.get(path)
        assert response.status_code == 404, path
        assert response.headers["content-type"] == "application/problem+json"


async def test_history_pages_show_each_row_once(reader: httpx.AsyncClient, filled: dict[str, int]) -> None:
    seen, moved, until, pages = [], [], None, 0
    while True:
        page = await get(reader, "/tunnels/seedbox-nl/history", limit=50, **({"until": until} if until else {}))
        seen += [o["seq"] for o in page["observations"]]
        moved += [t["new"] for t in page["transitions"]]
        until, pages = page["next_until"], pages + 1
        if until is None:
            break
    assert seen == list(range(296, 0, -1))
    assert moved == ["leaking", "protected", "down", "protected"]
    assert pages == 6


async def test_history_between_two_times(reader: httpx.AsyncClient, filled: dict[str, int], clock: ManualClock) -> None:
    page = await get(reader, "/tunnels/seedbox-nl/history", since=clock.now - 290, until=clock.now - 286)
    assert [o["seq"] for o in page["observations"]] == [14, 13, 12, 11, 10]
    page = await get(
        reader, "/tunnels/seedbox-nl/history", since="2027-01-15T07:55:10Z", until="2027-01-15T08:55:14+01:00"
    )
    assert [o["seq"] for o in page["observations"]] == [14, 13, 12, 11, 10]
    assert page["observations"][0]["body"] == {"trigger": "network", "canaries": [], "took_ms": 41.5}


async def test_history_passes_an_instant_that_holds_more_than_a_page(
    store: Store, filled: dict[str, int], clock: ManualClock
) -> None:
    crowd = [
        {
            "tunnel_id": filled["media-nl"],
            "spool": "s",
            "seq": n,
            "at": clock.now - 9,
            "received_at": clock.now,
            "state": "protected",
            "body": "{}",
        }
        for n in range(1, 12)
    ]
    await store.write(insert(schema.observations).values(crowd))
    page = await queries.history(store, "media-nl", None, None, 5)
    assert page is not None
    assert len(page.observations) == 5
    assert page.next_until is not None
    rest = await queries.history(store, "media-nl", None, page.next_until, 5)
    assert rest is not None
    assert (rest.observations, rest.next_until) == ([], None)


@pytest.mark.parametrize(
    "query",
    [
        "limit=-1",
        "limit=0",
        "limit=501",
        "limit=1e3",
        "limit=NaN",
        "limit=99999999999999999999999",
        "limit=x",
        "since=NaN",
        "since=inf",
        "since=-5",
        "since=1e400",
        "until=99999999999999",
        "since=yesterday",
        "until=2026-99-99T00:00:00",
        "since=" + "9" * 65,
        "since=2027-01-15T08:00:00%00",
    ],
)
async def test_query_that_cannot_be_meant(reader: httpx.AsyncClient, filled: dict[str, int], query: str) -> None:
    response = await reader.get(f"/tunnels/seedbox-nl/history?{query}")
    assert response.status_code in (400, 422), response.text
    problem = response.json()
    assert set(problem) == {"type", "title", "status", "detail"}
    assert query.partition("=")[0] in problem["detail"]


@pytest.mark.parametrize(
    "query",
    ["open=perhaps", "before=0", "before=99999999999999999999", f"tunnel={'x' * 101}", "tunnel=%00", "tunnel=a%0ab"],
)
async def test_incident_query_that_cannot_be_meant(reader: httpx.AsyncClient, query: str) -> None:
    assert (await reader.get(f"/incidents?{query}")).status_code == 400


async def test_incidents(reader: httpx.AsyncClient, filled: dict[str, int]) -> None:
    listed = (await get(reader, "/incidents"))["incidents"]
    assert [(i["tunnel"], i["worst"]) for i in listed] == [
        ("cabin-no", "silent"),
        ("seedbox-nl", "leaking"),
        ("seedbox-nl", "down"),
    ]
    assert [i["duration"] for i in listed] == [172800, 73, 2000]
    assert len((await get(reader, "/incidents", open="true"))["incidents"]) == 2
    assert [i["worst"] for i in (await get(reader, "/incidents", open="false"))["incidents"]] == ["down"]
    assert [i["worst"] for i in (await get(reader, "/incidents", tunnel="cabin-no"))["incidents"]] == ["silent"]
    first = await get(reader, "/incidents", limit=2)
    second = await get(reader, "/incidents", limit=2, before=first["next_before"])
    assert [i["id"] for i in first["incidents"] + second["incidents"]] == [i["id"] for i in listed]
    assert second["next_before"] is None


async def test_deliveries_tell_every_attempt_and_no_secret(reader: httpx.AsyncClient, filled: dict[str, int]) -> None:
    response = await reader.get("/deliveries")
    assert "SECRET" not in response.text
    owed, done = response.json()["deliveries"]
    assert (owed["status"], owed["attempts"], owed["settled_at"]) == ("due", [], None)
    assert (done["status"], done["channel"], done["kind"]) == ("done", "telegram", "leaking")
    assert [(a["attempt"], a["result"], a["reason"]) for a in done["attempts"]] == [
        (1, "transient", "rate_limited"),
        (2, "done", ""),
    ]


async def test_summary(reader: httpx.AsyncClient, filled: dict[str, int]) -> None:
    assert await get(reader, "/summary") == {
        "total": 7,
        "states": {
            "leaking": 1,
            "down": 1,
            "degraded": 1,
            "silent": 1,
            "unverified": 0,
            "pending": 1,
            "unknown": 0,
            "protected": 2,
        },
        "worst": "leaking",
    }


async def test_one_damaged_row_does_not_blank_the_list(
    reader: httpx.AsyncClient, store: Store, filled: dict[str, int]
) -> None:
    await store.write(
        schema.tunnels.update()
        .where(schema.tunnels.c.name == "media-nl")
        .values(
            state="sleeping",
            findings='[{"code":"from_the_future","message":"?","evidence":{}}]',
            place="{",
            resolvers="7",
        )
    )
    shown = await get(reader, "/tunnels/media-nl")
    assert (shown["state"], shown["resolvers"], shown["place"]["country"]) == ("unknown", [], None)
    assert [(f["code"], f["severity"]) for f in shown["findings"]] == [("from_the_future", "info")]


async def test_html_is_data(reader: httpx.AsyncClient, store: Store, filled: dict[str, int]) -> None:
    await store.write(schema.tunnels.update().values(dns_loc=HTML))
    response = await reader.get("/tunnels/media-nl")
    assert response.json()["dns_loc"] == HTML
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/schema/nothing", 404),
        ("POST", "/status", 405),
        ("DELETE", "/tunnels/media-nl", 405),
    ],
)
async def test_errors_are_problems(reader: httpx.AsyncClient, method: str, path: str, status: int) -> None:
    response = await reader.request(method, path)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == status
    if status == 405:
        assert "GET" in response.headers["allow"]


class Broken:
    """A store whose every question fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def read(self, statement: object) -> Any:
        raise self._error


async def ask_broken(services: ApiServices, error: Exception) -> httpx.Response:
    app = build_api(replace(services, store=Broken(error)))  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://sentinel.test/api/v1") as client:
        return await client.get("/status", headers={"X-API-Key": KEY})


async def test_database_away(services: ApiServices) -> None:
    response = await ask_broken(services, StoreUnavailable("connection", "tcp 10.0.0.5:5432 refused"))
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    assert "10.0.0.5" not in response.text


async def test_defect_says_nothing_of_the_inside(services: ApiServices, caplog: pytest.LogCaptureFixture) -> None:
    response = await ask_broken(services, KeyError("secret detail"))
    assert response.status_code == 500
    assert response.json()["detail"] == "The server could not answer."
    assert "secret detail" in caplog.text


async def test_openapi_describes_what_is_answered(nobody: httpx.AsyncClient) -> None:
    document = (await nobody.get("/schema/openapi.json")).json()
    assert document["openapi"].startswith("3.1")
    paths = {p.removeprefix("/api/v1") for p in document["paths"]}
    assert paths == {
        "/status",
        "/whoami",
        "/tunnels",
        "/tunnels/{name}",
        "/tunnels/{name}/history",
        "/incidents",
        "/deliveries",
        "/summary",
        "/events",
        "/keepalive",
    }
    text = json.dumps(document)
    names = set(document["components"]["schemas"])
    refs = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert refs <= names
    assert {"Keepalive", "Tunnel", "Finding", "Observation", "Notice", "PortCheck"} <= names
    assert not [n for n in names if n.endswith("Body")]


async def test_incidents_go_with_their_tunnel(reader: httpx.AsyncClient, store: Store, filled: dict[str, int]) -> None:
    await store.write(delete(schema.tunnels).where(schema.tunnels.c.name == "cabin-no"))
    assert {i["tunnel"] for i in (await get(reader, "/incidents"))["incidents"]} == {"seedbox-nl"}
