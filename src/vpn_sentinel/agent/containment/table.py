"""Whose table is there? Asked of the kernel itself (nfnetlink), so that looking costs microseconds and no library.

Numbers are those of linux/netfilter/nfnetlink.h and nf_tables.h. A table's comment is user data that nft(8)
writes since 0.9.7 and the kernel keeps since 5.10: a list of type (1 byte), length (1 byte) and value, of which type 0
is the comment.
"""

import errno
import socket
import struct
from typing import Final

from vpn_sentinel.agent.net.attributes import attributes, error_number
from vpn_sentinel.agent.net.rtnetlink import messages

_NETFILTER: Final = 12  # NETLINK_NETFILTER
_GET_TABLE: Final = (10 << 8) | 1  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE
_INET: Final = 1  # NFPROTO_INET
_NAME, _USER_DATA = 1, 6  # NFTA_TABLE_NAME, NFTA_TABLE_USERDATA
_ERROR, _REQUEST = 2, 1
_HEADER: Final = struct.Struct("=IHHII")


def owner_of(table: str) -> str | None:
    """The comment of the table `inet` `table`, empty when it has none; None when there is no such table.

    Raises OSError: PermissionError without CAP_NET_ADMIN, another where the kernel has no nftables.
    """
    name = table.encode() + b"\0"
    attribute = struct.pack("=HH", 4 + len(name), _NAME) + name + b"\0" * (-len(name) % 4)
    body = struct.pack("=BBH", _INET, 0, 0) + attribute
    request = _HEADER.pack(_HEADER.size + len(body), _GET_TABLE, _REQUEST, 1, 0) + body
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETFILTER) as sock:
        sock.settimeout(1.0)
        sock.send(request)
        return read_owner(sock.recv(65536))


def read_owner(answer: bytes) -> str | None:
    """The same out of the kernel's answer. Raises OSError."""
    for message in messages(answer):
        if message.kind == _ERROR:
            code = error_number(message.body)
            if code == errno.ENOENT:
                return None
            raise OSError(code, "the kernel does not show its nftables")
        return comment_in(attributes(message.body, 4).get(_USER_DATA, b""))
    raise OSError(errno.EPROTO, "the kernel gave no answer about its nftables")


def comment_in(data: bytes) -> str:
    """The comment in a table's user data, empty when there is none."""
    offset = 0
    while offset + 2 <= len(data):
        kind, length = data[offset], data[offset + 1]
        if kind == 0:
            return data[offset + 2 : offset + 2 + length].rstrip(b"\0").decode("utf-8", "replace")
        offset += 2 + length
    return ""
