"""Which interface is the tunnel, which one is physical, and which of the two a packet would leave by."""

import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from vpn_sentinel.agent.netlink import IFF_LOOPBACK, IFF_LOWER_UP, IFF_POINTOPOINT, IFF_UP, LOCAL, Interface, Kernel
from vpn_sentinel.domain.observation import Link, Path
from vpn_sentinel.domain.policy import IPAddress

# Kinds that rtnetlink names itself. Kinds that also carry home connections (sit, gre, ipip) are no sign of a VPN.
_KINDS: Final = frozenset({"wireguard", "tun", "ovpn", "ovpn-dco", "xfrm", "amneziawg"})
_NAMES: Final = re.compile(r"(wg|tun|ppp|utun|nordlynx|proton|tailscale|mullvad|awg)", re.ASCII)
# Where "the internet" is: more than one, because a rule may send one of them elsewhere (situation 18).
INTERNET: Final[tuple[IPAddress, ...]] = tuple(
    ip_address(a) for a in ("1.1.1.1", "8.8.8.8", "2606:4700:4700::1111", "2001:4860:4860::8888")
)
_MOST = 256  # interfaces named in one observation: what the wire takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The host's interfaces at one moment. `tunnel` is the tunnel's name, also when the interface is gone.

    `interfaces` is None when the kernel could not be asked. `physical` is the interface that leads home.
    """

    interfaces: tuple[Interface, ...] | None = None
    tunnel: str | None = None
    physical: Interface | None = None

    def link(self) -> Link | None:
        """The tunnel's interface as an observation tells it, None when none is known."""
        if self.tunnel is None or self.interfaces is None:
            return None
        found = next((i for i in self.interfaces if i.name == self.tunnel), None)
        if found is None:
            return Link(name=self.tunnel, present=False, up=False)
        return Link(name=found.name, present=True, up=is_up(found), rx_bytes=found.rx_bytes, tx_bytes=found.tx_bytes)

    def names(self) -> tuple[str, ...] | None:
        """All interfaces besides `lo`, None when nobody looked."""
        if self.interfaces is None:
            return None
        return tuple(i.name for i in self.interfaces if not i.flags & IFF_LOOPBACK)[:_MOST]

    def owns(self, address: IPAddress) -> bool:
        """Whether an interface still has this address; True when nobody can tell."""
        return self.interfaces is None or any(address in i.addresses for i in self.interfaces)


def is_up(interface: Interface) -> bool:
    """Switched on, and its other end (the process behind a tun device) is there."""
    return bool(interface.flags & IFF_UP) and bool(interface.flags & IFF_LOWER_UP)


def is_certainly_vpn(interface: Interface) -> bool:
    return interface.kind in _KINDS


def may_be_vpn(interface: Interface) -> bool:
    return is_certainly_vpn(interface) or (
        bool(interface.flags & IFF_POINTOPOINT) and _NAMES.match(interface.name) is not None
    )


def survey(kernel: Kernel | None, *, configured: str | None = None, remembered: str | None = None) -> Survey:
    """Look at the interfaces. Raises nothing: a kernel that cannot be asked makes a survey that knows nothing.

    The tunnel is the one configured; else the VPN interface that carries the route to the internet (one that never did,
    such as a Tailscale or a LAN-access WireGuard, is none); else the one remembered, so that its absence is seen.
    """
    if kernel is None:
        return Survey(tunnel=configured)
    try:
        interfaces = kernel.interfaces()
        tunnel = configured or _carrying(kernel, interfaces, remembered) or remembered
        return Survey(interfaces=interfaces, tunnel=tunnel, physical=_physical(kernel, interfaces, tunnel))
    except OSError:
        return Survey(tunnel=configured or remembered)


def _carrying(kernel: Kernel, interfaces: tuple[Interface, ...], remembered: str | None) -> str | None:
    by_index = {i.index: i for i in interfaces}
    for address in INTERNET:
        route = kernel.route(address)
        found = by_index.get(route.interface or 0) if route else None
        # A PPPoE line is a point-to-point `ppp0` too: a name alone never displaces the tunnel that is remembered.
        if found and (is_certainly_vpn(found) or (may_be_vpn(found) and remembered in (None, found.name))):
            return found.name
    return None


def _physical(kernel: Kernel, interfaces: tuple[Interface, ...], tunnel: str | None) -> Interface | None:
    """The best way out beside the tunnel: one with a gateway before one that merely has an address."""
    best: tuple[int, int] | None = None
    found = None
    for interface in interfaces:
        if interface.name == tunnel or may_be_vpn(interface) or interface.flags & IFF_LOOPBACK:
            continue
        addresses = [a for a in interface.addresses if not a.is_link_local]
        if not addresses or not interface.flags & IFF_UP:
            continue
        # With an interface given, IPv4 assumes the destination on link when no route is there: a gateway proves one.
        routes = (kernel.route(a, via=interface.index) for a in (INTERNET[0], INTERNET[2]))
        rank = (0 if any(r is not None and r.gateway for r in routes) else 1, interface.index)
        if best is None or rank < best:
            best, found = rank, interface
    return found


@dataclass(frozen=True, slots=True)
class Paths:
    """Tells by which kind of interface the kernel would send a packet."""

    kernel: Kernel | None
    survey: Survey

    def of(self, destination: IPAddress, port: int = 53, protocol: int = 17) -> Path:
        if self.kernel is None or self.survey.interfaces is None:
            return Path.UNKNOWN
        try:
            route = self.kernel.route(destination, port=port, protocol=protocol)
        except OSError:
            return Path.UNKNOWN
        if route is None:
            return Path.UNKNOWN
        if route.kind == LOCAL:
            return Path.LOCAL
        found = next((i for i in self.survey.interfaces if i.index == route.interface), None)
        if found is None:
            return Path.UNKNOWN
        if found.flags & IFF_LOOPBACK:
            return Path.LOCAL
        if found.name == self.survey.tunnel:
            return Path.TUNNEL
        # Another VPN's interface is neither this tunnel nor the home connection.
        return Path.UNKNOWN if may_be_vpn(found) else Path.OUTSIDE

    def has_own_way(self, destination: IPAddress, port: int) -> bool:
        """Whether a host route leads there beside the tunnel: OpenVPN makes one for its server's own address.

        Traffic to such an address is meant to leave outside, so it proves no leak.
        """
        if self.kernel is None:
            return False
        try:
            route = self.kernel.route(destination, port=port, match=True)
        except OSError:
            return False
        return route is not None and route.prefix == destination.max_prefixlen and route.kind != LOCAL
