"""What proves a leak: an answer to a canary that came out at home or outside the tunnel, or a packet that left
there.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address
from typing import Final

from vpn_sentinel.domain.observation import Answer, Canary, Observation, Path, Probe
from vpn_sentinel.domain.policy import IPAddress, Policy, is_public
from vpn_sentinel.domain.verdict import Code, Finding

# What may leave a home besides TCP, UDP and ICMP, by number (IANA, protocol-numbers).
_OTHER_PROTOCOL_NAMES: Final = {
    2: "IGMP", 4: "IPv4 in IP", 41: "IPv6 in IP", 47: "GRE", 50: "ESP", 51: "AH", 89: "OSPF", 132: "SCTP",
}  # fmt: skip
_MIN_WHOLE_SHARE: Final = 0.5  # of the internet's addresses: a tunnel that routes so much carries the IP version
_MAX_NAMED: Final = 4  # far ends that a finding names besides the first one
DNS_PORTS: Final = (53, 853)  # plain, and by TLS or QUIC (RFC 7858, 9250)


def by_canaries(seen: Observation, policy: Policy) -> Iterator[Finding]:
    """Leaks by where the canaries came out, and where the server got the report from."""
    for family, code in ((4, Code.IP_LEAK), (6, Code.IPV6_LEAK)):
        answered = [c for c in seen.asked(Probe.DEFAULT) if c.family == family and c.answer is Answer.ANSWERED]
        # With several outside interfaces there are several addresses; each is a finding, by its first canary. That is
        # the last one to be put in under its address; the findings come in the canaries' order again.
        outside = {c.address: c for c in reversed(answered) if _came_out_outside(c, seen, policy)}
        inside = next((c for c in answered if c.address is not None and not _came_out_outside(c, seen, policy)), None)
        if outside:
            for canary in reversed(outside.values()):
                yield _split_route(canary, inside) if inside else _ip_leak(code, canary, seen, policy)
        elif seen.reported_from and seen.reported_from.version == family and policy.is_home(seen.reported_from):
            yield Finding(
                code,
                f"This report reached the server from the home address {seen.reported_from}.",
                {"address": str(seen.reported_from), "seen_by": "server"},
            )


def _flow_words(facts: Mapping[str, str]) -> str:
    return f"{_protocol(facts['protocol'])} to {facts['destination']}"


def by_packets(seen: Observation, policy: Policy) -> Iterator[Finding]:
    """Leaks by packets that the leak watch saw: DNS leaks, and others by what else goes through the tunnel."""
    escapes = [e for e in seen.escapes if not policy.allows_outside(e.destination)]
    through = {c.family for c in seen.asked(Probe.DEFAULT) if c.address and not _came_out_outside(c, seen, policy)}
    if not seen.asked(Probe.DEFAULT) and seen.link is not None and seen.link.present and seen.link.up:
        # Reported before the canaries are back. IPv4 is taken to go through every tunnel that is up, IPv6 only where
        # routes show it: IPv6 outside an IPv4 tunnel is the usual leak of a whole version.
        inside = [r for r in seen.routed or () if r.interface == seen.link.name and not r.only]
        through = {4} | {r.family for r in inside if r.share >= _MIN_WHOLE_SHARE}
    for escape in escapes:
        alike = [e for e in escapes if (e.destination, e.interface) == (escape.destination, escape.interface)]
        facts = {
            "source": end_text(escape.source, escape.source_port),
            "destination": end_text(escape.destination, escape.destination_port),
            "protocol": escape.protocol,
            "interface": escape.interface,
            "packets": str(sum(e.packets for e in alike)),
            "bytes": str(sum(e.size for e in alike)),
            "seen_by": "leak watch",
            **({"routed_by": seen.link.name} if seen.link and escape.path is Path.TUNNEL else {}),
            **({} if escape.user is None else {"user": str(escape.user)}),
        }
        whose = "" if escape.user is None else f" of user {escape.user}"
        where = _flow_words(facts)
        if escape.destination_port in DNS_PORTS:
            if policy.allows_resolver(escape.destination) or not is_public(escape.destination):
                continue  # `resolvers` judges one on the LAN by where it asks the internet from
            asked = f' for "{escape.name}"' if escape.name else ""
            what = f"A DNS query{asked}" if escape.destination_port == 53 else "A packet to an encrypted DNS resolver"
            facts |= {"name": escape.name} if escape.name else {}
            yield Finding(Code.DNS_LEAK, f"{what}{whose} left outside the tunnel: {where}.", facts)
        elif escape.destination.version in through:
            yield Finding(Code.SPLIT_ROUTE, f"A packet{whose} left outside the tunnel: {where}.", facts)
        else:
            code = Code.IP_LEAK if escape.destination.version == 4 else Code.IPV6_LEAK
            yield Finding(code, f"A packet{whose} left outside the tunnel: {where}.", facts | _tunnel_fact(seen))


def _protocol(name: str) -> str:
    """The name of an escape's protocol, for people."""
    if not name.isdigit():
        return name.upper()
    known = _OTHER_PROTOCOL_NAMES.get(int(name))
    return f"IP protocol {name} ({known})" if known else f"IP protocol {name}"


