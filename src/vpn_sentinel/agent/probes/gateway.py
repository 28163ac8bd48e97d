"""The VPN server's own address inside the tunnel: does it answer while the internet does not (situation 7)?

An answer shows that the tunnel's other end is alive, and nothing about the internet behind it.
"""

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Final

from vpn_sentinel.agent.net.interfaces import INTERNET, Paths, is_up
from vpn_sentinel.agent.net.link import Interface
from vpn_sentinel.agent.net.packets import DNS_PORT
from vpn_sentinel.agent.probes import dnswire
from vpn_sentinel.agent.probes.targets import EchoAnswer
from vpn_sentinel.domain.observation import Path
from vpn_sentinel.domain.policy import IPAddress

_PRIVATE_NETWORKS: Final = tuple(
    ip_network(n) for n in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
)


@dataclass(frozen=True, slots=True)
class Gateway:
    """A `Target`. Asked for its own name, which it knows by itself; any answer counts, also "port unreachable"."""

    address: IPAddress
    port: int = DNS_PORT

    @property
    def name(self) -> str:
        return str(self.address)

    def question(self) -> tuple[bytes, Callable[[bytes], EchoAnswer | None]]:
        return dnswire.query(secrets.randbits(16), "id.server", dnswire.TXT, dnswire.CHAOS), _any


def _any(datagram: bytes) -> EchoAnswer | None:
    return EchoAnswer(None) if datagram else None


def gateway(paths: Paths, nameservers: Iterable[IPAddress]) -> Gateway | None:
    """The target: a nameserver of the VPN, else the gateway of its route, else the first address of its subnet.

    None when the tunnel's interface is not up, or its other end is unknown.
    """
    survey = paths.survey
    tunnel = next((i for i in survey.interfaces or () if i.name == survey.tunnel), None)
    if tunnel is None or not is_up(tunnel):
        return None
    for address in (*nameservers, *_next_hops(paths, tunnel), *_first_of_subnets(tunnel)):
        if is_private(address) and address not in tunnel.addresses and paths.of(address, DNS_PORT) is Path.TUNNEL:
            return Gateway(address)
    return None


def is_private(address: IPAddress) -> bool:
    """Of a private network or carrier-grade NAT, as addresses inside a VPN are."""
    return any(address.version == n.version and address in n for n in _PRIVATE_NETWORKS)


def _next_hops(paths: Paths, tunnel: Interface) -> Iterable[IPAddress]:
    for destination in INTERNET:
        try:
            route = paths.kernel.route(destination) if paths.kernel is not None else None
        except OSError:
            return
        if route is not None and route.interface == tunnel.index and route.next_hop is not None:
            yield route.next_hop


def _first_of_subnets(tunnel: Interface) -> Iterable[IPAddress]:
    for network in tunnel.networks:
        if network.prefixlen < network.max_prefixlen - 1:
            yield network.network_address + 1
