"""Sockets that are closed already: the kernel reports each one when it is destroyed (sock_diag(7), linux/sock_diag.h).

Groups SKNLGRP_INET_TCP_DESTROY and so on are readable without any capability, for this network namespace. The kernel
reports which ports and addresses a socket had and which device it was bound to, but not its owner: by then it has none
(inet_diag_handler_get_info in net/ipv4/inet_diag.c). It does so when the last packet has left the machine.
"""

import asyncio
import errno
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from vpn_sentinel.agent.net.netlink import NLMSG_HDR, attributes
from vpn_sentinel.agent.net.sockets import NETLINK_SOCK_DIAG, SOCKET_SIZE, Socket, parse_socket
from vpn_sentinel.domain.policy import IPAddress

PAUSE_S: Final = 0.1  # between two reads, however many sockets are destroyed
_GROUPS: Final = 0b1111  # of TCP and UDP, of IPv4 and IPv6
_BUFFER_BYTES: Final = 1024 * 1024  # asked for; the kernel may give less (rmem_max)
_MAX_KEPT: Final = 2048
_KEPT_BYTES: Final = slice(
    NLMSG_HDR.size, NLMSG_HDR.size + SOCKET_SIZE + 8
)  # with the first attribute, INET_DIAG_PROTOCOL
_LOCAL_PORT_BYTES: Final = slice(4, 6)  # idiag_sport in struct inet_diag_msg
_INET_DIAG_PROTOCOL: Final = 10


class ClosedSockets:
    """The last ones, bounded. Messages are kept unparsed: most are never queried."""

    def __init__(self, wall: Callable[[], float]) -> None:
        """`wall` is the clock of the kernel's packet timestamps. Raises OSError without sock_diag."""
        self._wall = wall
        self._closed: deque[tuple[float, bytes]] = deque(maxlen=_MAX_KEPT)  # time of reading, and inet_diag_msg
        self._lost = float("-inf")
        self._resume: asyncio.TimerHandle | None = None
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._sock = socket.socket(socket.AF_NETLINK, kind, NETLINK_SOCK_DIAG)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
            self._sock.bind((0, _GROUPS))
        except OSError:
            self._sock.close()
            raise
        asyncio.get_running_loop().add_reader(self._sock, self._readable)

    def close(self) -> None:
        if self._resume is not None:
            self._resume.cancel()
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()

    def of(
        self, protocol: int, source: IPAddress, port: int, far: IPAddress, far_port: int, *, since: float
    ) -> list[Socket]:
        """The sockets that may have sent from `source` and `port` to `far`, and ended after `since`.

        Their `uid` and `inode` have no meaning. `near` is what a socket was bound to, or connected from.
        """
        self._read()
        found: list[Socket] = []
        now = self._wall()
        for read, body in reversed(self._closed):
            if read > now:
                continue  # from before the clock was set back
            if read < since:
                break
            if int.from_bytes(body[_LOCAL_PORT_BYTES]) != port or (closed := parse_socket(body)) is None:
                continue
            near = closed.near == source or (closed.near.is_unspecified and closed.near.version in (6, source.version))
            to = closed.far is None or (closed.far, closed.far_port) == (far, far_port)
            if near and to and attributes(body, SOCKET_SIZE).get(_INET_DIAG_PROTOCOL) == bytes([protocol]):
                found.append(closed)
        return found

    def lost(self, since: float) -> bool:
        """Whether more were destroyed after `since` than could be read or kept, so that `of` misses some."""
        return since <= self._lost <= self._wall()  # a later time is from before the clock was set back

    def _readable(self) -> None:
        self._read()
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._sock)
        self._resume = loop.call_later(PAUSE_S, loop.add_reader, self._sock, self._readable)

    def _read(self) -> None:
        with suppress(BlockingIOError):
            for _ in range(_MAX_KEPT):
                try:
                    message = self._sock.recv(4096)
                except OSError as e:
                    if e.errno != errno.ENOBUFS:
                        raise
                    self._lost = self._wall()  # the messages that were not dropped can be read
                    continue
                if len(self._closed) == _MAX_KEPT:
                    self._lost = max(self._lost, self._closed[0][0])
                self._closed.append((self._wall(), message[_KEPT_BYTES]))
