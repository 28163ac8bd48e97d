"""The leak watch's view of this namespace: which interfaces to watch, and what may leave by them."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from vpn_sentinel.agent.leakwatch.rules import Rules
from vpn_sentinel.agent.leakwatch.senders import Senders, is_mark, marks, senders
from vpn_sentinel.agent.net.coverage import interval
from vpn_sentinel.agent.net.endpoints import Endpoint
from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.interfaces import INTERNET, Survey, is_up
from vpn_sentinel.agent.net.kernel import DeviceRoute
from vpn_sentinel.agent.net.link import IFF_LOOPBACK, IFF_POINTOPOINT, Interface
from vpn_sentinel.agent.net.local import MIN_PREFIX_LENGTH, addresses
from vpn_sentinel.agent.net.roles import has_internet_route, is_layer3_tunnel
from vpn_sentinel.agent.net.rtnetlink import Route
from vpn_sentinel.agent.net.servers import devices_to
from vpn_sentinel.domain.policy import NOT_PUBLIC, IPAddress, IPNetwork, is_public, within

_WIREGUARD: Final = frozenset({"wireguard", "amneziawg"})
_MAIN: Final = 254  # RT_TABLE_MAIN, linux/rtnetlink.h
_NOT_PUBLIC: Final = {v: tuple(interval(n) for n in NOT_PUBLIC if n.version == v) for v in (4, 6)}
_MAX_LAN_NETWORKS: Final = 128  # the filter has room for so many


class Tables(Protocol):
    """The kernel's routing. Methods may raise OSError."""

    def device_routes(self, by: Collection[int]) -> tuple[DeviceRoute, ...]: ...

    def route(
        self,
        destination: IPAddress,
        *,
        port: int = 0,
        protocol: int = 17,
        source: tuple[IPAddress, int] | None = None,
    ) -> Route | None: ...

    def changed(self) -> None:
        """Routes or rules may have changed: the next call reads them again. Raises nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Routes:
    """Where routes outside the tunnel lead: networks of the LAN, and single hosts behind a gateway.

    Read once for `outside_routes`, which are the same object until the tables change: full tables are slow to read.
    """

    outside_routes: tuple[DeviceRoute, ...]
    own: list[IPAddress]
    lan: tuple[IPNetwork, ...]
    hosts: tuple[IPNetwork, ...]

    @classmethod
    def read(cls, outside_routes: tuple[DeviceRoute, ...], own: list[IPAddress]) -> "_Routes":
        lan = tuple(dict.fromkeys(r.network for r in outside_routes if _is_lan(r, own)))[:_MAX_LAN_NETWORKS]
        hosts = tuple(r.network for r in outside_routes if r.gateway and r.network.prefixlen == r.network.max_prefixlen)
        return cls(outside_routes=outside_routes, own=own, lan=lan, hosts=hosts)


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressMap:
    """`rules` come from the kernel alone, without endpoints. `hosts` are addresses with a host route outside the
    tunnel. `openvpn`: by its device and the rules around it, the tunnel may be OpenVPN's. `senders` come from the
    routing rules. `fib` is None where the tables cannot be read; `tunnel`, the interface index, is None while the
    device is gone.
    """

    interfaces: tuple[Interface, ...] = ()
    rules: Rules = field(default_factory=Rules)
    hosts: tuple[IPNetwork, ...] = ()
    openvpn: bool = True
    senders: Senders = field(default_factory=Senders)
    fib: Fib | None = field(default=None, compare=False, repr=False)
    lines: tuple[Interface, ...] = ()  # point-to-point devices that may be another VPN's
    others: frozenset[int] = frozenset()  # indices of devices that are neither the tunnel nor watched
    tunnel: int | None = None
    routes: _Routes | None = field(default=None, compare=False, repr=False)
    nested: bool = False  # a tunnel is among the watched interfaces: this one may run inside it

    def with_endpoints(
        self,
        reported: Iterable[Endpoint],
        meant: Iterable[IPAddress],
        learned: Iterable[Endpoint] = (),
        server: IPAddress | None = None,
        *,
        closed: bool = False,
    ) -> Rules:
        """All rules. Packets may take a host route when the host is the VPN's or one of `meant`.

        Where the VPN's host is not reported, each host with a route may be it: OpenVPN makes a route to its server.
        `server` is the one that a trial found. Endpoints `learned` by fingerprint may be another VPN's. `closed`: at
        the VPN's host only reported and learned endpoints may be reached.
        """
        known = tuple(dict.fromkeys(reported))
        hosts = self.hosts
        if closed or server is not None or not self._is_open(known):
            addresses = set(meant)
            if not closed:
                addresses |= {e.address for e in known if self._reaches(e.address)}
                addresses |= {server} if server is not None else set()
            other_hosts = self._of_other_tunnels(e.address for e in known)
            hosts = tuple(h for h in hosts if h.network_address in addresses or h in other_hosts)
        ends = tuple(dict.fromkeys((*known, *learned)))
        return replace(self.rules, endpoints=ends, outside=(*self.rules.outside, *hosts))

    def _of_other_tunnels(self, reported: Iterable[IPAddress]) -> frozenset[IPNetwork]:
        """Hosts on devices without a reported endpoint, where one tunnel runs inside another: the outer one has a
        server.
        """
        if self.fib is None or not self.nested:
            return frozenset()
        devices = devices_to(self.fib, reported, [i.index for i in self.interfaces])
        found = ((h, self.fib.lookup(h.network_address)) for h in self.hosts)
        return frozenset(h for h, entry in found if entry and not any(entry.leads_by(d) for d in devices))

    def candidates(
        self, reported: Iterable[Endpoint], meant: Iterable[IPAddress]
    ) -> tuple[tuple[IPAddress, ...], bool]:
        """The public hosts of which one may be the VPN's server, and whether more than a route points to it.

        Where no endpoint is reported and a mark identifies the tunnel's packets, they may still pass through a wrapper
        on this host (WireGuard in TCP) that sends them on without the mark: only a trial shows it.
        """
        known = tuple(reported)
        reported_there = {e.address for e in known if self._reaches(e.address)}
        if not (reported_there or self._is_open(known) or (self.senders.excepted and not known)):
            return (), False
        aside = set(meant)
        found = {h.network_address for h in self.hosts}
        found = found & reported_there if reported_there else found
        hosts = tuple(sorted((a for a in found if is_public(a) and a not in aside), key=str))
        return hosts, bool(reported_there) or not self._is_open(known)

    def beside(self, servers: Iterable[IPAddress]) -> tuple[tuple[Interface, ...], tuple[IPAddress, ...]]:
        """Other VPNs' devices whose packets have no fingerprint, and the hosts of which one may be their server.

        A point-to-point line of the home's own may be among them: a trial finds no carrier for it.
        """
        known = set(servers)
        hosts = {h.network_address for h in self.hosts} - known
        return self.lines, tuple(sorted((a for a in hosts if is_public(a)), key=str))

    def _is_open(self, reported: tuple[Endpoint, ...]) -> bool:
        """Whether each host with a host route may be the VPN's."""
        return not any(self._reaches(e.address) for e in reported) and (self.openvpn or bool(reported))

    def _reaches(self, address: IPAddress) -> bool:
        """Whether packets to an endpoint leave by a watched interface.

        Packets to a wrapper on this host or on the LAN, or through another tunnel, are not seen here: they do not show
        what carries the tunnel from here on.
        """
        if within(address, NOT_PUBLIC):
            return False
        entry = self.fib.lookup(address) if self.fib else None
        # Where all traffic is routed into a tunnel, the endpoint's packets are excepted by their sender.
        return entry is None or not any(entry.leads_by(index) for index in self.others)

    def can_tell_tunnel(self, endpoints: Iterable[Endpoint]) -> bool:
        """Whether the tunnel's own packets can be distinguished from others."""
        return bool(self.senders.excepted) or self.can_tell_by_destination(endpoints)

    def can_tell_by_destination(self, endpoints: Iterable[Endpoint]) -> bool:
        """Whether their destination distinguishes them."""
        known = tuple(endpoints)
        by_host = bool(self.hosts) and (self.openvpn or self.nested or bool(known))
        return by_host or any(self._reaches(e.address) for e in known)

    def is_routed_outside(self, to: IPAddress) -> bool:
        """Whether routes lead there outside the tunnel, for a sender that no rule selects."""
        entry = self.fib.lookup(to) if self.fib else None
        return entry is not None and any(entry.leads_by(i.index) for i in self.interfaces)

    def leads_out(self, name: str) -> bool:
        """Whether the watched interface `name` leads to the internet, not only to containers of this host."""
        here, fib = next((i for i in self.interfaces if i.name == name), None), self.fib
        return (
            here is not None and fib is not None and any(has_internet_route(here, fib, version) for version in (4, 6))
        )


