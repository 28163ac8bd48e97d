"""Which user's socket sent a packet: the kernel's table of TCP and UDP sockets (sock_diag(7), linux/inet_diag.h).

Readable without any capability, for the whole network namespace: sockets of other users and containers too. A query
costs about 30 microseconds; it filters by local port, so that the answer is short.
"""

import errno
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from vpn_sentinel.agent.net.netlink import (
    NLM_F_DUMP,
    NLMSG_DONE,
    NLMSG_ERROR,
    attributes,
    error_number,
    messages,
    request,
)
from vpn_sentinel.domain.policy import IPAddress

# linux/tcp_states.h; a connected UDP socket is "established", an unconnected one closed
ESTABLISHED, _TIME_WAIT, _CLOSED, LISTEN = 1, 6, 7, 10
NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NO_COOKIE: Final = 0xFFFFFFFF
_REQUEST_HEAD: Final = struct.Struct("=BBBxI")  # the beginning of struct inet_diag_req_v2
_ID: Final = struct.Struct(
    "!HH16s16s"
)  # idiag_sport, dport, src, dst of struct inet_diag_sockid; interface and cookie follow
_INTERFACE_AND_COOKIE: Final = struct.Struct("=III")
_RESPONSE_HEAD: Final = struct.Struct("=BBBB")
_RESPONSE_TAIL: Final = struct.Struct("=5I")
SOCKET_SIZE: Final = (
    _RESPONSE_HEAD.size + _ID.size + _INTERFACE_AND_COOKIE.size + _RESPONSE_TAIL.size
)  # of struct inet_diag_msg; attributes follow
_INET_DIAG_CGROUP_ID: Final = 21  # since Linux 5.8
_ALL_STATES: Final = 0xFFFFFFFF
_STATES_WITH_OWNER: Final = _ALL_STATES & ~(
    1 << _TIME_WAIT
)  # the kernel does not report the owner of a socket in TIME_WAIT
_PORT_RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")  # for IPv6 too; of this network namespace
# Of this network namespace: ping sockets by identifier (icmp(7)), and raw sockets by protocol.
_ICMP_TABLES: Final = {
    4: (Path("/proc/self/net/icmp"), Path("/proc/self/net/raw")),
    6: (Path("/proc/self/net/icmp6"), Path("/proc/self/net/raw6")),
}
_ICMP_PROTOCOLS: Final = (socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6)
_MAX_DATAGRAMS: Final = 64  # of one answer: enough for some thousand sockets on one port


@dataclass(frozen=True, slots=True, kw_only=True)
class Socket:
    """`near` and `port` are the local end, `far` and `far_port` the remote end, None and 0 when not connected. `device`
    is the index of the interface that it is bound to, 0 for none; `cgroup` is 0 when unknown. `inode` is 0 for sockets
    of the kernel, and for those that their program has closed."""

    state: int
    near: IPAddress
    port: int
    far: IPAddress | None
    far_port: int
    uid: int
    inode: int
    device: int = 0
    cgroup: int = 0

    @property
    def listens(self) -> bool:
        return self.state == LISTEN

    @property
    def is_orphan(self) -> bool:
        """Whether no program holds it (any more): it is closed, or the kernel's own."""
        return self.inode == 0

    @property
    def is_kernels(self) -> bool:
        """Whether it is a UDP socket of the kernel, such as that of WireGuard's module."""
        return self.inode == 0 and self.state == _CLOSED


