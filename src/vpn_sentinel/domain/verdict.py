"""The judge: what one observation means under a policy, without clock, I/O or memory.

"Could not look" is never read as "looks fine", nor as "leaks": it is `State.UNKNOWN`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import ip_network
from typing import Final

from vpn_sentinel.domain import resolvers
from vpn_sentinel.domain.observation import Answer, Canary, Link, Observation, Path, Place, Probe, Trigger
from vpn_sentinel.domain.policy import IPAddress, Policy


class State(StrEnum):
    """Of a verdict or of a tunnel. `silent` and `pending` are never a verdict; `unknown` is never a tunnel's state."""

    LEAKING = "leaking"
    DOWN = "down"
    DEGRADED = "degraded"
    SILENT = "silent"
    PENDING = "pending"
    UNKNOWN = "unknown"
    PROTECTED = "protected"


# Worst first.
HARM: Final = tuple(State)


class Severity(StrEnum):
    CRITICAL = "critical"
    WARNING = "warning"
    INFO = "info"


class Code(StrEnum):
    IP_LEAK = "ip_leak"
    IPV6_LEAK = "ipv6_leak"
    DNS_LEAK = "dns_leak"
    SPLIT_ROUTE = "split_route"
    TUNNEL_DOWN = "tunnel_down"
    NO_TRAFFIC = "no_traffic"
    UPLINK_DOWN = "uplink_down"
    ORPHANED_NAMESPACE = "orphaned_namespace"
    COUNTRY_MISMATCH = "country_mismatch"
    DNS_DOWN = "dns_down"
    NOTHING_SEEN = "nothing_seen"
    NO_NETWORK = "no_network"
    TUNNEL_UNKNOWN = "tunnel_unknown"
    NO_REPORTS = "no_reports"
    KILLSWITCH_OPEN = "killswitch_open"
    DNS_INTERCEPTED = "dns_intercepted"
    RESOLVER_UNEXPECTED = "resolver_unexpected"
    RESOLVER_UNKNOWN = "resolver_unknown"
    LOCATION_UNCERTAIN = "location_uncertain"
    CLOCK_SKEW = "clock_skew"
    OBSERVATIONS_LOST = "observations_lost"


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a code says of the tunnel, how loud it is, and what its owner should do."""

    state: State
    severity: Severity
    advice: str


_CRITICAL, _WARNING, _INFO = Severity.CRITICAL, Severity.WARNING, Severity.INFO
MEANING: Final[Mapping[Code, Meaning]] = {
    Code.IP_LEAK: Meaning(
        State.LEAKING,
        _CRITICAL,
        "Stop the programs behind this tunnel, bring it back up, and switch its kill switch on.",
    ),
    Code.IPV6_LEAK: Meaning(State.LEAKING, _CRITICAL, "Route IPv6 through the tunnel, or block it outside the tunnel."),
    Code.DNS_LEAK: Meaning(
        State.LEAKING,
        _CRITICAL,
        "Set the nameserver to one that is reached through the tunnel, or allow this resolver.",
    ),
    Code.SPLIT_ROUTE: Meaning(
        State.LEAKING, _CRITICAL, "Look for routes and rules that send some destinations past the tunnel."
    ),
    Code.TUNNEL_DOWN: Meaning(State.DOWN, _CRITICAL, "Bring the tunnel's interface back up."),
    Code.NO_TRAFFIC: Meaning(
        State.DOWN, _CRITICAL, "Reconnect the tunnel or choose another VPN server; the interface alone says nothing."
    ),
    Code.UPLINK_DOWN: Meaning(State.DOWN, _CRITICAL, "Look at the home connection first: it is not the VPN's fault."),
    Code.ORPHANED_NAMESPACE: Meaning(
        State.DOWN, _CRITICAL, "Recreate this container; a restart will not bring its network back."
    ),
    Code.COUNTRY_MISMATCH: Meaning(
        State.DEGRADED, _WARNING, "Choose a VPN server in an expected country, or add this country to the policy."
    ),
    Code.DNS_DOWN: Meaning(
        State.DEGRADED, _WARNING, "The tunnel carries traffic, but no nameserver answers: check them."
    ),
    Code.NOTHING_SEEN: Meaning(State.UNKNOWN, _WARNING, "No canary could be sent; look at the agent's log."),
    Code.NO_NETWORK: Meaning(State.UNKNOWN, _WARNING, "No network is reachable from here."),
    Code.TUNNEL_UNKNOWN: Meaning(
        State.UNKNOWN,
        _WARNING,
        "No tunnel interface is known here and no home network is declared: set VPN_SENTINEL_HOME_NETWORKS.",
    ),
    Code.NO_REPORTS: Meaning(State.SILENT, _CRITICAL, "Look whether the agent runs and whether its tunnel is down."),
    Code.KILLSWITCH_OPEN: Meaning(
        State.PROTECTED,
        _WARNING,
        "Switch the VPN's kill switch on: without one, traffic leaks when the tunnel goes away.",
    ),
    Code.DNS_INTERCEPTED: Meaning(
        State.PROTECTED,
        _WARNING,
        "Something inside the tunnel answers DNS queries that were meant for another address.",
    ),
    Code.RESOLVER_UNEXPECTED: Meaning(
        State.PROTECTED, _WARNING, "Check that you know this resolver; if you do, allow it in the policy."
    ),
    Code.RESOLVER_UNKNOWN: Meaning(State.PROTECTED, _INFO, "No method could tell which resolver asks for this host."),
    Code.LOCATION_UNCERTAIN: Meaning(State.PROTECTED, _INFO, "Sources disagree on the place of the exit address."),
    Code.CLOCK_SKEW: Meaning(State.PROTECTED, _WARNING, "Set the agent's clock."),
    Code.OBSERVATIONS_LOST: Meaning(State.PROTECTED, _INFO, "The agent's spool was full: routine rounds were thinned."),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found, in words (`message`) and facts (`evidence`, text to text)."""

    code: Code
    message: str
    evidence: Mapping[str, str] = field(default_factory=dict)

    @property
    def severity(self) -> Severity:
        return MEANING[self.code].severity

    @property
    def advice(self) -> str:
        return MEANING[self.code].advice


