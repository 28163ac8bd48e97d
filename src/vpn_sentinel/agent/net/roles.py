"""Which device is the tunnel, and which ones are uplinks beside it: one answer for all parts of the agent.

A device's kind or name proves nothing. TUN and TAP are uplinks of rootless containers and virtual machines, PPP is the
uplink of many home lines, and names can be wrong. The roles follow from the routes: a tunnel takes packets to the
internet, and its own outer packets leave by another device, for which rules or routes make an exception; that device is
the uplink. A former uplink does not become the tunnel when the tunnel is gone.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from vpn_sentinel.agent.net.coverage import public_share
from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.link import ARPHRD_NONE, ARPHRD_PPP, IFF_LOOPBACK, IFF_POINTOPOINT, IFF_UP, Interface
from vpn_sentinel.agent.net.routes import RTN_UNICAST, RouteEntry
from vpn_sentinel.agent.net.routing_rules import Sender
from vpn_sentinel.domain.policy import IPAddress, is_public

# Addresses that stand for the internet in single lookups: more than one, since a rule may route one elsewhere.
INTERNET: Final[tuple[IPAddress, ...]] = tuple(
    ip_address(a) for a in ("1.1.1.1", "8.8.8.8", "193.0.14.129", "2606:4700:4700::1111", "2001:4860:4860::8888")
)
# Kinds of devices (IFLA_INFO_KIND) that only a tunnel has, whatever it is used for.
_ENCRYPTING_KINDS: Final = frozenset({"wireguard", "amneziawg", "ovpn", "ovpn-dco"})
# Kinds that may be a tunnel if the routes show it. Not PPP: that mostly is a home line or a modem, and routers with two
# lines have rules and routes that look like those of a tunnel.
_TUNNEL_KINDS: Final = _ENCRYPTING_KINDS | {
    "tun",
    "xfrm",
    "vti",
    "vti6",
    "ipip",
    "ip6tnl",
    "gre",
    "ip6gre",
    "gretap",
    "sit",
}
_LOCAL_KINDS: Final = frozenset({"dummy", "ifb", "nlmon", "vcan"})  # kinds by which no packet leaves this host
_MIN_SHARE: Final = 0.2  # of the public address space: a tunnel to the internet takes at least that much
# Where user-space implementations of WireGuard listen (wg(8); amneziawg-go), by interface.
_CONTROL_SOCKETS: Final = ("/run/wireguard/{}.sock", "/run/amneziawg/{}.sock")


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """From earlier surveys: the tunnel's name, and the names of the uplinks beside it."""

    tunnel: str | None = None
    uplinks: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """`tunnel` is the tunnel's name, also when its device is gone; None when nothing shows which device is one.

    `uplinks` are the devices beside it that packets can be sent by, the usual one first. `beside` are all devices by
    which a packet could leave that should go through the tunnel. `carries`: traffic is routed into the tunnel now.
    `declared`: only the configuration says that it is a tunnel. `misnamed`: the configuration names its uplink instead.
    """

    tunnel: str | None = None
    uplinks: tuple[Interface, ...] = ()
    beside: tuple[Interface, ...] = ()
    carries: bool = False
    declared: bool = False
    misnamed: bool = False


def claimed_by_program(name: str) -> bool:
    """Whether a user-space WireGuard has a control socket for this device."""
    return "/" not in name and any(Path(path.format(name)).exists() for path in _CONTROL_SOCKETS)


def roles(
    interfaces: tuple[Interface, ...],
    fib: Fib,
    *,
    configured: str | None = None,
    remembered: Remembered | None = None,
    claimed: Callable[[str], bool] = claimed_by_program,
    uid: int | None = None,
) -> Roles:
    """Decide. `configured` wins, unless it names the uplink of the tunnel; `uid` is the user whose packets count, by
    default this process's.

    Of the devices that take packets to the internet now, the tunnel is the remembered one; else one for whose outer
    packets rules or routes make an exception; else the remembered one stays the tunnel, so that its absence is noticed.
    """
    known = remembered or Remembered()
    sender = Sender(uid=os.geteuid() if uid is None else uid)
    finder = _RoleFinder(interfaces, fib, sender, claimed, known.uplinks)
    if configured is not None:
        above = finder.above(configured, known)
        if above is not None:
            return replace(finder.roles(above), misnamed=True)
        return replace(finder.roles(configured), declared=not finder.may_stay(configured))
    if known.tunnel in finder.carriers and finder.may_stay(known.tunnel):
        tunnel: str | None = known.tunnel
    else:
        found = (name for name in finder.candidates if name not in known.uplinks and finder.is_tunnel(name))
        tunnel = next(found, None) or (None if known.tunnel in finder.carriers else known.tunnel)
    return finder.roles(tunnel)


