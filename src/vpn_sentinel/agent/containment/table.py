"""The owner of a table, read from the kernel (nfnetlink): it takes microseconds and no library.

Numbers are those of linux/netfilter/nfnetlink.h and nf_tables.h. A table's comment is user data that nft(8)
writes since 0.9.7 and the kernel keeps since 5.10: a list of type (1 byte), length (1 byte) and value, of which type 0
is the comment.
"""

import errno
import socket
import struct
from typing import Final

from vpn_sentinel.agent.net.netlink import NLMSG_ERROR, attribute, attributes, error_number, messages, request

_NETLINK_NETFILTER: Final = 12
_NFT_MSG_GETTABLE: Final = (10 << 8) | 1  # of NFNL_SUBSYS_NFTABLES
_NFGENMSG: Final = struct.Struct("=BBH")
_NFPROTO_INET: Final = 1
_NFTA_TABLE_NAME, _NFTA_TABLE_USERDATA = 1, 6


def owner_of(table: str) -> str | None:
    """The comment of `table` in the family `inet`, "" when it has none; None when there is no such table.

    Raises OSError: PermissionError without CAP_NET_ADMIN, another where the kernel has no nftables.
    """
    name = table.encode() + b"\0"
    body = _NFGENMSG.pack(_NFPROTO_INET, 0, 0) + attribute(_NFTA_TABLE_NAME, name)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as sock:
        sock.settimeout(1.0)
        sock.send(request(_NFT_MSG_GETTABLE, body, sequence=1))
        return read_owner(sock.recv(65536))


def read_owner(answer: bytes) -> str | None:
    """The same, from the kernel's reply. Raises OSError."""
    for message in messages(answer):
        if message.type == NLMSG_ERROR:
            code = error_number(message.body)
            if code == errno.ENOENT:
                return None
            raise OSError(code, "the kernel does not show its nftables")
        return comment_in(attributes(message.body, _NFGENMSG.size).get(_NFTA_TABLE_USERDATA, b""))
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
