"""Netlink attributes (netlink(7)): the typed fields behind the fixed part of a message."""

import struct
from typing import Final

_HEADER: Final = struct.Struct("=HH")
_NESTED_MASK: Final = 0x3FFF


def attributes(body: bytes, offset: int = 0) -> dict[int, bytes]:
    """The attributes behind a message's fixed part, the last of each kind; broken ones end the list."""
    found = {}
    while offset + _HEADER.size <= len(body):
        length, kind = _HEADER.unpack_from(body, offset)
        if length < _HEADER.size or offset + length > len(body):
            break
        found[kind & _NESTED_MASK] = body[offset + _HEADER.size : offset + length]
        offset += (length + 3) & ~3
    return found


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded."""
    return _HEADER.pack(_HEADER.size + len(value), kind) + value + b"\0" * (-len(value) % 4)