@dataclass(frozen=True, slots=True)
class Verdict:
    state: State
    findings: tuple[Finding, ...] = ()


def worst(findings: tuple[Finding, ...]) -> State:
    """The state that the most harmful of the findings stands for; protected without any."""
    return min((MEANING[f.code].state for f in findings), key=HARM.index, default=State.PROTECTED)


def judge(seen: Observation, policy: Policy) -> Verdict:
    """Judge one observation. No clock, no I/O, no memory of the past.

    Knowing of a dead tunnel, nothing else is asked; knowing of a leak, the rest is still told.
    """
    leaks = tuple(_ip_leaks(seen, policy))
    canaries = seen.asked(Probe.DEFAULT)
    # A keepalive that arrived proves that something carries it; an agent's report may have come by a second way.
    alive = any(c.answer is Answer.ANSWERED for c in canaries) or seen.trigger is Trigger.KEEPALIVE
    if not leaks and not alive:
        findings = (*_dead(seen), *_kill_switch(seen))
    else:
        findings = (
            *leaks,
            *(() if leaks else _gone(seen)),
            *_unverifiable(seen, policy),
            *_dns(seen, policy),
            *_place(seen, policy),
            *_kill_switch(seen),
        )
    return Verdict(worst(findings), findings)


def _ip_leaks(seen: Observation, policy: Policy) -> Iterator[Finding]:
    for family, code in ((4, Code.IP_LEAK), (6, Code.IPV6_LEAK)):
        answered = [c for c in seen.asked(Probe.DEFAULT) if c.family == family and c.answer is Answer.ANSWERED]
        escaped = next((c for c in answered if _escapes(c, seen, policy)), None)
        inside = next((c for c in answered if c.address is not None and not _escapes(c, seen, policy)), None)
        if escaped is not None and inside is not None:
            yield _split_route(escaped, inside)
        elif escaped is not None:
            yield _ip_leak(code, escaped, policy)
        elif seen.reported_from and seen.reported_from.version == family and policy.is_home(seen.reported_from):
            yield Finding(
                code,
                f"This report reached the server from the home address {seen.reported_from}.",
                {"address": str(seen.reported_from), "seen_by": "server"},
            )


def _escapes(canary: Canary, seen: Observation, policy: Policy) -> bool:
    if canary.answer is not Answer.ANSWERED or canary.address is None:
        return False
    return policy.is_home(canary.address) or (seen.link is not None and canary.path is Path.OUTSIDE)


