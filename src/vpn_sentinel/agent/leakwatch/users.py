"""Whose packet it is, where that decides: users that rules or the owner let out, or for whom alone the tunnel is."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import Protocol

from vpn_sentinel.agent.endpoints import TCP
from vpn_sentinel.agent.leakwatch.inbound import MAX_FLOWS, Flow
from vpn_sentinel.agent.leakwatch.meant import Meant
from vpn_sentinel.agent.leakwatch.packets import Packet
from vpn_sentinel.agent.leakwatch.senders import Senders, is_mark, selects
from vpn_sentinel.agent.net.sockets import Socket
from vpn_sentinel.domain.policy import IPAddress


class Owners(Protocol):
    def of(
        self, protocol: int, source: IPAddress, port: int, far: IPAddress, far_port: int, devices: Iterable[int] = ()
    ) -> Socket | None:
        """The socket that sends so, one that is bound to one of `devices` too; None when it is gone. Raises OSError."""
        ...


class Users:
    """Asks the kernel only when some user is excepted, or the tunnel is for some users alone."""

    def __init__(self, owners: Owners | None, declared: Meant) -> None:
        self._owners = owners
        self._declared = declared
        self._senders = Senders()
        self._devices: tuple[int, ...] = ()
        self._known: OrderedDict[Flow, int] = OrderedDict()

    def learn(self, senders: Senders, devices: Iterable[int]) -> None:
        """What the routing rules say now, and the indices of the devices that packets come up from."""
        self._senders, self._devices = senders, tuple(devices)

    def belongs(self, packet: Packet) -> bool:
        """Whether what sent the packet should have gone through the tunnel.

        A sender that is gone already, and so unknown, is told where everybody belongs to the tunnel but some; where it
        is for some alone, it is nobody's leak.
        """
        excepted = [r for r in self._senders.excepted if r.uids is not None]
        # Those that the filter tells by their mark alone come up here when they belong.
        inside = () if all(is_mark(r) for r in self._senders.inside) else self._senders.inside
        only, users = self._declared.only, self._declared.users
        if not (excepted or inside or only or users):
            return True
        uid = self._uid(packet)
        if any(selects(r, packet, uid) for r in excepted) or uid in users:
            return False
        if only:
            return uid in only
        inside = tuple(r for r in inside if r.version == packet.destination.version)
        return not inside or any(selects(r, packet, uid) for r in inside)

    def led_out(self, packet: Packet) -> int | None:
        """The user whom a routing rule leads out, if the packet is that one's; the owner's word is another matter."""
        excepted = [r for r in self._senders.excepted if r.uids is not None]
        uid = self._uid(packet) if excepted else None
        return uid if any(selects(r, packet, uid) for r in excepted) and uid not in self._declared.users else None

    def _uid(self, packet: Packet) -> int | None:
        if self._owners is None or packet.source_port is None or packet.destination_port is None:
            return None
        flow = packet.protocol, packet.source, packet.source_port, packet.destination, packet.destination_port
        try:
            found = self._owners.of(*flow, self._devices)
        except OSError:
            return None
        if found is None or (found.inode == 0 and packet.protocol == TCP):
            return self._known.get(flow)  # closed: the kernel sends its end, for nobody any more
        self._known[flow] = found.uid
        if len(self._known) > MAX_FLOWS:
            self._known.popitem(last=False)
        return found.uid
