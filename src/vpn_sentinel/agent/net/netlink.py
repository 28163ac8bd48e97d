"""What all netlink messages have in common (netlink(7)): a header, attributes, the values in them, and errors.

They are packed and parsed only here; constants have the kernel's names. All fields are in host byte order.
"""

import errno
import struct
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Final, NamedTuple

from vpn_sentinel.domain.policy import IPAddress

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_DUMP_INTR, NLM_F_DUMP = 0x1, 0x10, 0x300
NLMSG_HDR: Final = struct.Struct("=IHHII")  # struct nlmsghdr
U32: Final = struct.Struct("=I")
_NLATTR: Final = struct.Struct("=HH")
_NLA_TYPE_MASK: Final = 0x3FFF
_ERROR: Final = struct.Struct("=i")


class NetlinkMessage(NamedTuple):
    type: int
    flags: int
    sequence: int
    body: bytes


def request(message_type: int, body: bytes, *, sequence: int, flags: int = 0) -> bytes:
    """One message to the kernel, with NLM_F_REQUEST added to `flags`."""
    length = NLMSG_HDR.size + len(body)
    return NLMSG_HDR.pack(length, message_type, NLM_F_REQUEST | flags, sequence, 0) + body


def messages(data: bytes) -> Iterator[NetlinkMessage]:
    """Split one datagram from the kernel. A truncated message at the end is left out."""
    offset = 0
    while offset + NLMSG_HDR.size <= len(data):
        length, message_type, flags, sequence, _pid = NLMSG_HDR.unpack_from(data, offset)
        if length < NLMSG_HDR.size or offset + length > len(data):
            return
        yield NetlinkMessage(message_type, flags, sequence, data[offset + NLMSG_HDR.size : offset + length])
        offset += _aligned(length)


def attribute(attribute_type: int, value: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    return _NLATTR.pack(_NLATTR.size + len(value), attribute_type) + value + b"\0" * (-len(value) % 4)


def attributes(body: bytes, offset: int = 0) -> dict[int, bytes]:
    """The attributes after a message's fixed part, the last of each type; a malformed one ends the list."""
    found = {}
    while offset + _NLATTR.size <= len(body):
        length, attribute_type = _NLATTR.unpack_from(body, offset)
        if length < _NLATTR.size or offset + length > len(body):
            break
        found[attribute_type & _NLA_TYPE_MASK] = body[offset + _NLATTR.size : offset + length]
        offset += _aligned(length)
    return found


def u32(value: bytes | None) -> int | None:
    """A 32-bit number; None when the value is missing or of another size."""
    return int(U32.unpack(value)[0]) if value is not None and len(value) == U32.size else None


def text(value: bytes | None) -> str:
    """A text without its trailing zeros; empty when the value is missing."""
    return (value or b"").rstrip(b"\0").decode("utf-8", "replace")


def address(value: bytes | None) -> IPAddress | None:
    """An address of either IP version; None when the value is missing or of another size."""
    return ip_address(value) if value is not None and len(value) in (4, 16) else None


def error_number(body: bytes) -> int:
    """The errno in a message of type NLMSG_ERROR; EPROTO when it is truncated."""
    return -int(_ERROR.unpack_from(body)[0]) if len(body) >= _ERROR.size else errno.EPROTO


def _aligned(length: int) -> int:
    return (length + 3) & ~3