def _ip_leak(code: Code, canary: Canary, policy: Policy) -> Finding:
    home = canary.address is not None and policy.is_home(canary.address)
    what = "the home address" if home else "outside the tunnel, from"
    return Finding(
        code,
        f"IPv{canary.family} traffic leaves {what if not home else 'from ' + what} {canary.address}.",
        {"address": str(canary.address), "seen_by": canary.target, "path": canary.path},
    )


def _split_route(escaped: Canary, inside: Canary) -> Finding:
    return Finding(
        Code.SPLIT_ROUTE,
        f"Part of the IPv{escaped.family} traffic leaves from {escaped.address}, outside the tunnel.",
        {"address": str(escaped.address), "seen_by": escaped.target, "through_the_tunnel": inside.target},
    )


def _unverifiable(seen: Observation, policy: Policy) -> Iterator[Finding]:
    if seen.link is not None:
        return
    exits = [e for e in (seen.exit(4), seen.exit(6)) if e] or ([seen.reported_from] if seen.reported_from else [])
    if any(e.version == home.version for e in exits for home in policy.home_networks):
        return
    named = ", ".join(str(e) for e in exits)
    yield Finding(
        Code.TUNNEL_UNKNOWN,
        f"Traffic leaves from {named or 'an unknown address'}, and nothing here tells whether that is a VPN.",
        {"exit": named} if named else {},
    )


def _gone(seen: Observation) -> Iterator[Finding]:
    """Something answers, though the tunnel's interface cannot carry it and no leak is proven."""
    by_tunnel = any(c.path is Path.TUNNEL and c.answer is Answer.ANSWERED for c in seen.asked(Probe.DEFAULT))
    if seen.link is not None and not (seen.link.present and seen.link.up) and not by_tunnel:
        yield _tunnel_down(seen.link, {})


def _dead(seen: Observation) -> Iterator[Finding]:
    """Why nothing came back on the default route."""
    canaries = seen.asked(Probe.DEFAULT)
    if seen.link is None:
        if canaries:
            yield Finding(
                Code.NO_NETWORK,
                "Nothing answers on the default route, and no tunnel is known here.",
                _answers(canaries),
            )
        else:
            yield Finding(Code.NOTHING_SEEN, "No canary could be sent.")
        return
    if not canaries and seen.link.present and seen.link.up:
        yield Finding(Code.NOTHING_SEEN, "The tunnel's interface is up, and no canary could be sent.")
        return
    physical = seen.asked(Probe.PHYSICAL)
    if seen.interfaces == ():
        yield Finding(
            Code.ORPHANED_NAMESPACE,
            f"Only the loopback interface is left: {seen.link.name} and all others are gone.",
            {"interface": seen.link.name},
        )
    elif physical and all(c.answer in (Answer.LOST, Answer.UNREACHABLE) for c in physical):
        yield Finding(
            Code.UPLINK_DOWN,
            "Nothing answers, neither through the tunnel nor beside it: the home connection is down.",
            {"beside_the_tunnel": ", ".join(sorted({c.answer for c in physical})), **_answers(canaries)},
        )
    elif not seen.link.present or not seen.link.up:
        yield _tunnel_down(seen.link, _answers(canaries))
    else:
        yield Finding(
            Code.NO_TRAFFIC,
            f"The interface {seen.link.name} is up, but nothing comes back through it.",
            {
                "interface": seen.link.name,
                "sent_bytes": str(seen.link.tx_bytes),
                "received_bytes": str(seen.link.rx_bytes),
                **_answers(canaries),
            },
        )


def _tunnel_down(link: Link, facts: Mapping[str, str]) -> Finding:
    message = f"The tunnel's interface {link.name} is {'down' if link.present else 'gone'}."
    return Finding(Code.TUNNEL_DOWN, message, {"interface": link.name, **facts})


def _answers(canaries: tuple[Canary, ...]) -> dict[str, str]:
    return {f"{c.target}_ipv{c.family}": c.answer for c in canaries}


