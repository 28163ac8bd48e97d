"""The sockets by which this process probes and reports: their packets are not a user's traffic.

A socket for probes, pulses or reports is registered here once it is connected. It counts as long as it is open, and
for a few seconds more: the leak watch may read its last packets later.
"""

import socket
import weakref
from collections.abc import Callable
from typing import Final

from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.wire import codec

KEEP_S: Final = 3.0  # after the socket is closed
_IFNAMSIZ: Final = 16  # bytes of a device's name, linux/if.h
_PROTOCOL_OF_SOCKET: Final = {socket.SOCK_DGRAM: socket.IPPROTO_UDP, socket.SOCK_STREAM: socket.IPPROTO_TCP}

_Flow = tuple[int, int, IPAddress, int]  # protocol, local port, remote address, remote port


class OwnSockets:
    """Flows by protocol, local port and remote end, so that another program with the same port later does not match."""

    def __init__(self, now: Callable[[], float]) -> None:
        """`now` is a clock in seconds that never jumps."""
        self._now = now
        self._open: dict[_Flow, int] = {}
        self._closed: dict[_Flow, float] = {}
        self._bound: set[_Flow] = set()  # open ones that are bound to a device, so that routes do not apply

    def add(self, sock: socket.socket, far: tuple[IPAddress, int] | None = None) -> None:
        """Remember a socket until it is closed. `far` is where it will send, if it is bound and not connected yet."""
        try:
            port = sock.getsockname()[1]
            if far is None:
                peer = sock.getpeername()
                far = codec.address(str(peer[0]).partition("%")[0]), peer[1]
        except OSError:
            return  # closed meanwhile: it sends nothing
        flow = _PROTOCOL_OF_SOCKET[socket.SocketKind(sock.type)], port, *far
        self._open[flow] = self._open.get(flow, 0) + 1
        if _is_bound_to_device(sock):
            self._bound.add(flow)
        weakref.finalize(sock, self._closed_one, flow).atexit = False

    def has(self, protocol: int, port: int | None, address: IPAddress, far_port: int | None) -> bool:
        """Whether a packet of `protocol` (6 or 17) from `port` to that address and port is this process's own."""
        if port is None or far_port is None:
            return False
        flow = protocol, port, address, far_port
        return flow in self._open or self._closed.get(flow, 0.0) > self._now()

    def ports(self, protocol: int, address: IPAddress, far_port: int | None) -> list[int]:
        """The local ports of this process's sockets that send, or recently sent, to that address and port."""
        now = self._now()
        recent = (flow for flow, until in self._closed.items() if until > now)
        return [f[1] for f in (*self._open, *recent) if (f[0], *f[2:]) == (protocol, address, far_port)]

    def routed(self, protocol: int, port: int) -> list[tuple[IPAddress, int]]:
        """Remote address and port of open sockets with that protocol and local port that follow the routes."""
        return [f[2:] for f in self._open if f[:2] == (protocol, port) and f not in self._bound]

    def _closed_one(self, flow: _Flow) -> None:
        now = self._now()
        left = self._open.get(flow, 0) - 1
        if left > 0:
            self._open[flow] = left
            return
        self._open.pop(flow, None)
        self._bound.discard(flow)
        self._closed = {f: until for f, until in self._closed.items() if until > now}
        self._closed[flow] = now + KEEP_S


def _is_bound_to_device(sock: socket.socket) -> bool:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, _IFNAMSIZ).strip(b"\0") != b""


OWN_SOCKETS: Final = OwnSockets(SystemClock().boottime)
