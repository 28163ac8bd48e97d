"""The kernel's timestamps of packets, however late they are read: SO_TIMESTAMPNS (socket(7), timestamping.rst)."""

import socket
import struct
from typing import Final

_SO_TIMESTAMPNS: Final = 35  # asm-generic/socket.h
_TIMESPEC: Final = struct.Struct("@qq")
ANCILLARY_BYTES: Final = socket.CMSG_SPACE(_TIMESPEC.size)
"""The buffer size for ancillary data that recvmsg needs."""


def enable_timestamps(sock: socket.socket) -> None:
    """Have the kernel timestamp each packet that the socket receives. Raises OSError."""
    sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)


def timestamp_socket() -> socket.socket | None:
    """A socket that keeps the kernel's timestamps enabled while it is open; None when there is no permission or memory.

    The kernel begins some time after the first socket that asks for them (net_enable_timestamp() in net/core/dev.c
    leaves it to a worker), and gives earlier packets the time when they were read: their order would be lost.
    """
    try:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        enable_timestamps(sock)
    except OSError:
        return None
    return sock


def packet_time(ancillary: list[tuple[int, int, bytes]]) -> float:
    """A packet's timestamp (wall clock, seconds) from recvmsg's ancillary data; 0.0 if it has none."""
    if not ancillary:
        return 0.0
    seconds, nanoseconds = _TIMESPEC.unpack(ancillary[0][2])
    return float(seconds + nanoseconds / 1e9)
