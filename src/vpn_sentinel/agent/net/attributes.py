"""What all netlink messages have alike (netlink(7)): attributes, the typed fields behind a fixed part, and errors."""

import errno
import struct
from typing import Final

_HEADER: Final = struct.Struct("=HH")
_NESTED_MASK: Final = 0x3FFF
_ERROR: Final = struct.Struct("=i")


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


def error_number(body: bytes) -> int:
    """The error that a message of type NLMSG_ERROR tells; EPROTO where it is cut off."""
    return -int(_ERROR.unpack_from(body)[0]) if len(body) >= _ERROR.size else errno.EPROTO
