"""The judge: what one observation means under a policy, without clock, I/O or memory.

What could not be observed is never read as "fine", nor as "leaks": it is `State.UNKNOWN`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from ipaddress import ip_network
from typing import Final

from vpn_sentinel.domain import leaks, lookups, outages, resolvers, routes, unseen
from vpn_sentinel.domain.observation import Answer, Canary, Observation, Path, Place, Probe, Trigger
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, Policy, is_public
from vpn_sentinel.domain.verdict import Code, Finding, State, Verdict, worst

# With fewer pulses in a window, the share of lost ones means nothing.
MIN_PULSES_JUDGED: Final = 20


def judge(seen: Observation, policy: Policy) -> Verdict:
    """Judge one observation. No clock, no I/O, no memory of the past.

    Where the tunnel is dead, only that is reported; where it leaks, all other findings are reported as well.
    """
    if seen.trigger is Trigger.PULSE:
        return _by_pulse(seen, policy)
    if seen.broken:
        return Verdict(State.UNKNOWN, (outages.round_failed(seen),))
    leaking = (*leaks.by_canaries(seen, policy), *leaks.by_packets(seen, policy), *routes.bypasses(seen, policy))
    canaries = seen.asked(Probe.DEFAULT)
    # A keepalive that arrived proves that traffic passes; an agent's report may have used a fallback URL.
    alive = any(c.answer is Answer.ANSWERED for c in canaries) or seen.trigger is Trigger.KEEPALIVE
    up = seen.link is not None and seen.link.present and seen.link.up
    if not leaking and not canaries and up and seen.trigger is Trigger.LEAK:
        return Verdict(State.UNKNOWN)  # packets that are meant to leave, reported before the canaries were sent
    if not leaking and not alive:
        findings = (*outages.why_dead(seen), *_kill_switch(seen))
    else:
        known = bool(leaking)
        leaking, dns = _merged_dns_leaks(leaking, tuple(_dns(seen, policy)))
        findings = (
            *leaking,
            *(() if known else outages.tunnel_gone(seen)),
            *unseen.findings(seen, policy),
            *dns,
            *_place(seen, policy),
            *_quality(seen, policy),
            *_port(seen),
            *_kill_switch(seen),
        )
    findings = (*findings, *_about_the_agent(seen))
    return Verdict(worst(findings), findings)


def judge_reference(seen: Observation) -> Verdict:
    """Judge an observation of a reference agent: only whether the home connection works."""
    canaries = seen.asked(Probe.DEFAULT)
    answered = [c for c in canaries if c.answer is Answer.ANSWERED]
    if seen.broken:
        findings: tuple[Finding, ...] = (outages.round_failed(seen),)
    elif any(c.path is Path.TUNNEL for c in answered):
        findings = (
            Finding(
                Code.NOTHING_SEEN,
                "A tunnel carries this host's traffic: a reference agent must run beside it.",
                {"path": str(Path.TUNNEL)},
            ),
        )
    elif answered:
        findings = ()
    elif all(c.answer is Answer.BLOCKED for c in canaries):
        findings = (Finding(Code.NOTHING_SEEN, "No canary could be sent.", outages.answers(canaries)),)
    elif seen.portal:
        findings = (outages.captive_portal(canaries),)
    else:
        text = "Nothing on the internet answers from here: the home connection is down."
        findings = (Finding(Code.UPLINK_DOWN, text, outages.answers(canaries)),)
    flaky = tuple(f for f in _about_the_agent(seen) if f.code in (Code.CANARY_FLAKY, Code.PULSES_BLOCKED))
    return Verdict(worst(findings), (*findings, *flaky))


def home_of(seen: Observation) -> tuple[IPNetwork, ...]:
    """The home networks that a reference agent's observation shows: the IPv4 address, and the /64 of the IPv6 address.

    Hosts of one site share the IPv4 address of its router, and have their own IPv6 addresses in one /64.
    """
    found = [seen.exit(4), seen.exit(6)] if judge_reference(seen).state is State.PROTECTED else []
    return tuple(ip_network((a, 32 if a.version == 4 else 64), strict=False) for a in found if a and is_public(a))


def with_learned_home(seen: Observation, policy: Policy) -> Policy:
    """Add the address that a canary outside a working tunnel came from: that is home by definition.

    Only when the tunnel works and comes out elsewhere; otherwise the two cannot be distinguished.
    """
    if seen.link is None or not (seen.link.present and seen.link.up):
        return policy
    through = {c.address for c in seen.asked(Probe.DEFAULT) if c.path is Path.TUNNEL and c.address}
    beside = {c.address for c in seen.came_out_beside() if c.address}
    if not through or not beside - through:
        return policy
    return policy.with_home(ip_network(a) for a in sorted(beside - through, key=str))


def _merged_dns_leaks(
    leaking: tuple[Finding, ...], dns: tuple[Finding, ...]
) -> tuple[tuple[Finding, ...], tuple[Finding, ...]]:
    """Merge a DNS leak that packets and a lookup show into one finding, with the lookup's message."""
    asked = [f for f in dns if f.code is Code.DNS_LEAK]
    seen = [f for f in leaking if f.code is Code.DNS_LEAK]
    if not asked:
        return leaks.one_per_code(leaking), dns
    (one,) = leaks.one_per_code((*asked, *seen))
    merged = (one if f is asked[0] else f for f in dns if f is asked[0] or f not in asked)
    return leaks.one_per_code(f for f in leaking if f not in seen), tuple(merged)


