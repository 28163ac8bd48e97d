"""The network devices of this host at one moment, the role of each, and which path a packet would take."""

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from vpn_sentinel.agent.net.endpoints import PROTOCOLS
from vpn_sentinel.agent.net.facts import FactStore, InMemoryFacts
from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.kernel import Kernel
from vpn_sentinel.agent.net.link import IFF_LOOPBACK, IFF_LOWER_UP, IFF_POINTOPOINT, IFF_UP, Interface, forwards
from vpn_sentinel.agent.net.local import natted
from vpn_sentinel.agent.net.roles import INTERNET, Remembered, Roles, has_internet_route, roles
from vpn_sentinel.agent.net.routes import RTN_LOCAL
from vpn_sentinel.agent.net.routing_rules import Sender
from vpn_sentinel.domain.observation import Escape, Link, Path
from vpn_sentinel.domain.policy import IPAddress, IPNetwork

__all__ = ["INTERNET", "FactStore", "Paths", "Survey", "Surveyor", "is_up", "recalled", "survey"]
# Names of facts in a `FactStore`.
_TUNNEL, _UPLINKS, _USER, _CONFIGURED = "tunnel_device", "uplinks", "tunnel_user", "tunnel_named"
log = logging.getLogger(__name__)
_MAX_USERS_TRIED: Final = 8  # of those that routing rules name
_MAX_INTERFACES: Final = 256  # interfaces named in one observation: the limit of the wire format


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The host's interfaces at one moment. `tunnel` is the tunnel's name, also when the interface is gone.

    `interfaces` is None when netlink did not answer. `uplinks` are the interfaces beside the tunnel that packets can be
    sent by, the usual one first; `beside` are all devices by which packets could leave beside it: see `net.roles`.
    `carries`: traffic is routed into the tunnel now. `declared`: only the configuration says that it is a tunnel.
    `misnamed` is the uplink that the configuration names where the tunnel is meant.
    `user` is the user whom the tunnel is for, None for everybody. `natted` are devices behind NAT whose public IPv4
    addresses are not theirs on the internet: see `net.local`.
    """

    interfaces: tuple[Interface, ...] | None = None
    tunnel: str | None = None
    uplinks: tuple[Interface, ...] = ()
    beside: tuple[Interface, ...] = ()
    carries: bool = False
    declared: bool = False
    misnamed: str | None = None
    fib: Fib | None = None
    user: int | None = None
    natted: frozenset[str] = frozenset()

    @property
    def physical(self) -> Interface | None:
        """The usual uplink beside the tunnel."""
        return self.uplinks[0] if self.uplinks else None

    def link(self) -> Link | None:
        """The tunnel's interface for an observation, None when no tunnel is known."""
        if self.tunnel is None or self.interfaces is None:
            return None
        found = self.device()
        if found is None:
            return Link(name=self.tunnel, present=False, up=False)
        return Link(
            name=found.name,
            present=True,
            up=is_up(found),
            rx_bytes=found.rx_bytes,
            tx_bytes=found.tx_bytes,
            declared=self.declared,
        )

    def device(self) -> Interface | None:
        """The tunnel's interface, None when it does not exist."""
        return next((i for i in self.interfaces or () if i.name == self.tunnel), None)

    def names(self) -> tuple[str, ...] | None:
        """All interfaces except `lo`, None when unknown."""
        if self.interfaces is None:
            return None
        return tuple(i.name for i in self.interfaces if not i.flags & IFF_LOOPBACK)[:_MAX_INTERFACES]

    def uplink_names(self) -> tuple[str, ...] | None:
        """The names of the uplinks beside the tunnel, None when unknown."""
        return None if self.interfaces is None else tuple(i.name for i in self.uplinks)[:_MAX_INTERFACES]

    def owns(self, address: IPAddress) -> bool:
        """Whether an interface still has this address; True when unknown."""
        return self.interfaces is None or any(address in i.addresses for i in self.interfaces)


def is_up(interface: Interface) -> bool:
    """Administratively up, and with a carrier (for a tun device: its process)."""
    return bool(interface.flags & IFF_UP) and bool(interface.flags & IFF_LOWER_UP)


def recalled(memory: FactStore) -> Remembered:
    """The roles that devices had, as stored in `memory`."""
    uplinks = (memory.fact(_UPLINKS) or "").split(",")
    return Remembered(tunnel=memory.fact(_TUNNEL), uplinks=frozenset(name for name in uplinks if name))


