"""What is remembered of a tunnel that worked, and what that proves when an agent finds no tunnel.

See docs/adr/0009-memory-as-evidence.md for why each condition is needed.
"""

from dataclasses import dataclass, replace
from ipaddress import ip_network
from typing import Final, TypeVar

from vpn_sentinel.domain.observation import Answer, Canary, Link, Observation, Path, Probe
from vpn_sentinel.domain.policy import IPAddress, is_public, within

_T = TypeVar("_T")

MAX_REMEMBERED: Final = 8  # exits, and as many AS numbers
MAX_INTERFACES: Final = 32
# Addresses of one provider's site share a prefix of this length; a shorter one might hold a provider and a home.
SITE_PREFIX_LENGTHS: Final = {4: 24, 6: 48}


@dataclass(frozen=True, slots=True, kw_only=True)
class Working:
    """A tunnel while it worked: its `device`, the other interfaces (`beside`), and its exits, the newest last.

    `asns` are the AS numbers of its exits, as far as any source named them.
    """

    device: str
    beside: tuple[str, ...] = ()
    exits: tuple[IPAddress, ...] = ()
    asns: tuple[int, ...] = ()


def learned_working(known: Working | None, seen: Observation) -> Working | None:
    """Add what an observation shows of a working tunnel; the caller has judged that it works."""
    if seen.link is None or not (seen.link.present and seen.link.up) or seen.interfaces is None:
        return known
    exits = tuple(
        c.address
        for c in seen.asked(Probe.DEFAULT)
        if c.answer is Answer.ANSWERED and c.path is Path.TUNNEL and c.address and is_public(c.address)
    )
    beside = tuple(sorted(n for n in seen.interfaces if n != seen.link.name))
    if not exits or len(beside) > MAX_INTERFACES:
        return known
    old = known if known is not None and known.device == seen.link.name else Working(device=seen.link.name)
    asns = tuple(p.asn for e in exits for p in seen.places_of(e) if p.asn is not None)
    return replace(old, beside=beside, exits=_newest(old.exits, exits), asns=_newest(old.asns, asns))


def with_memory(seen: Observation, known: Working | None, came_from: tuple[IPAddress, ...]) -> Observation:
    """The observation with what memory proves: the tunnel is gone, and an answer came outside it.

    `came_from` are the addresses from which the server itself got this agent's reports or pulses. Without proof the
    observation is returned unchanged: an agent that finds no tunnel cannot verify anything.
    """
    if known is None or seen.link is not None or seen.interfaces is None:
        return seen
    # It is the same namespace: only the tunnel's device is missing, and no new device can be another tunnel.
    if known.device in seen.interfaces or not seen.interfaces or not set(seen.interfaces) <= set(known.beside):
        return seen
    beside = [c for c in seen.canaries if _is_beside(c, seen, known, came_from)]
    if not beside:
        return seen
    canaries = tuple(replace(c, path=Path.OUTSIDE) if c in beside else c for c in seen.canaries)
    return replace(seen, link=Link(name=known.device, present=False, up=False), canaries=canaries)


def _is_beside(canary: Canary, seen: Observation, known: Working, came_from: tuple[IPAddress, ...]) -> bool:
    address = canary.address
    if canary.probe is not Probe.DEFAULT or canary.answer is not Answer.ANSWERED or canary.path is Path.TUNNEL:
        return False
    if address is None or address not in came_from or not is_public(address):
        return False
    exits = [e for e in known.exits if e.version == address.version]
    near = within(address, (ip_network((e, SITE_PREFIX_LENGTHS[e.version]), strict=False) for e in exits))
    named = {p.asn for p in seen.places_of(address) if p.asn is not None}
    return bool(exits) and not near and named.isdisjoint(known.asns)


def _newest(old: tuple[_T, ...], new: tuple[_T, ...]) -> tuple[_T, ...]:
    return tuple(dict.fromkeys((*(o for o in old if o not in new), *new)))[-MAX_REMEMBERED:]
