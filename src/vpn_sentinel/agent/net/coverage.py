"""How much of the internet leaves by which device, by the kernel's rules and tables alone.

The internet is the public address space: for IPv6 the global unicast block 2000::/3 (RFC 4291), less what IANA's
special-purpose registries take out (`domain.policy.NOT_PUBLIC`) and what they hold for documentation.

The blocks of NAT64 count where a route or a rule for them exists; a default route covers them too, and does not show
that the network has a translator. Of these, 64:ff9b::/96 stands for all of IPv4 (RFC 6052), and 64:ff9b:1::/48 has room
for the same (RFC 8215).
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network, summarize_address_range
from typing import Final

from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.routing_rules import ANY_SENDER, Sender
from vpn_sentinel.agent.net.space import ADDRESS_BITS, Interval, intersect, joined, subtract
from vpn_sentinel.domain.policy import NOT_PUBLIC, IPNetwork
from vpn_sentinel.runtime.addresses import LOCAL_NAT64, NAT64

_MIN_NAMED_SHARE: Final = 0.6  # of the public addresses of a route's network, from which on it is named as a whole
# No host has these addresses either: documentation (RFC 5737, 3849, 9637), and the relays of 6to4, which is obsolete
# (RFC 7526). VPN programs keep a list of private networks outside the tunnel, and it often includes these.
_UNUSED_BLOCKS: Final = tuple(
    ip_network(block)
    for block in (
        "192.0.2.0/24", "192.88.99.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", "3fff::/20",
    )
)  # fmt: skip
_MIN_NAT64_PREFIX: Final = 32  # prefix length from which on a route is for a NAT64 block
_MAX_CACHED_SENDER_CLASSES: Final = 8  # one for a long list of networks takes 5 MB
_INTERNET: Final = {4: ip_network("0.0.0.0/0"), 6: ip_network("2000::/3")}


@cache
def public_space(version: int) -> tuple[Interval, ...]:
    """The public addresses of one IP version, as disjoint intervals in order."""
    taken = joined(interval(n) for n in (*NOT_PUBLIC, *_UNUSED_BLOCKS) if n.version == version)
    return tuple(subtract([interval(_INTERNET[version])], taken))


def interval(network: IPNetwork) -> Interval:
    """The first and the last address of a network, as integers."""
    return int(network.network_address), int(network.broadcast_address)


def address_count(parts: Iterable[Interval]) -> int:
    """The number of addresses in disjoint intervals."""
    return sum(last - first + 1 for first, last in parts)


def networks(parts: Iterable[Interval], version: int) -> list[IPNetwork]:
    """The same addresses as the fewest networks, in order."""
    kind = IPv4Address if version == 4 else IPv6Address
    return [n for first, last in parts for n in summarize_address_range(kind(first), kind(last))]


def by_device(fib: Fib, version: int, sender: Sender = ANY_SENDER) -> dict[int, list[Interval]]:
    """The public addresses that leave by each device (by its index); one that several devices share is under each.

    A round asks for the same several times: the result is cached with the tables, by class of sender.
    """
    who = fib.sender_class(version, sender)
    if who not in fib.by_device_cache:
        if len(fib.by_device_cache) >= _MAX_CACHED_SENDER_CLASSES:
            fib.by_device_cache.clear()
        fib.by_device_cache[who] = _by_device(fib, version, sender)
    return fib.by_device_cache[who]


def _by_device(fib: Fib, version: int, sender: Sender) -> dict[int, list[Interval]]:
    segments = fib.segments(version, sender, public_space(version), merge=True)
    if version == 6:
        translated = fib.segments(version, sender, [interval(n) for n in (NAT64, LOCAL_NAT64)])
        segments += [s for s in translated if s.name is not None and s.name[1] >= _MIN_NAT64_PREFIX]
    found: dict[int, list[Interval]] = defaultdict(list)
    for segment in segments:
        for index in segment.interfaces:
            found[index].append((segment.first, segment.last))
    return {index: joined(parts) for index, parts in found.items()}


def covering_networks(
    fib: Fib, version: int, sender: Sender, interface: int, parts: list[Interval], limit: int
) -> tuple[list[IPNetwork], int]:
    """Networks that cover `parts`, which leave by a device: those of routes and rules, the largest part first; at most
    `limit` of them, and how many there are.

    Where such a network is much larger than the part that leaves, the part itself is split into networks.
    """
    # A block is the first address and the prefix length of a network.
    addresses_in: dict[tuple[int, int], int] = defaultdict(int)
    for segment in fib.segments(version, sender, parts):
        if interface in segment.interfaces and (block := segment.name) is not None:
            addresses_in[block] += segment.last - segment.first + 1
    found: dict[tuple[int, int], int] = {}
    for block, addresses in addresses_in.items():
        first, prefix = block
        ends = first, first + (1 << ADDRESS_BITS[version] - prefix) - 1
        if addresses == address_count([ends]):
            found[block] = addresses
            continue
        public = intersect([ends], public_space(version))
        if addresses >= _MIN_NAMED_SHARE * address_count(public):
            found[block] = addresses
        else:
            own = networks(intersect(public, parts), version)
            found |= {(int(n.network_address), n.prefixlen): n.num_addresses for n in own}
    kind = IPv4Network if version == 4 else IPv6Network
    return [kind(block) for block in sorted(found, key=lambda block: -found[block])[:limit]], len(found)


def public_share(fib: Fib, version: int, sender: Sender = ANY_SENDER) -> dict[int, float]:
    """The share of the public address space, above 0 and up to 1, that leaves by each device."""
    total = address_count(public_space(version))
    return {index: address_count(parts) / total for index, parts in by_device(fib, version, sender).items()}
