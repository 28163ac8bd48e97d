"""The largest packet that passes the tunnel, found with pulses that must not be cut into fragments.

A packet that the interface takes and that is lost without an ICMP error, while smaller ones pass, is a black hole: web
pages hang while pings answer (RFC 2923, section 2.1). ip(7) and ipv6(7) describe IP_PMTUDISC_PROBE: DF is set, and what
the kernel believes of the path is left aside, so that a packet as large as the interface takes really leaves.
"""

import asyncio
import errno
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.agent.net.own import OWN_SOCKETS
from vpn_sentinel.agent.probes.targets import ServerEcho
from vpn_sentinel.domain.observation import Answer
from vpn_sentinel.wire import pulse

# IP and UDP headers, and the packet that every path carries (RFC 791 and RFC 8200, section 5).
HEADERS: Final = {4: 28, 6: 48}
MIN_MTU: Final = {4: 576, 6: 1280}
_USUAL: Final = 1280  # most tunnels carry that
_STEPS: Final = 7
_TRIES, _AGAIN = 3, 5  # lost so often, and after the search so often again: at 30 % loss by chance once in 15,000
_MTU_DISCOVER: Final = {4: (socket.IPPROTO_IP, 10), 6: (socket.IPPROTO_IPV6, 23)}  # linux/in.h, linux/in6.h
_PROBE: Final = 3
# Sends a packet of so many bytes. ANSWERED, LOST, UNREACHABLE for one that was told to be too large, else BLOCKED.
Ask = Callable[[int], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class Found:
    """`mtu` is the largest packet in bytes that came through, None when nothing did or nobody knows. `vanished` is the
    size of one that got lost without a word though smaller ones passed.
    """

    mtu: int | None = None
    vanished: int | None = None


async def search(ask: Ask, mtu: int, family: int) -> Found:
    """Begin with a packet of `mtu` bytes. One round trip when it passes; some 15 s when it does not."""
    first = await _tries(ask, mtu, _TRIES)
    if first is Answer.ANSWERED:
        return Found(mtu)
    low, high = MIN_MTU[family], mtu
    if first is Answer.BLOCKED or low >= mtu or await _tries(ask, low, _TRIES) is not Answer.ANSWERED:
        return Found()  # nothing passes: that is no matter of size
    for step in range(_STEPS):
        middle = _USUAL if step == 0 and low < _USUAL < high else (low + high) // 2
        match await _tries(ask, middle, 2):
            case Answer.ANSWERED:
                low = middle
            case Answer.BLOCKED:
                return Found()
            case _:
                high = middle
    if first is Answer.UNREACHABLE:
        return Found(low)  # somebody told, so programs know to send less
    if await _tries(ask, mtu, _AGAIN) is Answer.ANSWERED:
        return Found(mtu)
    return Found(low, mtu)


async def _tries(ask: Ask, size: int, times: int) -> Answer:
    """Ask until something else than a loss comes, so many times at most."""
    for _ in range(times):
        answer = await ask(size)
        if answer is not Answer.LOST:
            return answer
    return Answer.LOST


class Sizer:
    """Asks the server's echo with packets of a size. Use `with`, for its socket."""

    def __init__(self, target: ServerEcho, numbered: Callable[[ServerEcho, int], tuple[int, int, bytes]]) -> None:
        """`numbered` makes the next pulse of a number of bytes: run, number and datagram. Raises OSError."""
        self._target = target
        self._numbered = numbered
        self._family = target.address.version
        kind = socket.AF_INET if self._family == 4 else socket.AF_INET6
        self._sock = AS_USER.socket(kind, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._sock.setsockopt(*_MTU_DISCOVER[self._family], _PROBE)
            self._sock.connect((str(target.address), target.port))
            OWN_SOCKETS.add(self._sock)
        except OSError:
            self._sock.close()
            raise

    def __enter__(self) -> "Sizer":
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def largest(self, mtu: int) -> int:
        """The largest packet up to `mtu` that a pulse can fill."""
        return min(mtu, pulse.MAX_SIZE_BYTES + HEADERS[self._family])

    async def ask(self, size: int, patience: float) -> Answer:
        """Send a packet of `size` bytes and wait `patience` seconds for one as large."""
        run, number, datagram = self._numbered(self._target, size - HEADERS[self._family])
        loop = asyncio.get_running_loop()
        try:
            self._sock.send(datagram)
            async with asyncio.timeout(patience):
                while True:
                    data = await loop.sock_recv(self._sock, 2048)
                    told = pulse.read_reply(data, self._target.ident, run, self._target.key)
                    if told is not None and told[0] == number:
                        return Answer.ANSWERED
        except TimeoutError:
            return Answer.LOST
        except BlockingIOError:
            return Answer.LOST
        except OSError as e:
            return Answer.UNREACHABLE if e.errno == errno.EMSGSIZE else Answer.BLOCKED
