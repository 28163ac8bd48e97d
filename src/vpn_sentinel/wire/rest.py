"""The HTTP API's responses. Times are ISO 8601 in UTC, durations seconds; what is not known is null, never a text.

A class ends in `Body` where the domain has the plain word for something else. The OpenAPI document has the plain words:
see `server/api/openapi`.
"""

from datetime import UTC, datetime
from typing import Final, TypeVar

import msgspec

from vpn_sentinel.domain.advice import advice
from vpn_sentinel.domain.verdict import MEANING, Code, Severity, State

T = TypeVar("T")
D = TypeVar("D")


class FindingBody(msgspec.Struct, frozen=True, kw_only=True):
    """One finding: `message` describes it, `advice` says what to do about it, `evidence` holds the facts."""

    code: str
    severity: Severity
    message: str
    advice: str = ""
    evidence: dict[str, str] = {}


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """Where the tunnel's traffic comes out."""

    ipv4: str | None = None
    ipv6: str | None = None


class PlaceBody(msgspec.Struct, frozen=True, kw_only=True):
    """The place of the exit address `ip`, as `source` names it. `country` is ISO 3166-1 alpha-2."""

    ip: str | None = None
    country: str | None = None
    region: str | None = None
    city: str | None = None
    timezone: str | None = None
    asn: int | None = None
    org: str | None = None
    source: str | None = None


class Resolver(msgspec.Struct, frozen=True, kw_only=True):
    """An address from which the tunnel's DNS queries come out."""

    ip: str
    country: str | None = None
    org: str | None = None


class PortCheckBody(msgspec.Struct, frozen=True, kw_only=True):
    """The server's last try to reach the forwarded port from outside.

    `answer` is "answered", "unreachable" (packets arrive, and nothing listens) or "lost" (none arrives).
    """

    address: str
    port: int
    answer: str
    at: float


class Tunnel(msgspec.Struct, frozen=True, kw_only=True):
    """A watched tunnel now. `deadline` is when it counts as silent; `last_seen` null means that it never reported.

    `source` is "agent" or "keepalive"; `interval` the seconds between two reports of a working agent. `role` is
    "tunnel", or "reference" for the home connection of its `site`, seen by an agent outside the tunnels.
    """

    name: str
    state: State
    since: datetime
    findings: list[FindingBody]
    last_seen: datetime | None
    deadline: datetime | None
    exit: Exit
    place: PlaceBody
    resolvers: list[Resolver]
    dns_loc: str | None
    dns_colo: str | None
    source: str | None
    client_version: str | None
    interval: float | None
    created_at: datetime
    role: str = "tunnel"
    site: str | None = None
    forwarded_port: int | None = None
    port_check: PortCheckBody | None = None


class Tunnels(msgspec.Struct, frozen=True, kw_only=True):
    tunnels: list[Tunnel]


class Changed(msgspec.Struct, frozen=True, kw_only=True):
    """One event of `/events`: the tunnels that changed, as they are now, and the names of deleted ones."""

    tunnels: list[msgspec.Raw]
    gone: list[str] = []


class ClientStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of `/status`, under the names of the replaced system; `state`, `findings` and `since` are new.

    `location` is "city, region, country", as far as known.
    """

    last_seen: str | None
    ip: str | None
    location: str | None
    provider: str | None
    country: str | None
    city: str | None
    region: str | None
    timezone: str | None
    dns_loc: str | None
    dns_colo: str | None
    client_version: str | None
    state: State
    findings: list[FindingBody]
    since: str


class Whoami(msgspec.Struct, frozen=True, kw_only=True):
    """The address that this request came from."""

    ip: str
    version: int


class Transition(msgspec.Struct, frozen=True, kw_only=True):
    """A change of state. `at` is when its cause began, `decided_at` when it was decided."""

    at: datetime
    decided_at: datetime
    old: State
    new: State
    findings: list[FindingBody]


class ObservationBody(msgspec.Struct, frozen=True, kw_only=True):
    """One round of an agent. `state` is the verdict of that round alone; `body` holds the facts as reported."""

    at: datetime
    received_at: datetime
    seq: int
    state: State
    body: msgspec.Raw


class ActionBody(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent did about its tunnel. `outcome` is "done", "failed", "dry_run" or "held"."""

    at: datetime
    name: str
    outcome: str
    detail: str


