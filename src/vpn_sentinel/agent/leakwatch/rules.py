"""What may leave outside the tunnel. `bpf` makes the kernel's filter of these rules; `Rules.allow` judges one packet.

They allow what a kill switch allows: the tunnel's own packets, the LAN, and what the network needs to run. DNS queries
to the LAN are not allowed, since the home router forwards them to the internet.
"""

from dataclasses import dataclass
from ipaddress import ip_network
from typing import Final

from vpn_sentinel.agent.leakwatch.senders import selects
from vpn_sentinel.agent.net.endpoints import TCP, UDP, Endpoint
from vpn_sentinel.agent.net.packets import RST, SYN_ACK, Packet
from vpn_sentinel.agent.net.routing_rules import Rule
from vpn_sentinel.domain.leaks import DNS_PORTS
from vpn_sentinel.domain.policy import NOT_PUBLIC, IPNetwork, within

ICMP, ICMP6 = 1, 58
_DHCPV6_CLIENT_TYPES: Final = (1, 3, 4, 5, 6, 8, 9, 11)  # RFC 8415, 7.3
IPV6_FRAGMENT: Final = 44  # IPv6's next header
# Multicast, broadcast, this host: no single remote host, so nobody there forwards a DNS query.
NO_REMOTE_HOST: Final[tuple[IPNetwork, ...]] = tuple(
    ip_network(block)
    for block in ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "255.255.255.255/32", "::/127", "ff00::/8")
)
# Never leaves the link.
NEVER_ROUTED: Final[tuple[IPNetwork, ...]] = (*NO_REMOTE_HOST, ip_network("169.254.0.0/16"), ip_network("fe80::/9"))
# Not reachable on the internet.
PRIVATE: Final[tuple[IPNetwork, ...]] = tuple(n for n in NOT_PUBLIC if n not in NEVER_ROUTED)
# The kernel's own messages about packets that came in; they hold no program's data (RFC 792). It answers echo and
# timestamp requests, and no other (icmp_pointers in net/ipv4/icmp.c).
ICMP_ANSWERS: Final = (0, 3, 11, 12, 14)
# The same, and neighbours, routers and multicast listeners (RFC 4861, 2710, 3810).
ICMP6_OWN: Final = (1, 2, 3, 4, 129, 130, 131, 132, 133, 134, 135, 136, 137, 143)


@dataclass(frozen=True, slots=True)
class PortRange:
    """A closed range of ports of a protocol (6 or 17)."""

    protocol: int
    low: int
    high: int

    def has(self, protocol: int, port: int) -> bool:
        return protocol == self.protocol and self.low <= port <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """`endpoints`, `marks` (mark and mask) and `excepted`, routing rules that select by sender, identify the tunnel's
    own packets. `outside` are allowed networks and hosts with a host route. All but DNS may go to the `lan`; DNS may go
    to `resolvers`. `published` are local ports that take connections from outside, `ports` are remote ports that are
    meant to be reached outside the tunnel. Where `inside` has marks, only packets with one of them belong to the
    tunnel.
    """

    endpoints: tuple[Endpoint, ...] = ()
    marks: tuple[tuple[int, int], ...] = ()
    outside: tuple[IPNetwork, ...] = ()
    lan: tuple[IPNetwork, ...] = ()
    resolvers: tuple[IPNetwork, ...] = ()
    excepted: tuple[Rule, ...] = ()
    published: tuple[PortRange, ...] = ()
    ports: tuple[PortRange, ...] = ()
    inside: tuple[tuple[int, int], ...] = ()

    def allow(self, packet: Packet) -> bool:
        """Whether this packet may leave. Only the kernel's filter knows its mark."""
        to = packet.destination
        for end in self.endpoints:
            # Later fragments have no ports: they may leave where the tunnel's own packets go.
            near = end.near is None or packet.source_port == end.near
            same_ports = packet.fragment or (packet.destination_port == end.port and near)
            if end.address == to and same_ports and packet.protocol in (end.protocol, IPV6_FRAGMENT):
                return True
        if any(selects(rule, packet) for rule in self.excepted) or self._is_meant(packet):
            return True
        if within(to, NO_REMOTE_HOST) or within(to, self.outside) or _keeps_the_network_running(packet):
            return True
        if is_dns(packet):
            return within(to, self.resolvers)
        return within(to, NEVER_ROUTED) or within(to, self.lan) or within(to, PRIVATE)

    def _is_meant(self, packet: Packet) -> bool:
        if packet.source_port is None or packet.destination_port is None:
            return False
        # A connection that is begun here is no answer, whatever its local port.
        answers = packet.protocol != TCP or not packet.opens
        return (answers and any(p.has(packet.protocol, packet.source_port) for p in self.published)) or any(
            p.has(packet.protocol, packet.destination_port) for p in self.ports
        )


def is_dhcp(packet: Packet) -> bool:
    """Whether it is a client's message to a DHCP server, by its ports and its content.

    RFC 2131, 2 and 4.1: a request, and after the fixed fields the magic cookie of RFC 1497. RFC 8415, 7.2, 7.3 and 8: a
    client's message type, and after the transaction id options, one of them the client identifier.
    """
    head = packet.payload
    ports = packet.source_port, packet.destination_port
    if packet.protocol != UDP or not head:
        return False
    if packet.destination.version == 4:
        return ports == (68, 67) and head[0] == 1 and head[236:240] == b"\x63\x82\x53\x63"
    return ports == (546, 547) and head[0] in _DHCPV6_CLIENT_TYPES and _names_its_client(head[4:])


def _names_its_client(options: bytes) -> bool:
    while len(options) >= 4:
        kind, size = int.from_bytes(options[:2]), int.from_bytes(options[2:4])
        if kind == 1:
            return size > 0
        options = options[4 + size :]
    return False


def is_dns(packet: Packet) -> bool:
    """Whether it goes to a DNS port."""
    return packet.destination_port in DNS_PORTS and packet.protocol in (UDP, TCP)


def _keeps_the_network_running(packet: Packet) -> bool:
    is_ipv4 = packet.destination.version == 4
    match packet.protocol:
        case 1:
            return is_ipv4 and packet.icmp_type in ICMP_ANSWERS
        case 58:
            return not is_ipv4 and packet.icmp_type in ICMP6_OWN
        case 6:
            return bool(packet.flags & RST) or packet.flags & SYN_ACK == SYN_ACK  # both are answers
        case _:
            return False