def egress_map(
    survey: Survey,
    tables: Tables | None,
    *,
    allowed: tuple[IPNetwork, ...],
    resolvers: tuple[IPNetwork, ...],
    before: EgressMap,
) -> EgressMap:
    """Read routes and rules. Raises OSError when the kernel cannot be asked.

    What identified the tunnel's packets `before` stays valid while its interface is gone: its program still sends.
    """
    if survey.interfaces is None:
        return EgressMap()
    watched = survey.beside
    own = [a for i in watched for a in addresses(i, survey.natted)]
    outside_routes = tables.device_routes([i.index for i in watched]) if tables else ()
    routes = before.routes
    if routes is None or routes.outside_routes is not outside_routes or routes.own != own:
        routes = _Routes.read(outside_routes, own)
    lan, hosts = routes.lan, routes.hosts
    tunnel = survey.device()
    fib = survey.fib
    lines = [i.index for i in watched if i.flags & IFF_POINTOPOINT]  # whose routes have no gateway
    entries = fib.entries if fib and lines else ()
    hosts += tuple(e.network for e in entries if e.is_for_one_host() and any(e.leads_by(line) for line in lines))
    found = before.senders if fib is None else senders(fib, tunnel.index if tunnel else None, before.senders)
    if tunnel is None:
        hosts = (*hosts, *before.hosts)
    return EgressMap(
        interfaces=watched,
        rules=Rules(
            marks=marks(found.excepted),
            excepted=tuple(r for r in found.excepted if not is_mark(r) and r.uids is None),
            inside=marks(found.leading_in) if all(is_mark(r) for r in found.leading_in) and not found.everybody else (),
            outside=allowed,
            lan=lan,
            resolvers=resolvers,
        ),
        hosts=tuple(dict.fromkeys(hosts))[:_MAX_LAN_NETWORKS],
        openvpn=before.openvpn if tunnel is None else tunnel.kind not in _WIREGUARD and _by_routes(found, fib, tunnel),
        senders=found,
        fib=fib,
        tunnel=tunnel.index if tunnel else None,
        routes=routes,
        nested=any(is_layer3_tunnel(i) for i in watched),
        lines=tuple(i for i in survey.interfaces if _is_line(i) and i.name != survey.tunnel),
        others=frozenset(i.index for i in survey.interfaces if not _is_known(i, survey)),
    )


