"""The kernel's routing rules and tables, and the walk through them that the kernel does for each packet.

Both are readable without any capability. Sources: ip-rule(8), ip-route(8), ip-nexthop(8), linux/fib_rules.h,
linux/rtnetlink.h, linux/nexthop.h, and the kernel's fib_rule_match(), fib_rules_lookup() and fib_table_lookup().

`Fib.lookup` answers for one packet. `Fib.spread` answers for all destinations at once: which part of the address space
leaves by which device. Addresses are integers there, parts of the space are closed intervals of them.
"""

import socket
import struct
import sys
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from operator import itemgetter
from typing import Final, NamedTuple

from vpn_sentinel.agent.net.attributes import attributes
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, is_public

RTN_UNICAST = 1
RTN_BLACKHOLE, RTN_UNREACHABLE, RTN_PROHIBIT, RTN_THROW = 6, 7, 8, 9
FR_ACT_TO_TBL, FR_ACT_GOTO = 1, 2
FR_ACT_BLACKHOLE, FR_ACT_UNREACHABLE, FR_ACT_PROHIBIT = 6, 7, 8

_FIXED: Final = struct.Struct("=8BI")  # rtmsg, and fib_rule_hdr, which has the same shape
_U32: Final = struct.Struct("=I")
_2U16: Final = struct.Struct("=HH")
_2U32: Final = struct.Struct("=II")
_NEXTHOP: Final = struct.Struct("=HBBi")  # rtnexthop
_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY = 1, 2, 4, 5, 6
_RTA_MULTIPATH, _RTA_TABLE, _RTA_VIA, _RTA_NH_ID = 9, 15, 18, 30
_NHMSG: Final = struct.Struct("=4BI")
_NEXTHOP_GROUP: Final = struct.Struct("=I4x")  # the identity of a member; its weight decides nothing here
_NHA_ID, _NHA_GROUP, _NHA_OIF, _NHA_GATEWAY = 1, 2, 5, 6
_FRA_DST, _FRA_SRC, _FRA_IIFNAME, _FRA_GOTO, _FRA_PRIORITY, _FRA_FWMARK = 1, 2, 3, 4, 6, 10
_FRA_TUN_ID, _FRA_SUPPRESS_IFGROUP = 12, 13
_FRA_SUPPRESS_PREFIXLEN, _FRA_TABLE, _FRA_FWMASK, _FRA_OIFNAME, _FRA_L3MDEV, _FRA_UID_RANGE = 14, 15, 16, 17, 19, 20
_FRA_IP_PROTO, _FRA_SPORT_RANGE, _FRA_DPORT_RANGE, _FRA_DSCP = 22, 23, 24, 25
_FRA_SPORT_MASK, _FRA_DPORT_MASK, _FRA_DSCP_MASK = 28, 29, 30
WHOLE_PORT: Final = 0xFFFF
_UNDERSTOOD: Final = frozenset({*range(26), _FRA_SPORT_MASK, _FRA_DPORT_MASK, _FRA_DSCP_MASK})
_FIB_RULE_INVERT: Final = 0x2
_RTNH_F_DEAD: Final = 0x1  # also said of a link without carrier where the kernel ignores routes by such
_RTM_F_CLONED: Final = 0x200
_RTPROT_KERNEL: Final = 2
_BITS: Final = {socket.AF_INET: 32, socket.AF_INET6: 128}
VERSION: Final = {socket.AF_INET: 4, socket.AF_INET6: 6}
_REFUSING: Final = frozenset({RTN_BLACKHOLE, RTN_UNREACHABLE, RTN_PROHIBIT})
# Where what this host itself sends is said to come in (fib_rules.c: LOOPBACK_IFINDEX).
_LOOPBACK: Final = "lo"
MOST_OWN_PORTS: Final = 256
FIRST_PERSON: Final = 1000  # the first user id that is a person's
# Behind them are those of services that have none of their own, and nobody's, which VPN programs change to.
PERSONS: Final = range(FIRST_PERSON, 60_000)

