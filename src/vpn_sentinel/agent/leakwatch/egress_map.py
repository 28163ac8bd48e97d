"""What this namespace looks like to the leak watch: which interfaces to watch, and what may leave by them."""

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
from vpn_sentinel.agent.net.roles import is_layer3_tunnel
from vpn_sentinel.agent.net.rtnetlink import Route
from vpn_sentinel.agent.net.servers import devices_to
from vpn_sentinel.domain.policy import NOT_PUBLIC, IPAddress, IPNetwork, is_public, within

_WIREGUARD: Final = frozenset({"wireguard", "amneziawg"})
_MAIN: Final = 254  # RT_TABLE_MAIN, linux/rtnetlink.h
_NOT_PUBLIC: Final = {v: tuple(interval(n) for n in NOT_PUBLIC if n.version == v) for v in (4, 6)}
_MAX_LAN_NETWORKS: Final = 128  # networks of the LAN that the filter takes in


class Tables(Protocol):
    """What is read of the kernel's routing. It may raise OSError."""

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
        """Routes or rules may have changed: the next look reads them anew. It raises nothing."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Routes:
    """What routes beside the tunnel lead to: networks of the LAN, and single hosts by a router of their own.

    Read once for `ways`, which are the same object until the tables change: full tables take a while.
    """

    ways: tuple[DeviceRoute, ...]
    own: list[IPAddress]
    lan: tuple[IPNetwork, ...]
    hosts: tuple[IPNetwork, ...]

    @classmethod
    def read(cls, ways: tuple[DeviceRoute, ...], own: list[IPAddress]) -> "_Routes":
        lan = tuple(dict.fromkeys(w.network for w in ways if _is_lan(w, own)))[:_MAX_LAN_NETWORKS]
        hosts = tuple(w.network for w in ways if w.gateway and w.network.prefixlen == w.network.max_prefixlen)
        return cls(ways=ways, own=own, lan=lan, hosts=hosts)


@dataclass(frozen=True, slots=True, kw_only=True)
class EgressMap:
    """`rules` are those of the kernel alone, without endpoints. `hosts` are the addresses with a route of their own
    beside the tunnel. `openvpn`: the tunnel may be OpenVPN's, by its device and by the rules around it. `senders` are
    those that the routing rules tell of. `fib` is None where the kernel does not tell of its tables, `tunnel`, its
    index, while the device is not there."""

    interfaces: tuple[Interface, ...] = ()
    rules: Rules = field(default_factory=Rules)
    hosts: tuple[IPNetwork, ...] = ()
    openvpn: bool = True
    senders: Senders = field(default_factory=Senders)
    fib: Fib | None = field(default=None, compare=False, repr=False)
    lines: tuple[Interface, ...] = ()  # devices with one other end that may be another VPN's
    others: frozenset[int] = frozenset()  # indices of devices that are neither the tunnel nor watched
    tunnel: int | None = None
    routes: _Routes | None = field(default=None, compare=False, repr=False)
    nested: bool = False  # a tunnel is among the ways out: this one may run inside it

    def with_endpoints(
        self,
        reported: Iterable[Endpoint],
        meant: Iterable[IPAddress],
        learned: Iterable[Endpoint] = (),
        server: IPAddress | None = None,
        *,
        closed: bool = False,
    ) -> Rules:
        """All rules. A host's route says that what goes there may leave, when the host is the VPN's, or one of `meant`.

        Where nobody told of the VPN's host, each such host may be it: OpenVPN makes a route for its server. `server` is
        the one of them that was found to be it. What was `learned` by shape may be another VPN's. `closed`: the ends
        that are told or learned are all that may be sent to at the VPN's host.
        """
        known = tuple(dict.fromkeys(reported))
        hosts = self.hosts
        if closed or server is not None or not self._is_open(known):
            addresses = set(meant)
            if not closed:
                addresses |= {e.address for e in known if self._reaches(e.address)}
                addresses |= {server} if server is not None else set()
            believed = self._of_other_tunnels(e.address for e in known)
            hosts = tuple(h for h in hosts if h.network_address in addresses or h in believed)
        ends = tuple(dict.fromkeys((*known, *learned)))
        return replace(self.rules, endpoints=ends, outside=(*self.rules.outside, *hosts))

    def _of_other_tunnels(self, reported: Iterable[IPAddress]) -> frozenset[IPNetwork]:
        """Hosts on devices of which nothing is reported, where one tunnel runs inside another: it has a server too."""
        if self.fib is None or not self.nested:
            return frozenset()
        devices = devices_to(self.fib, reported, [i.index for i in self.interfaces])
        found = ((h, self.fib.lookup(h.network_address)) for h in self.hosts)
        return frozenset(h for h, entry in found if entry and not any(entry.leads_by(d) for d in devices))

    def candidates(
        self, reported: Iterable[Endpoint], meant: Iterable[IPAddress]
    ) -> tuple[tuple[IPAddress, ...], bool]:
        """The hosts on the internet of which one may be the VPN's server, and whether more than a route tells of it.

        Where nobody says where the tunnel's packets go, and a mark tells them, they may go through a program of this
        host all the same (WireGuard in TCP), which sends them on unmarked: only a trial tells.
        """
        known = tuple(reported)
        told_of = {e.address for e in known if self._reaches(e.address)}
        if not (told_of or self._is_open(known) or (self.senders.excepted and not known)):
            return (), False
        aside = set(meant)
        found = {h.network_address for h in self.hosts}
        found = found & told_of if told_of else found
        hosts = tuple(sorted((a for a in found if is_public(a) and a not in aside), key=str))
        return hosts, bool(told_of) or not self._is_open(known)

    def beside(self, servers: Iterable[IPAddress]) -> tuple[tuple[Interface, ...], tuple[IPAddress, ...]]:
        """Other VPNs' devices, as far as no shape tells their packets, and the hosts of which one may be their server.

        A home line of that kind may be among them: what is sent into it is carried by no packet.
        """
        known = set(servers)
        hosts = {h.network_address for h in self.hosts} - known
        return self.lines, tuple(sorted((a for a in hosts if is_public(a)), key=str))

    def _is_open(self, reported: tuple[Endpoint, ...]) -> bool:
        """Whether each host with a route of its own may be the VPN's."""
        return not any(self._reaches(e.address) for e in reported) and (self.openvpn or bool(reported))

    def _reaches(self, address: IPAddress) -> bool:
        """Whether packets to an endpoint leave by what is watched.

        Those to a wrapper on this host or on the LAN, and those through another tunnel, never come up here: they say
        nothing of what carries the tunnel from here on.
        """
        if within(address, NOT_PUBLIC):
            return False
        entry = self.fib.lookup(address) if self.fib else None
        # Where everybody is routed into a tunnel, the endpoint's packets are excepted by their sender.
        return entry is None or not any(entry.leads_by(index) for index in self.others)

    def tells(self, endpoints: Iterable[Endpoint]) -> bool:
        """Whether the tunnel's own packets can be told from others."""
        return bool(self.senders.excepted) or self.tells_by_end(endpoints)

    def tells_by_end(self, endpoints: Iterable[Endpoint]) -> bool:
        """Whether they can by where they go."""
        known = tuple(endpoints)
        by_host = bool(self.hosts) and (self.openvpn or self.nested or bool(known))
        return by_host or any(self._reaches(e.address) for e in known)


