"""What proves a leak: an answer that came from home or from beside the tunnel, or a packet seen leaving there."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from vpn_sentinel.domain.observation import Answer, Canary, Observation, Path, Probe, Routed
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, Policy
from vpn_sentinel.domain.verdict import Code, Finding

_NAMED: Final = 4  # networks that a message names


def by_canaries(seen: Observation, policy: Policy) -> Iterator[Finding]:
    """Where the canaries came out, and, told by the server alone, where the report did."""
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


def by_routes(seen: Observation, policy: Policy) -> Iterator[Finding]:
    """What routes and rules send past a tunnel that carries the rest, unless this host refuses to send it there."""
    link = seen.link
    if link is None or not (link.present and link.up):
        return
    parts = seen.routed or ()
    carried = {part.family for part in parts if part.interface == link.name}
    held = {(c.interface, c.family) for c in seen.asked(Probe.PHYSICAL) if c.answer is Answer.BLOCKED}
    held -= {(c.interface, c.family) for c in seen.asked(Probe.PHYSICAL) if c.answer is Answer.ANSWERED}
    for part in parts:
        if part.interface == link.name or part.family not in carried or part.answer is Answer.BLOCKED:
            continue
        if (part.interface, part.family) in held and part.answer not in (Answer.ANSWERED, Answer.EXPIRED):
            continue
        meant = [n for n in part.networks if any(_inside(n, allowed) for allowed in policy.allowed_outside)]
        left = [n for n in part.networks if n not in meant]
        if left or part.more:
            yield _routed_outside(part, left)


def _inside(network: IPNetwork, other: IPNetwork) -> bool:
    return network.version == other.version and network.subnet_of(other)  # type: ignore[arg-type]


def _routed_outside(part: Routed, networks: list[IPNetwork]) -> Finding:
    named = ", ".join(str(n) for n in networks[:_NAMED])
    more = part.more + len(networks) - len(networks[:_NAMED])
    which = f"{named} and {more} more" if named and more else named or f"{more} networks"
    what = f"{part.only} in " if part.only else ""
    return Finding(
        Code.SPLIT_ROUTE,
        f"Routes send {what}{which} past the tunnel by {part.interface}, "
        f"{_percent(part.share)} of the IPv{part.family} internet.",
        {
            "interface": part.interface,
            "networks": which,
            "share": _percent(part.share),
            "seen_by": "routing tables",
            **({"traffic": part.only} if part.only else {}),
            **({"asked": f"{part.asked}: {part.answer}"} if part.asked else {}),
        },
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "less than 1 %"


def by_packets(seen: Observation, policy: Policy) -> Iterator[Finding]:
    """What the leak watch saw leave: names asked are a DNS leak, the rest by what else leaves from here."""
    told = [e for e in seen.escapes if not policy.allows_outside(e.destination)]
    through = {c.family for c in seen.asked(Probe.DEFAULT) if c.address and not _escapes(c, seen, policy)}
    if not seen.asked(Probe.DEFAULT) and seen.link is not None and seen.link.present and seen.link.up:
        through = {4}  # told before the canaries are back; IPv6 beside an IPv4 tunnel is the usual whole leak
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


def each_once(found: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """Each code once: a canary's word comes before a route's, and that before a packet's. Facts are kept of all."""
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
    if policy.is_home(canary.address):
        return True
    exits = {c.address for c in seen.asked(Probe.DEFAULT) if c.path is Path.TUNNEL and c.address is not None}
    return seen.link is not None and canary.path is Path.OUTSIDE and canary.address not in exits


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


def end(address: IPAddress, port: int | None) -> str:
    """One end of a flow, for people to read."""
    if port is None:
        return str(address)
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
