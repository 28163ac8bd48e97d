"""The questions that surfaces ask the database, and the one read model of a tunnel.

API, dashboard, bot and command line all show a `wire.rest.Tunnel`: what `GET /tunnels/{name}` answers is what
`vpn-sentinel tunnel show NAME --json` prints. Every question raises StoreUnavailable.
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

# Names in one statement; SQLite takes at most 32,766 parameters, old builds 999.
_MAX_NAMES: Final = 500
# How much of the past a tunnel's page shows.
RECENT_TRANSITIONS: Final = 100
_RECENT_INCIDENTS: Final = 20
_RECENT_OBSERVATIONS: Final = 25
_RECENT_ACTIONS: Final = 20


async def tunnel_rows(store: Store, names: set[str] | None = None) -> Rows:
    """The rows of all tunnels, or of those of `names` that exist, by name; `tunnel_of` makes each readable."""
    everything = select(tunnels).order_by(tunnels.c.name)
    if names is None:
        return await store.read(everything)
    wanted = sorted(names)
    found: list[Row[Any]] = []
    for start in range(0, len(wanted), _MAX_NAMES):
        found += await store.read(everything.where(tunnels.c.name.in_(wanted[start : start + _MAX_NAMES])))
    return found


async def all_tunnels(store: Store) -> list[rest.Tunnel]:
    """As they stand, by name."""
    return [tunnel_of(row) for row in await tunnel_rows(store)]


async def tunnel_named(store: Store, name: str) -> rest.Tunnel | None:
    """As it stands; None where no tunnel has this name."""
    row = await _row_named(store, name)
    return None if row is None else tunnel_of(row)


async def _row_named(store: Store, name: str) -> Row[Any] | None:
    try:
        rows = await store.read(select(tunnels).where(tunnels.c.name == tunnel_name(name)))
    except ValueError:  # no tunnel is called that, and not every engine takes every text
        return None
    return rows[0] if rows else None


def tunnel_of(row: Row[Any]) -> rest.Tunnel:
    """What a row of `tunnels` says."""
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
    """How many tunnels are in each state; a state that none is in is missing."""
    found: dict[State, int] = {}
    watched = select(tunnels.c.state, func.count().label("n")).where(tunnels.c.role != "reference")
    for row in await store.read(watched.group_by(tunnels.c.state)):
        found[rest.state_of(row.state)] = found.get(rest.state_of(row.state), 0) + row.n
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Recent:
    """One tunnel and what it did lately, newest first. The lists are rows of their tables."""

    tunnel: rest.Tunnel
    transitions: Rows
    incidents: Rows
    observations: Rows
    actions: Rows


async def recent(store: Store, name: str) -> Recent | None:
    """None where no tunnel has this name."""
    row = await _row_named(store, name)
    if row is None:
        return None
    opened = select(incidents).where(incidents.c.tunnel_id == row.id).order_by(incidents.c.opened_at.desc())
    return Recent(
        tunnel=tunnel_of(row),
        transitions=await store.read(_newest(transitions, row.id).limit(RECENT_TRANSITIONS)),
        incidents=await store.read(opened.limit(_RECENT_INCIDENTS)),
        observations=await store.read(_newest(observations, row.id).limit(_RECENT_OBSERVATIONS)),
        actions=await store.read(_newest(actions, row.id).limit(_RECENT_ACTIONS)),
    )


@dataclass(frozen=True, slots=True)
class HistoryPage:
    """A part of the past of `tunnel`, all lists newest first and complete down to `next_until`, None at its end."""

    tunnel: str
    transitions: Rows
    observations: Rows
    actions: Rows
    next_until: float | None


async def history(store: Store, name: str, since: float | None, until: float | None, limit: int) -> HistoryPage | None:
    """Up to `limit` of each kind from `since` to `until`, both included.

    A page ends between two instants, never within one, so that nothing of equal time is lost or shown twice. Only when
    more than `limit` rows share one instant, which no agent of ours makes, the rest of that instant is left out.

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
        return _stretch(row.name, kinds, None)
    edge = max(full)
    page = [[r for r in rows if r.at > edge] for rows in kinds]
    if any(page):
        return _stretch(row.name, page, edge)
    instant = [[r for r in rows if r.at == edge][:limit] for rows in kinds]
    return _stretch(row.name, instant, math.nextafter(edge, -math.inf))


def _stretch(tunnel: str, kinds: Sequence[Rows], next_until: float | None) -> HistoryPage:
    moved, seen, did = kinds
    return HistoryPage(tunnel, moved, seen, did, next_until)


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
    tries: dict[int, list[Row[Any]]] = {r.id: [] for r in rows}
    if tries:
        for attempt in await store.read(
            select(attempts).where(attempts.c.delivery_id.in_(tries)).order_by(attempts.c.id)
        ):
            tries[attempt.delivery_id].append(attempt)
    return rows, tries
