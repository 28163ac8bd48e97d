"""Pulses: the echo's request, sent repeatedly, with a number and a report on the replies so far.

A pulse is a request of `wire.echo` whose 24 spare bytes are used, so a server that does not know pulses answers it:
`VSE1`, 1 byte type (1), 3 bytes zero, 8 bytes id, 4 bytes run, 4 bytes number, 1 byte flags (bit 0 set), 3 bytes zero,
4 bytes `heard`, 4 bytes `silent`, 8 bytes tag, 4 bytes zero, 16 bytes MAC. Its reply is the echo's: run and
number are its nonce.

A sized pulse (type 3) carries zeros between that and the MAC, up to 1472 bytes in all; its reply (type 4) is exactly as
large, so that both directions are tested. No reply is ever larger than its request.

`run` is random for each start of an agent, `number` counts up from 1 in it, pulses of every kind together. `heard` is
the highest number whose reply arrived, 0 for none; `silent` is the milliseconds since the last reply arrived, NEVER for
none. So the server knows whether its replies arrive.
"""

import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.wire.echo import MAC_BYTES, MAGIC, REPLY, SIZE_BYTES, is_genuine, mac

MAX_SIZE_BYTES: Final = 1472  # the UDP payload of a full Ethernet frame with IPv4 (RFC 894)
NEVER: Final = 0xFFFFFFFF
_REQUEST_TYPE, _REPLY_TYPE, _SIZED_REQUEST_TYPE, _SIZED_REPLY_TYPE = 1, 2, 3, 4
_PULSE_FLAG: Final = 1
_REQUEST: Final = struct.Struct("!4sB3x8sIIB3xII8s4x")
_REQUEST_HEADS: Final = (MAGIC + bytes([_REQUEST_TYPE]), MAGIC + bytes([_SIZED_REQUEST_TYPE]))


@dataclass(frozen=True, slots=True)
class Pulse:
    """A decoded request. A request of `wire.echo` has no number: `numbered` is False."""

    ident: bytes
    run: int
    number: int
    heard: int
    silent: int
    numbered: bool
    sized: bool


def request(
    ident: bytes,
    key: bytes,
    *,
    run: int,
    number: int,
    heard: int = 0,
    silent: int = NEVER,
    size: int | None = None,
    tag: bytes = b"",
) -> bytes:
    """A pulse, or a sized one of `size` bytes (64 to 1472)."""
    kind = _REQUEST_TYPE if size is None else _SIZED_REQUEST_TYPE
    body = _REQUEST.pack(MAGIC, kind, ident, run, number, _PULSE_FLAG, heard, silent, tag)
    if size is not None:
        body = body.ljust(size - MAC_BYTES, b"\0")
    return body + mac(body, key)


def nonce(run: int, number: int) -> bytes:
    """The 8 bytes of a pulse that are the echo's nonce."""
    return struct.pack("!II", run, number)


def is_request(datagram: bytes) -> bool:
    """Whether it has the form of a request; its MAC is not checked."""
    head = datagram[:5]
    return (head == _REQUEST_HEADS[0] and len(datagram) == SIZE_BYTES) or (
        head == _REQUEST_HEADS[1] and SIZE_BYTES <= len(datagram) <= MAX_SIZE_BYTES
    )


def ident_of(datagram: bytes) -> bytes:
    return datagram[8:16]


def read(datagram: bytes) -> Pulse:
    """Decode a datagram for which `is_request` and `is_genuine` are true."""
    _magic, kind, ident, run, number, flags, heard, silent, _tag = _REQUEST.unpack_from(datagram)
    return Pulse(ident, run, number, heard, silent, bool(flags & _PULSE_FLAG), kind == _SIZED_REQUEST_TYPE)


def packed(host: str) -> bytes:
    """The bytes of an address as sockets return it, an IPv4-mapped one as its IPv4 address."""
    bare = host.partition("%")[0]
    if ":" not in bare:
        return socket.inet_pton(socket.AF_INET, bare)
    found = socket.inet_pton(socket.AF_INET6, bare)
    return found[12:] if found[:12] == b"\0" * 10 + b"\xff\xff" else found


def reply(datagram: bytes, address: bytes, port: int, key: bytes) -> bytes:
    """The reply to a genuine request from `address` (4 or 16 bytes) and `port`: exactly as large."""
    kind = _REPLY_TYPE if datagram[4] == _REQUEST_TYPE else _SIZED_REPLY_TYPE
    family = 4 if len(address) == 4 else 6
    body = REPLY.pack(MAGIC, kind, family, port, datagram[8:16], datagram[16:24], address)
    body = body.ljust(len(datagram) - MAC_BYTES, b"\0")
    return body + mac(body, key)


def read_reply(datagram: bytes, ident: bytes, run: int, key: bytes) -> tuple[int, IPAddress] | None:
    """The number of the pulse of `run` that a genuine reply answers, and the address it names; else None."""
    if not SIZE_BYTES <= len(datagram) <= MAX_SIZE_BYTES or not is_genuine(datagram, key):
        return None
    magic, kind, family, _port, got_ident, nonce, raw = REPLY.unpack_from(datagram)
    if magic != MAGIC or kind not in (_REPLY_TYPE, _SIZED_REPLY_TYPE) or got_ident != ident or family not in (4, 6):
        return None
    if int.from_bytes(nonce[:4], "big") != run:
        return None
    return int.from_bytes(nonce[4:], "big"), IPv4Address(raw[:4]) if family == 4 else IPv6Address(raw)
