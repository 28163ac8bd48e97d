"""One question in one UDP datagram, and its result: canaries and DNS lookups are sent by this.

Each question has a new socket: a random source port guards against forged answers, and the route is the current one.
Each carries the mark of a probe (`tag`), and is registered in `net.own`. ip(7), ipv6(7) and recvmsg(2) describe the
error queue, which distinguishes a lost packet from a refused one.
"""

import asyncio
import errno
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final, Generic, TypeVar

from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.agent.net.own import OWN_SOCKETS
from vpn_sentinel.agent.probes import tag
from vpn_sentinel.domain.observation import Answer
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.shortage import is_shortage

T = TypeVar("T")

LOST_AFTER_S: Final = 1.0  # until a question counts as lost
RESEND_AFTER_S: Final = 0.4  # until it is sent once more
IP_RECVERR, IPV6_RECVERR = 11, 25
TRACEROUTE_PORT: Final = 33434  # the first one of traceroute(8): no service listens there
_EXTENDED_ERROR: Final = struct.Struct("=IBBBBII")  # sock_extended_err of linux/errqueue.h
_ICMP, _ICMP6 = 2, 3  # its ee_origin
_TIME_EXCEEDED: Final = {_ICMP: 11, _ICMP6: 3}
# The host itself refuses: a firewall's drop in the output hook (EPERM), a `prohibit` or `blackhole` route.
_REFUSED: Final = frozenset({errno.EPERM, errno.EACCES, errno.EINVAL})


@dataclass(frozen=True, slots=True, kw_only=True)
class DatagramTarget:
    """Where to send. `device` binds to one interface, `hops` limits how far the datagram may go."""

    address: IPAddress
    port: int
    scope: int = 0
    device: str | None = None
    hops: int | None = None


@dataclass(frozen=True, slots=True)
class DatagramResult(Generic[T]):
    """`value` is the result of `read` for the answer; `router` is the sender of an ICMP error."""

    answer: Answer
    value: T | None = None
    rtt_ms: float | None = None
    router: IPAddress | None = None
    local: tuple[IPAddress, int] | None = None  # the local address and port


async def ask(
    destination: DatagramTarget,
    payload: bytes,
    read: Callable[[bytes], T | None],
    *,
    limit: float = LOST_AFTER_S,
    resend: float | None = RESEND_AFTER_S,
) -> DatagramResult[T]:
    """Send `payload` and wait up to `limit` seconds for a datagram that `read` accepts; others are ignored."""
    loop = asyncio.get_running_loop()
    family = socket.AF_INET if destination.address.version == 4 else socket.AF_INET6
    try:
        made = AS_USER.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    except OSError as e:
        # A host without IPv6 has no such sockets (EAFNOSUPPORT): unreachable.
        return DatagramResult(Answer.UNKNOWN if is_shortage(e) else Answer.UNREACHABLE)
    with made as sock:
        refused = _prepare(sock, destination)
        if refused is not None:
            return DatagramResult(refused)
        local = _local_end(sock)
        OWN_SOCKETS.add(sock)
        asked = tag.dns_question(payload, local[1])
        start = loop.time()
        try:
            sock.send(asked)
        except BlockingIOError:
            return DatagramResult(Answer.UNKNOWN)
        except OSError as e:
            return _failed(e, sock)
        again = loop.call_later(resend, _send_again, sock, asked) if resend is not None and resend < limit else None
        try:
            async with asyncio.timeout(limit):
                while True:
                    value = read(tag.unmarked(await loop.sock_recv(sock, 4096), asked, payload))
                    if value is not None:
                        return DatagramResult(Answer.ANSWERED, value, (loop.time() - start) * 1000, local=local)
        except TimeoutError:
            return DatagramResult(Answer.LOST)
        except OSError as e:
            return _failed(e, sock)
        finally:
            if again is not None:
                again.cancel()


def _prepare(sock: socket.socket, destination: DatagramTarget) -> Answer | None:
    """Bind and connect; return an answer if the question cannot be sent."""
    six = destination.address.version == 6
    try:
        if destination.device is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, destination.device.encode() + b"\0")
    except OSError as e:
        # No permission (kernels before 5.7) says nothing about the kill switch; a device that went away has no route.
        return Answer.UNREACHABLE if e.errno == errno.ENODEV else Answer.UNKNOWN
    try:
        if six:
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        hops = destination.hops or tag.PROBE_HOPS
        if six:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, hops)
        else:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, hops)
        where = (str(destination.address), destination.port)
        # Connected: only answers from that address are received, and ICMP errors are reported on this socket.
        sock.connect((*where, 0, destination.scope) if six else where)
    except OSError as e:
        return _failed(e, sock).answer
    return None


def plain_probe(address: IPAddress, device: str, payload: bytes) -> None:
    """Send one datagram by `device` with a TTL of 1, without waiting for an answer. Raises OSError."""
    six = address.version == 6
    with socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode() + b"\0")
        if six:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)
        sock.sendto(payload, (str(address), TRACEROUTE_PORT))


def _local_end(sock: socket.socket) -> tuple[IPAddress, int]:
    host, port = sock.getsockname()[:2]
    return ip_address(host.partition("%")[0]), port


def _send_again(sock: socket.socket, payload: bytes) -> None:
    try:
        sock.send(payload)
    except OSError:
        # The pending error of the first datagram: `ask` gets it again from recv.
        return


def _failed(error: OSError, sock: socket.socket) -> DatagramResult[T]:
    """Distinguish a refusal by this host, an ICMP time-exceeded message and any other ICMP error."""
    try:
        _data, ancillary, _flags, _from = sock.recvmsg(512, 512, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
    except OSError:
        ancillary = []
    for level, kind, data in ancillary:
        if (level, kind) not in ((socket.IPPROTO_IP, IP_RECVERR), (socket.IPPROTO_IPV6, IPV6_RECVERR)):
            continue
        if len(data) < _EXTENDED_ERROR.size:
            continue
        _errno, origin, icmp_type, _code, _pad, _info, _data2 = _EXTENDED_ERROR.unpack_from(data)
        if origin in _TIME_EXCEEDED and icmp_type == _TIME_EXCEEDED[origin]:
            return DatagramResult(Answer.EXPIRED, router=offender(data[_EXTENDED_ERROR.size :]))
        if origin in _TIME_EXCEEDED:
            return DatagramResult(Answer.UNREACHABLE, router=offender(data[_EXTENDED_ERROR.size :]))
    if is_shortage(error):
        return DatagramResult(Answer.UNKNOWN)
    return DatagramResult(Answer.BLOCKED if error.errno in _REFUSED else Answer.UNREACHABLE)


def offender(sockaddr: bytes) -> IPAddress | None:
    """The sender of the ICMP error, from the sockaddr after a sock_extended_err."""
    if len(sockaddr) < 8:
        return None
    (family,) = struct.unpack_from("=H", sockaddr)
    if family == socket.AF_INET:
        return ip_address(sockaddr[4:8])
    if family == socket.AF_INET6 and len(sockaddr) >= 24:
        return ip_address(sockaddr[8:24])
    return None