class SocketTable:
    """Queries the table over one netlink socket."""

    def __init__(self) -> None:
        """Raises OSError where the sandbox has no sock_diag."""
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG)
        self._sock.settimeout(0.5)
        self._sequence = 0

    def close(self) -> None:
        self._sock.close()

    def listens(self, port: int, version: int) -> bool:
        """Whether a TCP socket listens on this port. Raises OSError."""
        return bool(self._on_port(socket.IPPROTO_TCP, port, version, 1 << LISTEN))

    def serves(self, port: int, version: int) -> bool:
        """Whether an unconnected UDP socket, which takes datagrams from anybody, has this port. Raises OSError."""
        return any(s.far is None for s in self._on_port(socket.IPPROTO_UDP, port, version, _ALL_STATES))

    def is_ephemeral(self, port: int) -> bool:
        """Whether the kernel may have chosen this port for a program (ip-sysctl). Raises OSError."""
        low, high = _PORT_RANGE.read_text().split()
        return int(low) <= port <= int(high)

    def listening(self) -> frozenset[int]:
        """The ports with a listening TCP socket, except on loopback addresses. Raises OSError."""
        everything = _ID.pack(0, 0, b"", b"")
        found = (
            s
            for family in (socket.AF_INET, socket.AF_INET6)
            for s in self._ask(family, socket.IPPROTO_TCP, 1 << LISTEN, everything, NLM_F_DUMP)
        )
        return frozenset(s.port for s in found if not s.near.is_loopback)

    def pings(self, echo: int, version: int) -> int | None:
        """The user who pings with this identifier: by a ping socket, else by the raw sockets if all are of one user.

        None when unknown. Raises OSError.
        """
        by_echo, by_protocol = _ICMP_TABLES[version]
        own = {uid for ident, uid in _listed(by_echo) if ident == echo}
        found = own or {uid for protocol, uid in _listed(by_protocol) if protocol in _ICMP_PROTOCOLS}
        return found.pop() if len(found) == 1 else None

    def of(
        self, protocol: int, source: IPAddress, port: int, far: IPAddress, far_port: int, devices: Iterable[int] = ()
    ) -> Socket | None:
        """The socket that sends from `source` and `port` to `far`: a connected one, else an unconnected UDP socket.

        A TCP socket that is bound to a device is only found with that device's index, one of `devices`. None when it
        is closed already, or when sockets of different users match. Raises OSError.
        """
        if protocol == socket.IPPROTO_TCP:
            first = self._exact(source, port, far, far_port)
            if first is not None and not first.listens:
                return first
            bound = (self._exact(source, port, far, far_port, device) for device in devices)
            return next((s for s in bound if s is not None and not s.listens), first)
        found = self._on_port(protocol, port, far.version, _ALL_STATES)
        exact = [s for s in found if s.far == far and s.far_port == far_port]
        loose = [s for s in found if s.far is None and (s.near == source or s.near.is_unspecified)]
        chosen = exact or loose
        return chosen[0] if len({(s.uid, s.cgroup) for s in chosen}) == 1 else None

    def sender(self, protocol: int, port: int, far: IPAddress, far_port: int) -> Socket | None:
        """The socket that sends from `port`, whatever the packet's source address: NAT changed it.

        None as in `of`. Raises OSError.
        """
        tcp = protocol == socket.IPPROTO_TCP
        found = self.connecting(port, far.version) if tcp else self._on_port(protocol, port, far.version, _ALL_STATES)
        exact = [s for s in found if s.far == far and s.far_port == far_port]
        chosen = exact or [s for s in found if s.far is None]
        return chosen[0] if len({s.uid for s in chosen}) == 1 else None

    def has(self, source: IPAddress, port: int, far: IPAddress, far_port: int) -> bool:
        """Whether a TCP socket has exactly these two ends. Raises OSError."""
        found = self._exact(source, port, far, far_port)
        return found is not None and (found.far, found.far_port) == (far, far_port)

    def connecting(self, port: int, version: int) -> list[Socket]:
        """TCP sockets of programs with this local port that do not listen; a closed one has no owner. Raises OSError.

        The kernel scans all its sockets: half a millisecond, or more on a machine with much memory.
        """
        found = self._on_port(socket.IPPROTO_TCP, port, version, _STATES_WITH_OWNER & ~(1 << LISTEN))
        return [s for s in found if s.inode]

    def peer_users(self, near: IPAddress, port: int) -> frozenset[int]:
        """The users whose programs have the other end of a local TCP connection from `near` and `port`.

        A connection that was not accepted yet has no owner, so the users of the listening socket are included; root
        may have opened that socket for another user's program. Raises OSError.
        """
        families = (socket.AF_INET, socket.AF_INET6) if near.version == 4 else (socket.AF_INET6,)
        ends = _ID.pack(0, port, b"", b"")
        every = [s for f in families for s in self._ask(f, socket.IPPROTO_TCP, _STATES_WITH_OWNER, ends, NLM_F_DUMP)]
        peers = [s for s in every if (s.far, s.far_port) == (near, port)]
        listens = (self._on_port(socket.IPPROTO_TCP, s.port, near.version, 1 << LISTEN) for s in peers)
        return frozenset(s.uid for some in (peers, *listens) for s in some if s.inode)

    def _on_port(self, protocol: int, port: int, version: int, states: int) -> list[Socket]:
        """Sockets with this local port; an IPv6 socket may send IPv4 packets too."""
        families = (socket.AF_INET, socket.AF_INET6) if version == 4 else (socket.AF_INET6,)
        ends = _ID.pack(port, 0, b"", b"")
        found = [s for f in families for s in self._ask(f, protocol, states, ends, NLM_F_DUMP)]
        return [s for s in found if s.port == port]

    def _exact(self, source: IPAddress, port: int, far: IPAddress, far_port: int, device: int = 0) -> Socket | None:
        """By the kernel's own lookup, which falls back to a listening socket."""
        family = socket.AF_INET if far.version == 4 else socket.AF_INET6
        try:
            ends = _ID.pack(port, far_port, source.packed, far.packed)
            found = self._ask(family, socket.IPPROTO_TCP, _ALL_STATES, ends, device=device)
        except OSError as e:
            if e.errno == errno.ENOENT:
                return None
            raise
        return found[0] if found else None

    def _ask(
        self, family: int, protocol: int, states: int, ends: bytes, flags: int = 0, device: int = 0
    ) -> list[Socket]:
        self._sequence += 1
        body = (
            _REQUEST_HEAD.pack(family, protocol, 0, states)
            + ends
            + _INTERFACE_AND_COOKIE.pack(device, _NO_COOKIE, _NO_COOKIE)
        )
        self._sock.send(request(_SOCK_DIAG_BY_FAMILY, body, sequence=self._sequence, flags=flags))
        found: list[Socket] = []
        for _ in range(_MAX_DATAGRAMS):
            for message in messages(self._sock.recv(65536)):
                if message.sequence != self._sequence:
                    continue
                if message.type == NLMSG_DONE:
                    return found
                if message.type == NLMSG_ERROR:
                    raise OSError(error_number(message.body), "the kernel refuses to list sockets")
                if (parsed := parse_socket(message.body)) is not None:
                    found.append(parsed)
            if not flags & NLM_F_DUMP:
                return found
        raise OSError("the kernel's answer does not end")


