"""An entry of a routing table (ip-route(8), linux/rtnetlink.h), and a part of the address space that it applies to."""

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Final, NamedTuple

from vpn_sentinel.agent.net.routing_rules import Rule
from vpn_sentinel.agent.net.space import ADDRESS_BITS
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, is_public

RTN_UNICAST, RTN_LOCAL = 1, 2
RTN_BLACKHOLE, RTN_UNREACHABLE, RTN_PROHIBIT, RTN_THROW = 6, 7, 8, 9
REFUSING: Final = frozenset({RTN_BLACKHOLE, RTN_UNREACHABLE, RTN_PROHIBIT})


@dataclass(frozen=True, slots=True)
class Hop:
    """A next hop of a route: the device's index, and the router's address, None for a directly connected network."""

    interface: int
    gateway: IPAddress | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteEntry:
    """An entry of a routing table. `first` is the lowest address of its prefix, as an integer; `hops` may be empty.

    `type` is rtm_type (RTN_UNICAST and so on). With a `tos` it is only for packets of that type of service.
    With a `source` (IPv6 only) it is only for packets from that network.
    `by_kernel`: the kernel added it together with an address of this host, such as the route to the peer of a
    point-to-point link (RTPROT_KERNEL).
    """

    version: int
    table: int
    first: int
    prefix: int
    type: int = RTN_UNICAST
    hops: tuple[Hop, ...] = ()
    metric: int = 0
    tos: int = 0
    source: IPNetwork | None = None
    by_kernel: bool = False

    @property
    def last(self) -> int:
        return self.first | ((1 << (self.bits - self.prefix)) - 1)

    @property
    def bits(self) -> int:
        return ADDRESS_BITS[self.version]

    @property
    def network(self) -> IPNetwork:
        return IPv4Network((self.first, self.prefix)) if self.version == 4 else IPv6Network((self.first, self.prefix))

    def is_for_one_host(self) -> bool:
        """Whether it is a host route that a program or person added, as VPN clients do for their server."""
        return self.type == RTN_UNICAST and self.prefix == self.bits and bool(self.hops) and not self.by_kernel

    def leads_by(self, interface: int) -> bool:
        hops = self.hops  # nearly all routes of a full table have one
        return hops[0].interface == interface if len(hops) == 1 else any(h.interface == interface for h in hops)

    def leads_to_internet(self) -> bool:
        return self.prefix < 8 or is_public(self.network.network_address)


class Segment(NamedTuple):
    """A part of the address space, its route (None where the rule refuses packets), and the rule that decided."""

    first: int
    last: int
    entry: RouteEntry | None
    rule: Rule | None = None

    @property
    def interfaces(self) -> tuple[int, ...]:
        """Indices of the devices that packets leave by; none for local addresses and refused packets."""
        if self.entry is None or self.entry.type != RTN_UNICAST:
            return ()
        hops = self.entry.hops
        return (hops[0].interface,) if len(hops) == 1 else tuple(dict.fromkeys(hop.interface for hop in hops))

    @property
    def name(self) -> tuple[int, int] | None:
        """The network of its route or its rule, whichever is more specific: first address and prefix length.

        None without a route.
        """
        if self.entry is None:
            return None
        by_rule = self.rule.destination if self.rule is not None and not self.rule.invert else None
        if by_rule is not None and by_rule.prefixlen > self.entry.prefix:
            return int(by_rule.network_address), by_rule.prefixlen
        return self.entry.first, self.entry.prefix
