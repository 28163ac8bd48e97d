"""Host names to addresses, by the system's resolver, without being blocked by one that does not answer."""

import asyncio
import socket
import threading
from collections.abc import Callable
from ipaddress import ip_address
from typing import Final

from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.domain.policy import IPAddress

LOOKUP_TIMEOUT_S: Final = 1.0  # short: DNS often fails exactly when a report is urgent
Lookup = Callable[[str], tuple[IPAddress, ...]]


class NotFoundError(OSError):
    """The name has no address, or none was found in time."""


def encoded(host: str) -> bytes:
    """A name for getaddrinfo(3). For a `str`, Python would load the IDNA tables, also for ASCII names: 0.5 MB."""
    return host.encode("ascii" if host.isascii() else "idna")


def system_lookup(host: str) -> tuple[IPAddress, ...]:
    """getaddrinfo(3): the hosts file, mDNS and search domains included. Blocks. Raises OSError."""
    with AS_USER:
        found = socket.getaddrinfo(encoded(host), None, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(ip_address(str(sockaddr[0]).partition("%")[0]) for *_, sockaddr in found))


class HostResolver:
    """Looks names up in daemon threads, at most one per name, and remembers the last good answer.

    Not in the loop's executor: its threads are joined at exit, and a thread in getaddrinfo(3) may take half a minute,
    which would delay the stop.
    """

    def __init__(self, lookup: Lookup = system_lookup, *, patience: float = LOOKUP_TIMEOUT_S) -> None:
        self._lookup = lookup
        self._patience = patience
        self._good: dict[str, tuple[IPAddress, ...]] = {}
        self._running: dict[str, asyncio.Future[tuple[IPAddress, ...]]] = {}

    def remember(self, host: str, addresses: tuple[IPAddress, ...]) -> None:
        """Take over addresses that were known before a restart."""
        if addresses:
            self._good.setdefault(host, addresses)

    def known(self, host: str) -> tuple[IPAddress, ...]:
        """Addresses without a lookup: a literal address itself, or the last good answer."""
        return _literal(host) or self._good.get(host, ())

    async def addresses(self, host: str, *, patience: float | None = None) -> tuple[IPAddress, ...]:
        """Current addresses of `host`, or the last good ones when there is no answer in time. Raises NotFoundError."""
        if literal := _literal(host):
            return literal
        running = self._running.get(host) or self._start(host)
        await asyncio.wait([running], timeout=self._patience if patience is None else patience)
        if running.done() and running.exception() is None and running.result():
            return running.result()
        if known := self._good.get(host):
            return known
        raise NotFoundError(f"no address found for {host}")

    def _start(self, host: str) -> asyncio.Future[tuple[IPAddress, ...]]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[tuple[IPAddress, ...]] = loop.create_future()
        self._running[host] = future

        def finish(found: tuple[IPAddress, ...], error: Exception | None) -> None:
            del self._running[host]
            if found:
                self._good[host] = found
            if future.cancelled():
                return
            if error is None:
                future.set_result(found)
            else:
                future.set_exception(error)
                future.exception()  # marks it as retrieved: asyncio logs no error when no caller waits any more

        def work() -> None:
            found: tuple[IPAddress, ...] = ()
            error: Exception | None = None
            try:
                found = self._lookup(host)
            except (OSError, ValueError) as e:
                error = e
            try:
                loop.call_soon_threadsafe(finish, found, error)
            except RuntimeError:  # the loop has been closed meanwhile
                return

        threading.Thread(target=work, name="getaddrinfo", daemon=True).start()
        return future


def _literal(host: str) -> tuple[IPAddress, ...]:
    try:
        return (ip_address(host.strip("[]")),)
    except ValueError:
        return ()
