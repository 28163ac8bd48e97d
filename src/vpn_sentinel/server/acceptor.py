"""Takes the connections of a listener, counted before one costs more than a descriptor."""

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

# Connections taken in one turn of the loop. Where all slots are taken each drives one out, who should be heard first:
# the smallest listener has some hundred slots.
ACCEPTS_PER_TURN: Final = 8
_RETRY_S: Final = 1.0  # seconds after there was no descriptor for one


class Acceptor:
    """A loop's own server would not do: it tells of a connection when its TLS handshake is over; and uvloop's takes one
    in a turn of the loop (libuv 1.52, `uv__server_io`). Where turns are long the kernel's queue fills up then, and who
    finds no room in it tries again after 1, 3 and 7 s (tcp(7), `tcp_syn_retries`).
    """

    def __init__(
        self, bound: socket.socket, limit: ConnectionLimit, protocol: Callable[[ConnectionSlot], asyncio.BaseProtocol],
        *, waiting: int, context: ssl.SSLContext | None = None, seconds: float = 0.0,
    ) -> None:  # fmt: skip
        """`protocol` serves a connection, and leaves its slot at the end. So many as `waiting` says the kernel holds
        until they are taken.

        `seconds` is the time for a handshake, and for its end, where there is a `context`.
        """
        self._bound, self._connection_limit, self._protocol = bound, limit, protocol
        self._tls: dict[str, ssl.SSLContext | float] = {}
        if context is not None:  # asyncio gives a handshake a minute, and its end half a one
            self._tls = {"ssl": context, "ssl_handshake_timeout": seconds, "ssl_shutdown_timeout": seconds}
        self._loop = asyncio.get_running_loop()
        self._opening: dict[asyncio.Task[Any], socket.socket] = {}
        self._later: asyncio.TimerHandle | None = None
        bound.listen(waiting)
        self._open()

    def is_serving(self) -> bool:
        return self._bound.fileno() >= 0

    def close(self) -> None:
        """Take no more, and end those that are not open yet; of the others nothing is known here."""
        if self._later is not None:
            self._later.cancel()
        self._loop.remove_reader(self._bound)
        self._bound.close()
        for made in self._opening.values():
            _end(made)

    async def wait_closed(self) -> None:
        """As `asyncio.Server` has it."""
        if self._opening:
            await asyncio.wait(self._opening)

    def _open(self) -> None:
        self._loop.add_reader(self._bound, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                made, peer = self._bound.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as e:  # no descriptor is left: `watch.descriptors` says so
                log.debug("a connection cannot be taken", extra={"reason": e.strerror})
                self._loop.remove_reader(self._bound)
                self._later = self._loop.call_later(_RETRY_S, self._open)
                return
            made.setblocking(False)
            slot = self._connection_limit.enter(peer[0], self._loop.time(), partial(_end, made))
            if slot is None:
                made.close()
                continue
            opening = self._loop.create_task(
                self._loop.connect_accepted_socket(partial(self._protocol, slot), made, **self._tls)  # type: ignore[arg-type]
            )
            self._opening[opening] = made
            opening.add_done_callback(partial(self._opened, slot))

    def _opened(self, slot: ConnectionSlot, opening: asyncio.Task[Any]) -> None:
        made = self._opening.pop(opening)
        if opening.cancelled() or (failed := opening.exception()) is None:  # cancelled: the loop ends
            return
        made.close()
        slot.leave()
        if not isinstance(failed, OSError):
            raise failed
        log.debug("a connection does not open", extra={"reason": str(failed)})  # no TLS, mostly, or too slow


def _end(made: socket.socket) -> None:
    """Before it is open. It fails then, or is lost; to cancel that is of no use, as uvloop keeps what it began."""
    with contextlib.suppress(OSError):  # the other side did
        made.shutdown(socket.SHUT_RDWR)
