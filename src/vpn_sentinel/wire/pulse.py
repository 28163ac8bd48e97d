"""Pulses: the echo's question, asked again and again, with a number and with what was heard so far.

A pulse is a request of `wire.echo` whose 24 spare bytes are used, so a server that does not know pulses answers it:
`VSE1`, 1 byte type (1), 3 bytes zero, 8 bytes id, 4 bytes run, 4 bytes number, 1 byte flags (bit 0 set), 3 bytes zero,
4 bytes `heard`, 4 bytes `silent`, 8 bytes tag, 4 bytes zero, 16 bytes MAC. Its reply is the echo's: run
and number are its nonce.

A sized pulse (type 3) carries zeros between that and the MAC, up to 1472 bytes in all; its reply (type 4) is exactly as
large, so that both directions are tested. No reply is ever larger than its request.

`run` is random for each start of an agent, `number` counts up from 1 in it, pulses of every kind together. `heard` is
the highest number of which the reply came, 0 for none; `silent` the milliseconds since the last reply came, NEVER for
none. So the server knows whether its replies arrive, though it never hears of it otherwise.
"""

import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.wire.echo import MAC_BYTES, MAGIC, REPLY, SIZE_BYTES, is_genuine, mac

MAX_SIZE_BYTES: Final = 1472  # what an Ethernet frame takes of a UDP datagram in IPv4 (RFC 894)
NEVER: Final = 0xFFFFFFFF
_ASK, _TELL, _ASK_SIZED, _TELL_SIZED = 1, 2, 3, 4
_IS_PULSE: Final = 1
_REQUEST: Final = struct.Struct("!4sB3x8sIIB3xII8s4x")
_HEADS: Final = (MAGIC + bytes([_ASK]), MAGIC + bytes([_ASK_SIZED]))


@dataclass(frozen=True, slots=True)
class Pulse:
    """A request as its bytes say it. A question of `wire.echo` has no number: `numbered` is False."""

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
    kind = _ASK if size is None else _ASK_SIZED
    body = _REQUEST.pack(MAGIC, kind, ident, run, number, _IS_PULSE, heard, silent, tag)
    if size is not None:
        body = body.ljust(size - MAC_BYTES, b"\0")
    return body + mac(body, key)


def nonce(run: int, number: int) -> bytes:
    """The 8 bytes of a pulse that the echo knows as its nonce."""
    return struct.pack("!II", run, number)


def is_request(datagram: bytes) -> bool:
    """Whether it has the shape of a request; whose MAC is another question."""
    head = datagram[:5]
    return (head == _HEADS[0] and len(datagram) == SIZE_BYTES) or (
        head == _HEADS[1] and SIZE_BYTES <= len(datagram) <= MAX_SIZE_BYTES
    )


def ident_of(datagram: bytes) -> bytes:
    return datagram[8:16]


def read(datagram: bytes) -> Pulse:
    """What a datagram says of which `is_request` and `is_genuine` hold."""
    _magic, kind, ident, run, number, flags, heard, silent, _tag = _REQUEST.unpack_from(datagram)
    return Pulse(ident, run, number, heard, silent, bool(flags & _IS_PULSE), kind == _ASK_SIZED)


def packed(host: str) -> bytes:
    """The bytes of an address as a socket tells it, an IPv4-mapped one as the IPv4 address it is."""
    bare = host.partition("%")[0]
    if ":" not in bare:
        return socket.inet_pton(socket.AF_INET, bare)
    found = socket.inet_pton(socket.AF_INET6, bare)
    return found[12:] if found[:12] == b"\0" * 10 + b"\xff\xff" else found


def reply(datagram: bytes, address: bytes, port: int, key: bytes) -> bytes:
    """The answer to a genuine request from `address` (4 or 16 bytes) and `port`: exactly as large."""
    kind = _TELL if datagram[4] == _ASK else _TELL_SIZED
    family = 4 if len(address) == 4 else 6
    body = REPLY.pack(MAGIC, kind, family, port, datagram[8:16], datagram[16:24], address)
    body = body.ljust(len(datagram) - MAC_BYTES, b"\0")
    return body + mac(body, key)


def read_reply(datagram: bytes, ident: bytes, run: int, key: bytes) -> tuple[int, IPAddress] | None:
    """The number of the pulse of `run` that a genuine reply answers, and the address it names; else None."""
    if not SIZE_BYTES <= len(datagram) <= MAX_SIZE_BYTES or not is_genuine(datagram, key):
        return None
    magic, kind, family, _port, got_ident, nonce, raw = REPLY.unpack_from(datagram)
    if magic != MAGIC or kind not in (_TELL, _TELL_SIZED) or got_ident != ident or family not in (4, 6):
        return None
    if int.from_bytes(nonce[:4], "big") != run:
        return None
    return int.from_bytes(nonce[4:], "big"), IPv4Address(raw[:4]) if family == 4 else IPv6Address(raw)
