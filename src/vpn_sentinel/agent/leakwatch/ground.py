"""What this namespace looks like to the leak watch: which interfaces to watch, and what may leave by them."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from vpn_sentinel.agent.endpoints import Endpoint
from vpn_sentinel.agent.interfaces import Survey
from vpn_sentinel.agent.leakwatch.rules import Rules
from vpn_sentinel.agent.net.link import Interface
from vpn_sentinel.agent.netlink import Way
from vpn_sentinel.domain.policy import NOT_PUBLIC, IPAddress, IPNetwork

_WIREGUARD: Final = frozenset({"wireguard", "amneziawg"})
_SHORTEST: Final = {4: 16, 6: 48}  # prefix lengths of a public LAN
_MOST: Final = 128  # networks of the LAN that the filter takes in


class Tables(Protocol):
    """What is read of the kernel's routing. Each may raise OSError."""

    def ways(self) -> tuple[Way, ...]: ...

    def spared(self) -> tuple[tuple[int, int], ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """`rules` are those of the kernel alone, without endpoints. `hosts` are the addresses with a route of their own
    beside the tunnel. `openvpn`: the tunnel may be OpenVPN's, by its device and by the rules around it."""

    interfaces: tuple[Interface, ...] = ()
    rules: Rules = field(default_factory=Rules)
    hosts: tuple[IPNetwork, ...] = ()
    openvpn: bool = True

    def with_endpoints(
        self, told: Iterable[Endpoint], meant: Iterable[IPAddress], learned: Iterable[Endpoint] = ()
    ) -> Rules:
        """All rules. A host's route says that what goes there may leave, when the host is the VPN's, or one of `meant`.

        Where nobody told of the VPN's host, each such host may be it: OpenVPN makes a route for its server. What was
        `learned` by shape may be another VPN's.
        """
        known = tuple(dict.fromkeys(told))
        hosts = self.hosts
        if known or not self.openvpn:
            addresses = {e.address for e in known} | set(meant)
            hosts = tuple(h for h in hosts if h.network_address in addresses)
        ends = tuple(dict.fromkeys((*known, *learned)))
        return replace(self.rules, endpoints=ends, outside=(*self.rules.outside, *hosts))

    def tells(self, endpoints: Iterable[Endpoint]) -> bool:
        """Whether the tunnel's own packets can be told from others."""
        return bool(self.rules.marks) or bool(self.openvpn and self.hosts) or any(True for _ in endpoints)


def ground(
    survey: Survey,
    tables: Tables | None,
    *,
    allowed: tuple[IPNetwork, ...],
    resolvers: tuple[IPNetwork, ...],
    before: Ground,
) -> Ground:
    """Look at routes and rules. Raises OSError when the kernel cannot be asked.

    What told the tunnel's packets `before` holds on while its interface is gone: its program still sends to its server.
    """
    if survey.interfaces is None:
        return Ground()
    watched = survey.beside
    beside = {i.index for i in watched}
    own = [a for i in watched for a in i.addresses]
    ways = [w for w in tables.ways() if w.interface in beside] if tables else []
    lan = tuple(dict.fromkeys(w.network for w in ways if _is_lan(w, own)))[:_MOST]
    hosts = tuple(w.network for w in ways if w.gateway and w.network.prefixlen == w.network.max_prefixlen)
    tunnel = next((i for i in survey.interfaces if i.name == survey.tunnel), None)
    spared = tables.spared() if tables else ()
    if tunnel is None:
        spared = tuple(dict.fromkeys((*spared, *before.rules.marks)))
        hosts = (*hosts, *before.hosts)
    return Ground(
        interfaces=watched,
        rules=Rules(marks=spared, outside=(*allowed, *lan), resolvers=resolvers),
        hosts=tuple(dict.fromkeys(hosts))[:_MOST],
        openvpn=not spared and (before.openvpn if tunnel is None else tunnel.kind not in _WIREGUARD),
    )


def _is_lan(way: Way, own: list[IPAddress]) -> bool:
    """A private network with a route of its own, or any network that one of our addresses is in."""
    network = way.network
    if any(network.version == n.version and network.subnet_of(n) for n in NOT_PUBLIC):  # type: ignore[arg-type]
        return True
    # A shorter one is no LAN but a part of the internet, e.g. the half that some programs route in place of the whole.
    if way.gateway or network.prefixlen < _SHORTEST[network.version]:
        return False
    return any(a.version == network.version and a in network for a in own)
