"""The messages of routing netlink (rtnetlink(7)): requests packed, answers parsed, by the kernel's names.

Numbers are those of linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h, linux/fib_rules.h and linux/nexthop.h. What
is too short, or of another address family than IP, is parsed as None: no message raises an exception.
"""

import socket
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_network
from typing import Final

from vpn_sentinel.agent.net.link import Interface
from vpn_sentinel.agent.net.netlink import NLM_F_DUMP, U32, address, attribute, attributes, request, text, u32
from vpn_sentinel.agent.net.routes import RTN_UNICAST, Hop, RouteEntry
from vpn_sentinel.agent.net.routing_rules import FULL_PORT_MASK, Rule
from vpn_sentinel.agent.net.space import ADDRESS_BITS
from vpn_sentinel.domain.policy import IPAddress, IPNetwork

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
RTM_NEWNEXTHOP, RTM_DELNEXTHOP, RTM_GETNEXTHOP = 104, 105, 106

_IFINFOMSG: Final = struct.Struct("=BxHiII")
_IFADDRMSG: Final = struct.Struct("=BBBBi")
_RTMSG: Final = struct.Struct("=8BI")
_FIB_RULE_HDR: Final = _RTMSG  # of the same shape
_NHMSG: Final = struct.Struct("=4BI")
_RTNEXTHOP: Final = struct.Struct("=HBBi")
_NEXTHOP_GRP: Final = struct.Struct("=I4x")  # the id of a member; its weight does not matter here
_RX_TX_BYTES: Final = struct.Struct("=16x2Q")  # of struct rtnl_link_stats64

_IFLA_IFNAME, _IFLA_MTU, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_STATS64, _IFLA_GROUP = 3, 4, 10, 18, 23, 27
_IFLA_INFO_KIND = 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DST, _RTA_SRC, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC = 1, 2, 4, 5, 6, 7
_RTA_MULTIPATH, _RTA_TABLE, _RTA_VIA, _RTA_UID = 9, 15, 18, 25
_RTA_IP_PROTO, _RTA_SPORT, _RTA_DPORT, _RTA_NH_ID = 27, 28, 29, 30
_NHA_ID, _NHA_GROUP, _NHA_OIF, _NHA_GATEWAY = 1, 2, 5, 6
_FRA_DST, _FRA_SRC, _FRA_IIFNAME, _FRA_GOTO, _FRA_PRIORITY, _FRA_FWMARK = 1, 2, 3, 4, 6, 10
_FRA_TUN_ID, _FRA_SUPPRESS_IFGROUP, _FRA_SUPPRESS_PREFIXLEN = 12, 13, 14
_FRA_TABLE, _FRA_FWMASK, _FRA_OIFNAME, _FRA_L3MDEV, _FRA_UID_RANGE = 15, 16, 17, 19, 20
_FRA_IP_PROTO, _FRA_SPORT_RANGE, _FRA_DPORT_RANGE, _FRA_DSCP = 22, 23, 24, 25
_FRA_SPORT_MASK, _FRA_DPORT_MASK, _FRA_DSCP_MASK = 28, 29, 30

