"""The network devices here at one moment, the role of each, and which kind of way a packet would take."""

import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from vpn_sentinel.agent.net.endpoints import PROTOCOLS
from vpn_sentinel.agent.net.facts import FactStore, Recollection
from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.kernel import Kernel
from vpn_sentinel.agent.net.link import IFF_LOOPBACK, IFF_LOWER_UP, IFF_POINTOPOINT, IFF_UP, Interface, forwards
from vpn_sentinel.agent.net.local import natted
from vpn_sentinel.agent.net.roles import INTERNET, Remembered, Roles, has_way, roles
from vpn_sentinel.agent.net.routes import RTN_LOCAL
from vpn_sentinel.agent.net.routing_rules import Sender
from vpn_sentinel.domain.observation import Escape, Link, Path
from vpn_sentinel.domain.policy import IPAddress, IPNetwork

__all__ = ["INTERNET", "FactStore", "Paths", "Survey", "Surveyor", "is_up", "recalled", "survey"]
_TUNNEL, _UPLINKS, _USER, _WORD = "tunnel_device", "uplinks", "tunnel_user", "tunnel_named"  # facts of a memory
log = logging.getLogger(__name__)
_USERS: Final = 8  # users of rules that are tried
_MAX_INTERFACES: Final = 256  # interfaces named in one observation: what the wire takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """The host's interfaces at one moment. `tunnel` is the tunnel's name, also when the interface is gone.

    `interfaces` is None when the kernel could not be asked. `uplinks` are the ways out beside the tunnel that packets
    can be sent by, the usual one first; `beside` are all devices by which packets could leave beside it: see
    `net.roles`. `carries` says whether the tunnel carries anything, `declared` that only the owner calls it one,
    `misnamed` is the way out beneath the tunnel that the owner names in its place.
    `user` is whom the tunnel is for, when it is for one alone. `natted` are devices whose public IPv4 addresses are not
    the internet's: see `net.local`.
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
        """The usual way out beside the tunnel."""
        return self.uplinks[0] if self.uplinks else None

    def link(self) -> Link | None:
        """The tunnel's interface as an observation tells it, None when none is known."""
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
        """The tunnel's interface, None when it is not there."""
        return next((i for i in self.interfaces or () if i.name == self.tunnel), None)

    def names(self) -> tuple[str, ...] | None:
        """All interfaces besides `lo`, None when nobody looked."""
        if self.interfaces is None:
            return None
        return tuple(i.name for i in self.interfaces if not i.flags & IFF_LOOPBACK)[:_MAX_INTERFACES]

    def uplink_names(self) -> tuple[str, ...] | None:
        """The ways out beside the tunnel by name, None when nobody looked."""
        return None if self.interfaces is None else tuple(i.name for i in self.uplinks)[:_MAX_INTERFACES]

    def owns(self, address: IPAddress) -> bool:
        """Whether an interface still has this address; True when nobody can tell."""
        return self.interfaces is None or any(address in i.addresses for i in self.interfaces)


def is_up(interface: Interface) -> bool:
    """Switched on, and its other end (the process behind a tun device) is there."""
    return bool(interface.flags & IFF_UP) and bool(interface.flags & IFF_LOWER_UP)


def recalled(memory: FactStore) -> Remembered:
    """What a memory holds of the roles that devices had."""
    uplinks = (memory.fact(_UPLINKS) or "").split(",")
    return Remembered(tunnel=memory.fact(_TUNNEL), uplinks=frozenset(name for name in uplinks if name))


