"""The agent's requests to the kernel by routing netlink: devices, rules, routes, and the route of a packet.

A netlink socket always shows the namespace it was opened in; sysfs shows the namespace it was mounted in, which may be
another one in a container.
"""

import contextlib
import errno
import socket
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Final, Protocol

from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.link import Interface
from vpn_sentinel.agent.net.netlink import (
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    NLMSG_ERROR,
    NetlinkMessage,
    error_number,
    messages,
)
from vpn_sentinel.agent.net.routes import RTN_UNICAST, Hop, RouteEntry
from vpn_sentinel.agent.net.rtnetlink import (
    RTM_GETADDR,
    RTM_GETLINK,
    RTM_GETNEXTHOP,
    RTM_GETROUTE,
    RTM_GETRULE,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWNEXTHOP,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    Route,
    dump_request,
    parse_address,
    parse_entry,
    parse_group,
    parse_link,
    parse_network,
    parse_next_hops,
    parse_route,
    parse_rule,
    route_request,
)
from vpn_sentinel.domain.policy import IPAddress, IPNetwork
from vpn_sentinel.runtime.clock import Clock, SystemClock

# Routes and rules are cached for this multiple of the time that reading took, at most so many seconds.
_FIB_CACHE_MULTIPLE, _FIB_CACHE_MAX_S = 500, 60.0
_DUMP_TRIES: Final = 3
_NO_ROUTE: Final = frozenset(
    {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.ENODEV, errno.ESRCH}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRoute:
    """An entry of a routing table: packets to `network` leave by `interface`, to a router if `gateway`."""

    network: IPNetwork
    interface: int
    gateway: bool


class Kernel(Protocol):
    """The agent's requests to the kernel. Each may raise OSError where netlink is not available."""

    def interfaces(self) -> tuple[Interface, ...]: ...

    def route(
        self,
        destination: IPAddress,
        *,
        port: int = 0,
        protocol: int = 17,
        via: int | None = None,
        match: bool = False,
        source: tuple[IPAddress, int] | None = None,
    ) -> Route | None: ...

    def fib(self) -> Fib: ...

    def changed(self) -> None:
        """Something may have changed: the next `fib` reads routes and rules again."""
        ...


def device_routes(entry: RouteEntry, by: Collection[int]) -> Iterator[DeviceRoute]:
    """One for each device of `by` that a route leads to; none for a default route."""
    if entry.type == RTN_UNICAST and entry.prefix:
        for hop in entry.hops:
            if hop.interface in by:
                yield DeviceRoute(network=entry.network, interface=hop.interface, gateway=hop.gateway is not None)


def _opened() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    sock.settimeout(1.0)
    return sock


class Netlink:
    """A `Kernel` over one netlink socket. Answers come within microseconds, so calls block."""

    def __init__(self, clock: Clock | None = None) -> None:
        """Raises OSError where the sandbox has no netlink."""
        self._clock = clock or SystemClock()
        self._sock = _opened()
        self._sequence = 0
        self._fib: Fib | None = None  # while it is up to date
        self._last_fib: Fib | None = None  # as it was read last
        self._fib_until = 0.0
        self._device_routes: tuple[Fib, frozenset[int], tuple[DeviceRoute, ...]] | None = None
        self._parsed: dict[bytes, RouteEntry | None] = {}  # routes of the last dump, by message body
        self._hops: dict[int, tuple[Hop, ...]] = {}

    def close(self) -> None:
        self._sock.close()

    def _send(self, request: bytes) -> None:
        try:
            self._sock.send(request)
        except OSError:
            self._renew()
            raise

    def _receive(self) -> bytes:
        try:
            return self._sock.recv(65536)
        except OSError:
            self._renew()
            raise

    def _renew(self) -> None:
        """This request failed; a new socket keeps the next one from failing too."""
        with contextlib.suppress(OSError):  # tried again at the next failure
            fresh = _opened()
            self._sock.close()
            self._sock = fresh

    def interfaces(self) -> tuple[Interface, ...]:
        links = [link for m in self._dump(RTM_GETLINK) if m.type == RTM_NEWLINK and (link := parse_link(m.body))]
        addresses: dict[int, list[IPAddress]] = {}
        networks: dict[int, list[IPNetwork]] = {}
        for message in self._dump(RTM_GETADDR):
            if message.type == RTM_NEWADDR and (parsed := parse_address(message.body)):
                addresses.setdefault(parsed[0], []).append(parsed[1])
            if message.type == RTM_NEWADDR and (network := parse_network(message.body)):
                networks.setdefault(network[0], []).append(network[1])
        return tuple(
            replace(link, addresses=tuple(addresses.get(link.index, ())), networks=tuple(networks.get(link.index, ())))
            for link in links
        )

    def route(
        self,
        destination: IPAddress,
        *,
        port: int = 0,
        protocol: int = 17,
        via: int | None = None,
        match: bool = False,
        source: tuple[IPAddress, int] | None = None,
    ) -> Route | None:
        """The route of a packet of the user that sockets are made for (`net.as_user`).

        None without a route, or when a route prohibits it.
        """
        self._sequence += 1
        request = route_request(
            destination,
            self._sequence,
            port=port,
            protocol=protocol,
            via=via,
            match=match,
            source=source,
            uid=AS_USER.uid,
        )
        self._send(request)
        while True:
            for message in messages(self._receive()):
                if message.sequence != self._sequence:
                    continue
                if message.type == NLMSG_ERROR:
                    code = error_number(message.body)
                    if code in _NO_ROUTE:
                        return None
                    raise OSError(code, "netlink refuses to look a route up")
                return parse_route(message.body)

    def fib(self) -> Fib:
        """All routing rules and tables of both IP versions; the same object while they are the same.

        Read again after `changed`, and when the cache is old compared to the time that reading took: full tables take a
        while.
        """
        now = self._clock.boottime()
        if self._fib is None or now >= self._fib_until:
            self._fib = self._read_fib()
            if self._last_fib is not None and self._last_fib.is_like(self._fib):
                self._fib = self._last_fib  # so that results cached with it stay valid
            self._last_fib = self._fib
            self._fib_until = now + min((self._clock.boottime() - now) * _FIB_CACHE_MULTIPLE, _FIB_CACHE_MAX_S)
        return self._fib

    def changed(self) -> None:
        """Routes or rules may have changed: the next `fib` reads them again."""
        self._fib = None

    def _read_fib(self) -> Fib:
        rules = (parse_rule(m.body) for m in self._dump(RTM_GETRULE) if m.type == RTM_NEWRULE)
        hops = self._next_hops()
        entries = self._routes(hops)
        known = tuple(r for r in rules if r)
        links = self._dump(RTM_GETLINK) if any(r.suppress_group is not None for r in known) else ()
        groups = dict(g for m in links if m.type == RTM_NEWLINK and (g := parse_group(m.body)))
        return Fib(known, entries, groups)

    def _routes(self, hops: dict[int, tuple[Hop, ...]]) -> tuple[RouteEntry, ...]:
        """Most of a full table is unchanged: a message with the same bytes as in the last dump is not parsed again."""
        before = self._parsed if hops == self._hops else {}
        found: dict[bytes, RouteEntry | None] = {}
        for message in self._dump(RTM_GETROUTE):
            if message.type == RTM_NEWROUTE:
                body = message.body
                found[body] = before[body] if body in before else parse_entry(body, hops)
        self._parsed, self._hops = found, hops
        return tuple(e for e in found.values() if e)

    def _next_hops(self) -> dict[int, tuple[Hop, ...]]:
        try:
            return parse_next_hops(m.body for m in self._dump(RTM_GETNEXTHOP) if m.type == RTM_NEWNEXTHOP)
        except OSError as e:
            if e.errno != errno.EOPNOTSUPP:
                raise
            return {}  # a kernel older than 5.3 has none

    def device_routes(self, by: Collection[int]) -> tuple[DeviceRoute, ...]:
        """Entries of all tables by these devices, except default routes; the same object while tables are unchanged."""
        fib, devices = self.fib(), frozenset(by)
        if self._device_routes is None or self._device_routes[0] is not fib or self._device_routes[1] != devices:
            self._device_routes = fib, devices, tuple(r for e in fib.entries for r in device_routes(e, devices))
        return self._device_routes[2]

    def _dump(self, message_type: int) -> list[NetlinkMessage]:
        for _ in range(_DUMP_TRIES):
            self._sequence += 1
            self._send(dump_request(message_type, self._sequence))
            found, interrupted, done = [], False, False
            while not done:
                for message in messages(self._receive()):
                    if message.sequence != self._sequence:
                        continue
                    interrupted = interrupted or bool(message.flags & NLM_F_DUMP_INTR)
                    if message.type == NLMSG_ERROR:
                        raise OSError(error_number(message.body), "netlink refuses a dump")
                    if message.type == NLMSG_DONE:
                        done = True
                    else:
                        found.append(message)
            if not interrupted:
                break
        return found
