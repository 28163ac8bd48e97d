"""Recognize the agent's own packets: they show where traffic goes, and are no program's leak."""

import os
from collections.abc import Callable, Iterable

from vpn_sentinel.agent.leakwatch.diverted import is_diverted, is_led_out
from vpn_sentinel.agent.leakwatch.egress_map import EgressMap, Tables
from vpn_sentinel.agent.net.endpoints import TCP
from vpn_sentinel.agent.net.own import OwnSockets
from vpn_sentinel.agent.net.packets import Packet
from vpn_sentinel.agent.net.routing_rules import Sender
from vpn_sentinel.agent.probes.tag import is_probe
from vpn_sentinel.domain.policy import IPAddress


class OwnPackets:
    """`sockets` are those of this process; `servers` returns the hosts that reports go to."""

    def __init__(self, sockets: OwnSockets, tables: Tables | None, servers: Callable[[], Iterable[IPAddress]]) -> None:
        self.sockets = sockets
        self._tables = tables
        self._servers = servers

    def has(self, packet: Packet) -> bool:
        """Whether it is a probe, whose result a canary reports. With a hop limit of one it ends in the LAN."""
        return packet.ttl == 1 or self.is_probe(packet)

    def is_probe(self, packet: Packet) -> bool:
        to, port = packet.destination, packet.destination_port
        return self.sockets.has(packet.protocol, packet.source_port, to, port) or is_probe(
            packet, self.sockets.ports(packet.protocol, to, port)
        )

    def is_diverted(self, packet: Packet) -> bool:
        """Whether a DNS query of the agent left for another address than it was sent to."""
        return is_diverted(packet, self.sockets)

    def is_led_away(self, packet: Packet, around: EgressMap) -> bool:
        """Whether this host's firewall diverts a DNS query of the agent, and so everybody's, elsewhere or past the
        tunnel.
        """
        if self.is_diverted(packet):
            return True
        fib, tunnel = around.fib, around.tunnel
        if fib is None or tunnel is None or self._tables is None or not is_led_out(packet, self.sockets):
            return False
        entry = fib.lookup(packet.destination, _sender(packet))
        if entry is None or {hop.interface for hop in entry.hops} != {tunnel}:
            return False
        to, port, protocol = packet.destination, packet.destination_port or 0, packet.protocol
        try:
            # Tables are not enough: IPv6 avoids a route whose router does not answer.
            route = self._tables.route(to, port=port, protocol=protocol)
            if route is not None and route.source is not None:
                # A connected socket keeps this address, and a rule may select it (`from`).
                kept = (route.source, packet.source_port or 0)
                route = self._tables.route(to, port=port, protocol=protocol, source=kept)
        except OSError:
            return False
        return route is not None and route.interface == tunnel

    def is_of_a_broken_connection(self, packet: Packet, interface: str, around: EgressMap) -> bool:
        """Whether it belongs to the agent's connection to the server, begun through a tunnel that is gone now.

        A kill switch that accepts established flows lets it out, with the tunnel's address as its source.
        """
        if packet.destination not in self._servers() or packet.protocol != TCP or packet.opens:
            return False
        here = next((i for i in around.interfaces if i.name == interface), None)
        return here is not None and packet.source not in here.addresses


def _sender(packet: Packet) -> Sender:
    """This process, as it sent the packet."""
    return Sender(
        uid=os.geteuid(),
        protocol=packet.protocol,
        source_port=packet.source_port or 0,
        destination_port=packet.destination_port or 0,
    )
