"""DNS messages (RFC 1035), only what the probes need: one question, and a defensive parser for the answer."""

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from vpn_sentinel.domain.policy import IPAddress

A, CNAME, TXT, AAAA, OPT = 1, 5, 16, 28, 41
IN, CHAOS = 1, 3
NOERROR, SERVFAIL, NXDOMAIN, REFUSED = 0, 2, 3, 5
_HEADER: Final = struct.Struct("!6H")
_RECURSE, _RESPONSE, _TRUNCATED = 0x0100, 0x8000, 0x0200
_MAX_RECORDS: Final = 64


class BadMessageError(ValueError):
    """Not a DNS message, or a malformed one."""


@dataclass(frozen=True, slots=True)
class DnsReply:
    """`addresses` and `texts` are those of the answer section; a TXT record is a tuple of its strings.

    `aliased`: there is a CNAME record.
    """

    ident: int
    rcode: int
    addresses: tuple[IPAddress, ...] = ()
    texts: tuple[tuple[str, ...], ...] = ()
    aliased: bool = False


def query(ident: int, name: str, kind: int, klass: int = IN) -> bytes:
    """Pack one question with recursion desired. Raises ValueError when `name` is no domain name."""
    labels = [label.encode("ascii") for label in name.rstrip(".").split(".")]
    if any(not 0 < len(label) < 64 for label in labels) or sum(len(label) + 1 for label in labels) > 254:
        msg = f"{name!r} is not a domain name"
        raise ValueError(msg)
    question = b"".join(bytes([len(label)]) + label for label in labels) + b"\0" + struct.pack("!HH", kind, klass)
    return _HEADER.pack(ident, _RECURSE, 1, 0, 0, 0) + question


def parse(message: bytes, asked: bytes) -> DnsReply:
    """Read the answer to the query `asked`. Raises BadMessageError for anything else.

    A truncated answer is read as far as it goes: no probe needs more than the first record.
    """
    if len(message) < _HEADER.size:
        raise BadMessageError("shorter than a header")
    ident, flags, questions, answers, _authority, _additional = _HEADER.unpack_from(message)
    if not flags & _RESPONSE or message[:2] != asked[:2]:
        raise BadMessageError("not the answer to this query")
    offset = _HEADER.size
    if questions > 1:
        raise BadMessageError("more than one question")
    if questions == 1:
        end = _skip_name(message, offset) + 4
        # Compared without case: some forwarders change it.
        if message[offset:end].lower() != asked[_HEADER.size :].lower():
            raise BadMessageError("answers another question")
        offset = end
    elif not flags & 0xF:
        raise BadMessageError("an answer without its question")
    addresses: list[IPAddress] = []
    texts: list[tuple[str, ...]] = []
    aliased = False
    for _ in range(min(answers, _MAX_RECORDS)):
        try:
            offset, kind = _record(message, offset, addresses, texts)
            aliased = aliased or kind == CNAME
        except BadMessageError:
            if flags & _TRUNCATED:
                break
            raise
    return DnsReply(ident, flags & 0xF, tuple(addresses), tuple(texts), aliased)


def _record(message: bytes, offset: int, addresses: list[IPAddress], texts: list[tuple[str, ...]]) -> tuple[int, int]:
    """Parse one record; returns the offset after it, and its type."""
    offset = _skip_name(message, offset)
    if offset + 10 > len(message):
        raise BadMessageError("a record is cut off")
    kind = int.from_bytes(message[offset : offset + 2])
    length = int.from_bytes(message[offset + 8 : offset + 10])  # after class and TTL
    offset += 10
    data = message[offset : offset + length]
    if len(data) != length:
        raise BadMessageError("a record is cut off")
    if kind == A and length == 4:
        addresses.append(IPv4Address(data))
    elif kind == AAAA and length == 16:
        addresses.append(IPv6Address(data))
    elif kind == TXT:
        texts.append(_strings(data))
    return offset + length, kind


def _skip_name(message: bytes, offset: int) -> int:
    """The offset after a name. A pointer ends it and is never followed, so there can be no loop."""
    for _ in range(128):
        if offset >= len(message):
            break
        length = message[offset]
        if length == 0:
            return offset + 1
        if length >= 0xC0:
            return offset + 2
        if length >= 0x40:
            break
        offset += 1 + length
    raise BadMessageError("a name that does not end")


def _strings(data: bytes) -> tuple[str, ...]:
    found, offset = [], 0
    while offset < len(data):
        length = data[offset]
        string = data[offset + 1 : offset + 1 + length]
        if len(string) != length:
            raise BadMessageError("a text is cut off")
        found.append(string.decode("ascii", "replace"))
        offset += 1 + length
    return tuple(found)
