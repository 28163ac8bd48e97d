"""What a person sees, and what no text from outside can make of it."""

import asyncio
import json
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
from litestar import Litestar
from litestar.routes import HTTPRoute
from sqlalchemy import insert, update

from tests.conftest import ManualClock
from tests.server.sample import HTML, finding, settings
from vpn_sentinel.domain.observation import Link, Observation, Routed, Trigger
from vpn_sentinel.domain.verdict import HARM
from vpn_sentinel.server.dashboard.app import Dashboard, DashboardServices, build_dashboard
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.store import schema
from vpn_sentinel.server.store.store import Store, StoreUnavailable
from vpn_sentinel.wire.codec import encode


class Page(HTMLParser):
    """The tags of a page, with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


async def page(browser: httpx.AsyncClient, path: str) -> Page:
    response = await browser.get(path)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    return Page(response.text)


@pytest.mark.parametrize("path", ["/", "/dashboard"])
async def test_worst_first(browser: httpx.AsyncClient, filled: dict[str, int], path: str) -> None:
    shown = await page(browser, path)
    rows = [a for a in shown.all("tr") if a.get("id")]
    states = [str(a["class"]) for a in rows]
    assert states == sorted(states, key=HARM.index)
    assert [a["id"] for a in rows][:2] == ["t-seedbox-nl", "t-torrent-se"]
    for word in (
        "1 tunnel is leaking",
        "Leaking",
        "IPv4 traffic leaves from the home address",
        "switch its kill switch on",
    ):
        assert word in shown.text
    for word in ("2001:db8:a::23", "Valencia, ES", "Home Fibre S.A. · AS64511", "198.51.100.53", "NO · OSL", "4 s ago"):
        assert word in shown.text


async def test_empty_state_tells_what_to_do(browser: httpx.AsyncClient) -> None:
    shown = await page(browser, "/")
    assert "No tunnels yet" in shown.text
    assert "vpn-sentinel token create" in shown.text
    assert "https://vpn.example.net:8443" in shown.text
    assert [("hidden" in a) for name, a in shown.tags if a.get("id") in ("fleet", "empty")] == [True, False]


async def test_page_of_one_tunnel(browser: httpx.AsyncClient, filled: dict[str, int]) -> None:
    shown = await page(browser, "/tunnels/seedbox-nl")
    for word in ("ip_leak", "198.51.100.23", "seen by", "Incidents", "33 min", "42 ms", "network", "lasted", "open"):
        assert word in shown.text
    rects = [(a["class"], float(str(a["x"])), float(str(a["width"]))) for a in shown.all("rect")]
    assert [r[0] for r in rects] == ["protected", "protected", "pending", "down", "leaking"]
    assert all(x >= 0 and x + width <= 1440.01 for _, x, width in rects)


async def test_ways_to_the_internet_are_those_of_the_last_round_that_looked(
    browser: httpx.AsyncClient, store: Store, filled: dict[str, int], clock: ManualClock
) -> None:
    """A tunnel that is gone carries nothing any more; a pulse did not look, and takes nothing back."""
    link = Link(name="tun0", present=True, up=True)
    whole = Routed(interface="tun0", family=4, share=1.0)
    rounds = (
        Observation(trigger=Trigger.TIMER, link=link, routed=(whole,)),
        Observation(trigger=Trigger.PULSE, link=link),
        Observation(trigger=Trigger.NETWORK, link=Link(name="tun0", present=False, up=False), routed=()),
    )
    shown = []
    for n, seen in enumerate(rounds, 1000):
        row = {"tunnel_id": filled["seedbox-nl"], "spool": "5f2c", "seq": n, "at": clock.now + n}
        more = {"received_at": clock.now + n, "state": "leaking", "body": encode(seen).decode()}
        await store.write(insert(schema.observations).values(row | more))
        shown.append("tun0: 100 % of IPv4" in (await page(browser, "/tunnels/seedbox-nl")).text)
    assert shown == [True, True, False]


@pytest.mark.parametrize("name", ["nobody", "%ff", "%00", "..%2f..%2fetc%2fpasswd", "<script>"])
async def test_unknown_tunnel_is_a_page_too(browser: httpx.AsyncClient, filled: dict[str, int], name: str) -> None:
    response = await browser.get(f"/tunnels/{name}")
    assert response.status_code == 404
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "<script>" not in response.text


TEXTS = ["version", "exit4", "exit6", "dns_loc", "dns_colo", "source"]


async def spoil(store: Store) -> None:
    """Put HTML into every text that is shown, also where no edge would let it in: a page must not rely on edges."""
    bad = json.dumps([finding("ip_leak", HTML, **{HTML: HTML}), finding(HTML, HTML)])
    place = json.dumps(dict.fromkeys(("country", "region", "city", "timezone", "org", "source"), HTML))
    resolvers = json.dumps([{"ip": HTML, "country": HTML, "org": HTML}])
    texts: dict[str, Any] = dict.fromkeys(TEXTS, HTML)
    await store.write(
        update(schema.tunnels).values(**texts, findings=bad, place=place, resolvers=resolvers),
        update(schema.tunnels).where(schema.tunnels.c.name == "media-nl").values(name=HTML),
        update(schema.transitions).values(findings=bad, old=HTML, new=HTML),
        update(schema.incidents).values(findings=bad, worst=HTML),
        update(schema.observations).values(state=HTML),
    )


def assert_only_text(html: str) -> None:
    shown = Page(html)
    assert HTML in shown.text
    assert not shown.all("img")
    assert all(str(a.get("src")).startswith("/static/") for a in shown.all("script"))
    assert not [name for _, a in shown.tags for name in a if name.startswith("on") or name == "style"]
    assert {str(a.get("href"))[0] for a in shown.all("a")} <= {"/", "#"}


@pytest.mark.parametrize("path", ["/", "/tunnels/seedbox-nl"])
async def test_html_stays_text(browser: httpx.AsyncClient, store: Store, filled: dict[str, int], path: str) -> None:
    await spoil(store)
    assert_only_text((await browser.get(path)).text)


async def test_html_stays_text_in_the_stream(
    browser: httpx.AsyncClient, store: Store, filled: dict[str, int], services: DashboardServices
) -> None:
    await spoil(store)
    frame = await Dashboard(services).feed.open()
    data = json.loads((await anext(frame)).split(b"data: ")[1])
    assert len(data["rows"]) == len(filled)
    for row in data["rows"]:
        assert_only_text(row["html"])


@pytest.mark.parametrize(
    "path", ["/", "/tunnels/seedbox-nl", "/static/app.css", "/static/live.js", "/nothing", "/tunnels/x"]
)
async def test_protecting_headers_on_every_answer(
    browser: httpx.AsyncClient, filled: dict[str, int], path: str
) -> None:
    response = await browser.get(path)
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; ")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


async def test_nothing_inline_and_nothing_from_elsewhere(browser: httpx.AsyncClient, filled: dict[str, int]) -> None:
    for path in ("/", "/tunnels/seedbox-nl", "/nothing"):
        text = (await browser.get(path)).text
        assert "<style" not in text
        assert " style=" not in text
        shown = Page(text)
        found = [str(v) for _, a in shown.tags for k, v in a.items() if k in ("href", "src", "action", "data")]
        assert found
        assert [v for v in found if not v.startswith(("/", "#"))] == []
        assert all(a.get("src") for a in shown.all("script"))


async def test_files(browser: httpx.AsyncClient) -> None:
    for name, kind in (("app.css", "text/css"), ("live.js", "text/javascript"), ("icons.svg", "image/svg+xml")):
        response = await browser.get(f"/static/{name}")
        assert (response.status_code, response.headers["content-type"].split(";")[0]) == (200, kind)
        assert "immutable" in response.headers["cache-control"]
        assert "http://" not in response.text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    for name in ("nothing.css", "..%2fapp.py", "%2e%2e/app.py"):
        assert (await browser.get(f"/static/{name}")).status_code == 404


HOSTS = {
    "localhost": 200,
    "localhost:8080": 200,
    "LOCALHOST": 200,
    "127.0.0.1:8080": 200,
    "192.0.2.5": 200,
    "[::1]:8080": 200,
    "vpn.example.net": 200,
    "vpn.example.net:8443": 200,
    "evil.example": 421,
    "localhost.evil.example": 421,
    "127.0.0.1.nip.io": 421,
    "vpn.example.net.evil.example": 421,
    "evil.example@localhost": 421,
    "": 421,
    "[::1": 421,
    "[::1]": 200,
    "[::1].evil": 421,
    "[::1]evil:80": 421,
    "127.0.0.1:80:80": 421,
    "127.0.0.1:": 421,
    "localhost:80a": 421,
    "localhost:8080.evil": 421,
    "[127.0.0.1]": 421,
    "::1": 421,
    "[localhost]": 421,
}


@pytest.mark.parametrize(("host", "status"), HOSTS.items())
async def test_host_names(browser: httpx.AsyncClient, filled: dict[str, int], host: str, status: int) -> None:
    response = await browser.get("/", headers={"Host": host})
    assert response.status_code == status
    assert ("seedbox" in response.text) == (status == 200)


async def test_rebinding_reaches_no_route(
    browser: httpx.AsyncClient, dashboard: Litestar, hub: Hub, filled: dict[str, int]
) -> None:
    hub.close()  # so that streams end at once
    reached = {}
    for route in dashboard.routes:
        path = route.path_format.replace("{name}", "seedbox-nl")
        assert isinstance(route, HTTPRoute)
        for method in route.methods:
            response = await browser.request(method, path, headers={"Host": "evil.example"})
            if response.status_code != 421 or "seedbox" in response.text:
                reached[method, path] = response.status_code
    assert reached == {}


async def test_public_dashboard_answers_to_any_name(services: DashboardServices, filled: dict[str, int]) -> None:
    app = build_dashboard(replace(services, settings=settings(DASHBOARD_PUBLIC="true")))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://any.example") as client:  # type: ignore[arg-type]
        assert (await client.get("/")).status_code == 200


async def test_no_route_writes(dashboard: Litestar) -> None:
    methods = {m for route in dashboard.routes if isinstance(route, HTTPRoute) for m in route.methods}
    assert methods == {"GET", "OPTIONS"}


class Broken:
    """A store whose every question fails."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def read(self, statement: object) -> Any:
        raise self._error


def broken(services: DashboardServices, error: Exception) -> httpx.AsyncClient:
    app = build_dashboard(replace(services, store=Broken(error)))  # type: ignore[arg-type]
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://localhost:8080")


async def test_database_away(services: DashboardServices) -> None:
    async with broken(services, StoreUnavailable("connection", "tcp 10.0.0.5:5432 refused")) as browser:
        for path in ("/", "/live", "/tunnels/seedbox-nl"):
            response = await browser.get(path)
            assert (response.status_code, response.headers["retry-after"]) == (503, "2")
            assert "10.0.0.5" not in response.text


async def test_a_request_that_is_cut_at_the_end_is_no_defect(
    services: DashboardServices, caplog: pytest.LogCaptureFixture
) -> None:
    async with broken(services, asyncio.CancelledError()) as browser:  # type: ignore[arg-type]
        with pytest.raises(asyncio.CancelledError):
            await browser.get("/")
    assert caplog.records == []


async def test_defect_says_nothing_of_the_inside(services: DashboardServices, caplog: pytest.LogCaptureFixture) -> None:
    async with broken(services, KeyError("secret detail")) as browser:
        response = await browser.get("/")
    assert response.status_code == 500
    assert "secret detail" not in response.text
    assert "secret detail" in caplog.text