class Surveyor:
    """Reads the interfaces for each round. Roles are decided again when devices, rules or routes have changed."""

    def __init__(
        self,
        kernel: Kernel | None,
        *,
        configured: str | None = None,
        memory: FactStore | None = None,
        only: Collection[int] = (),
    ) -> None:
        """`memory` stores what was seen of the tunnel across restarts; without one it lasts as long as this object.

        `only` are the users whom the tunnel is for, by configuration.
        """
        self._kernel, self._configured = kernel, configured
        self._only = min(only, default=None)
        self._memory = memory if memory is not None else InMemoryFacts()
        self._decided: tuple[object, tuple[Roles, int | None]] | None = None
        self._outside: dict[str, frozenset[IPNetwork]] = {}
        self._logged_misnamed: str | None = None  # the tunnel for which the wrong name was logged

    def look(self) -> Survey:
        """Never raises: without netlink the survey has no interfaces."""
        if self._kernel is None:
            return Survey(tunnel=self._configured, user=self._only)
        known = recalled(self._memory)
        try:
            interfaces, fib = self._kernel.interfaces(), self._kernel.fib()
        except OSError:
            return Survey(tunnel=self._configured or known.tunnel, user=self._only)
        if self._configured is not None and self._memory.fact(_CONFIGURED) != self._configured:
            # The setting is new: what was the tunnel before does not count against it.
            self._memory.keep(_CONFIGURED, self._configured)
            known = replace(known, tunnel=None)
        found, user = self._roles(interfaces, fib, known)
        if found.tunnel is not None:
            self._memory.keep(_TUNNEL, found.tunnel)
        if found.misnamed and found.tunnel != self._logged_misnamed:
            self._logged_misnamed = found.tunnel
            log.warning(
                "VPN_SENTINEL_TUNNEL_INTERFACE names the uplink of a tunnel, and that tunnel is watched: name it, or "
                "unset this",
                extra={"named": self._configured, "tunnel": found.tunnel},
            )
        if found.carries:
            self._memory.keep(_USER, "" if user is None else str(user))
            self._memory.keep(_UPLINKS, ",".join(i.name for i in found.uplinks))
        return Survey(
            interfaces=interfaces,
            tunnel=found.tunnel,
            uplinks=found.uplinks,
            beside=found.beside,
            carries=found.carries,
            declared=found.declared,
            misnamed=self._configured if found.misnamed else None,
            fib=fib,
            user=user,
            natted=natted(found.beside, self._outside),
        )

    def learn_exits(self, outside: Mapping[str, frozenset[IPNetwork]]) -> bool:
        """Note at which addresses packets by each device come out; returns whether that is new."""
        changed = {name: found for name, found in outside.items() if found != self._outside.get(name)}
        self._outside |= changed
        return bool(changed)

    def learn(self, tunnel: str, beside: Iterable[str]) -> bool:
        """Take over what the server remembers if nothing is stored here; returns whether it was taken over."""
        if self._memory.fact(_TUNNEL) is not None:
            return False
        self._memory.keep(_TUNNEL, tunnel)
        self._memory.keep(_UPLINKS, ",".join(beside))
        return True

    def look_anew(self) -> Survey:
        """As `look`, with routes and rules read now, for a caller that cannot wait for the kernel's notification."""
        if self._kernel is not None:
            self._kernel.changed()
        return self.look()

    def _roles(self, interfaces: tuple[Interface, ...], fib: Fib, known: Remembered) -> tuple[Roles, int | None]:
        """Cached: `fib` is the same object while no route or rule changed."""
        now = (fib, interfaces, known)
        if self._decided is None or self._decided[0] != now:
            self._decided = now, self._decide(interfaces, fib, known)
        return self._decided[1]

    def _decide(self, interfaces: tuple[Interface, ...], fib: Fib, known: Remembered) -> tuple[Roles, int | None]:
        """The roles, and the user whom the tunnel is for when no other user's packets go through it.

        Where everybody's packets went through it before, a remaining rule for one user does not make it that user's.
        """
        found = roles(interfaces, fib, configured=self._configured, remembered=known, uid=self._only)
        if self._only is not None:
            return found, self._only
        remembered = self._memory.fact(_USER)
        if not remembered and self._memory.fact(_UPLINKS):
            return found, None
        devices = {i.name: i.index for i in interfaces}
        mine = _families(fib, os.geteuid(), devices.get(found.tunnel or ""))
        for uid in sorted({rule.uids[0] for rule in fib.rules if rule.uids is not None and not rule.invert})[
            :_MAX_USERS_TRIED
        ]:
            theirs = roles(interfaces, fib, configured=self._configured, remembered=known, uid=uid)
            if theirs.carries and _families(fib, uid, devices.get(theirs.tunnel or "")) > mine:
                return theirs, uid
        if remembered and not mine:
            uid = int(remembered)
            return roles(interfaces, fib, configured=self._configured, remembered=known, uid=uid), uid
        return found, None


