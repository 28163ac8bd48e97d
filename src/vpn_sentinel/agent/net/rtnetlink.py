"""Routing netlink (rtnetlink(7)): packing requests, parsing answers, and one small client.

Only what the agent asks: links, addresses and "by which interface would you send this?". A netlink socket always speaks
of the namespace it was opened in; sysfs shows the namespace it was mounted in, which in a container may be another.
Numbers are those of linux/rtnetlink.h and linux/if_link.h; all fields are in host byte order.
"""

import contextlib
import errno
import socket
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Final, NamedTuple, Protocol

from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.agent.net.attributes import attribute, attributes, error_number
from vpn_sentinel.agent.net.fib import Fib, Hop, RouteEntry, parse_entry, parse_next_hops, parse_rule
from vpn_sentinel.agent.net.link import Interface
from vpn_sentinel.domain.policy import IPAddress, IPNetwork
from vpn_sentinel.runtime.clock import Clock, SystemClock

NEWLINK, DELLINK, GETLINK = 16, 17, 18
NEWADDR, DELADDR, GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26
NEWRULE, DELRULE, GETRULE = 32, 33, 34
NEWNEXTHOP, DELNEXTHOP, GETNEXTHOP = 104, 105, 106
UNICAST, LOCAL = 1, 2  # rtm_type

_HEADER: Final = struct.Struct("=IHHII")
_LINK: Final = struct.Struct("=BxHiII")
_ADDR: Final = struct.Struct("=BBBBi")
_ROUTE: Final = struct.Struct("=8BI")
_NHMSG_SIZE: Final = 8
_U32: Final = struct.Struct("=I")
_ERROR, _DONE = 2, 3
_REQUEST, _DUMP, _DUMP_INTERRUPTED = 0x1, 0x300, 0x10
_FIB_MATCH = 0x2000
_RTA_UID = 25
# What was read of routes and rules is used for so many times as long as reading took, and never longer than seconds.
_FIB_REST, _FIB_OLDEST = 500, 60.0
_NO_ROUTE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.ENODEV, errno.ESRCH})


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """An entry of a routing table: packets to `network` leave by `interface`, by a router when `gateway`."""

    network: IPNetwork
    interface: int
    gateway: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The kernel's answer for one destination. `prefix` is the length of the route that matched, if that was asked."""

    interface: int | None
    kind: int = UNICAST
    gateway: bool = False
    source: IPAddress | None = None
    prefix: int | None = None
    next_hop: IPAddress | None = None


class Message(NamedTuple):
    kind: int
    flags: int
    sequence: int
    body: bytes


class Kernel(Protocol):
    """What the agent asks of the kernel. Each may raise OSError where netlink is not to be had."""

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
        """Something may have changed: the next look at routes and rules is a fresh one."""
        ...


def messages(data: bytes) -> Iterator[Message]:
    """Split one datagram from the kernel. What is cut off at the end is left out."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, sequence, _pid = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size or offset + length > len(data):
            return
        yield Message(kind, flags, sequence, data[offset + _HEADER.size : offset + length])
        offset += (length + 3) & ~3


def parse_link(body: bytes) -> Interface | None:
    """An interface out of RTM_NEWLINK or RTM_DELLINK, without addresses; None when it is too short to be one."""
    if len(body) < _LINK.size:
        return None
    _family, hardware, index, flags, _change = _LINK.unpack_from(body)
    found = attributes(body, _LINK.size)
    name = found.get(3, b"").rstrip(b"\0").decode("utf-8", "replace")
    kind = attributes(found.get(18, b"")).get(1, b"").rstrip(b"\0").decode("ascii", "replace")
    counters = found.get(23, b"")
    rx, tx = struct.unpack_from("=2Q", counters, 16) if len(counters) >= 32 else (0, 0)
    # A name may hold any byte but '/' and white space; what cannot be printed cannot be reported either.
    name = "".join(c if c.isprintable() else "?" for c in name)
    master, mtu = found.get(10, b""), found.get(4, b"")
    return Interface(
        index=index, name=name, kind=kind, hardware=hardware, flags=flags, rx_bytes=rx, tx_bytes=tx,
        master=_U32.unpack(master)[0] if len(master) == 4 else None,
        mtu=_U32.unpack(mtu)[0] if len(mtu) == 4 else 0,
    )  # fmt: skip


def parse_group(body: bytes) -> tuple[int, int] | None:
    """An interface's index and its group (IFLA_GROUP) out of RTM_NEWLINK."""
    if len(body) < _LINK.size:
        return None
    group = attributes(body, _LINK.size).get(27, b"")
    return (_LINK.unpack_from(body)[2], _U32.unpack(group)[0]) if len(group) == 4 else None