Interval = tuple[int, int]
_last: Final = itemgetter(1)  # address of an interval or a segment


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A routing rule. Selectors that are None, or "" for a name, match everything; `invert` turns all of them round.

    `version` is 4 or 6. `mark` is compared under `mask`; `uids`, `source_ports` and `destination_ports` are closed
    ranges, or one port under a mask; `table` counts for the action FR_ACT_TO_TBL, `target` for FR_ACT_GOTO. Where the
    table's route has a prefix that is not longer than `suppress_prefix`, or leads by a device of the group
    `suppress_group`, the next rule is asked. `tos` is compared under `tos_mask`, 0 is any. `rare`: it
    has a selector that is not read here, such as IPv6's flow label, so that it selects no ordinary packet.
    """

    version: int
    priority: int
    action: int = FR_ACT_TO_TBL
    table: int = 0
    target: int = 0
    invert: bool = False
    source: IPNetwork | None = None
    destination: IPNetwork | None = None
    mark: int | None = None
    mask: int = 0xFFFFFFFF
    uids: tuple[int, int] | None = None
    protocol: int | None = None
    source_ports: tuple[int, int] | None = None
    source_mask: int = WHOLE_PORT
    destination_ports: tuple[int, int] | None = None
    destination_mask: int = WHOLE_PORT
    incoming: str = ""
    outgoing: str = ""
    tos: int = 0
    tos_mask: int = 0xFF
    l3mdev: bool = False
    rare: bool = False
    suppress_prefix: int | None = None
    suppress_group: int | None = None

    def names_sender(self) -> bool:
        """Whether it selects by who sends: by mark, user or port of the sender, or by a protocol without ports.

        So VPN programs except their own packets. What a rule selects by destination is a part of the traffic instead.
        """
        own_protocol = self.protocol is not None and self.protocol not in (
            socket.IPPROTO_TCP,
            socket.IPPROTO_UDP,
            socket.IPPROTO_ICMP,
            socket.IPPROTO_ICMPV6,
        )
        return bool(self.mark) or self.uids is not None or self.source_ports is not None or own_protocol

    def sender(self, uid: int | None = None) -> "Sender":
        """A sender whom the selectors name, before any inversion; `uid` is its user where none is named."""
        return Sender(
            mark=(self.mark or 0) & self.mask,
            uid=self.uids[0] if self.uids else uid,
            protocol=self.protocol or 0,
            source_port=self.source_ports[0] if self.source_ports else 0,
            destination_port=self.destination_ports[0] if self.destination_ports else 0,
        )


def may_be_a_programs(rule: Rule) -> bool:
    """Whether the users or ports that a rule names may be those of one program, such as a VPN's own or one that is
    meant for it.

    One user may be. Several, with people among them, are a part of everybody; so is root, whose programs are many.
    Debian and Fedora, and login.defs(5), give numbers from 1000 on to people. One program has a port or a few of its
    own; a long range has those of everybody's connections in it.
    """
    if rule.source_ports is not None:
        low, high = rule.source_ports
        if (high - low + 1) << (WHOLE_PORT & ~rule.source_mask).bit_count() > MOST_OWN_PORTS:
            return False
    if rule.uids is None:
        return True
    low, high = rule.uids
    return low > 0 and (low == high or high < FIRST_PERSON)


@dataclass(frozen=True, slots=True)
class Hop:
    """A way that a route offers: the device's index, and whether a router there takes the packets."""

    interface: int
    gateway: IPAddress | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteEntry:
    """An entry of a routing table. `first` is the lowest address of its prefix, as an integer; `hops` may be empty.

    `kind` is rtm_type (RTN_UNICAST and so on). With a `tos` it is for packets of that type of service alone.
    With a `source`, which IPv6 knows, it is for packets from there alone.
    `by_kernel`: it came with an address of this host, such as that of a line's other end, and nobody asked for it
    (RTPROT_KERNEL).
    """

    version: int
    table: int
    first: int
    prefix: int
    kind: int = RTN_UNICAST
    hops: tuple[Hop, ...] = ()
    metric: int = 0
    tos: int = 0
    source: IPNetwork | None = None
    by_kernel: bool = False

    @property
    def last(self) -> int:
        return self.first | ((1 << (self.bits - self.prefix)) - 1)

    @property
    def bits(self) -> int:
        return 32 if self.version == 4 else 128

    @property
    def network(self) -> IPNetwork:
        return IPv4Network((self.first, self.prefix)) if self.version == 4 else IPv6Network((self.first, self.prefix))

    def is_for_one_host(self) -> bool:
        """Whether somebody gave a single host a route of its own: so the VPN's server is excepted from the tunnel."""
        return self.kind == RTN_UNICAST and self.prefix == self.bits and bool(self.hops) and not self.by_kernel

    def leads_by(self, interface: int) -> bool:
        hops = self.hops  # one, of nearly all of a full table
        return hops[0].interface == interface if len(hops) == 1 else any(h.interface == interface for h in hops)

    def leads_to_internet(self) -> bool:
        return self.prefix < 8 or is_public(self.network.network_address)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """What of a packet beside its destination decides where it goes. 0 for ports and protocol: any that no rule names.

    `uid` None is a sender whom no rule by user selects; `outgoing` is the device that its socket is bound to. What this
    host passes on for somebody else came in by the device `incoming`.
    """

    mark: int = 0
    uid: int | None = None
    source: IPAddress | None = None
    protocol: int = 0
    source_port: int = 0
    destination_port: int = 0
    tos: int = 0
    outgoing: str = ""
    incoming: str = _LOOPBACK