def _families(fib: Fib, uid: int, device: int | None) -> set[int]:
    """The IP versions of which a user's packets to the internet go through a device."""
    if device is None:
        return set()
    routes = [(a.version, fib.lookup(a, Sender(uid=uid))) for a in INTERNET]
    return {version for version, entry in routes if entry is not None and entry.leads_by(device)}


def survey(kernel: Kernel | None, *, configured: str | None = None, remembered: Remembered | None = None) -> Survey:
    """One survey, with the roles that are `remembered`."""
    memory = InMemoryFacts()
    if remembered is not None:
        memory.keep(_UPLINKS, ",".join(remembered.uplinks))
        if remembered.tunnel is not None:
            memory.keep(_TUNNEL, remembered.tunnel)
    return Surveyor(kernel, configured=configured, memory=memory).look()


@dataclass(frozen=True, slots=True)
class Paths:
    """By which kind of interface the kernel would send a packet."""

    kernel: Kernel | None
    survey: Survey

    def of(
        self,
        destination: IPAddress,
        port: int = 53,
        protocol: int = 17,
        source: tuple[IPAddress, int] | None = None,
    ) -> Path:
        """`source` is the address and port of a connected socket: multipath routes hash both ends."""
        if self.kernel is None or self.survey.interfaces is None:
            return Path.UNKNOWN
        try:
            route = self.kernel.route(destination, port=port, protocol=protocol, source=source)
        except OSError:
            return Path.UNKNOWN
        if route is None:
            return Path.UNKNOWN
        if route.type == RTN_LOCAL:
            return Path.LOCAL
        found = next((i for i in self.survey.interfaces if i.index == route.interface), None)
        return Path.UNKNOWN if found is None else self.by(found)

    def known_of(self, escapes: Iterable[Escape]) -> tuple[Escape, ...]:
        """The same with the path that each has by the routes now, which may differ from when it was sent."""
        return tuple(
            replace(e, path=self.of(e.destination, e.destination_port or 0, PROTOCOLS.get(e.protocol, 0)))
            for e in escapes
        )

    def by(self, device: Interface) -> Path:
        """Which kind of path a device of this survey is."""
        if device.flags & IFF_LOOPBACK:
            return Path.LOCAL
        if device.name == self.survey.tunnel:
            return Path.TUNNEL
        # A device of another VPN that leads only to that VPN's own network is neither this tunnel nor an uplink.
        return Path.OUTSIDE if device in self.survey.beside else Path.UNKNOWN

    def forwards_into_tunnel(self, neighbor: IPAddress) -> bool:
        """Whether this host is the router of `neighbor` (a container, say), and forwards its packets into the tunnel.

        A device that leads to the internet itself is an uplink, and has no such neighbours.
        """
        if self.kernel is None or self.survey.fib is None:
            return False
        try:
            route = self.kernel.route(neighbor)
        except OSError:
            return False
        found = next((i for i in self.survey.interfaces or () if route and i.index == route.interface), None)
        tunnel, fib = self.survey.device(), self.survey.fib
        if found is None or tunnel is None or not forwards(found, neighbor.version):
            return False
        if has_internet_route(found, fib, neighbor.version):
            return False
        to = next(a for a in INTERNET if a.version == neighbor.version)
        entry = fib.lookup(to, Sender(source=neighbor, incoming=found.name))
        return entry is not None and entry.leads_by(tunnel.index)

    def can_route(self, uplink: Interface, destination: IPAddress) -> bool:
        """Whether a socket bound to `uplink` has a route to `destination`; True when unknown.

        Without one, the kernel treats the address as on-link, and nobody answers its ARP or NDP requests.
        """
        if self.kernel is None:
            return True
        try:
            route = self.kernel.route(destination, via=uplink.index)
        except OSError:
            return True
        return route is not None and (route.gateway or bool(uplink.flags & IFF_POINTOPOINT))

    def is_balanced(self, destination: IPAddress) -> bool:
        """Whether the route there leads by several devices, from which the kernel chooses per socket."""
        entry = self.survey.fib.lookup(destination, Sender(uid=self.survey.user)) if self.survey.fib else None
        return entry is not None and len({hop.interface for hop in entry.hops}) > 1

    def has_host_route(self, destination: IPAddress, port: int) -> bool:
        """Whether a host route leads there beside the tunnel: OpenVPN makes one for its server's own address.

        Traffic to such an address is meant to leave outside, so it proves no leak.
        """
        if self.kernel is None:
            return False
        try:
            route = self.kernel.route(destination, port=port, match=True)
        except OSError:
            return False
        return route is not None and route.prefix == destination.max_prefixlen and route.type != RTN_LOCAL