_FRA_READ: Final = frozenset({*range(26), _FRA_SPORT_MASK, _FRA_DPORT_MASK, _FRA_DSCP_MASK})
_FIB_RULE_INVERT: Final = 0x2
_RTNH_F_DEAD: Final = 0x1  # also set for a link without carrier where the kernel ignores routes by such links
_RTM_F_CLONED: Final = 0x200
_RTM_F_FIB_MATCH: Final = 0x2000
_RTPROT_KERNEL: Final = 2
_RT_TABLE_LOCAL: Final = 255
_TWO_U16: Final = struct.Struct("=HH")
_TWO_U32: Final = struct.Struct("=II")
_PORT: Final = struct.Struct("!H")
VERSION: Final = {socket.AF_INET: 4, socket.AF_INET6: 6}
_FAMILY: Final = {4: socket.AF_INET, 6: socket.AF_INET6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """The kernel's answer for one destination. `type` is rtm_type (RTN_UNICAST and so on); `prefix` is the length
    of the route that matched, if that was requested.
    """

    interface: int | None
    type: int = RTN_UNICAST
    gateway: bool = False
    source: IPAddress | None = None
    prefix: int | None = None
    next_hop: IPAddress | None = None


# --- requests ---


def dump_request(message_type: int, sequence: int) -> bytes:
    """Ask for all links, addresses, rules, routes or nexthop objects; the rest of each request may be zero."""
    size = _NHMSG.size if message_type == RTM_GETNEXTHOP else _IFINFOMSG.size
    return request(message_type, bytes(size), sequence=sequence, flags=NLM_F_DUMP)


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
    routes are balanced by a hash of both ends. `uid` is the sender's user, None for this process.
    """
    attrs = attribute(_RTA_DST, destination.packed)
    if via is not None:
        attrs += attribute(_RTA_OIF, U32.pack(via))
    if port:
        # Rules may match on protocol and port (`ip rule … ipproto udp dport 53`); older kernels skip these attributes.
        attrs += attribute(_RTA_IP_PROTO, bytes([protocol])) + attribute(_RTA_DPORT, _PORT.pack(port))
    if source is not None:
        attrs += attribute(_RTA_SRC, source[0].packed)
        attrs += attribute(_RTA_SPORT, _PORT.pack(source[1])) if port else b""
    if uid is not None:
        attrs += attribute(_RTA_UID, U32.pack(uid))
    flags = _RTM_F_FIB_MATCH if match else 0
    source_bits = 0 if source is None else source[0].max_prefixlen
    family = _FAMILY[destination.version]
    fixed = _RTMSG.pack(family, destination.max_prefixlen, source_bits, 0, 0, 0, 0, 0, flags)
    return request(RTM_GETROUTE, fixed + attrs, sequence=sequence)


# --- devices and addresses ---


def parse_link(body: bytes) -> Interface | None:
    """An interface from RTM_NEWLINK or RTM_DELLINK, without addresses; None when it is too short."""
    if len(body) < _IFINFOMSG.size:
        return None
    _family, hardware, index, flags, _change = _IFINFOMSG.unpack_from(body)
    found = attributes(body, _IFINFOMSG.size)
    counters = found.get(_IFLA_STATS64, b"")
    rx, tx = _RX_TX_BYTES.unpack_from(counters) if len(counters) >= _RX_TX_BYTES.size else (0, 0)
    return Interface(
        index=index,
        # A name may hold any byte but '/' and white space; what cannot be printed cannot be reported either.
        name="".join(c if c.isprintable() else "?" for c in text(found.get(_IFLA_IFNAME))),
        kind=text(attributes(found.get(_IFLA_LINKINFO, b"")).get(_IFLA_INFO_KIND)),
        hardware=hardware,
        flags=flags,
        rx_bytes=rx,
        tx_bytes=tx,
        master=u32(found.get(_IFLA_MASTER)),
        mtu=u32(found.get(_IFLA_MTU)) or 0,
    )


def parse_group(body: bytes) -> tuple[int, int] | None:
    """An interface's index and its group (IFLA_GROUP) from RTM_NEWLINK."""
    if len(body) < _IFINFOMSG.size:
        return None
    group = u32(attributes(body, _IFINFOMSG.size).get(_IFLA_GROUP))
    return None if group is None else (_IFINFOMSG.unpack_from(body)[2], group)


def parse_address(body: bytes) -> tuple[int, IPAddress] | None:
    """The interface's index and the local address from RTM_NEWADDR or RTM_DELADDR."""
    if len(body) < _IFADDRMSG.size:
        return None
    _family, _prefix, _flags, _scope, index = _IFADDRMSG.unpack_from(body)
    found = attributes(body, _IFADDRMSG.size)
    local = address(found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS))
    return None if local is None else (index, local)


def parse_network(body: bytes) -> tuple[int, IPNetwork] | None:
    """The interface's index and the local address's network from RTM_NEWADDR."""
    found = parse_address(body)
    if found is None or (prefix := _IFADDRMSG.unpack_from(body)[1]) > found[1].max_prefixlen:
        return None
    return found[0], ip_network((found[1], prefix), strict=False)


# --- routes and rules ---


