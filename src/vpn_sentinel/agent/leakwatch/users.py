"""Whose packet it is, where that decides: users that rules or the owner let out, or for whom alone the tunnel is."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from vpn_sentinel.agent.leakwatch.inbound import MAX_FLOWS, Flow
from vpn_sentinel.agent.leakwatch.meant import Meant
from vpn_sentinel.agent.leakwatch.senders import Senders, is_mark, leads_in, selects
from vpn_sentinel.agent.net.endpoints import TCP
from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.packets import Packet
from vpn_sentinel.agent.net.routing_rules import PERSONAL_UIDS, Rule
from vpn_sentinel.agent.net.sockets import Socket
from vpn_sentinel.domain.policy import IPAddress

log = logging.getLogger(__name__)


class Owners(Protocol):
    def of(
        self, protocol: int, source: IPAddress, port: int, far: IPAddress, far_port: int, devices: Iterable[int] = ()
    ) -> Socket | None:
        """The socket that sends so, one that is bound to one of `devices` too; None when it is gone. Raises OSError."""
        ...

    def pings(self, echo: int, version: int) -> int | None:
        """The user who pings with this identifier, None when nobody can tell. Raises OSError."""
        ...


class Closed(Protocol):
    def of(
        self, protocol: int, source: IPAddress, port: int, far: IPAddress, far_port: int, *, since: float
    ) -> list[Socket]:
        """The sockets that may have sent so, and ended after `since`; the kernel does not tell whose they were."""
        ...

    def lost(self, since: float) -> bool:
        """Whether some that ended after `since` are not known."""
        ...

    def close(self) -> None: ...


class Users:
    """Asks the kernel only when some user is excepted, or the tunnel is for some users alone."""

    def __init__(self, owners: Owners | None, declared: Meant, closed: Callable[[], Closed]) -> None:
        """`closed` begins to listen for sockets that end; it may raise OSError."""
        self._owners = owners
        self._declared = declared
        self._listen = closed
        self._closed: Closed | None = None
        self._unable = False
        self._senders = Senders()
        self._devices: tuple[int, ...] = ()
        self._fib: Fib | None = None
        self._tunnel: int | None = None
        self._known: OrderedDict[Flow, int] = OrderedDict()

    def learn(self, senders: Senders, devices: Iterable[int], fib: Fib | None, tunnel: int | None) -> None:
        """What the routing rules say now, and the indices of the devices that packets come up from, and the tunnel's.

        Must be called on the event loop.
        """
        self._senders, self._devices, self._fib, self._tunnel = senders, tuple(devices), fib, tunnel
        if not self._excepted():
            self.close()
        elif self._closed is None:
            try:
                self._closed, self._unable = self._listen(), False
            except OSError as e:  # each look tries again
                if not self._unable:
                    log.warning("which sockets end is not told here", extra={"reason": e.strerror})
                self._unable = True

    def close(self) -> None:
        if self._closed is not None:
            self._closed.close()
            self._closed = None

    def note(self, packet: Packet) -> None:
        """Note whose it is as long as its socket is there, before something else takes its time."""
        if self._excepted() or self._declared.only or self._declared.users:
            self._sender(packet)

    def belongs(self, packet: Packet) -> bool | None:
        """Whether what sent the packet should have gone through the tunnel.

        None: its sender is gone already, and may be one whom a rule lets out; `was_led_out` tells a little later. Where
        the owner alone excepts some, such a packet is told; where the tunnel is for some alone, it is nobody's leak.
        """
        excepted = self._excepted()
        # Those that the filter tells by their mark alone come up here when they belong.
        inside = () if all(is_mark(r) for r in self._senders.inside) else self._senders.inside
        only, users = self._declared.only, self._declared.users
        if not (excepted or inside or only or users):
            return True
        uid, _ = self._sender(packet)
        if any(selects(r, packet, uid) for r in excepted) or uid in users:
            return False
        if only:
            return uid in only
        inside = tuple(r for r in inside if r.version == packet.destination.version)
        if inside:
            return any(selects(r, packet, uid) for r in inside)
        maybe = uid is None and self._closed is not None and _flow(packet) is not None
        return None if maybe and any(selects(replace(r, uids=None), packet) for r in excepted) else True

    def is_a_persons(self, packet: Packet) -> bool:
        """Whether a person's program sends it, which is no VPN's and none of the system's; False where nobody knows."""
        uid = self.user(packet)
        return uid is not None and uid in PERSONAL_UIDS

    def user(self, packet: Packet) -> int | None:
        """Whose program sends it, as long as the kernel knows the socket."""
        return self._sender(packet)[0]

    def was_led_out(self, packet: Packet, passed: float, *, killed: bool) -> bool:
        """Whether a rule for a user led the packet out, which `passed` then by the kernel's clock; its sender is gone.

        Also where nobody can know: that is no leak.

        So it is when everybody else's goes into the tunnel, or is `killed` by a kill switch, and its socket was not
        bound to a device.
        """
        ends = _flow(packet)
        if self._closed is None or ends is None:
            return False
        _, socket = self._sender(packet)
        sent = [socket] if socket is not None and socket.inode == 0 else self._closed.of(*ends, since=passed)
        if not sent:
            # It is there all the same, the kernel did not tell at first; or nobody can know any more.
            return self.belongs(packet) is False or self._closed.lost(passed)
        # Where several may be meant, each must have been.
        return all(s.device == 0 and (killed or self._leads_in(packet, s)) for s in sent)

    def led_out(self, packet: Packet) -> int | None:
        """The user whom a routing rule leads out, if the packet is that one's; the owner's word is another matter."""
        excepted = self._excepted()
        uid = self._sender(packet)[0] if excepted else None
        return uid if any(selects(r, packet, uid) for r in excepted) and uid not in self._declared.users else None

    def _excepted(self) -> list[Rule]:
        return [r for r in self._senders.excepted if r.uids is not None]

    def _leads_in(self, packet: Packet, sent: Socket) -> bool:
        near = None if sent.near.is_unspecified else sent.near
        return leads_in(self._senders, self._fib, packet, near, self._tunnel)

    def _sender(self, packet: Packet) -> tuple[int | None, Socket | None]:
        """The user, None for one that nobody knows; and the socket as long as the kernel knows it."""
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
        if found is None or (found.inode == 0 and packet.protocol == TCP):
            return self._known.get(flow), found  # closed: the kernel sends its end, for nobody any more
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
