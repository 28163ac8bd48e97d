"""The routes that read. Each queries the database and shows the result; none judges."""

from typing import Any, Final

from litestar import Request, get
from litestar.di import NamedDependency
from litestar.exceptions import NotFoundException
from litestar.handlers import HTTPRouteHandler
from litestar.params import FromPath
from litestar.response import Stream

from vpn_sentinel.server.access import key_from
from vpn_sentinel.server.api import events, present
from vpn_sentinel.server.api.guard import OPEN, address_of
from vpn_sentinel.server.api.params import Before, Limit, Open, Time, TunnelName, seconds
from vpn_sentinel.server.api.services import ApiServices
from vpn_sentinel.server.client import headers_of
from vpn_sentinel.server.store import queries
from vpn_sentinel.wire import rest

Services = NamedDependency[ApiServices]


@get("/status", summary="All tunnels under the names of the replaced system", tags=["tunnels"])
async def status(services: Services) -> dict[str, rest.ClientStatus]:
    return {t.name: present.client_status(t) for t in await queries.all_tunnels(services.store)}


@get("/whoami", summary="The address you come from", tags=["callers"], opt=OPEN, sync_to_thread=False)
def whoami(services: Services, request: Request[Any, Any, Any]) -> rest.Whoami:
    ip = address_of(request, headers_of(request.scope), services.settings)
    if ip is None:
        raise NotFoundException(
            detail="Your address is not known: a proxy does not pass it on, or the connection has no address."
        )
    return rest.Whoami(ip=str(ip), version=ip.version)


@get("/tunnels", summary="All tunnels", tags=["tunnels"])
async def list_tunnels(services: Services) -> rest.Tunnels:
    return rest.Tunnels(tunnels=await queries.all_tunnels(services.store))


@get("/tunnels/{name:str}", summary="One tunnel", tags=["tunnels"])
async def one_tunnel(services: Services, name: FromPath[str]) -> rest.Tunnel:
    found = await queries.tunnel_named(services.store, name)
    if found is None:
        raise NotFoundException(detail="No tunnel has this name.")
    return found


@get(
    "/tunnels/{name:str}/history",
    summary="A tunnel's transitions, observations and actions, newest first",
    tags=["tunnels"],
)
async def tunnel_history(
    services: Services, name: FromPath[str], since: Time = None, until: Time = None, limit: Limit = 100
) -> rest.History:
    first, last = seconds("since", since), seconds("until", until)
    page = await queries.history(services.store, name, first, last, limit)
    if page is None:
        raise NotFoundException(detail="No tunnel has this name.")
    return rest.History(
        tunnel=page.tunnel,
        transitions=[present.transition(r) for r in page.transitions],
        observations=[present.observation(r) for r in page.observations],
        actions=[present.action(r) for r in page.actions],
        next_until=page.next_until,
    )


@get("/incidents", summary="Times in which a tunnel was not protected, newest first", tags=["incidents"])
async def list_incidents(
    services: Services,
    tunnel: TunnelName = None,
    open_: Open = None,
    before: Before = None,
    limit: Limit = 100,
) -> rest.Incidents:
    rows = await queries.incident_page(services.store, tunnel, open_=open_, before=before, limit=limit)
    now = services.clock.wall()
    return rest.Incidents(
        incidents=[present.incident(r, now) for r in rows[:limit]],
        next_before=rows[limit - 1].id if len(rows) > limit else None,
    )


@get("/deliveries", summary="Deliveries of notices, pending and settled, newest first", tags=["notices"])
async def list_deliveries(
    services: Services, tunnel: TunnelName = None, before: Before = None, limit: Limit = 100
) -> rest.Deliveries:
    rows, attempts = await queries.delivery_page(services.store, tunnel, before, limit)
    now = services.clock.wall()
    return rest.Deliveries(
        deliveries=[present.delivery(r, attempts[r.id], now) for r in rows[:limit]],
        next_before=rows[limit - 1].id if len(rows) > limit else None,
    )


@get("/summary", summary="How many tunnels are in each state", tags=["tunnels"])
async def summary(services: Services) -> rest.Summary:
    return present.summary(await queries.counts(services.store))


@get(
    "/events",
    summary="Server-sent events: an event `tunnels` holds the tunnels that changed",
    tags=["tunnels"],
    media_type="text/event-stream",
)
async def live(
    services: Services, encoder: NamedDependency[events.TunnelEncoder], request: Request[Any, Any, Any]
) -> Stream:
    key = key_from(headers_of(request.scope))

    async def may_read() -> bool:
        caller = await services.access.caller(key)
        return caller is not None and caller.shared

    return Stream(
        events.stream(services.hub, encoder, may_read),
        media_type="text/event-stream",
        # Without this header some proxies buffer a response before they pass it on.
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


ROUTES: Final[list[HTTPRouteHandler]] = [
    status, whoami, list_tunnels, one_tunnel, tunnel_history, list_incidents, list_deliveries, summary, live,
]  # fmt: skip