def _tunnel_fact(seen: Observation) -> dict[str, str]:
    """Whether the tunnel's interface is up, as a fact: the advice depends on it."""
    link = seen.link
    return {} if link is None else {"tunnel": "gone" if not link.present else "up" if link.up else "down"}


def path_fact(path: Path) -> dict[str, str]:
    """The kind of interface, as a fact; {} when it is not known."""
    return {} if path is Path.UNKNOWN else {"path": str(path)}


def one_per_code(found: Iterable[Finding]) -> tuple[Finding, ...]:
    """One finding for each code: a canary's goes before a packet's, and that before a route's.

    The facts are the first one's, so that facts of IPv4 and IPv6, or of two devices, are not mixed. The others are
    named in the fact `also`.
    """
    by_code: dict[Code, list[Finding]] = {}
    for finding in found:
        by_code.setdefault(finding.code, []).append(finding)
    return tuple(_with_others(first, others) for first, *others in by_code.values())


def _with_others(first: Finding, others: Sequence[Finding]) -> Finding:
    """A finding, with a summary of the others of its code."""
    facts, summaries, device = first.evidence, {_summary(first.evidence)}, first.evidence.get("interface")
    more: dict[str, None] = {}
    for other in others:
        if "nameserver" in first.evidence and _host(other.evidence) == first.evidence["nameserver"]:
            facts = {**other.evidence, **facts}  # packets to the same nameserver
            continue
        summary = _summary(other.evidence)
        by = other.evidence.get("interface")
        if _rule_leads(other.evidence, first.evidence):
            facts = {"by_rule": f"{other.evidence['traffic']} by {by}", **facts}
        if by and by != device:
            summary += f" by {by}"
        if (address := other.evidence.get("comes_out_at")) is not None:
            summary += f" (comes out at {address})"
        if summary not in summaries:
            more[summary] = None
    return replace(first, evidence={"also": shortened(list(more)), **facts} if more else facts)


def _rule_leads(rule: Mapping[str, str], asked: Mapping[str, str]) -> bool:
    """Whether a rule for a port leads this query past the tunnel: then the rule is the cause, not the resolver."""
    where = asked.get("nameserver") if asked.get("path") == Path.OUTSIDE else _host(asked)
    if not where or "traffic" not in rule or "routed_by" in asked:
        return False
    address = ip_address(where)
    return rule["family"] == f"IPv{address.version}" and is_public(address)


def _host(facts: Mapping[str, str]) -> str:
    """The destination of a packet, without the port."""
    return facts.get("destination", "").rpartition(":")[0].strip("[]")


def _summary(facts: Mapping[str, str]) -> str:
    """The subject of a leak's finding, in a few words."""
    match facts:
        case {"destination": _}:
            return _flow_words(facts)
        case {"networks": networks}:
            some = facts.get("traffic") or ("some connections" if "also_by" in facts else "")
            return f"routes of {some} to {networks}" if some else f"routes to {networks}"
        case {"nameserver": server}:
            return f"the nameserver {server}"
        case _:
            return f"traffic from {facts.get('address') or facts.get('resolver')}"


def shortened(named: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
    return ", ".join(named[:_MAX_NAMED]) + more


def _came_out_outside(canary: Canary, seen: Observation, policy: Policy) -> bool:
    """Whether it came out outside the tunnel: by its address; by its route only where the address proves nothing."""
    if canary.answer is not Answer.ANSWERED or canary.address is None:
        return False
    if policy.is_home(canary.address) or canary.address in _outside_addresses(seen):
        return True
    exits = {c.address for c in seen.asked(Probe.DEFAULT) if c.path is Path.TUNNEL and c.address is not None}
    return seen.link is not None and canary.path is Path.OUTSIDE and canary.address not in exits


def _outside_addresses(seen: Observation) -> set[IPAddress]:
    """Where packets outside the tunnel come out, if other traffic comes out elsewhere, and so goes through the tunnel.

    Routes may show all of it as the tunnel's, although packets that a firewall marks take another route.
    """
    beside = {c.address for c in seen.came_out_beside() if c.address is not None}
    through = {c.address for c in seen.asked(Probe.DEFAULT) if c.path is Path.TUNNEL and c.address is not None}
    return {a for a in beside if any(t.version == a.version for t in through - beside)}


def _ip_leak(code: Code, canary: Canary, seen: Observation, policy: Policy) -> Finding:
    home = canary.address is not None and policy.is_home(canary.address)
    whence = "from the home address" if home else "outside the tunnel, from"
    return Finding(
        code,
        f"IPv{canary.family} traffic leaves {whence} {canary.address}.",
        {"address": str(canary.address), "seen_by": canary.target, **path_fact(canary.path), **_tunnel_fact(seen)},
    )


def _split_route(outside: Canary, inside: Canary) -> Finding:
    return Finding(
        Code.SPLIT_ROUTE,
        f"Part of the IPv{outside.family} traffic leaves from {outside.address}, outside the tunnel.",
        {"address": str(outside.address), "seen_by": outside.target, "through_the_tunnel": inside.target},
    )


def end_text(address: IPAddress, port: int | None) -> str:
    """One end of a flow, for people."""
    if port is None:
        return str(address)
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
