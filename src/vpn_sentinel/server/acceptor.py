"""Accepts the connections of a listener, and applies the limits while one costs only a descriptor."""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from vpn_sentinel.server.connection_limit import ConnectionLimit, ConnectionSlot

log = logging.getLogger(__name__)

# Connections accepted in one iteration of the event loop. When all slots are taken each of them evicts one, which
# should be served first: the smallest listener has some hundred slots.
ACCEPTS_PER_ITERATION: Final = 8
_RETRY_S: Final = 1.0  # after there was no free descriptor


class Acceptor:
    """Used instead of the event loop's own server for two reasons: that one reports a connection only after its TLS
    handshake; and uvloop's accepts one connection in an iteration (libuv 1.52, `uv__server_io`). With long iterations
    the kernel's queue fills up, and a client that finds no room in it tries again after 1, 3 and 7 s (tcp(7),
    `tcp_syn_retries`).
    """

    def __init__(
        self, bound: socket.socket, limit: ConnectionLimit, protocol: Callable[[ConnectionSlot], asyncio.BaseProtocol],
        *, backlog: int, context: ssl.SSLContext | None = None, tls_timeout_s: float = 0.0,
    ) -> None:  # fmt: skip
        """`protocol` serves a connection, and releases its slot at the end. `backlog` is the length of the kernel's
        queue of connections. `tls_timeout_s` is the time for a handshake, and for a shutdown, where there is a
        `context`.
        """
        self._bound, self._connection_limit, self._protocol = bound, limit, protocol
        self._tls: dict[str, ssl.SSLContext | float] = {}
        if context is not None:  # asyncio's defaults are 60 s for a handshake and 30 s for a shutdown
            self._tls = {"ssl": context, "ssl_handshake_timeout": tls_timeout_s, "ssl_shutdown_timeout": tls_timeout_s}
        self._loop = asyncio.get_running_loop()
        self._opening: dict[asyncio.Task[Any], socket.socket] = {}
        self._retry_timer: asyncio.TimerHandle | None = None
        bound.listen(backlog)
        self._open()

    def is_serving(self) -> bool:
        return self._bound.fileno() >= 0

    def close(self) -> None:
        """Accept no more, and end those that are not open yet; the others are not managed here."""
        if self._retry_timer is not None:
            self._retry_timer.cancel()
        self._loop.remove_reader(self._bound)
        self._bound.close()
        for accepted in self._opening.values():
            _end(accepted)

    async def wait_closed(self) -> None:
        """As in `asyncio.Server`."""
        if self._opening:
            await asyncio.wait(self._opening)

    def _open(self) -> None:
        self._loop.add_reader(self._bound, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_ITERATION):
            try:
                accepted, peer = self._bound.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as e:  # no descriptor is left: `watch.descriptors` logs that
                log.debug("a connection cannot be accepted", extra={"reason": e.strerror})
                self._loop.remove_reader(self._bound)
                self._retry_timer = self._loop.call_later(_RETRY_S, self._open)
                return
            accepted.setblocking(False)
            slot = self._connection_limit.enter(peer[0], self._loop.time(), partial(_end, accepted))
            if slot is None:
                accepted.close()
                continue
            opening = self._loop.create_task(
                self._loop.connect_accepted_socket(partial(self._protocol, slot), accepted, **self._tls)  # type: ignore[arg-type]
            )
            self._opening[opening] = accepted
            opening.add_done_callback(partial(self._opened, slot))

    def _opened(self, slot: ConnectionSlot, opening: asyncio.Task[Any]) -> None:
        accepted = self._opening.pop(opening)
        if opening.cancelled() or (failed := opening.exception()) is None:  # cancelled: the loop ends
            return
        accepted.close()
        slot.release()
        if not isinstance(failed, OSError):
            raise failed
        log.debug("a connection was not opened", extra={"reason": str(failed)})  # mostly no TLS, or too slow


def _end(accepted: socket.socket) -> None:
    """End a connection that is not open yet: its opening fails then. Cancelling it would not stop uvloop."""
    with contextlib.suppress(OSError):  # the client has closed it
        accepted.shutdown(socket.SHUT_RDWR)
