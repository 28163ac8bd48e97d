"""The dashboard: the present state of every tunnel, live, and the history of one. No route writes."""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any, Final

import msgspec
from litestar import Litestar, Request, Response, get
from litestar.di import NamedDependency, Provide
from litestar.exceptions import HTTPException, NotFoundException
from litestar.params import FromPath
from litestar.response import Stream
from markupsafe import Markup

from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.dashboard import view
from vpn_sentinel.server.dashboard.feed import Feed
from vpn_sentinel.server.dashboard.pages import Pages
from vpn_sentinel.server.dashboard.protection import add_headers, known_host
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.settings import ServerSettings
from vpn_sentinel.server.single_flight import SingleFlight
from vpn_sentinel.server.store import queries
from vpn_sentinel.server.store.store import Store, StoreUnavailable

log = logging.getLogger(__name__)

# A browser reconnects after this time, in milliseconds, when its stream has ended.
_RETRY_FRAME: Final = b"retry: 2000\n\n"
# Rows rendered before the event loop gets a chance to run other tasks.
_ROWS_PER_YIELD: Final = 25
_CACHE_ONE_YEAR: Final = "public, max-age=31536000, immutable"
_ENCODER: Final = msgspec.json.Encoder()

Html = Response[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class DashboardServices:
    store: Store
    hub: Hub
    settings: ServerSettings
    clock: Clock


class Dashboard:
    """Makes pages and stream frames from the database's rows."""

    def __init__(self, services: DashboardServices) -> None:
        self._store, self._clock, self._settings = services.store, services.clock, services.settings
        self.pages = Pages()
        self.overview = SingleFlight(self._overview)
        self.feed = Feed(services.hub, services.clock, self._frame, idle=b"event: beat\ndata: {}\n\n")

    async def _overview(self) -> str:
        head, now = view.overview(await queries.counts(self._store)), self._clock.wall()
        rows = await self._rows(None, now)
        return self.pages.render(
            "overview.html",
            # Rendered by our own template, which has escaped its values.
            rows=[Markup(html) for _, html in rows],  # noqa: S704
            head=head,
            now=now,
            dbip=any(seen.place_source.startswith("dbip") for seen, _ in rows),  # its licence requires a link
            server_url=self._settings.public_url or f"http://SERVER:{self._settings.api_port}",
        )

    async def tunnel(self, name: str) -> str:
        """Raises NotFoundException."""
        found = await queries.tunnel_detail(self._store, name)
        if found is None:
            raise NotFoundException(detail="No tunnel has this name.")
        now, moved, seen = self._clock.wall(), found.transitions, view.observations(found.observations)
        return self.pages.render(
            "tunnel.html",
            row=view.tunnel(found.tunnel),
            created=view.Moment.of(found.tunnel.created_at),
            strip=view.timeline(found.tunnel, moved, now, complete=len(moved) < queries.RECENT_TRANSITIONS),
            day=view.day_summary(found.tunnel, moved, now, complete=len(moved) < queries.RECENT_TRANSITIONS),
            transitions=view.transitions(moved, now),
            incidents=view.incidents(found.incidents, now),
            observations=seen,
            routes=next((o.routes for o in seen if o.routes is not None), ()),
            actions=view.actions(found.actions),
            now=now,
        )

    async def _frame(self, names: set[str] | None) -> bytes:
        """The rows of `names`, or all, as one event: `some` or `all`."""
        head, now = view.overview(await queries.counts(self._store)), self._clock.wall()
        rows = await self._rows(names, now)
        data = {
            "build": self.pages.build,
            "at": now,
            "title": head.title,
            "total": head.total,
            "head": self.pages.render("_head.html", head=head),
            "rows": [{"name": r.name, "key": r.key, "state": r.state, "html": html} for r, html in rows],
            "gone": sorted((names or set()) - {r.name for r, _ in rows}),
        }
        # The JSON has no line breaks, so it fits into one data line.
        return b"event: %b\ndata: %b\n\n" % (b"all" if names is None else b"some", _ENCODER.encode(data))

    async def _rows(self, names: set[str] | None, now: float) -> list[tuple[view.TunnelView, str]]:
        """The tunnels of `names`, or all, worst first, each with its row as HTML."""
        found: list[tuple[view.TunnelView, str]] = []
        for row in await queries.tunnel_rows(self._store, names):
            seen = view.tunnel(queries.tunnel_of(row))
            found.append((seen, self.pages.render("_row.html", row=seen, now=now)))
            if len(found) % _ROWS_PER_YIELD == 0:
                await asyncio.sleep(0)  # a thousand rows take 0.2 s: reports must not wait for them
        return sorted(found, key=lambda pair: pair[0].key)


@get(["/", "/dashboard"])
async def overview(dashboard: NamedDependency[Dashboard]) -> Html:
    return _html(await dashboard.overview.get())


@get("/tunnels/{name:str}")
async def tunnel(dashboard: NamedDependency[Dashboard], name: FromPath[str]) -> Html:
    return _html(await dashboard.tunnel(name))


@get("/live", media_type="text/event-stream")
async def live(dashboard: NamedDependency[Dashboard]) -> Stream:
    return Stream(
        _stream(await dashboard.feed.open()),
        media_type="text/event-stream",
        # Without this header some proxies buffer a response before they pass it on.
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


@get("/static/{name:str}", sync_to_thread=False)
def static(dashboard: NamedDependency[Dashboard], name: FromPath[str]) -> Response[bytes]:
    """A file by its bare name, from memory: no path of a request ever reaches the file system."""
    found = dashboard.pages.files.get(name)
    if found is None:
        raise NotFoundException
    return Response(found[1], media_type=found[0], headers={"Cache-Control": _CACHE_ONE_YEAR})


def build_dashboard(services: DashboardServices) -> Litestar:
    """The application behind `settings.dashboard_port`; its streams end when the hub closes."""
    dashboard = Dashboard(services)
    public = not ip_address(services.settings.dashboard_host).is_loopback
    return Litestar(
        route_handlers=[overview, tunnel, live, static],
        guards=[] if public else [known_host(services.settings.public_url)],
        dependencies={"dashboard": Provide(lambda: dashboard, sync_to_thread=False)},
        exception_handlers=_handlers(dashboard.pages),
        before_send=[add_headers],
        openapi_config=None,
        logging_config=None,
        request_max_body_size=0,
    )


async def _stream(frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield _RETRY_FRAME
    try:
        async for frame in frames:
            yield frame
    except StoreUnavailable as e:
        # The page shows that its content is old, and reconnects.
        log.warning("live stream ended", extra={"reason": e.reason})


def _handlers(pages: Pages) -> dict[Any, Any]:
    """Error pages in the dashboard's layout."""

    def answer(status: int, text: str, headers: dict[str, str] | None = None) -> Html:
        title = HTTPStatus(status).phrase
        return _html(pages.render("problem.html", title=title, text=text), status, headers)

    def http(_: Request[Any, Any, Any], error: HTTPException) -> Html:
        if error.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return answer(error.status_code, "The server could not answer.")
        if type(error) is NotFoundException and error.detail == HTTPStatus.NOT_FOUND.phrase:
            return answer(error.status_code, "There is no such page.")
        return answer(error.status_code, error.detail, error.headers)

    def away(_: Request[Any, Any, Any], error: StoreUnavailable) -> Html:
        text = f"The database {error.public_text}. Reload in a moment."
        return answer(HTTPStatus.SERVICE_UNAVAILABLE, text, {"Retry-After": "2"})

    def defect(request: Request[Any, Any, Any], error: Exception) -> Html:
        log.error("page failed", extra={"path": request.url.path}, exc_info=error)
        return answer(HTTPStatus.INTERNAL_SERVER_ERROR, "The server could not answer.")

    return {HTTPException: http, StoreUnavailable: away, Exception: defect}


def _html(content: str, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None) -> Html:
    return Response(content, status_code=status, media_type="text/html", headers=headers or {})
