"""The statements of the hot path, passed to the drivers directly, in the SQL that both engines share."""

import re
from dataclasses import fields
from itertools import count
from typing import Final

from vpn_sentinel.server.store.store import TunnelRow

_NAMES: Final = [f'"{f.name}"' for f in fields(TunnelRow)]
_UPDATED: Final = [n for n in _NAMES if n not in ('"id"', '"name"', '"created_at"')]

TUNNEL_COLUMNS: Final = ", ".join(_NAMES)
NEW_TUNNEL: Final = (
    f"INSERT INTO tunnels ({', '.join(_NAMES[1:])}) VALUES ({', '.join('?' * (len(_NAMES) - 1))}) "  # noqa: S608
    "ON CONFLICT (name) DO NOTHING"
)
SAVE_TUNNEL: Final = f"UPDATE tunnels SET {', '.join(f'{n} = ?' for n in _UPDATED)} WHERE id = ?"  # noqa: S608
# For a tunnel that reported again without a change.
TOUCH_TUNNEL: Final = "UPDATE tunnels SET seen_at = ?, last_seen = ?, deadline = ?, seq = ? WHERE id = ?"
ADD_OBSERVATION: Final = (
    "INSERT INTO observations (tunnel_id, spool, seq, at, received_at, state, body) VALUES (?, ?, ?, ?, ?, ?, ?) "
    "ON CONFLICT DO NOTHING"
)
ADD_TRANSITION: Final = (
    'INSERT INTO transitions (tunnel_id, at, decided_at, "old", "new", findings) VALUES (?, ?, ?, ?, ?, ?)'
)
ADD_ACTION: Final = "INSERT INTO actions (tunnel_id, at, name, outcome, detail) VALUES (?, ?, ?, ?, ?)"
VOID_SILENCE: Final = "DELETE FROM transitions WHERE tunnel_id = ? AND at = ? AND \"new\" = 'silent'"
OPEN_INCIDENT: Final = (
    "INSERT INTO incidents (tunnel_id, opened_at, worst, findings) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
)
WORSEN_INCIDENT: Final = "UPDATE incidents SET worst = ?, findings = ? WHERE tunnel_id = ? AND closed_at IS NULL"
CLOSE_INCIDENT: Final = "UPDATE incidents SET closed_at = ? WHERE tunnel_id = ? AND closed_at IS NULL"
VOID_INCIDENT: Final = "DELETE FROM incidents WHERE tunnel_id = ? AND closed_at IS NULL AND opened_at = ?"


def new_tunnel(name: str, now: float) -> tuple[object, ...]:
    """Values of NEW_TUNNEL for a tunnel that has not reported yet."""
    row = TunnelRow(
        id=0,
        name=name,
        created_at=now,
        state="pending",
        since=now,
        findings="[]",
        memory="",
        seen_at=0.0,
        source="",
        version="",
        interval=0.0,
        last_seen=0.0,
        deadline=None,
        spool="",
        seq=0,
        exit4=None,
        exit6=None,
        place="{}",
        resolvers="[]",
        dns_loc="",
        dns_colo="",
        role="tunnel",
        site="",
        policy="",
        port=None,
        port_check="",
    )
    return tuple(getattr(row, f.name) for f in fields(TunnelRow))[1:]


def saved_tunnel(row: TunnelRow) -> tuple[object, ...]:
    """Values of SAVE_TUNNEL."""
    return (
        row.state,
        row.since,
        row.findings,
        row.memory,
        row.seen_at,
        row.source,
        row.version,
        row.interval,
        row.last_seen,
        row.deadline,
        row.spool,
        row.seq,
        row.exit4,
        row.exit6,
        row.place,
        row.resolvers,
        row.dns_loc,
        row.dns_colo,
        row.role,
        row.site,
        row.policy,
        row.port,
        row.port_check,
        row.id,
    )


def touched_tunnel(row: TunnelRow) -> tuple[object, ...]:
    """Values of TOUCH_TUNNEL."""
    return (row.seen_at, row.last_seen, row.deadline, row.seq, row.id)


def numbered(sql: str) -> str:
    """The same statement with PostgreSQL's `$1`, `$2` … for `?`."""
    numbers = count(1)
    return re.sub(r"\?", lambda _: f"${next(numbers)}", sql)
