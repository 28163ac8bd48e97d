"""The largest packet that passes the tunnel, found with pulses that must not be fragmented.

A packet that the interface takes and that is lost without an ICMP error, while smaller ones pass, is a black hole: web
pages hang while pings answer (RFC 2923, section 2.1). ip(7) and ipv6(7) describe IP_PMTUDISC_PROBE: DF is set, and the
kernel's cached path MTU is ignored, so that a packet as large as the interface's MTU really leaves.
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

# IP and UDP headers, and the packet size that every path carries (RFC 791 and RFC 8200, section 5).
HEADER_BYTES: Final = {4: 28, 6: 48}
MIN_MTU: Final = {4: 576, 6: 1280}
_COMMON_MTU: Final = 1280  # most tunnels carry that; tried first
_MAX_SEARCH_STEPS: Final = 7
_TRIES, _CONFIRM_TRIES = 3, 5  # at 30 % loss, all eight are lost by chance once in 15,000
_MTU_DISCOVER: Final = {4: (socket.IPPROTO_IP, 10), 6: (socket.IPPROTO_IPV6, 23)}  # linux/in.h, linux/in6.h
_PMTUDISC_PROBE: Final = 3
# Sends a packet of that many bytes: ANSWERED, LOST, UNREACHABLE after an error that it is too large, else BLOCKED.
Ask = Callable[[int], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class MtuResult:
    """`mtu` is the largest packet in bytes that came through, None when none did or it is unknown. `vanished` is the
    size of one that was lost without an ICMP error although smaller ones passed.
    """

    mtu: int | None = None
    vanished: int | None = None


async def search(ask: Ask, mtu: int, family: int) -> MtuResult:
    """Begin with a packet of `mtu` bytes. One round trip when it passes; some 15 s when it does not."""
    first = await _tries(ask, mtu, _TRIES)
    if first is Answer.ANSWERED:
        return MtuResult(mtu)
    low, high = MIN_MTU[family], mtu
    if first is Answer.BLOCKED or low >= mtu or await _tries(ask, low, _TRIES) is not Answer.ANSWERED:
        return MtuResult()  # nothing passes, so size is not the cause
    for step in range(_MAX_SEARCH_STEPS):
        middle = _COMMON_MTU if step == 0 and low < _COMMON_MTU < high else (low + high) // 2
        match await _tries(ask, middle, 2):
            case Answer.ANSWERED:
                low = middle
            case Answer.BLOCKED:
                return MtuResult()
            case _:
                high = middle
    if first is Answer.UNREACHABLE:
        return MtuResult(low)  # there was an error, so programs know to send smaller packets
    if await _tries(ask, mtu, _CONFIRM_TRIES) is Answer.ANSWERED:
        return MtuResult(mtu)
    return MtuResult(low, mtu)


async def _tries(ask: Ask, size: int, times: int) -> Answer:
    """Repeat while packets are lost, `times` at most."""
    for _ in range(times):
        answer = await ask(size)
        if answer is not Answer.LOST:
            return answer
    return Answer.LOST


class MtuProbe:
    """Sends packets of a given size to the server's echo. A context manager, for its socket."""

    def __init__(self, target: ServerEcho, numbered: Callable[[ServerEcho, int], tuple[int, int, bytes]]) -> None:
        """`numbered` makes the next pulse of a number of bytes: run, number and datagram. Raises OSError."""
        self._target = target
        self._numbered = numbered
        self._family = target.address.version
        kind = socket.AF_INET if self._family == 4 else socket.AF_INET6
        self._sock = AS_USER.socket(kind, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            self._sock.setsockopt(*_MTU_DISCOVER[self._family], _PMTUDISC_PROBE)
            self._sock.connect((str(target.address), target.port))
            OWN_SOCKETS.add(self._sock)
        except OSError:
            self._sock.close()
            raise

    def __enter__(self) -> "MtuProbe":
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def largest(self, mtu: int) -> int:
        """The largest packet up to `mtu` that a pulse can have."""
        return min(mtu, pulse.MAX_SIZE_BYTES + HEADER_BYTES[self._family])

    async def ask(self, size: int, patience: float) -> Answer:
        """Send a packet of `size` bytes and wait `patience` seconds for one as large."""
        run, number, datagram = self._numbered(self._target, size - HEADER_BYTES[self._family])
        loop = asyncio.get_running_loop()
        try:
            self._sock.send(datagram)
            async with asyncio.timeout(patience):
                while True:
                    data = await loop.sock_recv(self._sock, 2048)
                    reply = pulse.read_reply(data, self._target.ident, run, self._target.key)
                    if reply is not None and reply[0] == number:
                        return Answer.ANSWERED
        except TimeoutError:
            return Answer.LOST
        except BlockingIOError:
            return Answer.LOST
        except OSError as e:
            return Answer.UNREACHABLE if e.errno == errno.EMSGSIZE else Answer.BLOCKED