EVERYBODY: Final = Sender()


class Segment(NamedTuple):
    """A part of the address space, the rule that decided, and the route that it takes; None where the rule refuses."""

    first: int
    last: int
    entry: RouteEntry | None
    rule: Rule | None = None

    @property
    def interfaces(self) -> tuple[int, ...]:
        """Indices of the devices that it leaves by; none for this host's own addresses and what is refused."""
        if self.entry is None or self.entry.kind != RTN_UNICAST:
            return ()
        hops = self.entry.hops
        return (hops[0].interface,) if len(hops) == 1 else tuple(dict.fromkeys(hop.interface for hop in hops))

    @property
    def name(self) -> tuple[int, int] | None:
        """The network by which its route or its rule names it, whichever says more: where it begins, and its prefix.

        None without a route.
        """
        if self.entry is None:
            return None
        by_rule = self.rule.destination if self.rule is not None and not self.rule.invert else None
        if by_rule is not None and by_rule.prefixlen > self.entry.prefix:
            return int(by_rule.network_address), by_rule.prefixlen
        return self.entry.first, self.entry.prefix


def parse_rule(body: bytes) -> Rule | None:
    """A rule out of RTM_NEWRULE; None for other families and what is too short."""
    if len(body) < _FIXED.size:
        return None
    family, dst_len, src_len, tos, table, _, _, action, flags = _FIXED.unpack_from(body)
    if family not in VERSION:
        return None
    found = attributes(body, _FIXED.size)
    mark = _u32(found.get(_FRA_FWMARK))
    protocol = found.get(_FRA_IP_PROTO)
    dscp = found.get(_FRA_DSCP)
    return Rule(
        version=VERSION[family],
        priority=_u32(found.get(_FRA_PRIORITY)) or 0,
        action=action,
        table=_u32(found.get(_FRA_TABLE)) or table,
        target=_u32(found.get(_FRA_GOTO)) or 0,
        invert=bool(flags & _FIB_RULE_INVERT),
        source=_network(found.get(_FRA_SRC), src_len),
        destination=_network(found.get(_FRA_DST), dst_len),
        mark=mark,
        mask=_or(_u32(found.get(_FRA_FWMASK)), 0xFFFFFFFF),
        uids=_pair(found.get(_FRA_UID_RANGE), _2U32),
        protocol=protocol[0] if protocol else None,
        source_ports=_pair(found.get(_FRA_SPORT_RANGE), _2U16),
        source_mask=_mask(found.get(_FRA_SPORT_MASK)),
        destination_ports=_pair(found.get(_FRA_DPORT_RANGE), _2U16),
        destination_mask=_mask(found.get(_FRA_DPORT_MASK)),
        incoming=_name(found.get(_FRA_IIFNAME)),
        outgoing=_name(found.get(_FRA_OIFNAME)),
        tos=dscp[0] << 2 if dscp else tos,
        tos_mask=(found.get(_FRA_DSCP_MASK) or b"\x3f")[0] << 2 if dscp else 0xFF,
        l3mdev=any(found.get(_FRA_L3MDEV, b"")),
        rare=any(found.get(_FRA_TUN_ID, b"")) or not _UNDERSTOOD.issuperset(found),
        suppress_prefix=_suppressed(found.get(_FRA_SUPPRESS_PREFIXLEN)),
        suppress_group=_suppressed(found.get(_FRA_SUPPRESS_IFGROUP)),
    )


