"""A lock that makes one agent the owner of the rules in a network namespace.

It is a name in the abstract namespace of Unix sockets (unix(7)): the kernel keeps these names per network namespace, as
it keeps the rules, and frees a name when its holder dies. It takes no file and no privilege, so any program here can
take the name; only a holder of this agent's user, or root, counts as an agent. Others must not prevent containment.
"""

import os
import socket
import struct
from typing import Final

_SOCKET_NAME: Final = "\0vpn-sentinel-containment"
_CREDENTIALS: Final = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class SingleInstanceLock:
    """`bound` is False also for a lock that was taken although another user's program holds its name."""

    def __init__(self) -> None:
        self._sock: socket.socket | None = None

    @property
    def bound(self) -> bool:
        return self._sock is not None

    def take(self) -> bool:
        """Take the lock; return whether this agent holds it."""
        if self._sock is not None:
            return True
        try:
            sock = _socket()
        except OSError:  # this sandbox has no Unix sockets
            return False
        try:
            sock.bind(_SOCKET_NAME)
            sock.listen(8)
        except OSError:  # another program holds the name
            sock.close()
            return _holder_uid() not in (0, os.geteuid())
        self._sock = sock
        return True

    def leave(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _holder_uid() -> int | None:
    """The user id of the holder of the name; None for one that does not listen as an agent does."""
    try:
        with _socket() as sock:
            sock.connect(_SOCKET_NAME)
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    except OSError:
        return None
    return int(_CREDENTIALS.unpack(credentials)[1])


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