def _listed(path: Path) -> list[tuple[int, int]]:
    """Local port (for ICMP the identifier, for raw sockets the protocol) and user of each socket (proc(5))."""
    lines = (line.split() for line in path.read_text().splitlines()[1:])
    return [(int(fields[1].rpartition(":")[2], 16), int(fields[7])) for fields in lines]


def parse_socket(body: bytes) -> Socket | None:
    """A socket from struct inet_diag_msg; None for other families and short messages."""
    at_id = _RESPONSE_HEAD.size
    if len(body) < SOCKET_SIZE:
        return None
    family, state, _timer, _retrans = _RESPONSE_HEAD.unpack_from(body)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return None
    port, far_port, near, far = _ID.unpack_from(body, at_id)
    (device, _, _) = _INTERFACE_AND_COOKIE.unpack_from(body, at_id + _ID.size)
    _expires, _rqueue, _wqueue, uid, inode = _RESPONSE_TAIL.unpack_from(body, SOCKET_SIZE - _RESPONSE_TAIL.size)
    cgroup = attributes(body, SOCKET_SIZE).get(_INET_DIAG_CGROUP_ID, b"")
    return Socket(
        state=state,
        near=_address(family, near),
        port=port,
        far=_address(family, far) if far_port else None,
        far_port=far_port,
        uid=uid,
        inode=inode,
        device=device,
        cgroup=int.from_bytes(cgroup, "little") if len(cgroup) == 8 else 0,
    )


def _address(family: int, packed: bytes) -> IPAddress:
    """IPv4-mapped addresses of IPv6 sockets become IPv4 addresses, as in their packets."""
    if family == socket.AF_INET:
        return ip_address(packed[:4])
    if packed[:12] == b"\0" * 10 + b"\xff\xff":
        return ip_address(packed[12:])
    return ip_address(packed)


def listening_ports() -> frozenset[int]:
    """The ports with a listening TCP socket here; none where the sandbox has no sock_diag."""
    try:
        sockets = SocketTable()
    except OSError:
        return frozenset()
    try:
        return sockets.listening()
    except OSError:
        return frozenset()
    finally:
        sockets.close()