def egress_map(
    survey: Survey,
    tables: Tables | None,
    *,
    allowed: tuple[IPNetwork, ...],
    resolvers: tuple[IPNetwork, ...],
    before: EgressMap,
) -> EgressMap:
    """Look at routes and rules. Raises OSError when the kernel cannot be asked.

    What told the tunnel's packets `before` holds on while its interface is gone: its program still sends to its server.
    """
    if survey.interfaces is None:
        return EgressMap()
    watched = survey.beside
    own = [a for i in watched for a in addresses(i, survey.natted)]
    ways = tables.device_routes([i.index for i in watched]) if tables else ()
    routes = before.routes
    if routes is None or routes.ways is not ways or routes.own != own:
        routes = _Routes.read(ways, own)
    lan, hosts = routes.lan, routes.hosts
    tunnel = survey.device()
    fib = survey.fib
    lines = [i.index for i in watched if i.flags & IFF_POINTOPOINT]  # whose routes have no gateway
    entries = fib.entries if fib and lines else ()
    hosts += tuple(e.network for e in entries if e.is_for_one_host() and any(e.leads_by(line) for line in lines))
    sent = before.senders if fib is None else senders(fib, tunnel.index if tunnel else None, before.senders)
    if tunnel is None:
        hosts = (*hosts, *before.hosts)
    return EgressMap(
        interfaces=watched,
        rules=Rules(
            marks=marks(sent.excepted),
            excepted=tuple(r for r in sent.excepted if not is_mark(r) and r.uids is None),
            inside=marks(sent.inside) if all(is_mark(r) for r in sent.inside) and not sent.everybody else (),
            outside=allowed,
            lan=lan,
            resolvers=resolvers,
        ),
        hosts=tuple(dict.fromkeys(hosts))[:_MAX_LAN_NETWORKS],
        openvpn=before.openvpn if tunnel is None else tunnel.kind not in _WIREGUARD and _by_routes(sent, fib, tunnel),
        senders=sent,
        fib=fib,
        tunnel=tunnel.index if tunnel else None,
        routes=routes,
        nested=any(is_layer3_tunnel(i) for i in watched),
        lines=tuple(i for i in survey.interfaces if _is_line(i) and i.name != survey.tunnel),
        others=frozenset(i.index for i in survey.interfaces if not _is_known(i, survey)),
    )


def _by_routes(sent: Senders, fib: Fib | None, tunnel: Interface) -> bool:
    """Whether the tunnel's own packets are kept out of it by routes, as OpenVPN does, not by rules for their sender.

    What rules let out of a tunnel that the main table leads into may be somebody else's.
    """
    if not sent.excepted or fib is None:
        return not sent.excepted
    everybody = (fib.lookup(address) for address in INTERNET)
    return any(e is not None and e.table == _MAIN and e.leads_by(tunnel.index) for e in everybody)


def _is_known(interface: Interface, survey: Survey) -> bool:
    return interface in survey.beside or interface.name == survey.tunnel or bool(interface.flags & IFF_LOOPBACK)


def _is_line(interface: Interface) -> bool:
    """TUN and PPP, switched on; WireGuard is known by its shape."""
    return bool(interface.flags & IFF_POINTOPOINT) and is_up(interface) and interface.kind not in _WIREGUARD


def _is_lan(way: DeviceRoute, own: list[IPAddress]) -> bool:
    """A private network with a route of its own, or any network that one of our addresses is in."""
    network = way.network
    first = int(network.network_address)
    last = first | int(network.hostmask)
    if any(low <= first and last <= high for low, high in _NOT_PUBLIC[network.version]):
        return True
    # A shorter one is no LAN but a part of the internet, e.g. the half that some programs route in place of the whole.
    if way.gateway or network.prefixlen < MIN_PREFIX_LENGTH[network.version]:
        return False
    return any(a.version == network.version and a in network for a in own)