def _mask(data: bytes | None) -> int:
    """Of a port (Linux 6.15), in host byte order like the range that it belongs to."""
    return int.from_bytes(data, sys.byteorder) if data is not None and len(data) == 2 else WHOLE_PORT


def _suppressed(data: bytes | None) -> int | None:
    """-1, as an unsigned number, says that nothing is."""
    return None if data == b"\xff" * 4 else _u32(data)


def parse_next_hops(bodies: Iterable[bytes]) -> dict[int, tuple[Hop, ...]]:
    """By their identity, the nexthop objects out of RTM_NEWNEXTHOP, groups among them.

    Routes may name one instead of devices and routers of their own, and where net.ipv4.nexthop_compat_mode is 0 the
    kernel tells nothing but that name. One without hops swallows packets, or its device is down.
    """
    single: dict[int, tuple[Hop, ...]] = {}
    groups: dict[int, list[int]] = {}
    for body in bodies:
        if len(body) < _NHMSG.size:
            continue
        *_, flags = _NHMSG.unpack_from(body)
        found = attributes(body, _NHMSG.size)
        ident = _u32(found.get(_NHA_ID))
        if ident is None:
            continue
        if (members := found.get(_NHA_GROUP)) is not None:
            whole = len(members) // _NEXTHOP_GROUP.size * _NEXTHOP_GROUP.size
            groups[ident] = [i for (i,) in _NEXTHOP_GROUP.iter_unpack(members[:whole])]
            continue
        interface = _u32(found.get(_NHA_OIF))
        single[ident] = ()
        if interface is not None and not flags & _RTNH_F_DEAD:
            single[ident] = (Hop(interface, _address(found.get(_NHA_GATEWAY))),)
    return single | {ident: tuple(h for i in of for h in single.get(i, ())) for ident, of in groups.items()}


