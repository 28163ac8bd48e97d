"""The queries of API, dashboard, bot and command line, and the one read model of a tunnel.

All of them show a `wire.rest.Tunnel`: the answer to `GET /tunnels/{name}` is what `vpn-sentinel tunnel show NAME
--json` prints. Every query raises StoreUnavailable.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Row, func, select
from sqlalchemy.sql import Select

from vpn_sentinel.domain.tunnel import tunnel_name
from vpn_sentinel.domain.verdict import State
from vpn_sentinel.server.store.schema import actions, attempts, incidents, observations, outbox, transitions, tunnels
from vpn_sentinel.server.store.store import Store
from vpn_sentinel.wire import rest
from vpn_sentinel.wire.rest import moment, when

Rows = Sequence[Row[Any]]

# SQLite takes at most 32,766 parameters in one statement, old builds 999.
_MAX_NAMES_PER_QUERY: Final = 500
# How many rows of each kind a tunnel's page shows.
RECENT_TRANSITIONS: Final = 100
_RECENT_INCIDENTS: Final = 20
_RECENT_OBSERVATIONS: Final = 25
_RECENT_ACTIONS: Final = 20


async def tunnel_rows(store: Store, names: set[str] | None = None) -> Rows:
    """The rows of all tunnels, or of those of `names` that exist, sorted by name; `tunnel_of` converts each."""
    everything = select(tunnels).order_by(tunnels.c.name)
    if names is None:
        return await store.read(everything)
    wanted = sorted(names)
    found: list[Row[Any]] = []
    for start in range(0, len(wanted), _MAX_NAMES_PER_QUERY):
        found += await store.read(everything.where(tunnels.c.name.in_(wanted[start : start + _MAX_NAMES_PER_QUERY])))
    return found


async def all_tunnels(store: Store) -> list[rest.Tunnel]:
    """All tunnels in their present state, sorted by name."""
    return [tunnel_of(row) for row in await tunnel_rows(store)]


async def tunnel_named(store: Store, name: str) -> rest.Tunnel | None:
    """A tunnel in its present state; None where no tunnel has this name."""
    row = await _row_named(store, name)
    return None if row is None else tunnel_of(row)


async def _row_named(store: Store, name: str) -> Row[Any] | None:
    try:
        rows = await store.read(select(tunnels).where(tunnels.c.name == tunnel_name(name)))
    except ValueError:  # no tunnel can have this name, and not every engine accepts every text
        return None
    return rows[0] if rows else None


def tunnel_of(row: Row[Any]) -> rest.Tunnel:
    """The read model of a row of `tunnels`."""
    return rest.Tunnel(
        name=row.name,
        state=rest.state_of(row.state),
        since=moment(row.since),
        findings=rest.findings_of(row.findings),
        last_seen=when(row.last_seen),
        deadline=when(row.deadline),
        exit=rest.Exit(ipv4=row.exit4, ipv6=row.exit6),
        place=rest.place_of(row.place),
        resolvers=rest.resolvers_of(row.resolvers),
        dns_loc=row.dns_loc or None,
        dns_colo=row.dns_colo or None,
        source=row.source or None,
        client_version=row.version or None,
        interval=row.interval or None,
        created_at=moment(row.created_at),
        role=row.role,
        site=row.site or None,
        forwarded_port=row.port,
        port_check=rest.port_check_of(row.port_check),
    )


async def counts(store: Store) -> dict[State, int]:
    """The number of tunnels in each state; a state without tunnels is missing."""
    found: dict[State, int] = {}
    watched = select(tunnels.c.state, func.count().label("n")).where(tunnels.c.role != "reference")
    for row in await store.read(watched.group_by(tunnels.c.state)):
        found[rest.state_of(row.state)] = found.get(rest.state_of(row.state), 0) + row.n
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class TunnelDetail:
    """One tunnel and its newest rows of each kind, newest first."""

    tunnel: rest.Tunnel
    transitions: Rows
    incidents: Rows
    observations: Rows
    actions: Rows


async def tunnel_detail(store: Store, name: str) -> TunnelDetail | None:
    """None where no tunnel has this name."""
    row = await _row_named(store, name)
    if row is None:
        return None
    opened = select(incidents).where(incidents.c.tunnel_id == row.id).order_by(incidents.c.opened_at.desc())
    return TunnelDetail(
        tunnel=tunnel_of(row),
        transitions=await store.read(_newest(transitions, row.id).limit(RECENT_TRANSITIONS)),
        incidents=await store.read(opened.limit(_RECENT_INCIDENTS)),
        observations=await store.read(_newest(observations, row.id).limit(_RECENT_OBSERVATIONS)),
        actions=await store.read(_newest(actions, row.id).limit(_RECENT_ACTIONS)),
    )


@dataclass(frozen=True, slots=True)
class HistoryPage:
    """A page of the history of `tunnel`: all lists newest first, complete down to `next_until`, None on the last."""

    tunnel: str
    transitions: Rows
    observations: Rows
    actions: Rows
    next_until: float | None


async def history(store: Store, name: str, since: float | None, until: float | None, limit: int) -> HistoryPage | None:
    """Up to `limit` of each kind from `since` to `until`, both included.

    A page ends between two instants, never within one, so that no rows of the same time are lost or shown twice. Only
    when more than `limit` rows share one instant, which no agent of ours produces, the rest of them are left out.

    None where no tunnel has this name.
    """
    row = await _row_named(store, name)
    if row is None:
        return None
    kinds = [
        await store.read(_within(table, row.id, since, until, limit)) for table in (transitions, observations, actions)
    ]
    full = [rows[limit].at for rows in kinds if len(rows) > limit]
    if not full:
        return _page(row.name, kinds, None)
    edge = max(full)
    page = [[r for r in rows if r.at > edge] for rows in kinds]
    if any(page):
        return _page(row.name, page, edge)
    instant = [[r for r in rows if r.at == edge][:limit] for rows in kinds]
    return _page(row.name, instant, math.nextafter(edge, -math.inf))


def _page(tunnel: str, kinds: Sequence[Rows], next_until: float | None) -> HistoryPage:
    transitions_, observations_, actions_ = kinds
    return HistoryPage(tunnel, transitions_, observations_, actions_, next_until)


def _within(table: Any, tunnel_id: int, since: float | None, until: float | None, limit: int) -> Select[Any]:
    statement = _newest(table, tunnel_id)
    if since is not None:
        statement = statement.where(table.c.at >= since)
    if until is not None:
        statement = statement.where(table.c.at <= until)
    return statement.limit(limit + 1)


def _newest(table: Any, tunnel_id: int) -> Select[Any]:
    last = table.c.seq if table is observations else table.c.id
    return select(table).where(table.c.tunnel_id == tunnel_id).order_by(table.c.at.desc(), last.desc())


async def incident_page(
    store: Store, tunnel: str | None, *, open_: bool | None, before: int | None, limit: int
) -> Rows:
    """Up to `limit` + 1 incidents, newest first, each with its tunnel's name as `name`."""
    statement = select(incidents, tunnels.c.name).join(tunnels, tunnels.c.id == incidents.c.tunnel_id)
    if tunnel is not None:
        statement = statement.where(tunnels.c.name == tunnel)
    if open_ is not None:
        statement = statement.where(incidents.c.closed_at.is_(None) if open_ else incidents.c.closed_at.is_not(None))
    if before is not None:
        statement = statement.where(incidents.c.id < before)
    return await store.read(statement.order_by(incidents.c.id.desc()).limit(limit + 1))


async def delivery_page(
    store: Store, tunnel: str | None, before: int | None, limit: int
) -> tuple[Rows, dict[int, list[Row[Any]]]]:
    """Up to `limit` + 1 deliveries, newest first, and the attempts at each by its id."""
    statement = select(outbox)
    if tunnel is not None:
        statement = statement.where(outbox.c.tunnel == tunnel)
    if before is not None:
        statement = statement.where(outbox.c.id < before)
    rows = await store.read(statement.order_by(outbox.c.id.desc()).limit(limit + 1))
    by_delivery: dict[int, list[Row[Any]]] = {r.id: [] for r in rows}
    if by_delivery:
        for attempt in await store.read(
            select(attempts).where(attempts.c.delivery_id.in_(by_delivery)).order_by(attempts.c.id)
        ):
            by_delivery[attempt.delivery_id].append(attempt)
    return rows, by_delivery
