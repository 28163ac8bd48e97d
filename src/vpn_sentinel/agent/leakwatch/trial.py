"""Whether what lets a packet out lets everybody's out: tried with a packet of our own to the same end.

It comes from an ordinary socket without a mark, with the same type of service, of this process's user and of the
sender's where that is a person, and has one hop to live. If it leaves with the mark that a rule leads past the tunnel,
this host's firewall put it there. If the connection comes about nevertheless, a program of this host took it (REDIRECT,
iptables-extensions(8)), and what that program's user sends on is everybody's.

A firewall may mark by what a packet of ours has not: a system user, a control group, a source port. So VPN programs are
excepted, and nothing is told then.
"""

import asyncio
import contextlib
import os
import socket
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from vpn_sentinel.agent.net.as_user import socket_of
from vpn_sentinel.agent.net.endpoints import TCP, UDP
from vpn_sentinel.agent.net.packets import Packet
from vpn_sentinel.agent.net.routing_rules import FIRST_PERSONAL_UID
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.wire import codec

PATIENCE_S: Final = 0.25  # for a packet that the kernel sends at once, and for a program that takes a connection
KEEP_S: Final = {True: 5.0, False: 60.0}  # seconds that an answer holds, by whether it is a leak
MAX_TRIALS: Final = 8  # trials at once
_ANSWERS: Final = 256
_HELD: Final = 16  # packets that wait for the end of one trial
ICMP, ICMP6 = 1, 58
TRIED: Final = frozenset({TCP, UDP, ICMP, ICMP6})
# Echo requests with number and sequence 0; of ICMPv6 the kernel makes the checksum (RFC 792, RFC 4443, RFC 3542).
_ECHO: Final = {ICMP: b"\x08\0\xf7\xff\0\0\0\0", ICMP6: b"\x80\0\0\0\0\0\0\0"}
_ABORT: Final = b"\1\0\0\0\0\0\0\0"  # struct linger: closed without a farewell

# the sender's user, protocol, address and port there; no address where every one counts
Key = tuple[int | None, int, IPAddress | None, int | None]


class Takers(Protocol):
    """Sockets of this network namespace. It may raise OSError."""

    def peer_users(self, near: IPAddress, port: int) -> frozenset[int]:
        """The users whose programs here have the other end of a TCP connection from `near` and `port`."""
        ...


_End = tuple[int, IPAddress, int | None]


@dataclass(slots=True)
class _Trial:
    timer: asyncio.TimerHandle
    probes: list[socket.socket]
    out: _End
    held: list[tuple[Packet, str]] = field(default_factory=list)


class Trials:
    """At most eight at once, and one a minute for the same user, protocol and end."""

    def __init__(
        self,
        *,
        now: Callable[[], float],
        sockets: Takers | None,
        leak: Callable[[Packet, str], None],
        none: Callable[[Packet], None] = lambda _: None,
        proxies: bool = False,
    ) -> None:
        """`leak` gets each packet that leaves as everybody's would, and the interface; `none` one that does not.

        `proxies`: senders are led out as users, so that only whether they take everybody's connections is tried.
        """
        self._now, self._sockets, self._proxies = now, sockets, proxies
        self._leak, self._none = leak, none
        self._running: dict[Key, _Trial] = {}
        self._known: OrderedDict[Key, tuple[bool, float]] = OrderedDict()

    def of(self, packet: Packet, interface: str, uid: int | None, left: Packet | None = None) -> None:
        """Try it, unless it is known. `uid` is the sender's, None when nobody knows; `left` the packet as it left,
        where it was sent to another end."""
        key = self._key(packet, uid)
        if self.knows(packet, interface, uid):
            return
        if key in self._running:
            held = self._running[key].held
            if len(held) < _HELD:
                held.append((packet, interface))
        elif len(self._running) < MAX_TRIALS:
            users = {os.geteuid(), FIRST_PERSONAL_UID} if self._proxies else _users(uid)
            probes = [p for u in users if (p := _send(packet, u)) is not None]
            timer = asyncio.get_running_loop().call_later(PATIENCE_S, self._ends, key)
            self._running[key] = _Trial(timer, probes, _end(left or packet), [(packet, interface)])

    def knows(self, packet: Packet, interface: str, uid: int | None) -> bool:
        """Whether it is known, and so told of."""
        everybody, until = self._known.get(self._key(packet, uid), (False, float("-inf")))
        known = self._now() < until
        if known:
            self._told(packet, interface, everybody=everybody)
        return known

    def _key(self, packet: Packet, uid: int | None) -> Key:
        to = None if self._proxies else packet.destination
        return uid, packet.protocol, to, packet.destination_port

    def seen(self, packet: Packet) -> None:
        """A packet with one hop to live left as those that are tried."""
        for key in [k for k, trial in self._running.items() if trial.out == _end(packet)]:
            self._over(key, everybody=True)

    def forget(self) -> None:
        """The rules are others now."""
        self._known.clear()

    def close(self) -> None:
        for trial in self._running.values():
            _stop(trial)
        self._running.clear()

    def _ends(self, key: Key) -> None:
        self._over(key, everybody=self._is_taken(key))

    def _is_taken(self, key: Key) -> bool:
        """Whether programs of the sender's user here take what is sent to that end. Root's are many."""
        uid, protocol, _to, _port = key
        if protocol != TCP or not uid or self._sockets is None:
            return False
        with contextlib.suppress(OSError):  # nobody tells whose they are
            for probe in self._running[key].probes:
                near, port = probe.getsockname()[:2]
                if uid in self._sockets.peer_users(codec.address(near), port):
                    return True
        return False

    def _over(self, key: Key, *, everybody: bool) -> None:
        trial = self._running.pop(key)
        _stop(trial)
        self._known[key] = everybody, self._now() + KEEP_S[everybody]
        if len(self._known) > _ANSWERS:
            self._known.popitem(last=False)
        for packet, interface in trial.held:
            self._told(packet, interface, everybody=everybody)

    def _told(self, packet: Packet, interface: str, *, everybody: bool) -> None:
        if everybody:
            self._leak(packet, interface)
        else:
            self._none(packet)


def _end(packet: Packet) -> _End:
    return packet.protocol, packet.destination, packet.destination_port


def _stop(trial: _Trial) -> None:
    trial.timer.cancel()
    for probe in trial.probes:
        probe.close()


def _users(uid: int | None) -> set[int]:
    """Who sends a packet of ours. A sender that is gone may have been a person, as most are."""
    person = FIRST_PERSONAL_UID if uid is None else uid
    return {os.geteuid(), person} if person >= FIRST_PERSONAL_UID else {os.geteuid()}


def _send(packet: Packet, uid: int) -> socket.socket | None:
    """One packet to the same end as user `uid`; its socket. None where it cannot be sent: a kill switch refuses it, or
    another user's sockets may not be made here."""
    six = packet.destination.version == 6
    kind = {TCP: socket.SOCK_STREAM, UDP: socket.SOCK_DGRAM}.get(packet.protocol, socket.SOCK_RAW)
    to = str(packet.destination), packet.destination_port or 0
    sock = None
    try:
        sock = socket_of(uid, socket.AF_INET6 if six else socket.AF_INET, kind | socket.SOCK_NONBLOCK, packet.protocol)
        if sock is None:
            return None
        if six:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, packet.tos)
        else:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, packet.tos)
        if packet.protocol == TCP:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
            sock.connect_ex(to)
        else:
            sock.sendto(_ECHO.get(packet.protocol, b""), to)
    except OSError:
        if sock is not None:
            sock.close()
        return None
    return sock
