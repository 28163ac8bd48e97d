"""One owner of the rules in a network namespace: whoever holds the lock.

A name in the abstract space of Unix sockets (unix(7)): the kernel keeps that space per network namespace, as it keeps
the rules, and frees the name when its holder dies. No file, no privilege: so any program here can take the name, and
only a holder of our own user, or root, is believed to be an agent. Others must not keep the ways out open by it.
"""

import os
import socket
import struct
from typing import Final

_NAME: Final = "\0vpn-sentinel-containment"
_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class SingleInstanceLock:
    """`bound` is False also for a lock that was taken though a stranger holds its name."""

    def __init__(self) -> None:
        self._sock: socket.socket | None = None

    @property
    def bound(self) -> bool:
        return self._sock is not None

    def take(self) -> bool:
        """Whether the lock is ours, now or since earlier."""
        if self._sock is not None:
            return True
        try:
            sock = _socket()
        except OSError:  # this sandbox has no Unix sockets
            return False
        try:
            sock.bind(_NAME)
            sock.listen(8)
        except OSError:  # somebody has it
            sock.close()
            return _holder() not in (0, os.geteuid())
        self._sock = sock
        return True

    def leave(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _holder() -> int | None:
    """The user who holds the name; None for one that does not listen as an agent does."""
    try:
        with _socket() as sock:
            sock.connect(_NAME)
            told = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError:
        return None
    return int(_CREDENTIALS.unpack(told)[1])


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