def parse_route(body: bytes) -> Route | None:
    """The answer to `route_request`; None when it is too short."""
    if len(body) < _RTMSG.size:
        return None
    _family, prefix, _src_len, _tos, _table, _protocol, _scope, route_type, _flags = _RTMSG.unpack_from(body)
    found = attributes(body, _RTMSG.size)
    return Route(
        interface=u32(found.get(_RTA_OIF)),
        type=route_type,
        gateway=_RTA_GATEWAY in found or _RTA_VIA in found,
        source=address(found.get(_RTA_PREFSRC)),
        prefix=prefix,
        next_hop=address(found.get(_RTA_GATEWAY)),
    )


def parse_rule(body: bytes) -> Rule | None:
    """A rule from RTM_NEWRULE; None for other families and short messages."""
    if len(body) < _FIB_RULE_HDR.size:
        return None
    family, dst_len, src_len, tos, table, _, _, action, flags = _FIB_RULE_HDR.unpack_from(body)
    if family not in VERSION:
        return None
    found = attributes(body, _FIB_RULE_HDR.size)
    mark = u32(found.get(_FRA_FWMARK))
    protocol = found.get(_FRA_IP_PROTO)
    dscp = found.get(_FRA_DSCP)
    return Rule(
        version=VERSION[family],
        priority=u32(found.get(_FRA_PRIORITY)) or 0,
        action=action,
        table=u32(found.get(_FRA_TABLE)) or table,
        target=u32(found.get(_FRA_GOTO)) or 0,
        invert=bool(flags & _FIB_RULE_INVERT),
        source=_network(found.get(_FRA_SRC), src_len),
        destination=_network(found.get(_FRA_DST), dst_len),
        mark=mark,
        mask=_or_default(u32(found.get(_FRA_FWMASK)), 0xFFFFFFFF),
        uids=_number_pair(found.get(_FRA_UID_RANGE), _TWO_U32),
        protocol=protocol[0] if protocol else None,
        source_ports=_number_pair(found.get(_FRA_SPORT_RANGE), _TWO_U16),
        source_mask=_mask(found.get(_FRA_SPORT_MASK)),
        destination_ports=_number_pair(found.get(_FRA_DPORT_RANGE), _TWO_U16),
        destination_mask=_mask(found.get(_FRA_DPORT_MASK)),
        incoming=text(found.get(_FRA_IIFNAME)),
        outgoing=text(found.get(_FRA_OIFNAME)),
        tos=dscp[0] << 2 if dscp else tos,
        tos_mask=(found.get(_FRA_DSCP_MASK) or b"\x3f")[0] << 2 if dscp else 0xFF,
        l3mdev=any(found.get(_FRA_L3MDEV, b"")),
        rare=any(found.get(_FRA_TUN_ID, b"")) or not _FRA_READ.issuperset(found),
        suppress_prefix=_suppressed(found.get(_FRA_SUPPRESS_PREFIXLEN)),
        suppress_group=_suppressed(found.get(_FRA_SUPPRESS_IFGROUP)),
    )


def _mask(data: bytes | None) -> int:
    """A port mask (Linux 6.15), in host byte order like the port range that it belongs to."""
    return int.from_bytes(data, sys.byteorder) if data is not None and len(data) == 2 else FULL_PORT_MASK


def _suppressed(data: bytes | None) -> int | None:
    """None for -1, as an unsigned number: nothing is suppressed."""
    return None if data == b"\xff" * 4 else u32(data)


def parse_next_hops(bodies: Iterable[bytes]) -> dict[int, tuple[Hop, ...]]:
    """The nexthop objects from RTM_NEWNEXTHOP by their id, including groups.

    A route may refer to one instead of having devices and routers of its own, and where net.ipv4.nexthop_compat_mode
    is 0 the kernel reports only its id. One without hops drops packets, or its device is down.
    """
    single: dict[int, tuple[Hop, ...]] = {}
    groups: dict[int, list[int]] = {}
    for body in bodies:
        if len(body) < _NHMSG.size:
            continue
        *_, flags = _NHMSG.unpack_from(body)
        found = attributes(body, _NHMSG.size)
        ident = u32(found.get(_NHA_ID))
        if ident is None:
            continue
        if (members := found.get(_NHA_GROUP)) is not None:
            whole = len(members) // _NEXTHOP_GRP.size * _NEXTHOP_GRP.size
            groups[ident] = [i for (i,) in _NEXTHOP_GRP.iter_unpack(members[:whole])]
            continue
        interface = u32(found.get(_NHA_OIF))
        single[ident] = ()
        if interface is not None and not flags & _RTNH_F_DEAD:
            single[ident] = (Hop(interface, address(found.get(_NHA_GATEWAY))),)
    return single | {ident: tuple(h for i in of for h in single.get(i, ())) for ident, of in groups.items()}


