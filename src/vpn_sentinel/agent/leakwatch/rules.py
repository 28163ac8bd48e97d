"""What may leave beside the tunnel: the same rules as values, as the kernel's filter (`bpf`), and for one packet here.

They let out what a kill switch lets out: the tunnel's own packets, the LAN, and what the network needs to run.
"""

from dataclasses import dataclass
from ipaddress import ip_network
from typing import Final

from vpn_sentinel.agent.endpoints import TCP, UDP, Endpoint
from vpn_sentinel.agent.leakwatch.packets import Packet
from vpn_sentinel.domain.policy import NOT_PUBLIC, IPNetwork, within

ICMP, ICMP6 = 1, 58
DNS, BOOTP, DHCPV6 = 53, 67, 547
FRAGMENT: Final = 44  # IPv6's next header
# Stays on the link whatever it is: multicast, broadcast, link-local, this host.
NEVER: Final[tuple[IPNetwork, ...]] = tuple(
    ip_network(block)
    for block in ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32", "::/127",
                  "fe80::/9", "ff00::/8")
)  # fmt: skip
# Nothing of these is on the internet. Only a name that is asked there may still get out: the home router passes it on.
PRIVATE: Final[tuple[IPNetwork, ...]] = tuple(n for n in NOT_PUBLIC if n not in NEVER)
# The kernel's own words about packets that came in; they hold nothing of a program's.
ICMP_ANSWERS: Final = (0, 3, 11, 12)
# The same, and neighbours, routers and multicast listeners (RFC 4861, 2710, 3810).
ICMP6_OWN: Final = (1, 2, 3, 4, 129, 130, 131, 132, 133, 134, 135, 136, 137, 143)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """`endpoints` and `marks` (mark and mask) tell the tunnel's own packets, `outside` is what may leave beside it:
    the LAN, allowed networks, hosts with a route of their own. DNS to `resolvers` is allowed."""

    endpoints: tuple[Endpoint, ...] = ()
    marks: tuple[tuple[int, int], ...] = ()
    outside: tuple[IPNetwork, ...] = ()
    resolvers: tuple[IPNetwork, ...] = ()

    def allow(self, packet: Packet) -> bool:
        """Whether this packet may leave; its mark is known to the kernel alone."""
        to = packet.destination
        for end in self.endpoints:
            # Later fragments have no ports; those of the tunnel's packets are the tunnel's too.
            same_port = packet.fragment or packet.destination_port == end.port
            if end.address == to and same_port and packet.protocol in (end.protocol, FRAGMENT):
                return True
        if within(to, NEVER) or within(to, self.outside) or _keeps_the_network_running(packet):
            return True
        if packet.destination_port == DNS and packet.protocol in (UDP, TCP):
            return within(to, self.resolvers)
        return within(to, PRIVATE)


def _keeps_the_network_running(packet: Packet) -> bool:
    four = packet.destination.version == 4
    match packet.protocol:
        case 1:
            return four and packet.kind in ICMP_ANSWERS
        case 58:
            return not four and packet.kind in ICMP6_OWN
        case 17:
            return packet.destination_port == (BOOTP if four else DHCPV6)
        case 6:
            return bool(packet.flags & 0x04) or packet.flags & 0x12 == 0x12  # RST, or SYN with ACK: answers
        case _:
            return False
