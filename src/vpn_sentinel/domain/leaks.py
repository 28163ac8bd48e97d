"""What proves a leak: an answer that came from home or from beside the tunnel, or a packet seen leaving there."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Final

from vpn_sentinel.domain.observation import Answer, Canary, Observation, Path, Probe
from vpn_sentinel.domain.policy import IPAddress, Policy, is_public
from vpn_sentinel.domain.verdict import Code, Finding

# What may leave a home besides TCP, UDP and ICMP, by number (IANA, protocol-numbers).
_PROTOCOLS: Final = {
    2: "IGMP", 4: "IPv4 in IP", 41: "IPv6 in IP", 47: "GRE", 50: "ESP", 51: "AH", 89: "OSPF", 132: "SCTP",
}  # fmt: skip
_MOST_OF_IT: Final = 0.5  # of the internet's addresses: what a tunnel takes that carries a family
_NAMED: Final = 4  # far ends that a finding names besides the first one
DNS_PORTS: Final = (53, 853)  # plain, and by TLS or QUIC (RFC 7858, 9250)


def by_canaries(seen: Observation, policy: Policy) -> Iterator[Finding]:
    """Where the canaries came out, and, told by the server alone, where the report did."""
    for family, code in ((4, Code.IP_LEAK), (6, Code.IPV6_LEAK)):
        answered = [c for c in seen.asked(Probe.DEFAULT) if c.family == family and c.answer is Answer.ANSWERED]
        escaped = next((c for c in answered if _escapes(c, seen, policy)), None)
        inside = next((c for c in answered if c.address is not None and not _escapes(c, seen, policy)), None)
        if escaped is not None and inside is not None:
            yield _split_route(escaped, inside)
        elif escaped is not None:
            yield _ip_leak(code, escaped, seen, policy)
        elif seen.reported_from and seen.reported_from.version == family and policy.is_home(seen.reported_from):
            yield Finding(
                code,
                f"This report reached the server from the home address {seen.reported_from}.",
                {"address": str(seen.reported_from), "seen_by": "server"},
            )


def by_packets(seen: Observation, policy: Policy) -> Iterator[Finding]:
    """What the leak watch saw leave, each code once: one flow by its facts, and where else packets went."""
    found = tuple(_packets(seen, policy))
    for first in each_once(found):
        ends = [_where(f.evidence) for f in found if f.code is first.code]
        others = [end for end in dict.fromkeys(ends) if end != _where(first.evidence)]
        if others:
            more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
            yield replace(first, evidence={"also": ", ".join(others[:_NAMED]) + more, **first.evidence})
        else:
            yield first


def _where(facts: Mapping[str, str]) -> str:
    return f"{_protocol(facts['protocol'])} to {facts['destination']}"


def _packets(seen: Observation, policy: Policy) -> Iterator[Finding]:
    """Names asked are a DNS leak, the rest by what else leaves from here."""
    told = [e for e in seen.escapes if not policy.allows_outside(e.destination)]
    through = {c.family for c in seen.asked(Probe.DEFAULT) if c.address and not _escapes(c, seen, policy)}
    if not seen.asked(Probe.DEFAULT) and seen.link is not None and seen.link.present and seen.link.up:
        # Told before the canaries are back. IPv6 beside an IPv4 tunnel is the usual whole leak.
        inside = [r for r in seen.routed or () if r.interface == seen.link.name and not r.only]
        through = {4} | {r.family for r in inside if r.share >= _MOST_OF_IT}
    for escape in told:
        facts = {
            "source": end(escape.source, escape.source_port),
            "destination": end(escape.destination, escape.destination_port),
            "protocol": escape.protocol,
            "interface": escape.interface,
            "packets": str(sum(e.packets for e in told if e.destination == escape.destination)),
            "bytes": str(sum(e.size for e in told if e.destination == escape.destination)),
            "seen_by": "leak watch",
        }
        where = _where(facts)
        if escape.destination_port in DNS_PORTS:
            if policy.allows_resolver(escape.destination) or not is_public(escape.destination):
                continue  # one on the LAN is known by where it asks the internet from: `resolvers`
            asked = f' for "{escape.name}"' if escape.name else ""
            what = f"A DNS query{asked}" if escape.destination_port == 53 else "A packet to an encrypted DNS resolver"
            facts |= {"name": escape.name} if escape.name else {}
            yield Finding(Code.DNS_LEAK, f"{what} left outside the tunnel: {where}.", facts)
        elif escape.destination.version in through:
            yield Finding(Code.SPLIT_ROUTE, f"A packet left outside the tunnel: {where}.", facts)
        else:
            code = Code.IP_LEAK if escape.destination.version == 4 else Code.IPV6_LEAK
            yield Finding(code, f"A packet left outside the tunnel: {where}.", facts | _tunnel(seen))


def _protocol(name: str) -> str:
    """Of an escape, for people to read."""
    if not name.isdigit():
        return name.upper()
    known = _PROTOCOLS.get(int(name))
    return f"IP protocol {name} ({known})" if known else f"IP protocol {name}"


def _tunnel(seen: Observation) -> dict[str, str]:
    """Whether the tunnel's interface is up, as a fact: what to do differs."""
    link = seen.link
    return {} if link is None else {"tunnel": "gone" if not link.present else "up" if link.up else "down"}


