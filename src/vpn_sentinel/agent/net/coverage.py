"""How much of the internet leaves by which device, by the kernel's rules and tables alone.

The internet is the public address space: for IPv6 the global unicast block 2000::/3 (RFC 4291), less what IANA's
special-purpose registries take out (`domain.policy.NOT_PUBLIC`). 64:ff9b::/96 stands for all of IPv4 (RFC 6052), and
64:ff9b:1::/48 has room for the same (RFC 8215), where the network has a translator: they count where a route or a rule
of their own leads there. A default route leads there too, and says nothing of one.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_network, summarize_address_range
from typing import Final

from vpn_sentinel.agent.net.fib import EVERYBODY, Fib, Interval, Sender, intersect, joined, subtract
from vpn_sentinel.domain.policy import NOT_PUBLIC, IPNetwork

_MOSTLY: Final = 0.6
_NAT64: Final = (ip_network("64:ff9b::/96"), ip_network("64:ff9b:1::/48"))
_OWN_ROUTE: Final = 32  # prefix length from which on a route is for that block
_WHOLE: Final = {4: ip_network("0.0.0.0/0"), 6: ip_network("2000::/3")}


@cache
def public_space(version: int) -> tuple[Interval, ...]:
    """The public addresses of one IP version, as disjoint intervals in order."""
    taken = joined(interval(n) for n in NOT_PUBLIC if n.version == version)
    return tuple(subtract([interval(_WHOLE[version])], taken))


def interval(network: IPNetwork) -> Interval:
    """The first and the last address of a network, as integers."""
    return int(network.network_address), int(network.broadcast_address)


def size(parts: Iterable[Interval]) -> int:
    """How many addresses disjoint intervals hold."""
    return sum(last - first + 1 for first, last in parts)


def networks(parts: Iterable[Interval], version: int) -> list[IPNetwork]:
    """The same addresses as the fewest networks, in order."""
    kind = IPv4Address if version == 4 else IPv6Address
    return [n for first, last in parts for n in summarize_address_range(kind(first), kind(last))]


def by_device(fib: Fib, version: int, sender: Sender = EVERYBODY) -> dict[int, list[Interval]]:
    """The public addresses that leave by each device (by its index); one that several devices share is under each."""
    found: dict[int, list[Interval]] = defaultdict(list)
    space, translated = public_space(version), [interval(n) for n in _NAT64] if version == 6 else []
    for segment in fib.spread(version, sender):
        parts = [(segment.first, segment.last)]
        public, also = intersect(parts, space), intersect(parts, translated)
        if also and segment.named is not None and segment.named.prefixlen >= _OWN_ROUTE:
            public += also
        for index in segment.interfaces:
            found[index] += public
    return {index: joined(parts) for index, parts in found.items() if parts}


def names(fib: Fib, version: int, sender: Sender, interface: int, parts: list[Interval]) -> list[IPNetwork]:
    """Networks that stand for `parts`, which leave by a device: as routes and rules name them, the largest part first.

    Where a name would say much more than what it stands for, its part is named by networks of its own.
    """
    size_of: dict[IPNetwork, int] = {}
    for segment in fib.spread(version, sender):
        if interface not in segment.interfaces or segment.named is None:
            continue
        left = intersect([(segment.first, segment.last)], parts)
        if left:
            size_of[segment.named] = size_of.get(segment.named, 0) + size(left)
    found: dict[IPNetwork, int] = {}
    for network, held in size_of.items():
        whole = intersect([interval(network)], public_space(version))
        if held >= _MOSTLY * size(whole):
            found[network] = held
        else:
            found |= {n: n.num_addresses for n in networks(intersect(whole, parts), version)}
    return sorted(found, key=lambda n: -found[n])


def public_share(fib: Fib, version: int, sender: Sender = EVERYBODY) -> dict[int, float]:
    """The part of the public address space, above 0 and up to 1, that leaves by each device."""
    total = size(public_space(version))
    return {index: size(parts) / total for index, parts in by_device(fib, version, sender).items()}