def parse_entry(body: bytes, next_hops: Mapping[int, tuple[Hop, ...]] | None = None) -> RouteEntry | None:
    """An entry out of RTM_NEWROUTE, which may name one of `next_hops`; None for other families and cache entries."""
    if len(body) < _FIXED.size:
        return None
    family, prefix, src_len, tos, table, protocol, _scope, kind, flags = _FIXED.unpack_from(body)
    if family not in VERSION or flags & _RTM_F_CLONED or prefix > _BITS[family]:
        return None
    found = attributes(body, _FIXED.size)
    destination = found.get(_RTA_DST, b"")
    if len(destination) * 8 != _BITS[family]:
        if prefix:
            return None
        destination = b"\0" * (_BITS[family] // 8)
    shift = _BITS[family] - prefix
    hops = _hops(found, family, next_hops or {}) if not flags & _RTNH_F_DEAD else ()
    return RouteEntry(
        version=VERSION[family],
        table=_u32(found.get(_RTA_TABLE)) or table,
        first=int.from_bytes(destination) >> shift << shift,
        prefix=prefix,
        kind=kind,
        hops=hops,
        metric=_u32(found.get(_RTA_PRIORITY)) or 0,
        tos=tos if family == socket.AF_INET else 0,
        source=_network(found.get(_RTA_SRC), src_len) if src_len else None,
        by_kernel=protocol == _RTPROT_KERNEL,
    )


def _hops(found: dict[int, bytes], family: int, next_hops: Mapping[int, tuple[Hop, ...]]) -> tuple[Hop, ...]:
    several = found.get(_RTA_MULTIPATH)
    if several is None:
        interface = _u32(found.get(_RTA_OIF))
        if interface is None:
            return next_hops.get(_u32(found.get(_RTA_NH_ID)) or 0, ())
        return _only_hop(interface, _gateway(found, family))
    hops, offset = [], 0
    while offset + _NEXTHOP.size <= len(several):
        length, flags, _weight, interface = _NEXTHOP.unpack_from(several, offset)
        if length < _NEXTHOP.size or offset + length > len(several):
            break
        if not flags & _RTNH_F_DEAD:
            nested = attributes(several[offset + _NEXTHOP.size : offset + length])
            hops.append(Hop(interface, _gateway(nested, family)))
        offset += (length + 3) & ~3
    return tuple(hops)


@lru_cache(maxsize=256)
def _only_hop(interface: int, gateway: IPAddress | None) -> tuple[Hop, ...]:
    """One object for all routes that lead the same way: full tables have few ways."""
    return (Hop(interface, gateway),)


def _gateway(found: dict[int, bytes], family: int) -> IPAddress | None:
    """RTA_GATEWAY, or RTA_VIA: a router of the other IP version (RFC 5549), behind its family in two bytes."""
    if (near := _address(found.get(_RTA_GATEWAY))) is not None:
        return near
    via = found.get(_RTA_VIA)
    return _address(via[2:]) if via is not None and family == socket.AF_INET else None


def _address(packed: bytes | None) -> IPAddress | None:
    return ip_address(packed) if packed is not None and len(packed) in (4, 16) else None


def _network(packed: bytes | None, prefix: int) -> IPNetwork | None:
    address = _address(packed)
    if address is None or not 0 < prefix <= address.max_prefixlen:
        return None
    return ip_network((address, prefix), strict=False)


def _u32(data: bytes | None) -> int | None:
    return int(_U32.unpack(data)[0]) if data is not None and len(data) == 4 else None


def _pair(data: bytes | None, shape: struct.Struct) -> tuple[int, int] | None:
    if data is None or len(data) != shape.size:
        return None
    low, high = shape.unpack(data)
    return low, high


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _name(data: bytes | None) -> str:
    return (data or b"").rstrip(b"\0").decode("utf-8", "replace")


# Of a table: IP version and number, the type of service and the sources that its routes may be for.
_Part = tuple[int, int, int, frozenset[IPNetwork]]


@dataclass(eq=False)
class Fib:
    """All rules and tables at one moment. Rules keep the kernel's order, which is that of their priorities.

    `groups` are the groups of devices by index (ip-link(8)); 0 is that of any other. Nothing of it changes, and what
    took a walk through full tables is kept: a round asks for the same some ten times.
    """

    rules: tuple[Rule, ...] = ()
    entries: tuple[RouteEntry, ...] = ()
    groups: Mapping[int, int] = field(default_factory=dict)
    _by_table: dict[tuple[int, int], list[RouteEntry]] = field(init=False, repr=False)
    _segments: dict[_Part, list[Segment]] = field(init=False, repr=False, default_factory=dict)
    _parts: dict[_Part, list[Segment]] = field(init=False, repr=False, default_factory=dict)
    _without: dict[int, "Fib"] = field(init=False, repr=False, default_factory=dict)
    leaving: dict[Hashable, dict[int, list[Interval]]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.rules = tuple(sorted(self.rules, key=lambda rule: rule.priority))
        self._by_table = defaultdict(list)
        for entry in self.entries:
            self._by_table[entry.version, entry.table].append(entry)

    def is_like(self, other: "Fib") -> bool:
        """Whether both lead every packet the same way."""
        mine, others = ((f.rules, f.entries, f.groups) for f in (self, other))
        return mine == others

    def kind(self, version: int, sender: Sender) -> Hashable:
        """What rules and routes tell a sender from others by: who has the same goes the same ways."""
        return (
            version,
            self._type(sender),
            self._from(sender),
            bool(self._sources) and sender.source is None,
            tuple(_selects(rule, sender) for rule in self.rules if rule.version == version),
        )

    def without(self, interface: int) -> "Fib":
        """The same without any route by one device: what the kernel would do if that device went away."""
        if interface not in self._without:
            self._without[interface] = self._left(interface)
        return self._without[interface]

    def _left(self, interface: int) -> "Fib":
        kept, touched = [], set()
        for entry in self.entries:
            if entry.leads_by(interface):
                touched.add((entry.version, entry.table))
                hops = tuple(hop for hop in entry.hops if hop.interface != interface)
                if hops:
                    kept.append(replace(entry, hops=hops))
            else:
                kept.append(entry)
        left = Fib(self.rules, tuple(kept), self.groups)
        for mine, others in ((self._segments, left._segments), (self._parts, left._parts)):
            others.update((key, found) for key, found in mine.items() if key[:2] not in touched)
        return left

    def hosts_beside(self, tunnel: int) -> list[tuple[IPNetwork, RouteEntry]]:
        """Single hosts with a way of their own past the tunnel's device: so a VPN client excepts its server.

        By a route of their own, as OpenVPN and vpnc-script make it; only where there is none, by a rule for one host.
        """
        routes = [(e.network, e) for e in self._single_hosts if not e.leads_by(tunnel)]
        if routes:
            return routes
        found = []
        for network in dict.fromkeys(r.destination for r in self.rules if r.destination and not r.invert):
            if network.prefixlen == network.max_prefixlen:
                entry = self.lookup(network.network_address)
                if entry is not None and entry.kind == RTN_UNICAST and entry.hops and not entry.leads_by(tunnel):
                    found.append((network, entry))
        return found

    @cached_property
    def _single_hosts(self) -> tuple[RouteEntry, ...]:
        return tuple(e for e in self.entries if e.is_for_one_host())

    @cached_property
    def ways_out(self) -> frozenset[tuple[int, int, bool]]:
        """IP version and device of the routes to the internet, and whether a router takes the packets there."""
        found: set[tuple[int, int, bool]] = set()
        for entry in self.entries:
            if entry.kind == RTN_UNICAST:
                for hop in entry.hops:
                    way = entry.version, hop.interface, hop.gateway is not None
                    if way not in found and entry.leads_to_internet():
                        found.add(way)
        return frozenset(found)

    def lookup(self, destination: IPAddress, sender: Sender = EVERYBODY) -> RouteEntry | None:
        """The route that a packet takes; None when nothing leads there or a rule refuses it."""
        number = int(destination)
        found = self._walk(destination.version, sender, [(number, number)])
        entry = found[0].entry if found else None
        return None if entry is None or entry.kind in _REFUSING else entry

    def spread(
        self,
        version: int,
        sender: Sender = EVERYBODY,
        within: Sequence[Interval] | None = None,
        *,
        by_way: bool = False,
    ) -> list[Segment]:
        """The address space of one IP version in disjoint parts, in order; what has no route is left out.

        Of it, `within` is walked; the whole where it is None. `by_way`: neighbours that lead the same way are one part,
        with the route of the first, so that a full table by one device is a few.
        """
        space = [(0, (1 << (32 if version == 4 else 128)) - 1)] if within is None else list(within)
        return sorted(self._walk(version, sender, space, by_way=by_way), key=lambda s: s.first)

    @cached_property
    def _types(self) -> frozenset[int]:
        return frozenset(e.tos for e in self.entries)

    def _type(self, sender: Sender) -> int:
        """The sender's type of service where a route is for it; else that of all others."""
        return sender.tos if sender.tos in self._types else 0

    @cached_property
    def _sources(self) -> frozenset[IPNetwork]:
        return frozenset(e.source for e in self.entries if e.source is not None)

    def _from(self, sender: Sender) -> frozenset[IPNetwork]:
        """Of the sources that routes are for, those that the sender's address is in."""
        return frozenset(n for n in self._sources if sender.source is not None and sender.source in n)

    def _walk(self, version: int, sender: Sender, space: list[Interval], *, by_way: bool = False) -> list[Segment]:
        """The way of each part of `space`.

        A socket without an address takes a route for all sources. Only where there is none the kernel gives it an
        address, and looks for the routes from there (ip6_dst_lookup_tail).
        """
        found = self._through(version, sender, space, self._from(sender), by_way=by_way)
        if version == 6 and sender.source is None and self._sources:
            found = [s for s in found if s.entry is not None and s.entry.kind not in _REFUSING]
            rest = subtract(space, sorted((s.first, s.last) for s in found))
            found += self._through(version, sender, rest, self._sources, by_way=by_way)
        return found

    def _through(
        self, version: int, sender: Sender, space: list[Interval], sources: frozenset[IPNetwork], *, by_way: bool
    ) -> list[Segment]:
        """Go through the rules in their order, with what of the address space is not decided yet."""
        out: list[Segment] = []
        rules = [r for r in self.rules if r.version == version]
        led_on: dict[int, list[Interval]] = {}  # by which rule goes on what a rule above it sent there
        for at, rule in enumerate(rules):
            space = sorted(space + led_on.pop(at, []))
            hit = intersect(space, list(_selected(rule, sender)))
            if not hit:
                continue
            if rule.action == FR_ACT_GOTO:
                # The kernel passes over one whose target is not there (ip-rule(8) calls it unresolved).
                target = next((n for n in range(at + 1, len(rules)) if rules[n].priority == rule.target), None)
                if target is not None:
                    led_on.setdefault(target, []).extend(hit)
                    space = subtract(space, hit)
            elif rule.action in (FR_ACT_BLACKHOLE, FR_ACT_UNREACHABLE, FR_ACT_PROHIBIT):
                out += [Segment(first, last, None, rule) for first, last in hit]
                space = subtract(space, hit)
            elif rule.action == FR_ACT_TO_TBL and rule.table:
                of_table = self._ways_of_table if by_way else self._of_table
                segments = of_table((version, rule.table, self._type(sender), sources))
                taken = list(self._routed(rule, hit, segments))
                out += taken
                space = subtract(space, [(s.first, s.last) for s in taken])
        return out

    def _routed(self, rule: Rule, space: list[Interval], segments: list[Segment]) -> Iterator[Segment]:
        at = 0
        for first, last in space:
            at = max(0, at - 1)  # the last one of the part before may reach into this one
            if at < len(segments) and segments[at].last < first:
                at = bisect_left(segments, first, lo=at, key=_last)
            while at < len(segments) and segments[at].first <= last:
                segment, entry = segments[at], segments[at].entry
                at += 1
                if entry is None or entry.kind == RTN_THROW:
                    continue
                if entry.kind in _REFUSING or not self._is_suppressed(entry, rule):
                    yield Segment(max(first, segment.first), min(last, segment.last), entry, rule)

    def _is_suppressed(self, entry: RouteEntry, rule: Rule) -> bool:
        """Whether the rule passes over the route that its table has (fib4_rule_suppress, fib6_rule_suppress).

        Of a route with several devices the first one counts. A less specific route of the table is not tried.
        """
        if rule.suppress_prefix is not None and entry.prefix <= rule.suppress_prefix:
            return True
        device = entry.hops[0].interface if entry.hops else None
        return (
            rule.suppress_group is not None
            and device is not None
            and (self.groups.get(device, 0) == rule.suppress_group)
        )

    def _of_table(self, part: _Part) -> list[Segment]:
        """The table as disjoint parts of the address space, each with its most specific route."""
        if part not in self._segments:
            version, table, tos, sources = part
            entries = (
                e
                for e in self._by_table.get((version, table), ())
                if e.tos in (0, tos) and (e.source is None or e.source in sources)
            )
            self._segments[part] = list(_flattened(_best(entries)))
        return self._segments[part]

    def _ways_of_table(self, part: _Part) -> list[Segment]:
        """The same with neighbours made one that no rule tells apart: most of a full table."""
        if part not in self._parts:
            asking = (r for r in self.rules if (r.version, r.table) == part[:2])
            longest = max((r.suppress_prefix for r in asking if r.suppress_prefix is not None), default=-1)
            self._parts[part] = list(_merged(self._of_table(part), longest))
        return self._parts[part]


def _selected(rule: Rule, sender: Sender) -> Iterable[Interval]:
    """The destinations for which the rule selects what `sender` sends."""
    whole = (0, (1 << (32 if rule.version == 4 else 128)) - 1)
    others = _selects(rule, sender)
    if rule.destination is None:
        return [whole] if others is not rule.invert else []
    within = (int(rule.destination.network_address), int(rule.destination.broadcast_address))
    if not rule.invert:
        return [within] if others else []
    return subtract([whole], [within]) if others else [whole]


def _selects(rule: Rule, sender: Sender) -> bool:
    """Whether all selectors but that of the destination agree, before the inversion."""
    return (
        rule.incoming in ("", sender.incoming)
        and rule.outgoing in ("", sender.outgoing)
        and (rule.mark is None or (rule.mark ^ sender.mark) & rule.mask == 0)
        and (rule.uids is None or (sender.uid is not None and rule.uids[0] <= sender.uid <= rule.uids[1]))
        and (rule.source is None or (sender.source is not None and sender.source in rule.source))
        and rule.protocol in (None, sender.protocol)
        and _is_in(rule.source_ports, rule.source_mask, sender.source_port)
        and _is_in(rule.destination_ports, rule.destination_mask, sender.destination_port)
        and (rule.tos == 0 or (rule.tos ^ sender.tos) & rule.tos_mask == 0)
        and not (rule.l3mdev or rule.rare)
    )


def _is_in(ports: tuple[int, int] | None, mask: int, port: int) -> bool:
    return ports is None or ports[0] & mask <= port & mask <= ports[1] & mask


def _best(entries: Iterable[RouteEntry]) -> list[RouteEntry]:
    """Of the routes with one prefix, that for the narrowest source, then for the type of service, then that with the
    lowest metric, of those whose devices are there (fib_find_alias, fib_table_lookup, fib6_node_lookup).

    IPv6 keeps routes of one prefix and metric by several routers as entries of their own and uses all of them.
    """
    best: dict[tuple[int, int], RouteEntry] = {}
    for entry in entries:
        if entry.kind == RTN_UNICAST and not entry.hops:
            continue
        key = entry.first, entry.prefix
        known = best.get(key)
        if known is None or _rank(entry) < _rank(known):
            best[key] = entry
        elif entry.version == 6 and _rank(entry) == _rank(known) and entry.kind == known.kind == RTN_UNICAST:
            best[key] = replace(known, hops=tuple(dict.fromkeys((*known.hops, *entry.hops))))
    return sorted(best.values(), key=lambda e: (e.first, e.prefix))


def _rank(entry: RouteEntry) -> tuple[int, int, int]:
    return -entry.source.prefixlen if entry.source else 0, -entry.tos, entry.metric


def _flattened(entries: Iterable[RouteEntry]) -> Iterator[Segment]:
    """Nested prefixes, in order, as disjoint parts, each with the innermost."""
    open_: list[tuple[int, RouteEntry]] = []  # with the last address of each
    at = 0
    for entry in entries:
        first = entry.first
        while open_ and open_[-1][0] < first:
            last, done = open_.pop()
            if at <= last:
                yield Segment(at, last, done)
                at = last + 1
        if open_ and at < first:
            yield Segment(at, first - 1, open_[-1][1])
        at = first
        open_.append((entry.last, entry))
    while open_:
        last, done = open_.pop()
        if at <= last:
            yield Segment(at, last, done)
            at = last + 1


def _merged(segments: Iterable[Segment], suppressed: int) -> Iterator[Segment]:
    """Neighbours that lead the same way as one; routes of prefixes up to the length `suppressed` stay apart."""
    first, last, entry = 0, -1, None
    for segment in segments:
        if entry is not None and segment.first == last + 1 and _are_alike(entry, segment.entry, suppressed):
            last = segment.last
        else:
            if entry is not None:
                yield Segment(first, last, entry)
            first, last, entry = segment.first, segment.last, segment.entry
    if entry is not None:
        yield Segment(first, last, entry)


def _are_alike(one: RouteEntry, other: RouteEntry | None, suppressed: int) -> bool:
    return (
        other is not None
        and one.hops == other.hops
        and one.kind == other.kind
        and (one.prefix == other.prefix or min(one.prefix, other.prefix) > suppressed)
    )


def intersect(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """What is in both; each is a list of disjoint intervals in order."""
    out, i = [], 0
    j = bisect_left(other, one[0][0], key=_last) if one else 0
    while i < len(one) and j < len(other):
        first, last = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if first <= last:
            out.append((first, last))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return out


def subtract(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """What is in `one` and not in `other`; each is a list of disjoint intervals in order."""
    out, j = [], 0
    for first, last in one:
        at = first
        while j < len(other) and other[j][1] < at:
            j += 1
        k = j
        while k < len(other) and other[k][0] <= last:
            if other[k][0] > at:
                out.append((at, other[k][0] - 1))
            at = max(at, other[k][1] + 1)
            k += 1
        if at <= last:
            out.append((at, last))
    return out


def joined(parts: Iterable[Interval]) -> list[Interval]:
    """The same addresses in as few intervals as possible, in order."""
    out: list[Interval] = []
    for first, last in sorted(parts):
        if out and first <= out[-1][1] + 1:
            out[-1] = out[-1][0], max(out[-1][1], last)
        else:
            out.append((first, last))
    return out
