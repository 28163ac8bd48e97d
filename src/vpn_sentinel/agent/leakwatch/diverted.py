"""Names that this host's own rules lead elsewhere: DNAT in the output hook, iptables' `nat OUTPUT` or nftables; or past
the tunnel: a mark that they put on packets, and a routing rule for it (policy routing).

Routes tell nothing of it: the kernel routes by the address that a program asked, and takes another one then. A question
of ours that comes out at another address than it was sent to proves it, and a program's question goes the same way. One
that is led to this host itself, as Docker's resolver and redirects to a local stub do it, never comes out.
"""

from vpn_sentinel.agent.leakwatch.rules import is_dns
from vpn_sentinel.agent.net.own import OwnSockets
from vpn_sentinel.agent.net.packets import Packet
from vpn_sentinel.agent.probes.dns import NO_DNS_HERE
from vpn_sentinel.agent.probes.tag import is_probe
from vpn_sentinel.domain.leaks import DNS_PORTS


def is_diverted(packet: Packet, own: OwnSockets) -> bool:
    """Whether this is a DNS question of this process that leaves for another address than it was sent to.

    A socket that is bound to a device says nothing: a rule may be for what leaves by that device alone. Nor does one of
    the other family, which no rule leads to: both families have each port once.
    """
    if packet.source_port is None or not is_dns(packet) or not is_probe(packet):
        return False
    to, routed = packet.destination, own.routed(packet.protocol, packet.source_port)
    sent = [address for address, port in routed if port in DNS_PORTS and address.version == to.version]
    return bool(sent) and to not in sent


def is_led_out(packet: Packet, own: OwnSockets) -> bool:
    """Whether this is a DNS question of this process from a socket that routes alone decide of, to where it was sent.

    Where the routes lead there through the tunnel, this host's rules took it out. What is asked of an address that runs
    no DNS is left to the others: people would look for a nameserver there.
    """
    if packet.source_port is None or not is_dns(packet) or not is_probe(packet):
        return False
    if packet.destination == NO_DNS_HERE.address:
        return False
    return (packet.destination, packet.destination_port) in own.routed(packet.protocol, packet.source_port)
