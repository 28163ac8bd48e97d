"""What an agent saw in one round: facts only, which the judge interprets.

A missing value has a name: `Answer.UNKNOWN` and `Path.UNKNOWN` mean "not asked" or "could not be asked".
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from vpn_sentinel.domain.policy import IPAddress, IPNetwork, is_public

# Targets whose canaries are DNS queries: port 53 may be diverted when other traffic is not.
ASKED_BY_DNS: Final = frozenset({"cloudflare", "opendns"})


class Answer(StrEnum):
    """How a probe ended."""

    ANSWERED = "answered"
    BLOCKED = "blocked"  # this host refused to send it (EPERM), as a kill switch does
    UNREACHABLE = "unreachable"  # no route, or an ICMP error came back
    EXPIRED = "expired"  # ICMP time-exceeded came back: the packet left this host, and its hop limit ended as planned
    LOST = "lost"  # sent, and nothing came back in time
    UNKNOWN = "unknown"  # not asked


class Path(StrEnum):
    """By which kind of interface the kernel routes a packet out of this host."""

    TUNNEL = "tunnel"
    OUTSIDE = "outside"  # a physical interface
    LOCAL = "local"  # stays on this host, e.g. a forwarder on 127.0.0.11
    UNKNOWN = "unknown"


class Probe(StrEnum):
    """Which canary asked: the three of docs/reference/situations.md, or the one that ends at the VPN server."""

    DEFAULT = "default"  # C1: on the default route
    PHYSICAL = "physical"  # C2: bound to the physical interface
    FIRST_HOP = "first_hop"  # C3: bound to the physical interface, TTL 1
    GATEWAY = "gateway"  # to the VPN server's address inside the tunnel: it may answer while the internet does not


class Trigger(StrEnum):
    """Why a round ran."""

    START = "start"
    TIMER = "timer"
    NETWORK = "network"  # rtnetlink reported a change of a link, an address, a route or a rule
    CANARY = "canary"  # pulses or canaries between rounds were lost, or came out elsewhere
    LEAK = "leak"  # the leak watch saw a packet leave outside the tunnel
    DEVICE = "device"  # the tunnel's own program, or its counters, reported a change
    RECHECK = "recheck"  # the round before found trouble
    PULSE = "pulse"  # the server's own observation: where an agent's pulses come from, and whether replies arrive
    KEEPALIVE = "keepalive"  # a report of the replaced system's client


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The tunnel's network interface. Counters are bytes since the interface was made.

    `declared`: only the owner's setting says that it is the tunnel; nothing else shows it.
    """

    name: str
    present: bool
    up: bool
    rx_bytes: int = 0
    tx_bytes: int = 0
    declared: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """One probe to an echo. `address` is the source that the echo saw; `rtt_ms` the round-trip time."""

    probe: Probe
    target: str
    family: int  # 4 or 6
    answer: Answer
    path: Path = Path.UNKNOWN
    address: IPAddress | None = None
    rtt_ms: float | None = None
    interface: str | None = None  # the device that it was bound to, None when it went as the kernel routes

    def __post_init__(self) -> None:
        if self.family not in (4, 6):
            msg = "family is 4 or 6"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolverSighting:
    """What one lookup through one of the system's nameservers showed.

    `egress` is the address from which the authoritative server was asked. `client` is the address from which the
    nameserver itself saw the agent ask (CH whoami). `subnet` is the client subnet it passed on (RFC 7871).
    """

    method: str
    nameserver: IPAddress
    answer: Answer
    path: Path = Path.UNKNOWN
    egress: IPAddress | None = None
    client: IPAddress | None = None
    subnet: IPNetwork | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemLookup:
    """One fresh name, looked up by getaddrinfo(3) as programs do: by resolv.conf, nsswitch.conf and what they name.

    ANSWERED: an address, or that there is none. UNREACHABLE: it failed, `error` says how. LOST: no answer in time.
    `egress` are the addresses from which the authoritative server was asked, where the name shows them. `upstreams` are
    the nameservers of systemd-resolved, where its stub is in use.
    """

    answer: Answer
    error: str = ""
    egress: tuple[IPAddress, ...] = ()
    upstreams: tuple[IPAddress, ...] = ()


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
class Escape:
    """Packets of one flow that left outside the tunnel, seen on a physical interface by the leak watch.

    `protocol` is "udp", "tcp", "icmp", "icmp6" or the IP protocol's number; ports are None where it has none.
    `name` is the queried name, when the packet was a DNS query. `size` counts bytes of IP packets. `first_age` and
    `last_age` are how many seconds before the observation the first and the last packet left. `path` is how routes send
    a packet there that is not bound to a device and not marked by a firewall. `user` is the user id of the program that
    sent the first one, where its socket was still known.
    """

    interface: str
    protocol: str
    source: IPAddress
    destination: IPAddress
    source_port: int | None = None
    destination_port: int | None = None
    packets: int = 1
    size: int = 0
    first_age: float = 0.0
    last_age: float = 0.0
    name: str | None = None
    path: Path = Path.UNKNOWN
    user: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """A part of the public address space that rules and routing tables send out by one device.

    `share` is above 0 and at most 1. For a device outside the tunnel, `networks` are the largest that are not meant to
    go there, and `more` is the number of further ones. `only` is a label of the traffic that is routed so ("TCP to port
    443"), "" for all; `ports` are the lowest and the highest destination port of that traffic, None for any port and
    from older agents. `answer` is the result of a packet with a hop limit of one to `asked`, an address in that part.
    """

    interface: str
    family: int
    share: float
    networks: tuple[IPNetwork, ...] = ()
    more: int = 0
    only: str = ""
    asked: IPAddress | None = None
    answer: Answer = Answer.UNKNOWN
    ports: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What the tunnel's own program says about it: evidence in addition to the canaries, never against them.

    `source` is "wireguard", "openvpn" or "gluetun"; `status` the program's own term ("running", "CONNECTED"), or
    "error: …" when it could not be asked. `handshake_age` is seconds, None for never or unknown. `address` is the exit
    that it names.
    """

    source: str
    status: str = ""
    endpoint: str | None = None
    handshake_age: float | None = None
    address: IPAddress | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """The tunnel's quality, from the pulses of the last `seconds`: times in ms, rates in bytes a second.

    `lost` of `sent` were never answered. `mtu` is the largest IP packet that passed, None when that was not measured;
    `vanished` the size of one that the interface took and that was lost without an ICMP error, although smaller ones
    passed; `vanished_for` is how many seconds ago one of the full size last passed, or the route changed. `lossy_for`
    is how many seconds ago a loss that was examined may have begun, 0 where none was found.
    """

    seconds: float
    sent: int
    lost: int
    reordered: int = 0
    rtt_ms: float | None = None
    jitter_ms: float | None = None
    mtu: int | None = None
    vanished: int | None = None
    vanished_for: float = 0.0
    lossy_for: float = 0.0
    rx_rate: float | None = None
    tx_rate: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PortCheck:
    """The server's attempt to reach the forwarded port from outside, over TCP.

    ANSWERED: something accepted. UNREACHABLE: it was refused, so packets arrive and nothing listens. LOST: no answer.
    """

    address: IPAddress
    port: int
    answer: Answer


class Outcome(StrEnum):
    """How an action of the agent ended."""

    DONE = "done"
    FAILED = "failed"
    DRY_RUN = "dry_run"  # would have been done
    HELD = "held"  # by the back-off, or the limit per hour


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """Something that the agent did about the tunnel: containment, its release, or a remedy. `age` is seconds."""

    name: str
    outcome: Outcome
    detail: str = ""
    age: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One round. `interfaces` are all that exist besides `lo`, None when they could not be read.

    `link` is None when no tunnel interface is known here. `reported_from` is added by the server to a keepalive and to
    a pulse: the global address that it came from, None when it came over a LAN. An agent has canaries for that.
    `uplinks` are the names of the interfaces to the internet outside the tunnel, and `routed` is what routes send
    where; None when they could not be read.

    `dns_intercepted` is True when an address that runs no DNS answered a query, `dns_rewritten` when a name that does
    not exist got an address; None when that was not tested.

    `leak_watch` is whether packets can be watched here, `pulses` whether UDP reaches the server's echo.
    `watch_refused` is why this process may open no packet socket, "" where it may; None when that was not tested.
    `refused_user` is the id of the one user whose programs go through the tunnel, where the agent may not send as that
    user; None where it may, or all users' programs go through it.
    `silent_for` is how many seconds before this round the first canary or pulse was sent of those that are unanswered,
    with none answered since.
    `broken` is why a round failed, "" for one that did not: then nothing else was seen.
    `portal` is True when a captive portal's page answered outside the tunnel. `flaky` are canary targets that stay
    silent while others answer. `contained` is True while the agent's own rules close the namespace. `port_check`,
    `reference_up` (whether the site's reference agent reaches the internet) and `unheard` (pulses come in, and the
    agent does not get their replies) are added by the server, never taken from an agent.
    """

    trigger: Trigger
    broken: str = ""
    link: Link | None = None
    interfaces: tuple[str, ...] | None = None
    canaries: tuple[Canary, ...] = ()
    resolvers: tuple[ResolverSighting, ...] = ()
    places: tuple[Place, ...] = ()
    uplinks: tuple[str, ...] | None = None
    routed: tuple[Routed, ...] | None = None
    dns_intercepted: bool | None = None
    dns_rewritten: bool | None = None
    system_lookup: SystemLookup | None = None  # None: not asked, or not over yet
    escapes: tuple[Escape, ...] = ()
    leak_watch: bool | None = None
    watch_refused: str | None = None
    refused_user: int | None = None
    claims: tuple[Claim, ...] = ()
    quality: Quality | None = None
    pulses: bool | None = None
    silent_for: float = 0.0
    forwarded_port: int | None = None
    portal: bool | None = None
    flaky: tuple[str, ...] = ()
    contained: bool | None = None
    actions: tuple[Action, ...] = ()
    reported_from: IPAddress | None = None
    port_check: PortCheck | None = None
    reference_up: bool | None = None
    unheard: bool | None = None
    took_ms: float = 0.0

    def asked(self, probe: Probe) -> tuple[Canary, ...]:
        """The canaries of one kind that were sent."""
        return tuple([c for c in self.canaries if c.probe is probe and c.answer is not Answer.UNKNOWN])

    def places_of(self, address: IPAddress | None) -> tuple[Place, ...]:
        return tuple([p for p in self.places if p.ip == address])

    def came_out_beside(self) -> tuple[Canary, ...]:
        """The canaries that show where packets sent outside the tunnel come out.

        As for the exit: a canary by DNS counts only where no other one by the same interface has an address, since a
        home router, for one, may divert DNS and answer with another address than the line's.
        """
        answered = [c for c in self.asked(Probe.PHYSICAL) if c.answer is Answer.ANSWERED and c.address is not None]
        better = {
            (c.interface, c.family)
            for c in answered
            if c.address is not None and is_public(c.address) and c.target not in ASKED_BY_DNS
        }
        return tuple(c for c in answered if c.target not in ASKED_BY_DNS or (c.interface, c.family) not in better)

    def exit(self, family: int) -> IPAddress | None:
        """The address that the far end saw on the default route, None when no canary came back.

        Where a part of the traffic goes outside the tunnel, the exit is where the tunnel's part comes out. A canary by
        DNS may be answered by something that intercepts DNS: it counts only where no other one has an address, and not
        at all where interception was seen.
        """
        seen = [c for c in self.canaries if c.family == family and c.probe is Probe.DEFAULT and c.address is not None]
        others = [c for c in seen if c.target not in ASKED_BY_DNS]
        for some in (others,) if self.dns_intercepted else (others, seen):
            if through := next((c.address for c in some if c.path is Path.TUNNEL), None):
                return through
        known = others if self.dns_intercepted else seen
        return known[0].address if known else None
