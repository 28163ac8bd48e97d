"""When the kernel saw a packet, however late it is read: SO_TIMESTAMPNS (socket(7), timestamping.rst)."""

import socket
import struct
from typing import Final

_SO_TIMESTAMPNS: Final = 35  # asm-generic/socket.h
_TIMESPEC: Final = struct.Struct("@qq")
ANCILLARY: Final = socket.CMSG_SPACE(_TIMESPEC.size)
"""Bytes of ancillary data that recvmsg needs room for."""


def note_times(sock: socket.socket) -> None:
    """Have the kernel tell the time of each packet that the socket gets. Raises OSError."""
    sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)


def packet_times() -> socket.socket | None:
    """A socket that has the kernel note the time of each packet, to be kept open; None where there is none to be had.

    It begins some time after the first socket that asks for it (net_enable_timestamp() in net/core/dev.c leaves it to a
    worker), and says of earlier packets when they were read: which of two came first would be anybody's guess.
    """
    try:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        note_times(sock)
    except OSError:
        return None
    return sock


def passed(told: list[tuple[int, int, bytes]]) -> float:
    """The time of a packet by the wall clock, in seconds, out of recvmsg's ancillary data; 0.0 where it has none."""
    if not told:
        return 0.0
    seconds, nanoseconds = _TIMESPEC.unpack(told[0][2])
    return float(seconds + nanoseconds / 1e9)