def _kill_switch(seen: Observation) -> Iterator[Finding]:
    """Only beside a tunnel that routes: without one, the physical interface is the way out."""
    if seen.link is None:
        return
    open_ = [c for c in seen.asked(Probe.PHYSICAL) if c.answer is Answer.ANSWERED]
    hops = [c for c in seen.asked(Probe.FIRST_HOP) if c.answer is Answer.EXPIRED]
    if open_:
        yield Finding(
            Code.KILLSWITCH_OPEN,
            f"A packet sent beside the tunnel came out at {open_[0].address}.",
            {"address": str(open_[0].address), "seen_by": open_[0].target},
        )
    elif hops:
        yield Finding(
            Code.KILLSWITCH_OPEN,
            "A packet sent beside the tunnel reached the first router.",
            {"router": str(hops[0].address) if hops[0].address else "unnamed"},
        )


def _dns(seen: Observation, policy: Policy) -> Iterator[Finding]:
    """By path, in the order of docs/reference/situations.md; a country is never a reason."""
    if seen.dns_intercepted:
        yield Finding(Code.DNS_INTERCEPTED, "An address that runs no DNS answered a query.")
    if not seen.resolvers:
        return
    leak = next((f for s in seen.resolvers if (f := resolvers.leak(s, seen, policy))), None)
    if leak is not None:
        yield Finding(Code.DNS_LEAK, leak.message, leak.evidence)
        return
    if all(s.answer in (Answer.LOST, Answer.UNREACHABLE, Answer.BLOCKED) for s in seen.resolvers):
        servers = ", ".join(sorted({str(s.nameserver) for s in seen.resolvers}))
        yield Finding(Code.DNS_DOWN, f"No nameserver answers: {servers}.", {"nameservers": servers})
        return
    telling = [s for s in seen.resolvers if s.answer is Answer.ANSWERED and s.egress]
    if not telling:
        yield Finding(Code.RESOLVER_UNKNOWN, "No method could tell which resolver asks for this host.")
    for egress in dict.fromkeys(s.egress for s in telling if not policy.allows_resolver(s.nameserver)):
        if egress is not None and not resolvers.is_expected(egress, seen, policy):
            yield Finding(
                Code.RESOLVER_UNEXPECTED,
                f"DNS queries come out at {egress}, neither in the exit's network nor at a known resolver.",
                {"resolver": str(egress), **_country_of(egress, seen)},
            )


def _country_of(address: IPAddress, seen: Observation) -> dict[str, str]:
    return next(({"country": p.country} for p in seen.places_of(address) if p.country), {})


def _place(seen: Observation, policy: Policy) -> Iterator[Finding]:
    exit_ = seen.exit(4) or seen.exit(6)
    places = seen.places_of(exit_)
    if len(places) < 2:
        return  # one source alone neither disagrees nor convinces
    claims = {p.source: p.country for p in places if p.country}
    country = agreed_country(places)
    if claims and country is None and len(claims) > 1:
        said = ", ".join(f"{source} says {c}" for source, c in claims.items())
        yield Finding(Code.LOCATION_UNCERTAIN, f"Sources disagree on the place of {exit_}: {said}.", dict(claims))
    elif country and policy.expected_countries and country not in policy.expected_countries:
        agreeing = [s for s, c in claims.items() if c == country]
        if len(agreeing) > 1:  # a single one is often wrong about VPN exits
            yield Finding(
                Code.COUNTRY_MISMATCH,
                f"The exit {exit_} is in {country}, not in {' or '.join(policy.expected_countries)}.",
                {"country": country, "expected": ", ".join(policy.expected_countries), "sources": ", ".join(agreeing)},
            )


def agreed_country(places: tuple[Place, ...]) -> str | None:
    """The country that most sources name; None when they are split or none speaks."""
    if len(places) == 1:
        return places[0].country
    ranked = Counter(p.country for p in places if p.country).most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]


def learned_home(seen: Observation, policy: Policy) -> Policy:
    """Add the address that a canary beside a working tunnel came from: by definition it is home.

    Only when the tunnel works and comes out elsewhere; otherwise the two cannot be told apart.
    """
    if seen.link is None or not (seen.link.present and seen.link.up):
        return policy
    through = {c.address for c in seen.asked(Probe.DEFAULT) if c.path is Path.TUNNEL and c.address}
    beside = {c.address for c in seen.asked(Probe.PHYSICAL) if c.answer is Answer.ANSWERED and c.address}
    if not through or not beside - through:
        return policy
    return policy.with_home(ip_network(a) for a in sorted(beside - through, key=str))
