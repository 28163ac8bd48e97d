"""What routes and rules send past the tunnel: the findings, and texts for people."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from vpn_sentinel.domain.counted import counted
from vpn_sentinel.domain.leaks import DNS_PORTS
from vpn_sentinel.domain.observation import Answer, Observation, Probe, Routed
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, Policy
from vpn_sentinel.domain.verdict import Code, Finding

_MAX_DNS_RANGE: Final = 16  # ports: a rule for so few, with one of DNS among them, is about DNS and not about the rest
# Agents that report no `ports` say by such an ending of `Routed.only` that DNS is meant.
_TO_DNS: Final = tuple(f"to port {port}" for port in DNS_PORTS)
_MAX_NAMED: Final = 4  # in a message
_ROUNDING: Final = 1e-6


def bypasses(seen: Observation, policy: Policy) -> Iterator[Finding]:
    """Findings for what routes and rules send past a tunnel that carries the rest, unless this host blocks it there."""
    link = seen.link
    if link is None or not (link.present and link.up):
        return
    parts = seen.routed or ()
    carried = {part.family for part in parts if part.interface == link.name}
    # Where a kill switch of this host refuses packets.
    blocked = {(c.interface, c.family) for c in seen.asked(Probe.PHYSICAL) if c.answer is Answer.BLOCKED}
    blocked -= {(c.interface, c.family) for c in seen.asked(Probe.PHYSICAL) if c.answer is Answer.ANSWERED}
    for part in parts:
        if part.interface == link.name or part.family not in carried or part.answer is Answer.BLOCKED:
            continue
        if (part.interface, part.family) in blocked and part.answer not in (Answer.ANSWERED, Answer.EXPIRED):
            continue
        meant = [n for n in part.networks if any(_inside(n, allowed) for allowed in policy.allowed_outside)]
        not_meant = [n for n in part.networks if n not in meant]
        if not_meant or part.more:
            shared_with = link.name if is_shared(part, parts, link.name) else ""
            yield _routed_outside(part, not_meant, shared_with, _comes_out_at(seen, part))


def _inside(network: IPNetwork, other: IPNetwork) -> bool:
    return network.version == other.version and network.subnet_of(other)  # type: ignore[arg-type]


def is_shared(part: Routed, parts: Iterable[Routed], tunnel: str | None) -> bool:
    """Whether part of the same space also goes by the tunnel: a route with several next hops, or a rule by source."""
    inside = next((p.share for p in parts if p.interface == tunnel and p.family == part.family and not p.only), 0.0)
    return not part.only and part.share + inside > 1 + _ROUNDING


def _comes_out_at(seen: Observation, part: Routed) -> IPAddress | None:
    """The public address of what is sent by the part's device, None where it is not known."""
    by = part.interface, part.family
    return next((c.address for c in seen.came_out_beside() if (c.interface, c.family) == by), None)


def _routed_outside(
    part: Routed, not_meant: Sequence[IPNetwork], shared_with: str, address: IPAddress | None
) -> Finding:
    which, share = _networks(not_meant, part.more), percent(part.share)
    facts = {"interface": part.interface, "networks": which, "share": share, "seen_by": "routing tables"}
    if part.only:
        facts["traffic"] = part.only
    facts["family"] = f"IPv{part.family}"
    if part.asked is not None and part.answer is not Answer.UNKNOWN:
        facts["asked"] = f"{part.asked}: {part.answer}"
    there = ""
    if address is not None:
        facts["comes_out_at"] = str(address)
        there = f" What leaves there comes out at {address}."
    if shared_with:
        # The share of the traffic depends on the kernel's choice for each connection.
        del facts["share"]
        return Finding(
            Code.SPLIT_ROUTE,
            f"Routes send some connections to {which} past the tunnel by {part.interface}, and others through it."
            + there,
            facts | {"also_by": shared_with},
        )
    only = f"{part.only} in " if part.only else ""
    return Finding(
        Code.DNS_LEAK if _is_dns(part) else Code.SPLIT_ROUTE,
        f"Routes send {only}{which} past the tunnel by {part.interface}, {share} of the IPv{part.family} internet."
        + there,
        facts,
    )


def _is_dns(part: Routed) -> bool:
    """Whether the part is DNS alone, or little besides it."""
    if part.ports is None:
        return part.only.endswith(_TO_DNS)
    low, high = part.ports
    return high - low < _MAX_DNS_RANGE and any(low <= port <= high for port in DNS_PORTS)


def described(part: Routed, tunnel: str | None, *, shared: bool = False) -> str:
    """One part for people to read: `wg0: 100 % of IPv4`, `eth0: 43 % of IPv4, past the tunnel (128.0.0.0/1)`.

    `shared`: the tunnel has part of it too, so the share of the space is not the share of the traffic.
    """
    only = f", {part.only} only" if part.only else ""
    beside = "" if part.interface == tunnel else f", past the tunnel ({_networks(part.networks, part.more)})"
    share = "some connections" if shared else percent(part.share)
    return f"{part.interface}: {share} of IPv{part.family}{only}{beside}"


def all_described(parts: Sequence[Routed], tunnel: str | None) -> tuple[str, ...]:
    """All parts for people to read."""
    shared = {p.family for p in parts if p.interface != tunnel and is_shared(p, parts, tunnel)}
    return tuple(
        described(p, tunnel, shared=p.family in shared and (p.interface == tunnel or is_shared(p, parts, tunnel)))
        for p in parts
    )


def percent(share: float) -> str:
    """A share from 0 to 1 in words."""
    return f"{100 * share:.0f} %" if share >= 0.01 else "less than 1 %"


def _networks(networks: Sequence[IPNetwork], more: int) -> str:
    named = ", ".join(str(n) for n in networks[:_MAX_NAMED])
    more += max(0, len(networks) - _MAX_NAMED)
    return f"{named} and {more} more" if named and more else named or counted(more, "network")
