"""What proves a leak: an answer that came from home or from beside the tunnel, or a packet seen leaving there."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address
from typing import Final

from vpn_sentinel.domain.observation import Answer, Canary, Observation, Path, Probe
from vpn_sentinel.domain.policy import IPAddress, Policy, is_public
from vpn_sentinel.domain.verdict import Code, Finding

# What may leave a home besides TCP, UDP and ICMP, by number (IANA, protocol-numbers).
_PROTOCOLS: Final = {
    2: "IGMP", 4: "IPv4 in IP", 41: "IPv6 in IP", 47: "GRE", 50: "ESP", 51: "AH", 89: "OSPF", 132: "SCTP",
}  # fmt: skip
_WHOLE_SHARE: Final = 0.5  # of the internet's addresses: what a tunnel takes that carries a family
_MAX_NAMED: Final = 4  # far ends that a finding names besides the first one
DNS_PORTS: Final = (53, 853)  # plain, and by TLS or QUIC (RFC 7858, 9250)


def by_canaries(seen: Observation, policy: Policy) -> Iterator[Finding]:
    """Where the canaries came out, and, told by the server alone, where the report did."""
    for family, code in ((4, Code.IP_LEAK), (6, Code.IPV6_LEAK)):
        answered = [c for c in seen.asked(Probe.DEFAULT) if c.family == family and c.answer is Answer.ANSWERED]
        # By several ways out it comes out at several addresses, and each is told.
        escaped = {c.address: c for c in reversed(answered) if _escapes(c, seen, policy)}
        inside = next((c for c in answered if c.address is not None and not _escapes(c, seen, policy)), None)
        if escaped:
            for canary in reversed(escaped.values()):
                yield _split_route(canary, inside) if inside else _ip_leak(code, canary, seen, policy)
        elif seen.reported_from and seen.reported_from.version == family and policy.is_home(seen.reported_from):
            yield Finding(
                code,
                f"This report reached the server from the home address {seen.reported_from}.",
                {"address": str(seen.reported_from), "seen_by": "server"},
            )


def _where(facts: Mapping[str, str]) -> str:
    return f"{_protocol(facts['protocol'])} to {facts['destination']}"


def by_packets(seen: Observation, policy: Policy) -> Iterator[Finding]:
    """What the leak watch saw leave: names asked are a DNS leak, the rest by what else leaves from here."""
    told = [e for e in seen.escapes if not policy.allows_outside(e.destination)]
    through = {c.family for c in seen.asked(Probe.DEFAULT) if c.address and not _escapes(c, seen, policy)}
    if not seen.asked(Probe.DEFAULT) and seen.link is not None and seen.link.present and seen.link.up:
        # Told before the canaries are back. IPv6 beside an IPv4 tunnel is the usual whole leak.
        inside = [r for r in seen.routed or () if r.interface == seen.link.name and not r.only]
        through = {4} | {r.family for r in inside if r.share >= _WHOLE_SHARE}
    for escape in told:
        alike = [e for e in told if (e.destination, e.interface) == (escape.destination, escape.interface)]
        facts = {
            "source": end(escape.source, escape.source_port),
            "destination": end(escape.destination, escape.destination_port),
            "protocol": escape.protocol,
            "interface": escape.interface,
            "packets": str(sum(e.packets for e in alike)),
            "bytes": str(sum(e.size for e in alike)),
            "seen_by": "leak watch",
            **({"routed_by": seen.link.name} if seen.link and escape.path is Path.TUNNEL else {}),
            **({} if escape.user is None else {"user": str(escape.user)}),
        }
        whose = "" if escape.user is None else f" of user {escape.user}"
        where = _where(facts)
        if escape.destination_port in DNS_PORTS:
            if policy.allows_resolver(escape.destination) or not is_public(escape.destination):
                continue  # one on the LAN is known by where it asks the internet from: `resolvers`
            asked = f' for "{escape.name}"' if escape.name else ""
            what = f"A DNS query{asked}" if escape.destination_port == 53 else "A packet to an encrypted DNS resolver"
            facts |= {"name": escape.name} if escape.name else {}
            yield Finding(Code.DNS_LEAK, f"{what}{whose} left outside the tunnel: {where}.", facts)
        elif escape.destination.version in through:
            yield Finding(Code.SPLIT_ROUTE, f"A packet{whose} left outside the tunnel: {where}.", facts)
        else:
            code = Code.IP_LEAK if escape.destination.version == 4 else Code.IPV6_LEAK
            yield Finding(code, f"A packet{whose} left outside the tunnel: {where}.", facts | _tunnel(seen))


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


def each_once(found: Iterable[Finding]) -> tuple[Finding, ...]:
    """Each code once: a canary's word comes before a packet's, and that before a route's.

    The facts are the first one's, so that none is read as another's: of IPv4 what is IPv6's, or of one device what is
    the other's. What else was found is named beside it.
    """
    told: dict[Code, list[Finding]] = {}
    for finding in found:
        told.setdefault(finding.code, []).append(finding)
    return tuple(_with_others(first, others) for first, *others in told.values())


def _with_others(first: Finding, others: Sequence[Finding]) -> Finding:
    """A finding, with what the others of its code are about."""
    facts, said, device = first.evidence, {_briefly(first.evidence)}, first.evidence.get("interface")
    more: dict[str, None] = {}
    for other in others:
        if "nameserver" in first.evidence and _host(other.evidence) == first.evidence["nameserver"]:
            facts = {**other.evidence, **facts}  # packets to the very nameserver
            continue
        words = _briefly(other.evidence)
        by = other.evidence.get("interface")
        if _leads(other.evidence, first.evidence):
            facts = {"by_rule": f"{other.evidence['traffic']} by {by}", **facts}
        if by and by != device:
            words += f" by {by}"
        if (address := other.evidence.get("comes_out_at")) is not None:
            words += f" (comes out at {address})"
        if words not in said:
            more[words] = None
    return replace(first, evidence={"also": few(list(more)), **facts} if more else facts)


def _leads(rule: Mapping[str, str], asked: Mapping[str, str]) -> bool:
    """Whether a rule for a port leads what was asked past the tunnel: it is at fault then, and no resolver."""
    where = asked.get("nameserver") if asked.get("path") == Path.OUTSIDE else _host(asked)
    if not where or "traffic" not in rule or "routed_by" in asked:
        return False
    return (":" in rule["networks"]) == (":" in where) and is_public(ip_address(where))


def _host(facts: Mapping[str, str]) -> str:
    """Where a packet went, without the port."""
    return facts.get("destination", "").rpartition(":")[0].strip("[]")


def _briefly(facts: Mapping[str, str]) -> str:
    """What a finding of a leak is about, in a few words."""
    match facts:
        case {"destination": _}:
            return _where(facts)
        case {"networks": networks}:
            some = facts.get("traffic") or ("some connections" if "also_by" in facts else "")
            return f"routes of {some} to {networks}" if some else f"routes to {networks}"
        case {"nameserver": server}:
            return f"the nameserver {server}"
        case _:
            return f"traffic from {facts.get('address') or facts.get('resolver')}"


def few(named: Sequence[str]) -> str:
    """Some of them, and how many more there are."""
    more = f" and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
    return ", ".join(named[:_MAX_NAMED]) + more


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