class _RoleFinder:
    """Devices, rules and tables at one moment. Devices are identified by name, which is unique at one moment."""

    def __init__(
        self,
        interfaces: tuple[Interface, ...],
        fib: Fib,
        sender: Sender,
        claimed: Callable[[str], bool],
        uplinks: frozenset[str],
    ) -> None:
        self._all, self._uplinks = interfaces, uplinks
        self._fib, self._sender, self._claimed = fib, sender, claimed
        self._named: Mapping[str, Interface] = {i.name: i for i in interfaces}
        self._by_index = {i.index: i for i in interfaces}
        share = {4: public_share(fib, 4, sender), 6: public_share(fib, 6, sender)}
        ranked = sorted(share[4] | share[6], key=lambda i: (-share[4].get(i, 0.0), -share[6].get(i, 0.0), i))
        # Names of the devices by which packets to the internet leave, the one with the largest share first.
        self.carriers = [self._by_index[i].name for i in ranked if i in self._by_index]
        # Those that take more than single networks: a tunnel to a private network is not a tunnel to the internet.
        self.candidates = [
            name for name in self.carriers
            if max(share[v].get(self._named[name].index, 0.0) for v in (4, 6)) >= _MIN_SHARE
        ]  # fmt: skip

    def may_stay(self, name: str | None) -> bool:
        """Whether the remembered or configured device can be the tunnel: neither is proof for an ordinary uplink."""
        found = self._named.get(name or "")
        return found is not None and (is_layer3_tunnel(found) or self.is_tunnel(found.name))

    def above(self, name: str, known: Remembered) -> str | None:
        """The tunnel that uses this device as its uplink, now or by memory; None if the device may be a tunnel itself.

        An owner who names the uplink means a tunnel on a router, or is mistaken. It is a mistake if a tunnel here takes
        the packets to the internet and its own packets leave by that device.
        """
        found = self._named.get(name)
        if found is None or self.may_stay(name):
            return None
        for other in self.candidates if name not in self.candidates else ():
            left = self._fib.without(self._named[other].index)
            takes_over = any(public_share(left, v, self._sender).get(found.index, 0.0) >= _MIN_SHARE for v in (4, 6))
            if self.is_tunnel(other) and (takes_over or self._carries_host_route_of(self._named[other], found)):
                return other
        return known.tunnel if name in known.uplinks and known.tunnel != name else None

    def is_tunnel(self, name: str) -> bool:
        """Whether there is evidence that the device is a tunnel: its program, or an exception for its outer packets."""
        found = self._named[name]
        if found.kind in _ENCRYPTING_KINDS or self._claimed(name):
            return True
        if found.kind == "ppp" or found.hardware == ARPHRD_PPP:
            return False
        may_be = found.kind in _TUNNEL_KINDS or (not found.kind and found.hardware == ARPHRD_NONE)
        return may_be and (self._a_host_is_excepted(found) or self._a_sender_is_excepted(found))

    def _a_host_is_excepted(self, tunnel: Interface) -> bool:
        """Whether a single host of the internet has a route by another device, as the VPN's server has."""
        found = self._fib.hosts_beside(tunnel.index)
        return any(self._leads_out(entry) and is_public(network.network_address) for network, entry in found)

    def _leads_out(self, entry: RouteEntry) -> bool:
        """By a router, or by a point-to-point link: a host on the local link is not on the internet."""
        lines = {i.index for i in self._all if i.flags & IFF_POINTOPOINT}
        return any(h.gateway is not None or h.interface in lines for h in entry.hops)

    def _a_sender_is_excepted(self, tunnel: Interface) -> bool:
        """Whether rules route packets with some mark, user or source port by another device."""
        return any(True for _ in self._routes_of_excepted_senders(tunnel))

    def _routes_of_excepted_senders(self, tunnel: Interface) -> Iterator[RouteEntry]:
        for rule in self._fib.rules:
            if not rule.names_sender():
                continue
            for other in (rule.sender(self._sender.uid), Sender()):
                for address in INTERNET:
                    if address.version != rule.version:
                        continue
                    ours, theirs = self._fib.lookup(address, self._sender), self._fib.lookup(address, other)
                    if ours is None or not ours.leads_by(tunnel.index) or theirs is None:
                        continue
                    if theirs.type == RTN_UNICAST and theirs.hops and not theirs.leads_by(tunnel.index):
                        yield theirs

    def roles(self, tunnel: str | None) -> Roles:
        """The uplinks beside `tunnel`: first those that would take over, then those with a route, then the rest."""
        device = self._named.get(tunnel or "")
        left = self._fib if device is None else self._fib.without(device.index)
        takes_over = [public_share(left, version, self._sender) for version in (4, 6)]
        ranks: list[tuple[int, float, int, Interface]] = []
        for found in self._all:
            if _cannot_leave(found) or found.name == tunnel:
                continue
            share = sum(shares.get(found.index, 0.0) for shares in takes_over)
            with_route = any(has_internet_route(found, self._fib, version) for version in (4, 6))
            rank = 0 if share >= _MIN_SHARE else 1 if share or with_route else 2
            # A second VPN's device that leads only to its own networks does not lead to the internet, and a standby
            # VPN is not an uplink.
            if not (self._is_standby_vpn(found, device) if rank == 0 else self._is_another_vpn(found, device)):
                ranks.append((rank, -share, found.index, found))
        beside = tuple(i for *_, i in sorted(ranks, key=lambda r: r[:3]))
        return Roles(
            tunnel=tunnel,
            uplinks=tuple(i for i in beside if _can_send(i)),
            beside=beside,
            carries=tunnel in self.carriers,
        )

    def _is_standby_vpn(self, found: Interface, tunnel: Interface | None) -> bool:
        """Whether a device that would take over certainly is a second VPN, and not the one that `tunnel` runs in."""
        if tunnel is None or not (found.kind in _ENCRYPTING_KINDS or self._claimed(found.name)):
            return False
        if found.name in self._uplinks or self._carries_host_route_of(tunnel, found):
            return False
        return not any(route.leads_by(found.index) for route in self._routes_of_excepted_senders(tunnel))

    def _is_another_vpn(self, found: Interface, tunnel: Interface | None) -> bool:
        """Whether a device that takes only a small part of the internet leads to the network of another VPN.

        TUN and TAP can be uplinks too; then they were one before, or the tunnel's own packets leave by them.
        """
        if found.kind in _ENCRYPTING_KINDS or self._claimed(found.name):
            return True
        if found.name in self._uplinks or (tunnel is not None and self._carries_host_route_of(tunnel, found)):
            return False
        return is_layer3_tunnel(found) or (found.kind == "tun" and self._has_its_own_networks_only(found))

    def _carries_host_route_of(self, tunnel: Interface, found: Interface) -> bool:
        excepted = self._fib.hosts_beside(tunnel.index)
        return any(entry.leads_by(found.index) and is_public(n.network_address) for n, entry in excepted)

    def _has_its_own_networks_only(self, found: Interface) -> bool:
        """Whether all its routes to public addresses were added with its own addresses, as in an overlay network."""
        public = [e for e in self._fib.entries if e.leads_by(found.index) and e.leads_to_internet()]
        return bool(public) and all(e.by_kernel for e in public)


