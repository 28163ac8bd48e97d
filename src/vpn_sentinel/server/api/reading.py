"""The questions that the API asks the database."""

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
from vpn_sentinel.wire.rest import state_of

Rows = Sequence[Row[Any]]

# Names in one statement; SQLite takes at most 32,766 parameters, old builds 999.
_NAMES: Final = 500


async def all_tunnels(store: Store) -> Rows:
    return await store.read(select(tunnels).order_by(tunnels.c.name))


async def tunnels_named(store: Store, names: set[str]) -> Rows:
    """The rows of those of `names` that exist, by name."""
    wanted = sorted(names)
    found: list[Row[Any]] = []
    for start in range(0, len(wanted), _NAMES):
        some = tunnels.c.name.in_(wanted[start : start + _NAMES])
        found += await store.read(select(tunnels).where(some).order_by(tunnels.c.name))
    return found


async def tunnel_named(store: Store, name: str) -> Row[Any] | None:
    try:
        rows = await store.read(select(tunnels).where(tunnels.c.name == tunnel_name(name)))
    except ValueError:  # no tunnel is called that, and not every engine takes every text
        return None
    return rows[0] if rows else None


async def counts(store: Store) -> dict[State, int]:
    """How many tunnels are in each state; a state that none is in is missing."""
    found: dict[State, int] = {}
    watched = select(tunnels.c.state, func.count().label("n")).where(tunnels.c.role != "reference")
    for row in await store.read(watched.group_by(tunnels.c.state)):
        found[state_of(row.state)] = found.get(state_of(row.state), 0) + row.n
    return found


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a tunnel's past, all lists newest first and complete down to `next_until`, None at its end."""

    transitions: Rows
    observations: Rows
    actions: Rows
    next_until: float | None


async def history(store: Store, tunnel_id: int, since: float | None, until: float | None, limit: int) -> Stretch:
    """Up to `limit` of each kind from `since` to `until`, both included.

    A page ends between two instants, never within one, so that nothing of equal time is lost or shown twice. Only when
    more than `limit` rows share one instant, which no agent of ours makes, the rest of that instant is left out.
    """
    kinds = [
        await store.read(_within(select(table), table, tunnel_id, since, until, limit))
        for table in (transitions, observations, actions)
    ]
    full = [rows[limit].at for rows in kinds if len(rows) > limit]
    if not full:
        return _stretch(kinds, None)
    edge = max(full)
    page = [[r for r in rows if r.at > edge] for rows in kinds]
    if any(page):
        return _stretch(page, edge)
    crowd = [[r for r in rows if r.at == edge][:limit] for rows in kinds]
    return _stretch(crowd, math.nextafter(edge, -math.inf))


def _stretch(kinds: Sequence[Rows], next_until: float | None) -> Stretch:
    moved, seen, did = kinds
    return Stretch(moved, seen, did, next_until)


def _within(
    statement: Select[Any], table: Any, tunnel_id: int, since: float | None, until: float | None, limit: int
) -> Select[Any]:
    statement = statement.where(table.c.tunnel_id == tunnel_id)
    if since is not None:
        statement = statement.where(table.c.at >= since)
    if until is not None:
        statement = statement.where(table.c.at <= until)
    last = table.c.seq if table is observations else table.c.id
    return statement.order_by(table.c.at.desc(), last.desc()).limit(limit + 1)


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