def parse_address(body: bytes) -> tuple[int, IPAddress] | None:
    """The interface's index and the local address out of RTM_NEWADDR or RTM_DELADDR."""
    if len(body) < _ADDR.size:
        return None
    _family, _prefix, _flags, _scope, index = _ADDR.unpack_from(body)
    found = attributes(body, _ADDR.size)
    address = _address(found.get(2) or found.get(1))
    return None if address is None else (index, address)


def parse_network(body: bytes) -> tuple[int, IPNetwork] | None:
    """The interface's index and the local address's network out of RTM_NEWADDR."""
    found = parse_address(body)
    if found is None or body[1] > found[1].max_prefixlen:
        return None
    return found[0], ip_network((found[1], body[1]), strict=False)


def parse_route(body: bytes) -> Route | None:
    if len(body) < _ROUTE.size:
        return None
    fixed = _ROUTE.unpack_from(body)
    found = attributes(body, _ROUTE.size)
    oif = found.get(4, b"")
    return Route(
        interface=_U32.unpack(oif)[0] if len(oif) == 4 else None,
        kind=fixed[7],
        gateway=5 in found or 18 in found,
        source=_address(found.get(7)),
        prefix=fixed[1],
        next_hop=_address(found.get(5)),
    )


def ways(entry: RouteEntry, by: Collection[int]) -> Iterator[Way]:
    """By each of the devices that a route leads to; none for a default route."""
    if entry.kind == UNICAST and entry.prefix:
        for hop in entry.hops:
            if hop.interface in by:
                yield Way(network=entry.network, interface=hop.interface, gateway=hop.gateway is not None)


def dump_request(kind: int, sequence: int) -> bytes:
    """Ask for all links, addresses, rules, routes or nexthop objects; the rest of each request may be zero."""
    body = bytes(_NHMSG_SIZE if kind == GETNEXTHOP else _LINK.size)
    return _HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _DUMP, sequence, 0) + body


def route_request(
    destination: IPAddress,
    sequence: int,
    *,
    port: int,
    protocol: int,
    via: int | None,
    match: bool,
    source: tuple[IPAddress, int] | None = None,
    uid: int | None = None,
) -> bytes:
    """Ask for the route that a packet of `protocol` to `destination` and `port` would take (0: any port).

    With the address and port of a connected socket as `source`, the answer is that socket's own route, also where
    routes are balanced by a hash of both ends. `uid` is whose packet it is, this process's own where it is None.
    """
    family = socket.AF_INET6 if isinstance(destination, IPv6Address) else socket.AF_INET
    attrs = attribute(1, destination.packed)
    if via is not None:
        attrs += attribute(4, _U32.pack(via))
    if port:
        # Rules may look at protocol and port (`ip rule … ipproto udp dport 53`); older kernels skip these attributes.
        attrs += attribute(27, bytes([protocol])) + attribute(29, struct.pack("!H", port))
    if source is not None:
        attrs += attribute(2, source[0].packed) + (attribute(28, struct.pack("!H", source[1])) if port else b"")
    if uid is not None:
        attrs += attribute(_RTA_UID, _U32.pack(uid))
    flags = _FIB_MATCH if match else 0
    source_length = 0 if source is None else len(source[0].packed) * 8
    body = _ROUTE.pack(family, len(destination.packed) * 8, source_length, 0, 0, 0, 0, 0, flags) + attrs
    return _HEADER.pack(_HEADER.size + len(body), GETROUTE, _REQUEST, sequence, 0) + body


def _address(packed: bytes | None) -> IPAddress | None:
    return ip_address(packed) if packed is not None and len(packed) in (4, 16) else None


def _opened() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    sock.settimeout(1.0)
    return sock