def _by_routes(found: Senders, fib: Fib | None, tunnel: Interface) -> bool:
    """Whether routes keep the tunnel's own packets out of it, as with OpenVPN, rather than rules for their sender.

    Where the main table leads into the tunnel, packets that rules let out may be another program's.
    """
    if not found.excepted or fib is None:
        return not found.excepted
    everybody = (fib.lookup(address) for address in INTERNET)
    return any(e is not None and e.table == _MAIN and e.leads_by(tunnel.index) for e in everybody)


def _is_known(interface: Interface, survey: Survey) -> bool:
    return interface in survey.beside or interface.name == survey.tunnel or bool(interface.flags & IFF_LOOPBACK)


def _is_line(interface: Interface) -> bool:
    """TUN and PPP devices that are up; WireGuard is known by its fingerprint."""
    return bool(interface.flags & IFF_POINTOPOINT) and is_up(interface) and interface.kind not in _WIREGUARD


def _is_lan(route: DeviceRoute, own: list[IPAddress]) -> bool:
    """Whether it is a private network with its own route, or a network that holds one of the `own` addresses."""
    network = route.network
    first = int(network.network_address)
    last = first | int(network.hostmask)
    if any(low <= first and last <= high for low, high in _NOT_PUBLIC[network.version]):
        return True
    # A shorter prefix is a part of the internet: some programs route two halves instead of the default route.
    if route.gateway or network.prefixlen < MIN_PREFIX_LENGTH[network.version]:
        return False
    return any(a.version == network.version and a in network for a in own)