def follows_from_another_message(body: bytes) -> bool:
    """Whether RTM_NEWROUTE or RTM_DELROUTE adds nothing: the local route of an address follows the message about the
    address, and a cloned route is only a cache entry.
    """
    if len(body) < _RTMSG.size:
        return True
    _family, _prefix, _src_len, _tos, table, _protocol, _scope, _type, flags = _RTMSG.unpack_from(body)
    return table == _RT_TABLE_LOCAL or bool(flags & _RTM_F_CLONED)


def parse_entry(body: bytes, next_hops: Mapping[int, tuple[Hop, ...]] | None = None) -> RouteEntry | None:
    """An entry from RTM_NEWROUTE, which may refer to one of `next_hops`; None for other families and cache entries."""
    if len(body) < _RTMSG.size:
        return None
    family, prefix, src_len, tos, table, protocol, _scope, route_type, flags = _RTMSG.unpack_from(body)
    version = VERSION.get(family)
    if version is None or flags & _RTM_F_CLONED or prefix > ADDRESS_BITS[version]:
        return None
    bits = ADDRESS_BITS[version]
    found = attributes(body, _RTMSG.size)
    destination = found.get(_RTA_DST, b"")
    if len(destination) * 8 != bits:
        if prefix:
            return None
        destination = b"\0" * (bits // 8)
    shift = bits - prefix
    hops = _hops(found, family, next_hops or {}) if not flags & _RTNH_F_DEAD else ()
    return RouteEntry(
        version=version,
        table=u32(found.get(_RTA_TABLE)) or table,
        first=int.from_bytes(destination) >> shift << shift,
        prefix=prefix,
        type=route_type,
        hops=hops,
        metric=u32(found.get(_RTA_PRIORITY)) or 0,
        tos=tos if version == 4 else 0,
        source=_network(found.get(_RTA_SRC), src_len) if src_len else None,
        by_kernel=protocol == _RTPROT_KERNEL,
    )


def _hops(found: dict[int, bytes], family: int, next_hops: Mapping[int, tuple[Hop, ...]]) -> tuple[Hop, ...]:
    several = found.get(_RTA_MULTIPATH)
    if several is None:
        interface = u32(found.get(_RTA_OIF))
        if interface is None:
            return next_hops.get(u32(found.get(_RTA_NH_ID)) or 0, ())
        return _only_hop(interface, _gateway(found, family))
    hops, offset = [], 0
    while offset + _RTNEXTHOP.size <= len(several):
        length, flags, _weight, interface = _RTNEXTHOP.unpack_from(several, offset)
        if length < _RTNEXTHOP.size or offset + length > len(several):
            break
        if not flags & _RTNH_F_DEAD:
            nested = attributes(several[offset + _RTNEXTHOP.size : offset + length])
            hops.append(Hop(interface, _gateway(nested, family)))
        offset += (length + 3) & ~3
    return tuple(hops)


@lru_cache(maxsize=256)
def _only_hop(interface: int, gateway: IPAddress | None) -> tuple[Hop, ...]:
    """One object for all routes with the same next hop: full tables have few next hops."""
    return (Hop(interface, gateway),)


def _gateway(found: dict[int, bytes], family: int) -> IPAddress | None:
    """RTA_GATEWAY, or RTA_VIA: a router of the other IP version (RFC 5549), after two bytes for its family."""
    if (near := address(found.get(_RTA_GATEWAY))) is not None:
        return near
    via = found.get(_RTA_VIA)
    return address(via[2:]) if via is not None and family == socket.AF_INET else None


def _network(packed: bytes | None, prefix: int) -> IPNetwork | None:
    first = address(packed)
    if first is None or not 0 < prefix <= first.max_prefixlen:
        return None
    return ip_network((first, prefix), strict=False)


def _number_pair(data: bytes | None, shape: struct.Struct) -> tuple[int, int] | None:
    if data is None or len(data) != shape.size:
        return None
    low, high = shape.unpack(data)
    return low, high


def _or_default(value: int | None, default: int) -> int:
    return default if value is None else value