def has_internet_route(interface: Interface, fib: Fib, version: int) -> bool:
    """Whether a socket bound to this device has a route to the internet: by a router, or a point-to-point link to one.

    Without one the kernel treats every address as on-link, and nobody answers its ARP or NDP requests.
    """
    by_router = (version, interface.index, True) in fib.internet_routes
    return by_router or (
        bool(interface.flags & IFF_POINTOPOINT) and (version, interface.index, False) in fib.internet_routes
    )


def is_layer3_tunnel(found: Interface) -> bool:
    """A device for packets, not frames: WireGuard, TUN and the like; not PPP or TAP."""
    if found.kind == "ppp" or found.hardware == ARPHRD_PPP:
        return False
    return found.kind in _ENCRYPTING_KINDS or (
        found.kind in _TUNNEL_KINDS and bool(found.flags & IFF_POINTOPOINT or found.hardware == ARPHRD_NONE)
    )


def _cannot_leave(found: Interface) -> bool:
    """Loopback, kinds without an uplink, and ports of a bridge or bond: packets of this host leave by the bridge."""
    return bool(found.flags & IFF_LOOPBACK) or found.master is not None or found.kind in _LOCAL_KINDS


def _can_send(found: Interface) -> bool:
    return bool(found.flags & IFF_UP) and any(not a.is_link_local for a in found.addresses)
