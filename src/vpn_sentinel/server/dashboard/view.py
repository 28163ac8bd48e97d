"""Turns database rows into what the pages show. It judges nothing; Jinja escapes all text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any, Final

from sqlalchemy import Row

from vpn_sentinel.domain.counted import counted
from vpn_sentinel.domain.observation import Observation
from vpn_sentinel.domain.routes import all_described
from vpn_sentinel.domain.verdict import HARM, State
from vpn_sentinel.wire import codec, rest

# The predicate of a headline, for one tunnel in a state and for several.
_PREDICATES: Final = {
    State.LEAKING: ("is leaking", "are leaking"),
    State.DOWN: ("is down", "are down"),
    State.DEGRADED: ("is degraded", "are degraded"),
    State.SILENT: ("is silent", "are silent"),
    State.UNVERIFIED: ("cannot be verified", "cannot be verified"),
    State.PENDING: ("has no verdict yet", "have no verdict yet"),
    State.UNKNOWN: ("is in an unknown state", "are in an unknown state"),
    State.PROTECTED: ("is protected", "are protected"),
}
_UNITS: Final = ((86400, "d"), (3600, "h"), (60, "min"))
# The timeline of a tunnel's page: the last day, one unit of width a minute.
_DAY_S: Final = 86400.0
_MIN_WIDTH_MINUTES: Final = 10.0
_NOT_VERIFIED: Final = frozenset({State.SILENT, State.UNVERIFIED, State.PENDING, State.UNKNOWN})


def short_duration(seconds: float) -> str:
    """A duration as people say it: one unit, or two where the second one matters (`3 h 20 min`)."""
    whole = max(0, int(seconds))
    for index, (size, name) in enumerate(_UNITS):
        if whole >= size:
            big, left = divmod(whole, size)
            small, unit = _UNITS[index + 1] if index + 1 < len(_UNITS) else (1, "s")
            rest_ = left // small
            return f"{big} {name} {rest_} {unit}" if rest_ and big < 10 and small > 1 else f"{big} {name}"
    return f"{whole} s"


@dataclass(frozen=True, slots=True)
class Moment:
    """A time to show. `iso` is for machines; the page's script turns `text`, in UTC, into the reader's own time."""

    at: float

    @classmethod
    def of(cls, time: datetime) -> "Moment":
        return cls(time.timestamp())

    @property
    def iso(self) -> str:
        return datetime.fromtimestamp(self.at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    @property
    def text(self) -> str:
        return datetime.fromtimestamp(self.at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")

    def ago(self, now: float) -> str:
        return "now" if now - self.at < 2 else f"{short_duration(now - self.at)} ago"

    def lasting(self, now: float) -> str:
        return short_duration(now - self.at)


@dataclass(frozen=True, slots=True, kw_only=True)
class TunnelView:
    """A tunnel as a row of the overview, and at the top of its own page."""

    name: str
    state: State
    since: Moment
    findings: tuple[rest.FindingBody, ...]
    exits: tuple[str, ...]
    place: str
    provider: str
    resolvers: tuple[str, ...]
    last_seen: Moment | None
    reporter: str
    interval: float
    place_source: str
    placed: str  # the exit address that place and provider belong to
    home: bool  # the home connection of the site, not a tunnel
    site: str
    port: str

    @property
    def key(self) -> str:
        """Sorts worst first, then by site and name; home connections come last."""
        return f"{9 if self.home else HARM.index(self.state)} {self.site} {self.name}"

    @property
    def fingerprint(self) -> str:
        """Changes with everything that the row shows, except the time of the last report."""
        shown = [getattr(self, f.name) for f in fields(self) if f.name != "last_seen"]
        return blake2b(repr(shown).encode(), digest_size=6).hexdigest()


def tunnel(tunnel: rest.Tunnel) -> TunnelView:
    place = tunnel.place
    return TunnelView(
        name=tunnel.name,
        state=tunnel.state,
        since=Moment.of(tunnel.since),
        findings=tuple(tunnel.findings),
        exits=tuple(e for e in (tunnel.exit.ipv4, tunnel.exit.ipv6) if e),
        place=", ".join(dict.fromkeys(p for p in (place.city, place.region, place.country) if p)),
        provider=" · ".join(p for p in (place.org, f"AS{place.asn}" if place.asn else None) if p),
        # The replaced system's clients know only the place of their resolver.
        resolvers=tuple(" · ".join(p for p in (r.ip, r.country, r.org) if p) for r in tunnel.resolvers)
        or tuple(filter(None, [" · ".join(p for p in (tunnel.dns_loc, tunnel.dns_colo) if p)])),
        last_seen=Moment.of(tunnel.last_seen) if tunnel.last_seen else None,
        reporter=" ".join(
            p
            for p in ("keepalive client" if tunnel.source == "keepalive" else tunnel.source, tunnel.client_version)
            if p
        ),
        interval=tunnel.interval or 0.0,
        place_source=place.source or "",
        placed=place.ip or "",
        home=tunnel.role == "reference",
        site=tunnel.site or "",
        port=_port(tunnel),
    )


def _port(tunnel: rest.Tunnel) -> str:
    """The forwarded port, and the result of the last check from outside."""
    port, check = tunnel.forwarded_port, tunnel.port_check
    if port is None:
        return ""
    if check is None or check.port != port:
        return f"{port}, not tried from outside yet"
    state = {"answered": "open", "unreachable": "open, nobody listens", "lost": "closed"}.get(
        check.answer, check.answer
    )
    return f"{port}, {state}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """The head of the page: the number of tunnels in each state, worst first."""

    counts: tuple[tuple[State, int], ...]

    @property
    def total(self) -> int:
        return sum(n for _, n in self.counts)

    @property
    def worst(self) -> State | None:
        return self.counts[0][0] if self.counts else None

    @property
    def headline(self) -> str:
        if not self.counts:
            return "No tunnels yet"
        state, n = self.counts[0]
        one, many = _PREDICATES[state]
        if n == self.total:
            return f"The tunnel {one}" if n == 1 else f"All {n} tunnels {many}"
        return f"{counted(n, 'tunnel')} {one if n == 1 else many}"

    @property
    def title(self) -> str:
        """The title of the browser's tab: short, with the worst state."""
        state, n = self.counts[0] if self.counts else (State.PROTECTED, 0)
        return "VPN Sentinel" if state is State.PROTECTED else f"{n} {state.value} – VPN Sentinel"