class History(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a tunnel's past, newest first; all lists are complete for it.

    When `next_until` is not null there is more: ask again with it as `until`.
    """

    tunnel: str
    transitions: list[Transition]
    observations: list[ObservationBody]
    actions: list[ActionBody]
    next_until: float | None


class Incident(msgspec.Struct, frozen=True, kw_only=True):
    """A time when a tunnel was not protected. `closed_at` null means that it lasts; `duration` is seconds, so far."""

    id: int
    tunnel: str
    opened_at: datetime
    closed_at: datetime | None
    duration: float
    worst: State
    findings: list[FindingBody]


class Incidents(msgspec.Struct, frozen=True, kw_only=True):
    """Newest first. When `next_before` is not null there are more: ask again with it as `before`."""

    incidents: list[Incident]
    next_before: int | None


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt to deliver: `result` is "done", "transient" or "permanent"."""

    attempt: int
    at: datetime
    result: str
    reason: str


class NoticeBody(msgspec.Struct, frozen=True, kw_only=True):
    """The content of a delivery. `exit` and `old_exit` are addresses."""

    at: datetime | None = None
    began: datetime | None = None
    was: str | None = None
    exit: str | None = None
    old_exit: str | None = None
    findings: list[FindingBody] = []


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """One notice for one channel. `status` is "due", "leased", "done", "given_up", "superseded" or "summed"."""

    id: int
    channel: str
    tunnel: str | None
    kind: str
    status: str
    created_at: datetime
    due_at: datetime
    settled_at: datetime | None
    attempts: list[Attempt]
    notice: NoticeBody


class Deliveries(msgspec.Struct, frozen=True, kw_only=True):
    """Newest first. When `next_before` is not null there are more: ask again with it as `before`."""

    deliveries: list[Delivery]
    next_before: int | None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """How many tunnels are in each state; `worst` is the most harmful state that any is in."""

    total: int
    states: dict[State, int]
    worst: State | None


def when(seconds: float | None) -> datetime | None:
    """Seconds since the epoch as a time in UTC; None and 0, which mean never, as None."""
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


def moment(seconds: float) -> datetime:
    """Seconds since the epoch as a time in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


class StoredFinding(msgspec.Struct, frozen=True):
    """A finding as the database keeps it: severity and advice depend on the code, and come from the running version."""

    code: str
    message: str = ""
    evidence: dict[str, str] = {}

    def full(self) -> FindingBody:
        try:
            meaning = MEANING[Code(self.code)]
        except ValueError:  # of a newer version
            return FindingBody(code=self.code, severity=Severity.INFO, message=self.message, evidence=self.evidence)
        return FindingBody(
            code=self.code,
            severity=meaning.severity,
            message=self.message,
            advice=advice(self.code, self.evidence) or meaning.advice,
            evidence=self.evidence,
        )


_FINDINGS: Final = msgspec.json.Decoder(list[StoredFinding])
_PLACE: Final = msgspec.json.Decoder(PlaceBody)
_PORT_CHECK: Final = msgspec.json.Decoder(PortCheckBody)
_RESOLVERS: Final = msgspec.json.Decoder(list[Resolver])


def state_of(text: str) -> State:
    """The state of that name; unknown for one that this version does not know."""
    try:
        return State(text)
    except ValueError:
        return State.UNKNOWN


def findings_of(text: str) -> list[FindingBody]:
    """The findings in a JSON column."""
    return [stored.full() for stored in decoded(_FINDINGS, text, [])]


def place_of(text: str) -> PlaceBody:
    """The place in a JSON column."""
    return decoded(_PLACE, text, PlaceBody())


def resolvers_of(text: str) -> list[Resolver]:
    """The resolvers in a JSON column."""
    return decoded(_RESOLVERS, text, [])


def port_check_of(text: str) -> PortCheckBody | None:
    """The port check in a JSON column, None without one."""
    return decoded(_PORT_CHECK, text, None)


def decoded(decoder: msgspec.json.Decoder[T], text: str, default: D) -> T | D:
    """The value of a JSON column; `default` when it is empty or damaged, so that one row cannot break a whole list."""
    try:
        return decoder.decode(text) if text else default
    except (ValueError, RecursionError):
        return default
