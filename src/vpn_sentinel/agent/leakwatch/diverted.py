"""DNS queries that this host's own firewall diverts: to another nameserver by DNAT in the output hook (iptables' `nat
OUTPUT`, or nftables), or past the tunnel by a mark and a routing rule for it (policy routing).

Routes do not show this: the kernel routes by the address that a program asked, and the destination changes afterwards.
A query of the agent that leaves for another address than it was sent to proves it, and a program's query takes the same
route. One that is redirected to this host itself, as by Docker's resolver or a local stub, never leaves.
"""

from vpn_sentinel.agent.leakwatch.rules import is_dns
from vpn_sentinel.agent.net.own import OwnSockets
from vpn_sentinel.agent.net.packets import Packet
from vpn_sentinel.agent.probes.dns import NO_DNS_HERE
from vpn_sentinel.agent.probes.tag import is_probe
from vpn_sentinel.domain.leaks import DNS_PORTS


def is_diverted(packet: Packet, own: OwnSockets) -> bool:
    """Whether this is a DNS query of this process that leaves for another address than it was sent to.

    A socket that is bound to a device proves nothing: a rule may apply to that device alone. Nor does a socket of the
    other family: each family has every port once, and DNAT stays within a family.
    """
    if packet.source_port is None or not is_dns(packet) or not is_probe(packet):
        return False
    to, routed = packet.destination, own.routed(packet.protocol, packet.source_port)
    sent = [address for address, port in routed if port in DNS_PORTS and address.version == to.version]
    return bool(sent) and to not in sent


def is_led_out(packet: Packet, own: OwnSockets) -> bool:
    """Whether this is a DNS query of this process to the address it was sent to, from a socket that only routes govern.

    Where the routes lead there through the tunnel, this host's firewall took it out. A query to `NO_DNS_HERE` is never
    reported, since people would look for a nameserver there.
    """
    if packet.source_port is None or not is_dns(packet) or not is_probe(packet):
        return False
    if packet.destination == NO_DNS_HERE.address:
        return False
    return (packet.destination, packet.destination_port) in own.routed(packet.protocol, packet.source_port)