def overview(counts: dict[State, int]) -> Overview:
    return Overview(counts=tuple((s, counts[s]) for s in HARM if counts.get(s)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionView:
    at: Moment
    old: State
    new: State
    lasted: str
    findings: tuple[rest.FindingBody, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineSegment:
    """A part of the timeline: `x` and `width` are minutes of the day that it shows."""

    state: State
    x: float
    width: float
    label: str


def transitions(rows: Sequence[Row[Any]], now: float) -> list[TransitionView]:
    """Newest first, like `rows`; each with the duration of the state that it led to."""
    ends = [now, *(r.at for r in rows)]
    return [
        TransitionView(
            at=Moment(row.at),
            old=rest.state_of(row.old),
            new=rest.state_of(row.new),
            lasted=short_duration(end - row.at),
            findings=tuple(rest.findings_of(row.findings)),
        )
        for row, end in zip(rows, ends, strict=False)
    ]


def timeline(tunnel: rest.Tunnel, moved: Sequence[Row[Any]], now: float, *, complete: bool) -> list[TimelineSegment]:
    """The last day as segments of one state. The time before the oldest known transition is drawn if `complete`."""
    start = now - _DAY_S
    found = [
        TimelineSegment(
            state=state,
            x=round(min((max(at, start) - start) / 60, 1440 - _MIN_WIDTH_MINUTES), 2),
            width=round(max((end - max(at, start)) / 60, _MIN_WIDTH_MINUTES), 2),
            label=f"{state.value} for {short_duration(end - at)}, from {Moment(at).text}",
        )
        for state, at, end in _segments(tunnel, moved, now, complete=complete)
        if end > max(at, start)
    ]
    # The worst come last: a short leak is drawn wide enough to be seen, over its neighbours.
    return sorted(found, key=lambda s: -HARM.index(s.state))


def day_summary(tunnel: rest.Tunnel, moved: Sequence[Row[Any]], now: float, *, complete: bool) -> str:
    """The share of the last day in which a tunnel was protected; unverified time is not counted."""
    protected = verified = unverified = 0.0
    for state, at, end in _segments(tunnel, moved, now, complete=complete):
        lasted = max(0.0, end - max(at, now - _DAY_S))
        if state in _NOT_VERIFIED:
            unverified += lasted
        else:
            verified += lasted
            protected += lasted if state is State.PROTECTED else 0.0
    shown = f" Not verified for {short_duration(unverified)}." if unverified >= 1 else ""
    if verified < 1:
        return shown.strip()
    share = math.floor(1000 * protected / verified) / 10  # rounded down: only the full time is "100 %"
    return f"Protected {share:g} % of the time that was verified ({short_duration(verified)}).{shown}"


def _segments(
    tunnel: rest.Tunnel, moved: Sequence[Row[Any]], now: float, *, complete: bool
) -> list[tuple[State, float, float]]:
    """State, begin and end of each segment, oldest first."""
    changes = sorted(((r.at, rest.state_of(r.new)) for r in moved), key=lambda change: change[0])
    if not changes:
        changes = [(tunnel.since.timestamp(), tunnel.state)]
    elif complete:
        changes.insert(0, (tunnel.created_at.timestamp(), rest.state_of(min(moved, key=lambda r: r.at).old)))
    ends = [at for at, _ in changes[1:]] + [now]
    return [(state, at, end) for (at, state), end in zip(changes, ends, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class IncidentView:
    opened: Moment
    closed: Moment | None
    lasted: str
    worst: State


def incidents(rows: Sequence[Row[Any]], now: float) -> list[IncidentView]:
    return [
        IncidentView(
            opened=Moment(row.opened_at),
            closed=None if row.closed_at is None else Moment(row.closed_at),
            lasted=short_duration((now if row.closed_at is None else row.closed_at) - row.opened_at),
            worst=rest.state_of(row.worst),
        )
        for row in rows
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionView:
    at: Moment
    name: str
    outcome: str
    detail: str


def actions(rows: Sequence[Row[Any]]) -> list[ActionView]:
    return [
        ActionView(at=Moment(r.at), name=r.name, outcome=r.outcome.replace("_", " "), detail=r.detail) for r in rows
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservationView:
    at: Moment
    state: State
    trigger: str
    exits: tuple[str, ...]
    took: str
    routes: tuple[str, ...] | None = None  # None: not read


def _routes(seen: Observation) -> tuple[str, ...] | None:
    return None if seen.routed is None else all_described(seen.routed, seen.link.name if seen.link else None)


def observations(rows: Sequence[Row[Any]]) -> list[ObservationView]:
    decode, found = codec.decoder(Observation), []
    for row in rows:
        try:
            seen: Observation | None = decode(row.body)
        except (ValueError, RecursionError):
            seen = None
        found.append(
            ObservationView(
                at=Moment(row.at),
                state=rest.state_of(row.state),
                trigger=seen.trigger.value if seen else "",
                exits=tuple(str(e) for e in (seen.exit(4), seen.exit(6)) if e) if seen else (),
                took=f"{seen.took_ms:.0f} ms" if seen and seen.took_ms else "",
                routes=_routes(seen) if seen else None,
            )
        )
    return found
