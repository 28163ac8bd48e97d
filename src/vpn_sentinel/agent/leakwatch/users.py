"""Which user sent a packet, where that matters: rules or the owner let some out, or the tunnel is for some alone."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from vpn_sentinel.agent.leakwatch.inbound import MAX_FLOWS, Flow
from vpn_sentinel.agent.leakwatch.meant import MeantOutside
from vpn_sentinel.agent.leakwatch.senders import Senders, is_mark, leads_in, selects
from vpn_sentinel.agent.net.endpoints import TCP
from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.packets import Packet
from vpn_sentinel.agent.net.routing_rules import PERSONAL_UIDS, Rule
from vpn_sentinel.agent.net.sockets import Socket
from vpn_sentinel.domain.policy import IPAddress

log = logging.getLogger(__name__)


class OpenSockets(Protocol):
    """The sockets of this network namespace, as the kernel has them now."""

    def of(
        self, protocol: int, source: IPAddress, port: int, far: IPAddress, far_port: int, devices: Iterable[int] = ()
    ) -> Socket | None:
        """The socket with these ends, also one bound to one of `devices`; None when it is gone. Raises OSError."""
        ...

    def pings(self, echo: int, version: int) -> int | None:
        """The user who pings with this identifier, None when it is not known. Raises OSError."""
        ...


class EndedSockets(Protocol):
    """The sockets of this network namespace that ended while it is open."""

    def of(
        self, protocol: int, source: IPAddress, port: int, far: IPAddress, far_port: int, *, since: float
    ) -> list[Socket]:
        """The sockets with these ends that ended after `since`; the kernel does not report their users."""
        ...

    def lost(self, since: float) -> bool:
        """Whether sockets that ended after `since` may be missing."""
        ...

    def close(self) -> None: ...


class Users:
    """Asks the kernel only when a user is excepted, or the tunnel is for some users alone."""

    def __init__(self, owners: OpenSockets | None, declared: MeantOutside, closed: Callable[[], EndedSockets]) -> None:
        """`closed` starts to record sockets that end; it may raise OSError."""
        self._owners = owners
        self._declared = declared
        self._watch_closed = closed
        self._closed: EndedSockets | None = None
        self._is_unable = False
        self._senders = Senders()
        self._devices: tuple[int, ...] = ()
        self._fib: Fib | None = None
        self._tunnel: int | None = None
        self._known: OrderedDict[Flow, int] = OrderedDict()

    def learn(self, senders: Senders, devices: Iterable[int], fib: Fib | None, tunnel: int | None) -> None:
        """Take the senders by the routing rules, and the indices of the watched devices and of the tunnel.

        Must be called on the event loop.
        """
        self._senders, self._devices, self._fib, self._tunnel = senders, tuple(devices), fib, tunnel
        if not self._excepted():
            self.close()
        elif self._closed is None:
            try:
                self._closed, self._is_unable = self._watch_closed(), False
            except OSError as e:  # each update tries again
                if not self._is_unable:
                    log.warning("the kernel does not report here which sockets end", extra={"reason": e.strerror})
                self._is_unable = True

    def close(self) -> None:
        if self._closed is not None:
            self._closed.close()
            self._closed = None

    def note(self, packet: Packet) -> None:
        """Note the sender while its socket exists, before slower work begins."""
        if self._excepted() or self._declared.only_users or self._declared.users:
            self._sender(packet)

    def belongs_in_tunnel(self, packet: Packet) -> bool | None:
        """Whether the sender's packets belong in the tunnel.

        None: the sender is gone, and may be one that a rule lets out; `was_let_out` decides a little later. Where only
        the owner excepts users, a packet of an unknown user is reported; where the tunnel is for some users alone, it
        is not.
        """
        excepted = self._excepted()
        # Where the filter selects by mark, only packets that belong in the tunnel arrive here.
        leading_in = () if all(is_mark(r) for r in self._senders.leading_in) else self._senders.leading_in
        only, users = self._declared.only_users, self._declared.users
        if not (excepted or leading_in or only or users):
            return True
        uid, _ = self._sender(packet)
        if any(selects(r, packet, uid) for r in excepted) or uid in users:
            return False
        if only:
            return uid in only
        leading_in = tuple(r for r in leading_in if r.version == packet.destination.version)
        if leading_in:
            return any(selects(r, packet, uid) for r in leading_in)
        maybe = uid is None and self._closed is not None and _flow(packet) is not None
        return None if maybe and any(selects(replace(r, uids=None), packet) for r in excepted) else True

    def is_a_persons(self, packet: Packet) -> bool:
        """Whether a person's program sent it, not a VPN's or the system's; False when the user is not known."""
        uid = self.user(packet)
        return uid is not None and uid in PERSONAL_UIDS

    def user(self, packet: Packet) -> int | None:
        """The user id of the sender, None when the kernel does not know the socket any more."""
        return self._sender(packet)[0]

    def was_let_out(self, packet: Packet, passed: float, *, is_refused: bool) -> bool:
        """Whether a rule for a user let out the packet that `passed` at that time of the kernel's clock; its sender is
        gone.

        True when other users' packets go into the tunnel, or a kill switch blocks them (`is_refused`), and the socket
        was not bound to a device. True also where the socket cannot be known: that is no leak.
        """
        ends = _flow(packet)
        if self._closed is None or ends is None:
            return False
        _, socket = self._sender(packet)
        sent = [socket] if socket is not None and socket.is_orphan else self._closed.of(*ends, since=passed)
        if not sent:
            # The kernel knows the socket after all, or it cannot be known any more.
            return self.belongs_in_tunnel(packet) is False or self._closed.lost(passed)
        # Where several sockets fit, all must have been let out.
        return all(s.device == 0 and (is_refused or self._leads_in(packet, s)) for s in sent)

    def user_let_out(self, packet: Packet) -> int | None:
        """The user who sent the packet, if a routing rule lets that user out and the owner did not declare it."""
        excepted = self._excepted()
        uid = self._sender(packet)[0] if excepted else None
        return uid if any(selects(r, packet, uid) for r in excepted) and uid not in self._declared.users else None

    def _excepted(self) -> list[Rule]:
        return [r for r in self._senders.excepted if r.uids is not None]

    def _leads_in(self, packet: Packet, sent: Socket) -> bool:
        near = None if sent.near.is_unspecified else sent.near
        return leads_in(self._senders, self._fib, packet, near, self._tunnel)

    def _sender(self, packet: Packet) -> tuple[int | None, Socket | None]:
        """The user, None when it is not known; and the socket while the kernel knows it."""
        flow = _flow(packet)
        if self._owners is None:
            return None, None
        try:
            if packet.echo is not None:
                flow = packet.protocol, packet.source, packet.echo, packet.destination, 0
                uid = self._owners.pings(packet.echo, packet.destination.version)
                return self._known.get(flow) if uid is None else self._note(flow, uid), None
            if flow is None:
                return None, None
            found = self._owners.of(*flow, self._devices)
        except OSError:
            return None, None
        if found is None or (found.is_orphan and packet.protocol == TCP):
            return self._known.get(flow), found  # closed: the kernel sends the FIN, and no user owns it
        return self._note(flow, found.uid), found

    def _note(self, flow: Flow, uid: int) -> int:
        self._known[flow] = uid
        if len(self._known) > MAX_FLOWS:
            self._known.popitem(last=False)
        return uid


def _flow(packet: Packet) -> Flow | None:
    if packet.source_port is None or packet.destination_port is None:
        return None
    return packet.protocol, packet.source, packet.source_port, packet.destination, packet.destination_port
