"""TCP connections whose first data is waited for: only that tells a VPN program that goes over to TCP from any other.

Where a kill switch refuses what leaves beside the tunnel, a connection that it lets out was most likely let out for the
VPN: then its first packets wait, for a moment. Everywhere else a connection is told by its first packet.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.agent.net.endpoints import TCP
from vpn_sentinel.agent.net.packets import Packet
from vpn_sentinel.domain.policy import IPAddress

PATIENCE_S: Final = 0.7  # until the first data: with what follows, a leak is told within a second
MAX_WAITING: Final = 16  # connections; more are no VPN program's

_Flow = tuple[IPAddress, int | None, IPAddress, int | None]


@dataclass(slots=True)
class _Opening:
    packet: Packet
    interface: str
    timer: asyncio.TimerHandle


class Openings:
    def __init__(self, other: Callable[[Packet, str], None]) -> None:
        """`other` gets the first packet of a connection that is not the VPN's, and the name of its interface."""
        self._other = other
        self._waiting: dict[_Flow, _Opening] = {}

    def waits(self, packet: Packet, interface: str, *, begin: bool) -> bool:
        """Whether to wait for more of this connection. `begin`: whether new ones may wait.

        Data that came to be asked about is no VPN's: `belongs_to_vpn` is told of that first.
        """
        if packet.protocol != TCP:
            return False
        flow = _flow(packet)
        if packet.opens and flow not in self._waiting:
            if not begin or len(self._waiting) >= MAX_WAITING:
                return False
            timer = asyncio.get_running_loop().call_later(PATIENCE_S, self._over, flow)
            self._waiting[flow] = _Opening(packet, interface, timer)
            return True
        if flow not in self._waiting:
            return False
        if packet.payload_size:
            self._waiting[flow].timer.cancel()
            self._over(flow)
            return False
        return True

    def belongs_to_vpn(self, packet: Packet) -> None:
        """The packet is a VPN's: its connection, and others to the same port, are no leak."""
        for flow, waiting in list(self._waiting.items()):
            if flow[2:] == _flow(packet)[2:]:
                waiting.timer.cancel()
                del self._waiting[flow]

    def close(self) -> None:
        for waiting in self._waiting.values():
            waiting.timer.cancel()
        self._waiting.clear()

    def _over(self, flow: _Flow) -> None:
        waiting = self._waiting.pop(flow)
        self._other(waiting.packet, waiting.interface)


def _flow(packet: Packet) -> _Flow:
    return packet.source, packet.source_port, packet.destination, packet.destination_port