class Surveyor:
    """Looks at the interfaces again and again. Roles are decided anew when devices, rules or routes changed."""

    def __init__(
        self,
        kernel: Kernel | None,
        *,
        configured: str | None = None,
        memory: FactStore | None = None,
        only: Collection[int] = (),
    ) -> None:
        """`memory` keeps what was seen of the tunnel across restarts; without one it lasts as long as this object.

        `only` are the users whom the tunnel is for, by the owner's word.
        """
        self._kernel, self._configured = kernel, configured
        self._only = min(only, default=None)
        self._memory = memory if memory is not None else Recollection()
        self._decided: tuple[object, tuple[Roles, int | None]] | None = None
        self._outside: dict[str, frozenset[IPNetwork]] = {}
        self._over: str | None = None  # the tunnel that was said to be meant, where its uplink is named

    def look(self) -> Survey:
        """Raises nothing: a kernel that cannot be asked makes a survey that knows nothing."""
        if self._kernel is None:
            return Survey(tunnel=self._configured, user=self._only)
        known = recalled(self._memory)
        try:
            interfaces, fib = self._kernel.interfaces(), self._kernel.fib()
        except OSError:
            return Survey(tunnel=self._configured or known.tunnel, user=self._only)
        if self._configured is not None and self._memory.fact(_WORD) != self._configured:
            # A new word of the owner's: what was the tunnel before it does not speak against it.
            self._memory.keep(_WORD, self._configured)
            known = replace(known, tunnel=None)
        found, user = self._roles(interfaces, fib, known)
        if found.tunnel is not None:
            self._memory.keep(_TUNNEL, found.tunnel)
        if found.misnamed and found.tunnel != self._over:
            self._over = found.tunnel
            log.warning(
                "VPN_SENTINEL_TUNNEL_INTERFACE names the way out beneath a tunnel, and that tunnel is watched: name "
                "it, or unset this",
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

    def came_out(self, outside: Mapping[str, frozenset[IPNetwork]]) -> bool:
        """Take in where packets by the devices of these names come out; whether it says anything new."""
        news = {name: found for name, found in outside.items() if found != self._outside.get(name)}
        self._outside |= news
        return bool(news)

    def learn(self, tunnel: str, beside: Iterable[str]) -> bool:
        """Take in what somebody else remembers, where nothing is remembered here; whether it was taken."""
        if self._memory.fact(_TUNNEL) is not None:
            return False
        self._memory.keep(_TUNNEL, tunnel)
        self._memory.keep(_UPLINKS, ",".join(beside))
        return True

    def look_anew(self) -> Survey:
        """The same with routes and rules read in this moment, for a caller who cannot wait for the kernel's news."""
        if self._kernel is not None:
            self._kernel.changed()
        return self.look()

    def _roles(self, interfaces: tuple[Interface, ...], fib: Fib, known: Remembered) -> tuple[Roles, int | None]:
        """What was read of routes is the same object while nothing changed."""
        now = (fib, interfaces, known)
        if self._decided is None or self._decided[0] != now:
            self._decided = now, self._decide(interfaces, fib, known)
        return self._decided[1]

    def _decide(self, interfaces: tuple[Interface, ...], fib: Fib, known: Remembered) -> tuple[Roles, int | None]:
        """The roles, and the user whom the tunnel is for when nobody else's packets go through it.

        Where everybody's went through it before, a rule for one user that is left of it makes no tunnel of that user's.
        """
        found = roles(interfaces, fib, configured=self._configured, remembered=known, uid=self._only)
        if self._only is not None:
            return found, self._only
        remembered = self._memory.fact(_USER)
        if not remembered and self._memory.fact(_UPLINKS):
            return found, None
        devices = {i.name: i.index for i in interfaces}
        mine = _families(fib, os.geteuid(), devices.get(found.tunnel or ""))
        for uid in sorted({rule.uids[0] for rule in fib.rules if rule.uids is not None and not rule.invert})[:_USERS]:
            its = roles(interfaces, fib, configured=self._configured, remembered=known, uid=uid)
            if its.carries and _families(fib, uid, devices.get(its.tunnel or "")) > mine:
                return its, uid
        if remembered and not mine:
            uid = int(remembered)
            return roles(interfaces, fib, configured=self._configured, remembered=known, uid=uid), uid
        return found, None


def _families(fib: Fib, uid: int, device: int | None) -> set[int]:
    """The IP versions of which a user's packets to the internet go through a device."""
    if device is None:
        return set()
    ways = [(a.version, fib.lookup(a, Sender(uid=uid))) for a in INTERNET]
    return {version for version, entry in ways if entry is not None and entry.leads_by(device)}


def survey(kernel: Kernel | None, *, configured: str | None = None, remembered: Remembered | None = None) -> Survey:
    """One look, with what is `remembered`."""
    memory = Recollection()
    if remembered is not None:
        memory.keep(_UPLINKS, ",".join(remembered.uplinks))
        if remembered.tunnel is not None:
            memory.keep(_TUNNEL, remembered.tunnel)
    return Surveyor(kernel, configured=configured, memory=memory).look()


@dataclass(frozen=True, slots=True)
class Paths:
    """Tells by which kind of interface the kernel would send a packet."""

    kernel: Kernel | None
    survey: Survey

    def of(
        self,
        destination: IPAddress,
        port: int = 53,
        protocol: int = 17,
        source: tuple[IPAddress, int] | None = None,
    ) -> Path:
        """`source` is the address and port of a connected socket: balanced routes go by both ends."""
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
        """The same with how each is routed now, which need not be how it went."""
        return tuple(
            replace(e, path=self.of(e.destination, e.destination_port or 0, PROTOCOLS.get(e.protocol, 0)))
            for e in escapes
        )

    def by(self, device: Interface) -> Path:
        """Which kind of way a device of this survey is."""
        if device.flags & IFF_LOOPBACK:
            return Path.LOCAL
        if device.name == self.survey.tunnel:
            return Path.TUNNEL
        # A device of another VPN that leads to that one's own network only is neither this tunnel nor a way home.
        return Path.OUTSIDE if device in self.survey.beside else Path.UNKNOWN

    def takes_through(self, neighbor: IPAddress) -> bool:
        """Whether this host is the router of a container or machine here, and passes what that one sends on into the
        tunnel. A device that leads to the internet itself is an uplink, and none of those.
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
        if has_way(found, fib, neighbor.version):
            return False
        to = next(a for a in INTERNET if a.version == neighbor.version)
        entry = fib.lookup(to, Sender(source=neighbor, incoming=found.name))
        return entry is not None and entry.leads_by(tunnel.index)

    def leads_there(self, uplink: Interface, destination: IPAddress) -> bool:
        """Whether a socket bound to `uplink` has a route to `destination`; True when nobody can tell.

        Where none is, the kernel takes the address for a neighbour's, and nobody answers for it.
        """
        if self.kernel is None:
            return True
        try:
            route = self.kernel.route(destination, via=uplink.index)
        except OSError:
            return True
        return route is not None and (route.gateway or bool(uplink.flags & IFF_POINTOPOINT))

    def is_balanced(self, destination: IPAddress) -> bool:
        """Whether the route there leads by several devices, from which the kernel chooses for each socket."""
        entry = self.survey.fib.lookup(destination, Sender(uid=self.survey.user)) if self.survey.fib else None
        return entry is not None and len({hop.interface for hop in entry.hops}) > 1

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
        return route is not None and route.prefix == destination.max_prefixlen and route.type != RTN_LOCAL