def _by_pulse(seen: Observation, policy: Policy) -> Verdict:
    """Judge what the server sees of an agent's pulses. It can prove trouble, but never health."""
    findings = tuple(leaks.by_canaries(seen, policy))
    if not findings and seen.unheard:
        findings = (
            Finding(
                Code.NO_TRAFFIC,
                "The agent's pulses reach the server, and nothing comes back to the agent: one direction is dead.",
                {"seen_by": "server"},
            ),
        )
    return Verdict(worst(findings), findings) if findings else Verdict(State.UNKNOWN)


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
    if found.sent >= MIN_PULSES_JUDGED and found.lost / found.sent > policy.max_loss:
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
        where = leaks.end_text(check.address, check.port)
        yield Finding(
            Code.PORT_CLOSED,
            f"The forwarded port {check.port} takes no connection from outside.",
            {"asked": where, "answer": check.answer},
        )


def _about_the_agent(seen: Observation) -> Iterator[Finding]:
    """What the agent does, and what it cannot see here."""
    if seen.contained:
        yield Finding(Code.CONTAINED, "The agent has closed the ways out beside the tunnel.")
    if seen.flaky:
        names = ", ".join(seen.flaky)
        yield Finding(Code.CANARY_FLAKY, f"No answer from {names}, while others answer.", {"targets": names})
    if seen.leak_watch is False:
        facts = {} if seen.watch_refused is None else {"packet_socket": seen.watch_refused or "opens"}
        yield Finding(Code.LEAK_WATCH_OFF, packets_unseen(seen.watch_refused), facts)
    if seen.pulses is False:
        yield Finding(Code.PULSES_BLOCKED, "UDP does not reach the server; the WebSocket carries the sign of life.")


def packets_unseen(refused: str | None) -> str:
    """A sentence on packets that are not watched, and why, as far as that is known."""
    match refused:
        case None:
            return "Packets cannot be watched here, or not on every way out: the agent's log tells why."
        case "":
            return "Packets cannot be watched on every way out: the agent's log tells which interface, and why."
        case _:
            return f"Packets cannot be watched here: the agent may open no packet socket ({refused})."


def _kill_switch(seen: Observation) -> Iterator[Finding]:
    """Only next to a tunnel: without one, the physical interface is the normal route."""
    if seen.link is None:
        return
    open_ = [c for c in seen.asked(Probe.PHYSICAL) if c.answer is Answer.ANSWERED]
    hops = [c for c in seen.asked(Probe.FIRST_HOP) if c.answer is Answer.EXPIRED]
    if not open_ and not hops:
        return
    # An answer with an address says most; each interface has its own answers.
    named = sorted(seen.came_out_beside(), key=lambda c: c.family)
    interfaces = dict.fromkeys(c.interface for c in (*named, *open_, *hops))
    reached = {
        interface: _how_far(
            [c for c in named if c.interface == interface] or [c for c in (*open_, *hops) if c.interface == interface]
        )
        for interface in interfaces
    }
    facts = next(iter(reached.values()))[1] if len(interfaces) == 1 else {}
    text = "; one ".join(f"by {interface} {words}" if interface else words for interface, (words, _) in reached.items())
    asked = seen.asked(Probe.PHYSICAL)
    held = dict.fromkeys(c.interface for c in asked if c.answer is Answer.BLOCKED and c.interface)
    by, closed = ", ".join(w for w in interfaces if w), ", ".join(i for i in held if i not in interfaces)
    yield Finding(
        Code.KILLSWITCH_OPEN,
        f"A packet sent beside the tunnel {text}.",
        {**facts, **({"interfaces": by} if by else {}), **({"held": closed} if closed else {})},
    )


