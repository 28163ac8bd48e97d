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
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, Policy, is_public


class State(StrEnum):
    """Of a verdict or of a tunnel. `silent` and `pending` are never a verdict; `unknown` is never a tunnel's state."""

    LEAKING = "leaking"
    DOWN = "down"
    DEGRADED = "degraded"
    SILENT = "silent"
    PENDING = "pending"
    UNKNOWN = "unknown"
    PROTECTED = "protected"


# Pulses in a window below which a share of lost ones says nothing.
LEAST_PULSES: Final = 20
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
    NO_FORWARDING = "no_forwarding"
    CAPTIVE_PORTAL = "captive_portal"
    UPLINK_DOWN = "uplink_down"
    ORPHANED_NAMESPACE = "orphaned_namespace"
    COUNTRY_MISMATCH = "country_mismatch"
    DNS_DOWN = "dns_down"
    MTU_BLACKHOLE = "mtu_blackhole"
    HIGH_LOSS = "high_loss"
    HIGH_LATENCY = "high_latency"
    PORT_CLOSED = "port_closed"
    FLAPPING = "flapping"
    NOTHING_SEEN = "nothing_seen"
    NO_NETWORK = "no_network"
    TUNNEL_UNKNOWN = "tunnel_unknown"
    NO_REPORTS = "no_reports"
    KILLSWITCH_OPEN = "killswitch_open"
    CONTAINED = "contained"
    DNS_INTERCEPTED = "dns_intercepted"
    DNS_REWRITTEN = "dns_rewritten"
    RESOLVER_UNEXPECTED = "resolver_unexpected"
    RESOLVER_UNKNOWN = "resolver_unknown"
    LOCATION_UNCERTAIN = "location_uncertain"
    CANARY_FLAKY = "canary_flaky"
    LEAK_WATCH_OFF = "leak_watch_off"
    PULSES_BLOCKED = "pulses_blocked"
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
    Code.NO_FORWARDING: Meaning(
        State.DOWN, _CRITICAL, "The VPN server answers and forwards nothing: choose another one, or tell its operator."
    ),
    Code.CAPTIVE_PORTAL: Meaning(
        State.DOWN, _CRITICAL, "Open a web page on this network and log in there; until then no tunnel can come up."
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
    Code.MTU_BLACKHOLE: Meaning(
        State.DEGRADED, _WARNING, "Lower the MTU of the tunnel's interface to the size that passes."
    ),
    Code.HIGH_LOSS: Meaning(State.DEGRADED, _WARNING, "Look at the home connection, or choose another VPN server."),
    Code.HIGH_LATENCY: Meaning(
        State.DEGRADED, _WARNING, "The line is full or the VPN server is: wait, limit what fills it, or choose another."
    ),
    Code.PORT_CLOSED: Meaning(
        State.DEGRADED, _WARNING, "Ask the VPN for a new forwarded port, and see that it is the one in use."
    ),
    Code.FLAPPING: Meaning(
        State.DEGRADED, _WARNING, "The tunnel comes and goes: look at its log, or choose another VPN server."
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
    Code.CONTAINED: Meaning(
        State.PROTECTED,
        _WARNING,
        "The agent has closed this namespace; it opens again when the tunnel is proven, or by vpn-sentinel release.",
    ),
    Code.DNS_REWRITTEN: Meaning(
        State.PROTECTED, _WARNING, "A resolver gives names that do not exist an address of its own: use another one."
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
    Code.CANARY_FLAKY: Meaning(State.PROTECTED, _INFO, "Nothing to do: the other canaries answer."),
    Code.LEAK_WATCH_OFF: Meaning(
        State.PROTECTED, _INFO, "Give the agent CAP_NET_RAW, and it sees each packet that leaves outside the tunnel."
    ),
    Code.PULSES_BLOCKED: Meaning(
        State.PROTECTED, _INFO, "Let UDP to the server's API port pass; until then reports alone are the sign of life."
    ),
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
    if seen.trigger is Trigger.PULSE:
        return _by_pulse(seen, policy)
    leaks = _in_order((*_ip_leaks(seen, policy), *_escapes_seen(seen, policy)))
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
            *(f for f in _dns(seen, policy) if f.code not in {k.code for k in leaks}),
            *_place(seen, policy),
            *_quality(seen, policy),
            *_port(seen),
            *_kill_switch(seen),
        )
    findings = (*findings, *_about_the_agent(seen))
    return Verdict(worst(findings), findings)


def judge_reference(seen: Observation) -> Verdict:
    """Judge what an agent outside the tunnels of its site saw: whether the home connection works, and no more."""
    canaries = seen.asked(Probe.DEFAULT)
    answered = [c for c in canaries if c.answer is Answer.ANSWERED]
    if any(c.path is Path.TUNNEL for c in answered):
        findings: tuple[Finding, ...] = (
            Finding(Code.NOTHING_SEEN, "A tunnel carries this host's traffic: a reference agent must run beside it."),
        )
    elif answered:
        findings = ()
    elif all(c.answer is Answer.BLOCKED for c in canaries):
        findings = (Finding(Code.NOTHING_SEEN, "No canary could be sent.", _answers(canaries)),)
    elif seen.portal:
        said = "A page of somebody else's answers on this network, and nothing else does: a captive portal."
        findings = (Finding(Code.CAPTIVE_PORTAL, said, _answers(canaries)),)
    else:
        said = "Nothing on the internet answers from here: the home connection is down."
        findings = (Finding(Code.UPLINK_DOWN, said, _answers(canaries)),)
    flaky = tuple(f for f in _about_the_agent(seen) if f.code in (Code.CANARY_FLAKY, Code.PULSES_BLOCKED))
    return Verdict(worst(findings), (*findings, *flaky))


def home_of(seen: Observation) -> tuple[IPNetwork, ...]:
    """The home networks that a reference agent's observation shows: one IPv4 address, and the /64 of an IPv6 one.

    Hosts of one site share the IPv4 address of its router, and have IPv6 addresses of their own in one /64.
    """
    found = [seen.exit(4), seen.exit(6)] if judge_reference(seen).state is State.PROTECTED else []
    return tuple(ip_network((a, 32 if a.version == 4 else 64), strict=False) for a in found if a and is_public(a))


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


def _in_order(leaks: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """Each code once: a canary's word comes before a packet's."""
    return tuple({f.code: f for f in reversed(leaks)}[c] for c in dict.fromkeys(f.code for f in leaks))


def _by_pulse(seen: Observation, policy: Policy) -> Verdict:
    """What the server sees of an agent's pulses by itself. It proves trouble and never health."""
    findings = tuple(_ip_leaks(seen, policy))
    if not findings and seen.unheard:
        findings = (
            Finding(
                Code.NO_TRAFFIC,
                "The agent's pulses reach the server, and nothing comes back to the agent: one direction is dead.",
                {"seen_by": "server"},
            ),
        )
    return Verdict(worst(findings), findings) if findings else Verdict(State.UNKNOWN)


def _escapes_seen(seen: Observation, policy: Policy) -> Iterator[Finding]:
    """What the leak watch saw leave: names asked are a DNS leak, the rest by what else leaves from here."""
    told = [e for e in seen.escapes if not policy.allows_outside(e.destination)]
    through = {c.family for c in seen.asked(Probe.DEFAULT) if c.address and not _escapes(c, seen, policy)}
    if not seen.asked(Probe.DEFAULT) and seen.link is not None and seen.link.present and seen.link.up:
        through = {4}  # told before the canaries are back; IPv6 beside an IPv4 tunnel is the usual whole leak
    for escape in told:
        facts = {
            "source": _end(escape.source, escape.source_port),
            "destination": _end(escape.destination, escape.destination_port),
            "protocol": escape.protocol,
            "interface": escape.interface,
            "packets": str(sum(e.packets for e in told if e.destination == escape.destination)),
            "bytes": str(sum(e.size for e in told if e.destination == escape.destination)),
            "seen_by": "leak watch",
        }
        where = f"{escape.protocol.upper()} to {facts['destination']}"
        if escape.destination_port == 53:
            if policy.allows_resolver(escape.destination):
                continue
            asked = f' for "{escape.name}"' if escape.name else ""
            facts |= {"name": escape.name} if escape.name else {}
            yield Finding(Code.DNS_LEAK, f"A DNS query{asked} left outside the tunnel: {where}.", facts)
        elif escape.destination.version in through:
            yield Finding(Code.SPLIT_ROUTE, f"A packet left outside the tunnel: {where}.", facts)
        else:
            code = Code.IP_LEAK if escape.destination.version == 4 else Code.IPV6_LEAK
            yield Finding(code, f"A packet left outside the tunnel: {where}.", facts)


def _end(address: IPAddress, port: int | None) -> str:
    if port is None:
        return str(address)
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


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
    elif seen.portal:
        yield Finding(
            Code.CAPTIVE_PORTAL,
            "A page of somebody else's answers on this network, and nothing else does: a captive portal.",
            _answers(canaries),
        )
    elif seen.reference_up is False and not seen.contained:
        yield Finding(
            Code.UPLINK_DOWN,
            "Nothing answers, and the site's reference agent has no internet either: the home connection is down.",
            {"reference": "down", **_answers(canaries)},
        )
    elif (
        seen.reference_up is None and physical and all(c.answer in (Answer.LOST, Answer.UNREACHABLE) for c in physical)
    ):
        yield Finding(
            Code.UPLINK_DOWN,
            "Nothing answers, neither through the tunnel nor beside it: the home connection is down.",
            {"beside_the_tunnel": ", ".join(sorted({c.answer for c in physical})), **_answers(canaries)},
        )
    elif not seen.link.present or not seen.link.up:
        yield _tunnel_down(seen.link, _answers(canaries))
    elif (gateway := next((c for c in seen.asked(Probe.GATEWAY) if c.answer is Answer.ANSWERED), None)) is not None:
        yield Finding(
            Code.NO_FORWARDING,
            f"The VPN server answers at {gateway.target}, and nothing beyond it does.",
            {"gateway": gateway.target, **_answers(canaries), **_claimed(seen)},
        )
    else:
        yield Finding(
            Code.NO_TRAFFIC,
            f"The interface {seen.link.name} is up, but nothing comes back through it.",
            {
                "interface": seen.link.name,
                "sent_bytes": str(seen.link.tx_bytes),
                "received_bytes": str(seen.link.rx_bytes),
                **_answers(canaries),
                **_claimed(seen),
            },
        )


def _tunnel_down(link: Link, facts: Mapping[str, str]) -> Finding:
    message = f"The tunnel's interface {link.name} is {'down' if link.present else 'gone'}."
    return Finding(Code.TUNNEL_DOWN, message, {"interface": link.name, **facts})


def _answers(canaries: tuple[Canary, ...]) -> dict[str, str]:
    return {f"{c.target}_ipv{c.family}": c.answer for c in canaries}


def _claimed(seen: Observation) -> dict[str, str]:
    """What the tunnel's own program says, beside what the canaries found."""
    facts: dict[str, str] = {}
    for claim in seen.claims:
        if claim.status:
            facts[f"{claim.source}_says"] = claim.status
        if claim.handshake_age is not None:
            facts["handshake_seconds_ago"] = f"{claim.handshake_age:.0f}"
    return facts


def _quality(seen: Observation, policy: Policy) -> Iterator[Finding]:
    found = seen.quality
    if found is None:
        return
    if found.vanished is not None:
        passes = f"; {found.mtu} bytes pass" if found.mtu else ""
        yield Finding(
            Code.MTU_BLACKHOLE,
            f"Packets of {found.vanished} bytes vanish in the tunnel without a word{passes}.",
            {"vanished": str(found.vanished), **({"passes": str(found.mtu)} if found.mtu else {})},
        )
    if found.sent >= LEAST_PULSES and found.lost / found.sent > policy.max_loss:
        share = round(100 * found.lost / found.sent)
        yield Finding(
            Code.HIGH_LOSS,
            f"{share} % of the pulses of the last {found.seconds:.0f} s were lost.",
            {"lost": str(found.lost), "sent": str(found.sent)},
        )
    if found.rtt_ms is not None and found.rtt_ms > policy.max_rtt_ms:
        yield Finding(
            Code.HIGH_LATENCY,
            f"An answer takes {found.rtt_ms:.0f} ms.",
            {"rtt_ms": f"{found.rtt_ms:.0f}", "most": f"{policy.max_rtt_ms:.0f}"},
        )


def _port(seen: Observation) -> Iterator[Finding]:
    check = seen.port_check
    if check is not None and check.answer is Answer.LOST and check.port == seen.forwarded_port:
        where = _end(check.address, check.port)
        yield Finding(
            Code.PORT_CLOSED,
            f"The forwarded port {check.port} takes no connection from outside.",
            {"asked": where, "answer": check.answer},
        )


def _about_the_agent(seen: Observation) -> Iterator[Finding]:
    """What it does, and what it cannot see here."""
    if seen.contained:
        yield Finding(Code.CONTAINED, "The agent has closed the ways out beside the tunnel.")
    if seen.flaky:
        names = ", ".join(seen.flaky)
        yield Finding(Code.CANARY_FLAKY, f"No answer from {names}, while others answer.", {"targets": names})
    if seen.leak_watch is False:
        yield Finding(Code.LEAK_WATCH_OFF, "Packets cannot be watched here: the agent lacks CAP_NET_RAW.")
    if seen.pulses is False:
        yield Finding(Code.PULSES_BLOCKED, "UDP does not reach the server; the WebSocket carries the sign of life.")


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
    if seen.dns_rewritten:
        yield Finding(Code.DNS_REWRITTEN, "A name that does not exist was given an address.")
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
