"""Parses the first bytes of a packet: addresses, ports, the name in a DNS query. Never raises on malformed bytes."""

import struct
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from vpn_sentinel.domain.policy import IPAddress

IPV4, IPV6 = 0x0800, 0x86DD  # of linux/if_ether.h
_PROTOCOL_NAMES: Final = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmp6"}
_IPPROTO_FRAGMENT: Final = 44
_ECHO_REQUEST: Final = {1: 8, 58: 128}
SYN, RST, SYN_ACK = 0x02, 0x04, 0x12  # TCP's flags (RFC 9293, 3.1)
DNS_PORT: Final = 53
_MAX_NAME_CHARS: Final = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """`size` is the IP packet's, in bytes. `echo` is the identifier of a ping (RFC 792, RFC 4443), `flags` are TCP's.

    `fragment` says that it is a fragment without ports: any of IPv6, and of IPv4 those after the first. `ttl` is the
    time to live, or hop limit; `tos` the type of service, or traffic class. `name` is the name that a DNS query asks
    for, None when it is none. `payload` is what follows the header of UDP or TCP, as far as it was captured, and
    `payload_size` its length in bytes as it was sent.
    """

    protocol: int
    source: IPAddress
    destination: IPAddress
    source_port: int | None = None
    destination_port: int | None = None
    size: int = 0
    icmp_type: int | None = None
    echo: int | None = None
    flags: int = 0
    fragment: bool = False
    ttl: int = 64
    tos: int = 0
    name: str | None = None
    payload: bytes = b""
    payload_size: int = 0

    @property
    def opens(self) -> bool:
        """Whether it opens a TCP connection."""
        return self.flags & SYN_ACK == SYN

    @property
    def protocol_name(self) -> str:
        """The protocol's name in an observation."""
        return _PROTOCOL_NAMES.get(self.protocol, str(self.protocol))


def decode(ethertype: int, data: bytes) -> Packet | None:
    """Read a packet from its IP header on, possibly cut off; None when it is not IP."""
    if ethertype == IPV4 and len(data) >= 20 and data[0] >> 4 == 4 and data[0] & 0xF >= 5:
        size, offset = struct.unpack_from("!H", data, 2)[0], struct.unpack_from("!H", data, 6)[0] & 0x1FFF
        return _transport(
            data, (data[0] & 0xF) * 4, data[9], (IPv4Address(data[12:16]), IPv4Address(data[16:20])),
            size or len(data), ttl=data[8], fragment=offset > 0, tos=data[1],
        )  # fmt: skip
    if ethertype == IPV6 and len(data) >= 40 and data[0] >> 4 == 6:
        size = 40 + struct.unpack_from("!H", data, 4)[0]
        ends = IPv6Address(data[8:24]), IPv6Address(data[24:40])
        tos = struct.unpack_from("!H", data)[0] >> 4 & 0xFF
        return _transport(data, 40, data[6], ends, size, ttl=data[7], fragment=data[6] == _IPPROTO_FRAGMENT, tos=tos)
    return None


def _transport(
    data: bytes, start: int, protocol: int, ends: tuple[IPAddress, IPAddress], size: int, *, ttl: int, fragment: bool,
    tos: int,
) -> Packet:  # fmt: skip
    source, to = ends
    bare = Packet(protocol=protocol, source=source, destination=to, size=size, ttl=ttl, fragment=fragment, tos=tos)
    rest = data[start:]
    if fragment:
        return bare
    if protocol in (1, 58) and rest:
        pings = rest[0] == _ECHO_REQUEST[protocol] and len(rest) >= 6
        return replace(bare, icmp_type=rest[0], echo=int.from_bytes(rest[4:6]) if pings else None)
    if protocol not in (6, 17) or len(rest) < 4:
        return bare
    source_port, destination_port = struct.unpack_from("!HH", rest)
    tcp = protocol == 6
    payload = rest[(rest[12] >> 4) * 4 :] if tcp and len(rest) > 12 else b"" if tcp else rest[8:]
    name = None
    if destination_port == DNS_PORT:
        name = asked_name(payload[2:] if tcp else payload)
    return replace(
        bare,
        source_port=source_port,
        destination_port=destination_port,
        flags=rest[13] if tcp and len(rest) > 13 else 0,
        name=name,
        payload=payload,
        payload_size=max(0, size - start - (len(rest) - len(payload))) if tcp else max(0, size - start - 8),
    )


def asked_name(message: bytes) -> str | None:
    """The name in a DNS query (RFC 1035, 4.1.2); None when it is not one. Unprintable bytes become `?`."""
    if len(message) < 13 or message[2] & 0x80 or struct.unpack_from("!H", message, 4)[0] == 0:
        return None
    labels, offset = [], 12
    while offset < len(message) and 0 < message[offset] < 64:
        length = message[offset]
        label = message[offset + 1 : offset + 1 + length]
        if len(label) < length:
            return None
        labels.append("".join(chr(b) if 0x20 < b < 0x7F and b != 0x2E else "?" for b in label))
        offset += 1 + length
    if offset >= len(message) or message[offset] != 0:
        return None
    return ".".join(labels)[:_MAX_NAME_CHARS] or "."
