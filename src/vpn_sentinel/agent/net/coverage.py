"""How much of the internet leaves by which device, by the kernel's rules and tables alone.

The internet is the public address space: for IPv6 the global unicast block 2000::/3 (RFC 4291), less what IANA's
special-purpose registries take out (`domain.policy.NOT_PUBLIC`) and what they hold for documentation. 64:ff9b::/96
stands for all of IPv4 (RFC 6052), and 64:ff9b:1::/48 has room for the same (RFC 8215), where the network has a
translator: they count where a route or a rule of their own leads there. A default route leads there too, and says
nothing of one.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network, summarize_address_range
from typing import Final

from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.routing_rules import EVERYBODY, Sender
from vpn_sentinel.agent.net.space import Interval, intersect, joined, subtract
from vpn_sentinel.domain.policy import NOT_PUBLIC, IPNetwork

_MOSTLY: Final = 0.6
# Nobody's either, though examples use them: documentation (RFC 5737, 3849, 9637), and the relays of 6to4, which are no
# more (RFC 7526). VPN programs keep lists of what is private out of the tunnel, and these stand there.
_NOBODYS: Final = tuple(
    ip_network(block)
    for block in (
        "192.0.2.0/24", "192.88.99.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", "3fff::/20",
    )
)  # fmt: skip
_NAT64: Final = (ip_network("64:ff9b::/96"), ip_network("64:ff9b:1::/48"))
_OWN_ROUTE: Final = 32  # prefix length from which on a route is for that block
_MAX_SENDER_CLASSES: Final = 8  # of senders whose ways are kept: those through a long list of networks take 5 MB
_BITS: Final = {4: 32, 6: 128}
_WHOLE: Final = {4: ip_network("0.0.0.0/0"), 6: ip_network("2000::/3")}


@cache
def public_space(version: int) -> tuple[Interval, ...]:
    """The public addresses of one IP version, as disjoint intervals in order."""
    taken = joined(interval(n) for n in (*NOT_PUBLIC, *_NOBODYS) if n.version == version)
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
    """The public addresses that leave by each device (by its index); one that several devices share is under each.

    A round asks for the same several times: it is kept with the tables, for each class of senders that rules know.
    """
    who = fib.sender_class(version, sender)
    if who not in fib.leaving:
        if len(fib.leaving) >= _MAX_SENDER_CLASSES:
            fib.leaving.clear()
        fib.leaving[who] = _by_device(fib, version, sender)
    return fib.leaving[who]


def _by_device(fib: Fib, version: int, sender: Sender) -> dict[int, list[Interval]]:
    segments = fib.spread(version, sender, public_space(version), by_way=True)
    if version == 6:
        translated = fib.spread(version, sender, [interval(n) for n in _NAT64])
        segments += [s for s in translated if s.name is not None and s.name[1] >= _OWN_ROUTE]
    found: dict[int, list[Interval]] = defaultdict(list)
    for segment in segments:
        for index in segment.interfaces:
            found[index].append((segment.first, segment.last))
    return {index: joined(parts) for index, parts in found.items()}


def names(
    fib: Fib, version: int, sender: Sender, interface: int, parts: list[Interval], most: int
) -> tuple[list[IPNetwork], int]:
    """Networks that stand for `parts`, which leave by a device: as routes and rules name them, the largest part first;
    `most` of them, and how many there are.

    Where a name would say much more than what it stands for, its part is named by networks of its own.
    """
    held: dict[tuple[int, int], int] = defaultdict(int)  # of what begins at an address and has a prefix
    for segment in fib.spread(version, sender, parts):
        if interface in segment.interfaces and (name := segment.name) is not None:
            held[name] += segment.last - segment.first + 1
    found: dict[tuple[int, int], int] = {}
    for name, addresses in held.items():
        ends = name[0], name[0] + (1 << _BITS[version] - name[1]) - 1
        if addresses == size([ends]) or addresses >= _MOSTLY * size(whole := intersect([ends], public_space(version))):
            found[name] = addresses
        else:
            own = networks(intersect(whole, parts), version)
            found |= {(int(n.network_address), n.prefixlen): n.num_addresses for n in own}
    kind = IPv4Network if version == 4 else IPv6Network
    return [kind(name) for name in sorted(found, key=lambda name: -found[name])[:most]], len(found)


def public_share(fib: Fib, version: int, sender: Sender = EVERYBODY) -> dict[int, float]:
    """The part of the public address space, above 0 and up to 1, that leaves by each device."""
    total = size(public_space(version))
    return {index: size(parts) / total for index, parts in by_device(fib, version, sender).items()}