class Netlink:
    """A `Kernel` over one netlink socket. Answers come within microseconds, so it asks without the loop."""

    def __init__(self, clock: Clock | None = None) -> None:
        """Raises OSError where the sandbox has no netlink."""
        self._clock = clock or SystemClock()
        self._sock = _opened()
        self._sequence = 0
        self._fib: Fib | None = None  # while it may be true
        self._before: Fib | None = None  # as it was read last
        self._fib_until = 0.0
        self._ways: tuple[Fib, frozenset[int], tuple[Way, ...]] | None = None
        self._read: dict[bytes, RouteEntry | None] = {}  # what the last dump told of routes
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
        """This question is lost; the next one shall not fail for what became of the socket."""
        with contextlib.suppress(OSError):  # then it is tried again at the next failure
            fresh = _opened()
            self._sock.close()
            self._sock = fresh

    def interfaces(self) -> tuple[Interface, ...]:
        links = [link for m in self._dump(GETLINK) if m.kind == NEWLINK and (link := parse_link(m.body))]
        addresses: dict[int, list[IPAddress]] = {}
        networks: dict[int, list[IPNetwork]] = {}
        for message in self._dump(GETADDR):
            if message.kind == NEWADDR and (parsed := parse_address(message.body)):
                addresses.setdefault(parsed[0], []).append(parsed[1])
            if message.kind == NEWADDR and (network := parse_network(message.body)):
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
        """Where a packet of the user that sockets are made for would go (`net.as_user`).

        None when no route (or one that prohibits) leads there.
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
                if message.kind == _ERROR:
                    code = error_number(message.body)
                    if code in _NO_ROUTE:
                        return None
                    raise OSError(code, "netlink refuses to look a route up")
                return parse_route(message.body)

    def fib(self) -> Fib:
        """All routing rules and tables of both IP versions; the same object while they are the same.

        Read anew after `changed`, and when the last reading is old beside what it cost: full tables take a while.
        """
        now = self._clock.boottime()
        if self._fib is None or now >= self._fib_until:
            self._fib = self._read_fib()
            if self._before is not None and self._before.is_like(self._fib):
                self._fib = self._before  # what was concluded from it holds
            self._before = self._fib
            self._fib_until = now + min((self._clock.boottime() - now) * _FIB_REST, _FIB_OLDEST)
        return self._fib

    def changed(self) -> None:
        """Routes or rules may have changed: the next look reads them anew."""
        self._fib = None

    def _read_fib(self) -> Fib:
        rules = (parse_rule(m.body) for m in self._dump(GETRULE) if m.kind == NEWRULE)
        hops = self._next_hops()
        entries = self._routes(hops)
        known = tuple(r for r in rules if r)
        links = self._dump(GETLINK) if any(r.suppress_group is not None for r in known) else ()
        groups = dict(g for m in links if m.kind == NEWLINK and (g := parse_group(m.body)))
        return Fib(known, entries, groups)

    def _routes(self, hops: dict[int, tuple[Hop, ...]]) -> tuple[RouteEntry, ...]:
        """Of a full table most is as it was: what the last dump told in the same words means the same."""
        before = self._read if hops == self._hops else {}
        found: dict[bytes, RouteEntry | None] = {}
        for message in self._dump(GETROUTE):
            if message.kind == NEWROUTE:
                body = message.body
                found[body] = before[body] if body in before else parse_entry(body, hops)
        self._read, self._hops = found, hops
        return tuple(e for e in found.values() if e)

    def _next_hops(self) -> dict[int, tuple[Hop, ...]]:
        try:
            return parse_next_hops(m.body for m in self._dump(GETNEXTHOP) if m.kind == NEWNEXTHOP)
        except OSError as e:
            if e.errno != errno.EOPNOTSUPP:
                raise
            return {}  # a kernel older than 5.3 has none

    def ways(self, by: Collection[int]) -> tuple[Way, ...]:
        """All tables' entries by these devices but the default routes; the same object while the tables are."""
        fib, devices = self.fib(), frozenset(by)
        if self._ways is None or self._ways[0] is not fib or self._ways[1] != devices:
            self._ways = fib, devices, tuple(w for e in fib.entries for w in ways(e, devices))
        return self._ways[2]

    def _dump(self, kind: int) -> list[Message]:
        for _ in range(3):
            self._sequence += 1
            self._send(dump_request(kind, self._sequence))
            found, interrupted, done = [], False, False
            while not done:
                for message in messages(self._receive()):
                    if message.sequence != self._sequence:
                        continue
                    interrupted = interrupted or bool(message.flags & _DUMP_INTERRUPTED)
                    if message.kind == _ERROR:
                        raise OSError(error_number(message.body), "netlink refuses a dump")
                    if message.kind == _DONE:
                        done = True
                    else:
                        found.append(message)
            if not interrupted:
                break
        return found
