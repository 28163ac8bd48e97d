"""Turns database rows into the API's answers. Everything that a caller sees is named here, field by field."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from sqlalchemy import Row

from vpn_sentinel.domain.verdict import HARM, State
from vpn_sentinel.wire import rest
from vpn_sentinel.wire.rest import moment, when


class _StoredNotice(msgspec.Struct):
    at: float | None = None
    began: float | None = None
    was: str | None = None
    exit: str | None = None
    old_exit: str | None = None
    findings: list[rest.StoredFinding] = []


_NOTICE: Final = msgspec.json.Decoder(_StoredNotice)


def client_status(tunnel: rest.Tunnel) -> rest.ClientStatus:
    """The tunnel in the form of the replaced system."""
    place = tunnel.place
    return rest.ClientStatus(
        last_seen=tunnel.last_seen.isoformat() if tunnel.last_seen else None,
        ip=tunnel.exit.ipv4 or tunnel.exit.ipv6,
        location=", ".join(p for p in (place.city, place.region, place.country) if p) or None,
        provider=place.org,
        country=place.country,
        city=place.city,
        region=place.region,
        timezone=place.timezone,
        dns_loc=tunnel.dns_loc,
        dns_colo=tunnel.dns_colo,
        client_version=tunnel.client_version,
        state=tunnel.state,
        findings=tunnel.findings,
        since=tunnel.since.isoformat(),
    )


def transition(row: Row[Any]) -> rest.Transition:
    return rest.Transition(
        at=moment(row.at),
        decided_at=moment(row.decided_at),
        old=rest.state_of(row.old),
        new=rest.state_of(row.new),
        findings=rest.findings_of(row.findings),
    )


def observation(row: Row[Any]) -> rest.ObservationBody:
    return rest.ObservationBody(
        at=moment(row.at),
        received_at=moment(row.received_at),
        seq=row.seq,
        state=rest.state_of(row.state),
        body=msgspec.Raw(row.body.encode()),
    )


def action(row: Row[Any]) -> rest.ActionBody:
    return rest.ActionBody(at=moment(row.at), name=row.name, outcome=row.outcome, detail=row.detail)


def incident(row: Row[Any], now: float) -> rest.Incident:
    """`row` holds the tunnel's name as `name`."""
    end = now if row.closed_at is None else row.closed_at
    return rest.Incident(
        id=row.id,
        tunnel=row.name,
        opened_at=moment(row.opened_at),
        closed_at=when(row.closed_at),
        duration=max(0.0, round(end - row.opened_at, 3)),
        worst=rest.state_of(row.worst),
        findings=rest.findings_of(row.findings),
    )


def delivery(row: Row[Any], attempts: Sequence[Row[Any]], now: float) -> rest.Delivery:
    """Only the fields named here are shown: a later field of the stored notice may be confidential."""
    notice = rest.decoded(_NOTICE, row.body, _StoredNotice())
    return rest.Delivery(
        id=row.id,
        channel=row.channel,
        tunnel=row.tunnel or None,
        kind=row.kind,
        status=_delivery_status(row, now),
        created_at=moment(row.created_at),
        due_at=moment(row.due_at),
        settled_at=when(row.settled_at),
        attempts=[rest.Attempt(attempt=a.attempt, at=moment(a.at), result=a.result, reason=a.reason) for a in attempts],
        notice=rest.NoticeBody(
            at=when(notice.at),
            began=when(notice.began),
            was=notice.was,
            exit=notice.exit,
            old_exit=notice.old_exit,
            findings=[f.full() for f in notice.findings],
        ),
    )


def summary(counts: dict[State, int]) -> rest.Summary:
    return rest.Summary(
        total=sum(counts.values()),
        states={s: counts.get(s, 0) for s in HARM},
        worst=next((s for s in HARM if counts.get(s)), None),
    )


def _delivery_status(row: Row[Any], now: float) -> str:
    if row.settled_at is not None:
        return str(row.outcome)
    return "leased" if row.leased_until > now else "due"
