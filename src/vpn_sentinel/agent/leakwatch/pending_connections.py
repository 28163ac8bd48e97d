"""TCP connections that wait for their first data: only that distinguishes a VPN program that changes to TCP from
others.

Where a kill switch blocks traffic outside the tunnel, a connection that it lets out is most likely the VPN's: its first
packets wait for a moment. Everywhere else the first packet of a connection is reported.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.agent.net.endpoints import TCP
from vpn_sentinel.agent.net.packets import Packet
from vpn_sentinel.domain.policy import IPAddress

FIRST_DATA_S: Final = 0.7  # wait for the first data; a leak must be reported within a second in all
MAX_CONNECTIONS: Final = 16  # no VPN program opens more

_Flow = tuple[IPAddress, int | None, IPAddress, int | None]


@dataclass(slots=True)
class _PendingConnection:
    packet: Packet
    interface: str
    timer: asyncio.TimerHandle


class PendingConnections:
    def __init__(self, on_other: Callable[[Packet, str], None]) -> None:
        """`on_other` gets the first packet of a connection that is not the VPN's, and the name of its interface."""
        self._on_other = on_other
        self._waiting: dict[_Flow, _PendingConnection] = {}

    def waits(self, packet: Packet, interface: str, *, begin: bool) -> bool:
        """Whether to wait for more of this connection. `begin`: whether new ones may wait.

        A data packet is taken for another program's: the caller calls `belongs_to_vpn` first for a VPN's.
        """
        if packet.protocol != TCP:
            return False
        flow = _flow(packet)
        if packet.opens and flow not in self._waiting:
            if not begin or len(self._waiting) >= MAX_CONNECTIONS:
                return False
            timer = asyncio.get_running_loop().call_later(FIRST_DATA_S, self._expire, flow)
            self._waiting[flow] = _PendingConnection(packet, interface, timer)
            return True
        if flow not in self._waiting:
            return False
        if packet.payload_size:
            self._waiting[flow].timer.cancel()
            self._expire(flow)
            return False
        return True

    def belongs_to_vpn(self, packet: Packet) -> None:
        """Drop the connection of this packet of a VPN, and others to the same port: they are no leak."""
        for flow, waiting in list(self._waiting.items()):
            if flow[2:] == _flow(packet)[2:]:
                waiting.timer.cancel()
                del self._waiting[flow]

    def close(self) -> None:
        for waiting in self._waiting.values():
            waiting.timer.cancel()
        self._waiting.clear()

    def _expire(self, flow: _Flow) -> None:
        waiting = self._waiting.pop(flow)
        self._on_other(waiting.packet, waiting.interface)


def _flow(packet: Packet) -> _Flow:
    return packet.source, packet.source_port, packet.destination, packet.destination_port