def path_fact(path: Path) -> dict[str, str]:
    """By which kind of interface, as a fact; what is not known is none."""
    return {} if path is Path.UNKNOWN else {"path": str(path)}


def each_once(found: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """Each code once: a canary's word comes before a packet's, and that before a route's. Facts are kept of all."""
    told: dict[Code, Finding] = {}
    for finding in found:
        first = told.setdefault(finding.code, finding)
        if first is not finding:
            told[finding.code] = replace(first, evidence={**finding.evidence, **first.evidence})
    return tuple(told.values())


def _escapes(canary: Canary, seen: Observation, policy: Policy) -> bool:
    """Whether it came out beside the tunnel: by its address, and only where that says nothing by its route."""
    if canary.answer is not Answer.ANSWERED or canary.address is None:
        return False
    if policy.is_home(canary.address) or canary.address in _beside_alone(seen):
        return True
    exits = {c.address for c in seen.asked(Probe.DEFAULT) if c.path is Path.TUNNEL and c.address is not None}
    return seen.link is not None and canary.path is Path.OUTSIDE and canary.address not in exits


def _beside_alone(seen: Observation) -> set[IPAddress]:
    """Where packets beside the tunnel come out, if part of the traffic comes out elsewhere: through the tunnel, then.

    Routes may call all of it the tunnel's: what a firewall marks takes another way.
    """
    beside = {c.address for c in seen.came_out_beside() if c.address is not None}
    through = {c.address for c in seen.asked(Probe.DEFAULT) if c.path is Path.TUNNEL and c.address is not None}
    return {a for a in beside if any(t.version == a.version for t in through - beside)}


def _ip_leak(code: Code, canary: Canary, seen: Observation, policy: Policy) -> Finding:
    home = canary.address is not None and policy.is_home(canary.address)
    what = "the home address" if home else "outside the tunnel, from"
    return Finding(
        code,
        f"IPv{canary.family} traffic leaves {what if not home else 'from ' + what} {canary.address}.",
        {"address": str(canary.address), "seen_by": canary.target, **path_fact(canary.path), **_tunnel(seen)},
    )


def _split_route(escaped: Canary, inside: Canary) -> Finding:
    return Finding(
        Code.SPLIT_ROUTE,
        f"Part of the IPv{escaped.family} traffic leaves from {escaped.address}, outside the tunnel.",
        {"address": str(escaped.address), "seen_by": escaped.target, "through_the_tunnel": inside.target},
    )


def end(address: IPAddress, port: int | None) -> str:
    """One end of a flow, for people to read."""
    if port is None:
        return str(address)
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
