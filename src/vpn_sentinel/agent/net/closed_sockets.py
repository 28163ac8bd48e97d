"""Sockets that are gone already: the kernel tells of each one when it ends (sock_diag(7), linux/sock_diag.h).

Groups SKNLGRP_INET_TCP_DESTROY and so on are readable without any capability, for this network namespace. The kernel
says which ports and addresses a socket had and which device it was bound to, but not whose it was: by then it is
nobody's (inet_diag_handler_get_info in net/ipv4/inet_diag.c). It does so when the last packet has left the machine.
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

PAUSE_S: Final = 0.1  # between two wakings, however many sockets end
_GROUPS: Final = 0b1111  # of TCP and UDP, of IPv4 and IPv6
_BUFFER_BYTES: Final = 1024 * 1024  # asked for; the kernel may give less (rmem_max)
_MAX_KEPT: Final = 2048
_KEPT: Final = slice(NLMSG_HDR.size, NLMSG_HDR.size + SOCKET_SIZE + 8)  # with the first attribute, INET_DIAG_PROTOCOL
_PORT: Final = slice(4, 6)  # idiag_sport in struct inet_diag_msg
_INET_DIAG_PROTOCOL: Final = 10


class ClosedSockets:
    """Bounded. It keeps what the kernel said as it is: most of it nobody asks for."""

    def __init__(self, wall: Callable[[], float]) -> None:
        """`wall` is the clock by which the kernel tells when a packet passed. Raises OSError without sock_diag."""
        self._wall = wall
        self._closed: deque[tuple[float, bytes]] = deque(maxlen=_MAX_KEPT)  # read when, and inet_diag_msg
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
        asyncio.get_running_loop().add_reader(self._sock, self._woken)

    def close(self) -> None:
        if self._resume is not None:
            self._resume.cancel()
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()

    def of(
        self, protocol: int, source: IPAddress, port: int, far: IPAddress, far_port: int, *, since: float
    ) -> list[Socket]:
        """The sockets that may have sent from `source` and `port` to `far`, and ended after `since`.

        Neither `uid` nor `inode` of them mean anything. `near` is what a socket was bound to, or connected from.
        """
        self._read()
        every: list[Socket] = []
        now = self._wall()
        for read, body in reversed(self._closed):
            if read > now:
                continue  # of before the clock was set back
            if read < since:
                break
            if int.from_bytes(body[_PORT]) != port or (found := parse_socket(body)) is None:
                continue
            near = found.near == source or (found.near.is_unspecified and found.near.version in (6, source.version))
            to = found.far is None or (found.far, found.far_port) == (far, far_port)
            if near and to and attributes(body, SOCKET_SIZE).get(_INET_DIAG_PROTOCOL) == bytes([protocol]):
                every.append(found)
        return every

    def lost(self, since: float) -> bool:
        """Whether more ended after `since` than can be read or kept, so that `of` does not know of each."""
        return since <= self._lost <= self._wall()  # else it is of before the clock was set back

    def _woken(self) -> None:
        self._read()
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._sock)
        self._resume = loop.call_later(PAUSE_S, loop.add_reader, self._sock, self._woken)

    def _read(self) -> None:
        with suppress(BlockingIOError):
            for _ in range(_MAX_KEPT):
                try:
                    message = self._sock.recv(4096)
                except OSError as e:
                    if e.errno != errno.ENOBUFS:
                        raise
                    self._lost = self._wall()  # the rest is there
                    continue
                if len(self._closed) == _MAX_KEPT:
                    self._lost = max(self._lost, self._closed[0][0])
                self._closed.append((self._wall(), message[_KEPT]))