def _how_far(shown: Sequence[Canary]) -> tuple[str, dict[str, str]]:
    """How far packets got by one interface, in words and as facts."""
    first = shown[0]
    if first.probe is Probe.FIRST_HOP:
        router = f", {first.address}" if first.address else ""
        facts = {"router": str(first.address)} if first.address else {}
        return f"reached the first router{router}; whether that one lets it through is not known", facts
    if first.address is None:
        return f"was answered by {first.target}", {"seen_by": first.target}
    at = " and ".join(dict.fromkeys(str(c.address) for c in shown))
    return f"came out at {at}", {"address": str(first.address), "seen_by": first.target}


def _dns(seen: Observation, policy: Policy) -> Iterator[Finding]:
    """DNS findings, by path, in the order of docs/reference/situations.md; a country is never a reason."""
    if seen.dns_intercepted:
        yield Finding(Code.DNS_INTERCEPTED, "An address that runs no DNS answered a query.")
    if seen.dns_rewritten:
        yield Finding(Code.DNS_REWRITTEN, "A name that does not exist was given an address.")
    leaking = [f for s in seen.resolvers if (f := resolvers.leak(s, seen, policy))]
    if not leaking and (system_leak := resolvers.system_leak(seen, policy)):
        leaking.append(system_leak)
    yield from leaking
    yield from lookups.lookup_failures(seen)
    by_system = resolvers.system_egresses(seen, policy)
    if leaking or not (by_system or (seen.resolvers and not lookups.all_dead(seen))):
        return
    beside = resolvers.unverified_nameservers(seen, policy)
    if beside:
        named = ", ".join(map(str, beside))
        yield Finding(
            Code.RESOLVER_UNKNOWN,
            f"The nameserver {named} is reached outside the tunnel, and where it asks the internet from could not be "
            "verified.",
            {"nameservers": named, "path": str(Path.OUTSIDE)},
        )
    with_egress = [s for s in seen.resolvers if s.answer is Answer.ANSWERED and resolvers.egress_of(s, seen)]
    if not with_egress and not beside and not by_system:
        yield Finding(Code.RESOLVER_UNKNOWN, "No method could tell which resolver asks for this host.")
    by_nameserver = (resolvers.egress_of(s, seen) for s in with_egress if not policy.allows_resolver(s.nameserver))
    for egress in dict.fromkeys((*by_nameserver, *by_system)):
        if egress is not None and not resolvers.is_expected(egress, seen, policy):
            gap = resolvers.missing_knowledge(egress, seen, policy)
            yield Finding(
                Code.RESOLVER_UNEXPECTED,
                f"DNS queries come out at {egress}, neither in the exit's network nor at a known resolver."
                + (f" Whether it is the home provider's cannot be determined without {gap}." if gap else ""),
                {"resolver": str(egress), **_country_of(egress, seen)},
            )


def _country_of(address: IPAddress, seen: Observation) -> dict[str, str]:
    return next(({"country": p.country} for p in seen.places_of(address) if p.country), {})


def _place(seen: Observation, policy: Policy) -> Iterator[Finding]:
    exit_ = seen.exit(4) or seen.exit(6)
    places = seen.places_of(exit_)
    if len(places) < 2:
        return  # one source alone proves nothing
    claims = {p.source: p.country for p in places if p.country}
    country = agreed_country(places)
    if claims and country is None and len(claims) > 1:
        text = ", ".join(f"{source} says {c}" for source, c in claims.items())
        yield Finding(Code.LOCATION_UNCERTAIN, f"Sources disagree on the place of {exit_}: {text}.", dict(claims))
    elif country and policy.expected_countries and country not in policy.expected_countries:
        agreeing = [s for s, c in claims.items() if c == country]
        if len(agreeing) > 1:  # a single source is often wrong about VPN exits
            yield Finding(
                Code.COUNTRY_MISMATCH,
                f"The exit {exit_} is in {country}, not in {' or '.join(policy.expected_countries)}.",
                {"country": country, "expected": ", ".join(policy.expected_countries), "sources": ", ".join(agreeing)},
            )


def agreed_country(places: tuple[Place, ...]) -> str | None:
    """The country that most sources name; None when they are split or none names one."""
    if len(places) == 1:
        return places[0].country
    ranked = Counter(p.country for p in places if p.country).most_common(2)
    if not ranked or (len(ranked) == 2 and ranked[0][1] == ranked[1][1]):
        return None
    return ranked[0][0]
