"""What an agent saw in one round. Facts only; what they mean is the judge's.

Every value that can be missing has a name for it: `Answer.UNKNOWN` and `Path.UNKNOWN` mean "did not or could not look".
"""

from dataclasses import dataclass
from enum import StrEnum

from vpn_sentinel.domain.policy import IPAddress, IPNetwork


class Answer(StrEnum):
    """How a question to the network ended."""

    ANSWERED = "answered"
    BLOCKED = "blocked"  # this host refused to send it (EPERM): a kill switch at work
    UNREACHABLE = "unreachable"  # no route, or an ICMP error came back
    EXPIRED = "expired"  # an ICMP time-exceeded: the packet left this host and died where it was meant to
    LOST = "lost"  # sent, and nothing came back in time
    UNKNOWN = "unknown"  # not asked


class Path(StrEnum):
    """By which kind of interface the kernel routes a packet out of this host."""

    TUNNEL = "tunnel"
    OUTSIDE = "outside"  # a physical interface
    LOCAL = "local"  # stays on this host, e.g. a forwarder on 127.0.0.11
    UNKNOWN = "unknown"


class Probe(StrEnum):
    """Which of the three canaries of docs/reference/situations.md asked."""

    DEFAULT = "default"  # C1: on the default route
    PHYSICAL = "physical"  # C2: bound to the physical interface
    FIRST_HOP = "first_hop"  # C3: bound to the physical interface, TTL 1


class Trigger(StrEnum):
    """Why a round ran."""

    START = "start"
    TIMER = "timer"
    NETWORK = "network"  # rtnetlink told of a link, an address, a route or a rule
    CANARY = "canary"  # beats of the canary went missing, or came back from elsewhere
    RECHECK = "recheck"  # the round before was not well
    KEEPALIVE = "keepalive"  # a report of the replaced system's client


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The tunnel's network interface. Counters are bytes since the interface was made."""

    name: str
    present: bool
    up: bool
    rx_bytes: int = 0
    tx_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """One datagram to an echo. `address` is where the echo saw it come from; `rtt_ms` the round trip."""

    probe: Probe
    target: str
    family: int  # 4 or 6
    answer: Answer
    path: Path = Path.UNKNOWN
    address: IPAddress | None = None
    rtt_ms: float | None = None

    def __post_init__(self) -> None:
        if self.family not in (4, 6):
            msg = "family is 4 or 6"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolverSighting:
    """What one lookup through one of the system's nameservers revealed.

    `egress` is the address from which the authoritative side was asked. `client` is the address from which the
    nameserver itself saw us ask (CH whoami). `subnet` is the client subnet it passed on (RFC 7871).
    """

    method: str
    nameserver: IPAddress
    answer: Answer
    path: Path = Path.UNKNOWN
    egress: IPAddress | None = None
    client: IPAddress | None = None
    subnet: IPNetwork | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What one source says of one address. `country` is ISO 3166-1 alpha-2, `asn` the number alone."""

    ip: IPAddress
    source: str
    country: str | None = None
    region: str | None = None
    city: str | None = None
    timezone: str | None = None
    asn: int | None = None
    org: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One round. `interfaces` are all that exist besides `lo`, None when nobody looked.

    `link` is None when no tunnel interface is known here. `reported_from` is added by the server to a keepalive: the
    global address that it came from, None when it came over a LAN. An agent has canaries for that.
    `dns_intercepted` is True when an address that runs no DNS answered a query, None when nobody asked.
    """

    trigger: Trigger
    link: Link | None = None
    interfaces: tuple[str, ...] | None = None
    canaries: tuple[Canary, ...] = ()
    resolvers: tuple[ResolverSighting, ...] = ()
    places: tuple[Place, ...] = ()
    dns_intercepted: bool | None = None
    reported_from: IPAddress | None = None
    took_ms: float = 0.0

    def asked(self, probe: Probe) -> tuple[Canary, ...]:
        """The canaries of one kind that were really sent."""
        return tuple([c for c in self.canaries if c.probe is probe and c.answer is not Answer.UNKNOWN])

    def places_of(self, address: IPAddress | None) -> tuple[Place, ...]:
        return tuple([p for p in self.places if p.ip == address])

    def exit(self, family: int) -> IPAddress | None:
        """The address that the far end saw on the default route, None when no canary came back."""
        for canary in self.canaries:
            if canary.family == family and canary.probe is Probe.DEFAULT and canary.address is not None:
                return canary.address
        return None
