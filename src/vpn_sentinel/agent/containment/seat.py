"""One owner of the rules in a network namespace: whoever holds the seat.

A name in the abstract space of Unix sockets (unix(7)): the kernel keeps that space per network namespace, as it keeps
the rules, and frees the name when its holder dies. No file, no privilege.
"""

import socket
from typing import Final

_NAME: Final = "\0vpn-sentinel-containment"


class Seat:
    def __init__(self) -> None:
        self._sock: socket.socket | None = None

    def take(self) -> bool:
        """Whether the seat is ours, now or since earlier."""
        if self._sock is not None:
            return True
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            sock.bind(_NAME)
        except OSError:  # somebody has it, or this sandbox has no Unix sockets: either way it is not ours
            sock.close()
            return False
        self._sock = sock
        return True

    def leave(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None
