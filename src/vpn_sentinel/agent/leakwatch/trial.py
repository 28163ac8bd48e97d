"""Find by trial whether the rule that lets one packet out lets everybody's out.

The agent sends a packet to the same end from an ordinary socket without a mark, with the same type of service and a hop
limit of one, as this process's user, and as the sender's user where that is a person. If it leaves with the mark that a
rule leads past the tunnel, this host's firewall set the mark. If a connection is established nevertheless, a program of
this host accepted it (REDIRECT, iptables-extensions(8)), and what that program's user sends on is everybody's traffic.

A firewall may set a mark by what the agent's packet lacks: a system user, a control group, a source port. VPN programs
are excepted in that way, and nothing is reported then.
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

TRIAL_S: Final = 0.25  # the kernel sends the packet, or a program accepts the connection, within this time
RESULT_HOLDS_S: Final = {True: 5.0, False: 60.0}  # by whether the result is a leak
MAX_TRIALS: Final = 8  # at once
_MAX_RESULTS: Final = 256
_MAX_HELD_PACKETS: Final = 16  # that wait for the end of one trial
ICMP, ICMP6 = 1, 58
TRIED_PROTOCOLS: Final = frozenset({TCP, UDP, ICMP, ICMP6})
# Echo requests with identifier and sequence number 0; for ICMPv6 the kernel sets the checksum (RFC 792, 4443, 3542).
_ECHO: Final = {ICMP: b"\x08\0\xf7\xff\0\0\0\0", ICMP6: b"\x80\0\0\0\0\0\0\0"}
_LINGER_RESET: Final = b"\1\0\0\0\0\0\0\0"  # struct linger: close with RST

# the sender's user, protocol, remote address and port; no address where every destination counts
Key = tuple[int | None, int, IPAddress | None, int | None]


class Acceptors(Protocol):
    """Sockets of this network namespace. It may raise OSError."""

    def peer_users(self, near: IPAddress, port: int) -> frozenset[int]:
        """The users whose programs on this host hold the other end of a TCP connection from `near` and `port`."""
        ...


_End = tuple[int, IPAddress, int | None]


@dataclass(slots=True)
class _Trial:
    timer: asyncio.TimerHandle
    probes: list[socket.socket]
    end: _End
    held: list[tuple[Packet, str]] = field(default_factory=list)


class Trials:
    """Runs at most eight at once, and one a minute for the same user, protocol and end."""

    def __init__(
        self,
        *,
        now: Callable[[], float],
        sockets: Acceptors | None,
        leak: Callable[[Packet, str], None],
        no_leak: Callable[[Packet], None] = lambda _: None,
        proxies: bool = False,
    ) -> None:
        """`leak` gets each packet that leaves as everybody's would, and the interface; `no_leak` each other packet.

        `proxies`: rules let the senders out as users; only whether they accept everybody's connections is tried.
        """
        self._now, self._sockets, self._proxies = now, sockets, proxies
        self._leak, self._none = leak, no_leak
        self._running: dict[Key, _Trial] = {}
        self._known: OrderedDict[Key, tuple[bool, float]] = OrderedDict()

    def start(self, packet: Packet, interface: str, uid: int | None, as_sent: Packet | None = None) -> None:
        """Start a trial, unless its result is known. `uid` is the sender's, None when it is not known; `as_sent` is the
        packet as it left, where that was to another end than it was addressed to."""
        key = self._key(packet, uid)
        if self.knows(packet, interface, uid):
            return
        if key in self._running:
            held = self._running[key].held
            if len(held) < _MAX_HELD_PACKETS:
                held.append((packet, interface))
        elif len(self._running) < MAX_TRIALS:
            users = {os.geteuid(), FIRST_PERSONAL_UID} if self._proxies else _users(uid)
            probes = [p for u in users if (p := _send(packet, u)) is not None]
            timer = asyncio.get_running_loop().call_later(TRIAL_S, self._on_timeout, key)
            self._running[key] = _Trial(timer, probes, _end(as_sent or packet), [(packet, interface)])

    def knows(self, packet: Packet, interface: str, uid: int | None) -> bool:
        """Whether the result is known; then the packet is passed on by it."""
        everybody, until = self._known.get(self._key(packet, uid), (False, float("-inf")))
        known = self._now() < until
        if known:
            self._give_result(packet, interface, everybody=everybody)
        return known

    def _key(self, packet: Packet, uid: int | None) -> Key:
        to = None if self._proxies else packet.destination
        return uid, packet.protocol, to, packet.destination_port

    def seen(self, packet: Packet) -> None:
        """Take a packet that left with a hop limit of one: it may be one of a trial."""
        for key in [k for k, trial in self._running.items() if trial.end == _end(packet)]:
            self._finish(key, everybody=True)

    def forget(self) -> None:
        """Drop all results, since the rules have changed."""
        self._known.clear()

    def close(self) -> None:
        for trial in self._running.values():
            _stop(trial)
        self._running.clear()

    def _on_timeout(self, key: Key) -> None:
        self._finish(key, everybody=self._is_accepted_here(key))

    def _is_accepted_here(self, key: Key) -> bool:
        """Whether programs of the sender's user on this host accept what is sent to that end. Root has too many
        programs.
        """
        uid, protocol, _to, _port = key
        if protocol != TCP or not uid or self._sockets is None:
            return False
        with contextlib.suppress(OSError):  # a sandbox that hides sockets
            for probe in self._running[key].probes:
                near, port = probe.getsockname()[:2]
                if uid in self._sockets.peer_users(codec.address(near), port):
                    return True
        return False

    def _finish(self, key: Key, *, everybody: bool) -> None:
        trial = self._running.pop(key)
        _stop(trial)
        self._known[key] = everybody, self._now() + RESULT_HOLDS_S[everybody]
        if len(self._known) > _MAX_RESULTS:
            self._known.popitem(last=False)
        for packet, interface in trial.held:
            self._give_result(packet, interface, everybody=everybody)

    def _give_result(self, packet: Packet, interface: str, *, everybody: bool) -> None:
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
    """The users to send as. A sender that is gone may have been a person, as most are."""
    person = FIRST_PERSONAL_UID if uid is None else uid
    return {os.geteuid(), person} if person >= FIRST_PERSONAL_UID else {os.geteuid()}


def _send(packet: Packet, uid: int) -> socket.socket | None:
    """Send one packet to the same end as user `uid`, and return its socket.

    None where it cannot be sent: a kill switch blocks it, or sockets of another user may not be made here.
    """
    is_ipv6 = packet.destination.version == 6
    kind = {TCP: socket.SOCK_STREAM, UDP: socket.SOCK_DGRAM}.get(packet.protocol, socket.SOCK_RAW)
    to = str(packet.destination), packet.destination_port or 0
    sock = None
    try:
        sock = socket_of(
            uid, socket.AF_INET6 if is_ipv6 else socket.AF_INET, kind | socket.SOCK_NONBLOCK, packet.protocol
        )
        if sock is None:
            return None
        if is_ipv6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, packet.tos)
        else:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, 1)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, packet.tos)
        if packet.protocol == TCP:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
            sock.connect_ex(to)
        else:
            sock.sendto(_ECHO.get(packet.protocol, b""), to)
    except OSError:
        if sock is not None:
            sock.close()
        return None
    return sock
