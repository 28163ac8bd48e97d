"""What may leave beside the tunnel: the same rules as values, as the kernel's filter (`bpf`), and for one packet here.

They let out what a kill switch lets out: the tunnel's own packets, the LAN, and what the network needs to run. Only a
question for a name that goes to the LAN comes up: the home router passes it on to the internet.
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
DNS = 53
_OF_A_CLIENT: Final = (1, 3, 4, 5, 6, 8, 9, 11)  # of DHCPv6's message types
FRAGMENT: Final = 44  # IPv6's next header
# Nobody there asks for a name elsewhere: multicast, broadcast, this host.
NOBODY: Final[tuple[IPNetwork, ...]] = tuple(
    ip_network(block)
    for block in ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "255.255.255.255/32", "::/127", "ff00::/8")
)
# Stays on the link whatever it is.
NEVER: Final[tuple[IPNetwork, ...]] = (*NOBODY, ip_network("169.254.0.0/16"), ip_network("fe80::/9"))
# Nothing of these is on the internet.
PRIVATE: Final[tuple[IPNetwork, ...]] = tuple(n for n in NOT_PUBLIC if n not in NEVER)
# The kernel's own words about packets that came in; they hold nothing of a program's (RFC 792). It answers to echo and
# timestamp requests, and to no other (icmp_pointers in net/ipv4/icmp.c).
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
    """`endpoints`, `marks` (mark and mask) and `excepted`, rules that select by sender, tell the tunnel's own packets;
    `outside` is what may leave beside it: allowed networks, hosts with a route of their own. What goes to the `lan`
    may leave too, but DNS: that is allowed to `resolvers`. `published` are ports here that take connections from
    outside, `ports` those of far ends that are meant to be reached beside the tunnel. Where `inside` has marks, only
    packets that carry one belong to it.
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
        """Whether this packet may leave; its mark is known to the kernel alone."""
        to = packet.destination
        for end in self.endpoints:
            # Later fragments have no ports; those of the tunnel's packets are the tunnel's too.
            near = end.near is None or packet.source_port == end.near
            same_ports = packet.fragment or (packet.destination_port == end.port and near)
            if end.address == to and same_ports and packet.protocol in (end.protocol, FRAGMENT):
                return True
        if any(selects(rule, packet) for rule in self.excepted) or self._is_meant(packet):
            return True
        if within(to, NOBODY) or within(to, self.outside) or _keeps_the_network_running(packet):
            return True
        if is_dns(packet):
            return within(to, self.resolvers)
        return within(to, NEVER) or within(to, self.lan) or within(to, PRIVATE)

    def _is_meant(self, packet: Packet) -> bool:
        if packet.source_port is None or packet.destination_port is None:
            return False
        # A connection that is begun here is no answer, whichever port it is begun from.
        answers = packet.protocol != TCP or not packet.opens
        return (answers and any(p.has(packet.protocol, packet.source_port) for p in self.published)) or any(
            p.has(packet.protocol, packet.destination_port) for p in self.ports
        )


def is_dhcp(packet: Packet) -> bool:
    """Whether it is a client's message to a server of DHCP, by its ports and its shape.

    RFC 2131, 2 and 4.1: a request, and behind its fixed fields the cookie of RFC 1497. RFC 8415, 7.2, 7.3 and 8: a
    client's type, and behind the transaction's number options of which one names the client.
    """
    head = packet.payload
    ports = packet.source_port, packet.destination_port
    if packet.protocol != UDP or not head:
        return False
    if packet.destination.version == 4:
        return ports == (68, 67) and head[0] == 1 and head[236:240] == b"\x63\x82\x53\x63"
    return ports == (546, 547) and head[0] in _OF_A_CLIENT and _names_its_client(head[4:])


def _names_its_client(options: bytes) -> bool:
    while len(options) >= 4:
        kind, size = int.from_bytes(options[:2]), int.from_bytes(options[2:4])
        if kind == 1:
            return size > 0
        options = options[4 + size :]
    return False


def is_dns(packet: Packet) -> bool:
    """Whether it goes to a port of nameservers."""
    return packet.destination_port in DNS_PORTS and packet.protocol in (UDP, TCP)


def _keeps_the_network_running(packet: Packet) -> bool:
    four = packet.destination.version == 4
    match packet.protocol:
        case 1:
            return four and packet.kind in ICMP_ANSWERS
        case 58:
            return not four and packet.kind in ICMP6_OWN
        case 6:
            return bool(packet.flags & RST) or packet.flags & SYN_ACK == SYN_ACK  # both are answers
        case _:
            return False
