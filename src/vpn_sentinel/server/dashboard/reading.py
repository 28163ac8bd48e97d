"""The questions that the pages ask the database."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Row, func, select

from vpn_sentinel.domain.tunnel import tunnel_name
from vpn_sentinel.domain.verdict import State
from vpn_sentinel.server.store.schema import actions, incidents, observations, transitions, tunnels
from vpn_sentinel.server.store.store import Store
from vpn_sentinel.wire.rest import state_of

Rows = Sequence[Row[Any]]

# How much of the past a tunnel's page shows.
TRANSITIONS: Final = 100
_INCIDENTS: Final = 20
_OBSERVATIONS: Final = 25
_ACTIONS: Final = 20
# Above this it is cheaper to read them all, and no engine takes endless lists.
_NAMES: Final = 500


async def rows(store: Store, names: set[str] | None = None) -> Rows:
    """The rows of all tunnels, or of those of `names` that exist."""
    statement = select(tunnels)
    if names is not None and len(names) <= _NAMES:
        return await store.read(statement.where(tunnels.c.name.in_(sorted(names))))
    found = await store.read(statement)
    return found if names is None else [r for r in found if r.name in names]


async def counts(store: Store) -> dict[State, int]:
    """How many tunnels are in each state; a state that none is in is missing."""
    found: dict[State, int] = {}
    watched = select(tunnels.c.state, func.count().label("n")).where(tunnels.c.role != "reference")
    for row in await store.read(watched.group_by(tunnels.c.state)):
        found[state_of(row.state)] = found.get(state_of(row.state), 0) + row.n
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """One tunnel and what it did lately, newest first."""

    tunnel: Row[Any]
    transitions: Rows
    incidents: Rows
    observations: Rows
    actions: Rows


async def past(store: Store, name: str) -> Past | None:
    """None when no tunnel has this name."""
    try:
        found = await store.read(select(tunnels).where(tunnels.c.name == tunnel_name(name)))
    except ValueError:  # no tunnel is called that, and not every engine takes every text
        return None
    if not found:
        return None
    id_ = found[0].id
    moved = select(transitions).where(transitions.c.tunnel_id == id_)
    spans = select(incidents).where(incidents.c.tunnel_id == id_)
    seen = select(observations).where(observations.c.tunnel_id == id_)
    did = select(actions).where(actions.c.tunnel_id == id_).order_by(actions.c.at.desc(), actions.c.id.desc())
    return Past(
        tunnel=found[0],
        transitions=await store.read(
            moved.order_by(transitions.c.at.desc(), transitions.c.id.desc()).limit(TRANSITIONS)
        ),
        incidents=await store.read(spans.order_by(incidents.c.opened_at.desc()).limit(_INCIDENTS)),
        observations=await store.read(
            seen.order_by(observations.c.at.desc(), observations.c.seq.desc()).limit(_OBSERVATIONS)
        ),
        actions=await store.read(did.limit(_ACTIONS)),
    )
