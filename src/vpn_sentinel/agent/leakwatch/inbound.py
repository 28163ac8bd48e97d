"""Which flows were begun from outside: what leaves in such a flow is an answer, as its owner wants it.

TCP: a connection that the other side began, seen by its first packet, or one of a port that takes connections here.
UDP: a packet of that very flow came in first. A flow that was begun from here never becomes one.
"""

from collections import OrderedDict
from typing import Final, Protocol

from vpn_sentinel.agent.endpoints import TCP, UDP
from vpn_sentinel.agent.leakwatch.packets import Packet
from vpn_sentinel.domain.policy import IPAddress

MAX_FLOWS: Final = 2048
UDP_FLOW_S: Final = 180.0  # after its last packet, as the kernel's own table of connections keeps it
_SYN, _SYN_ACK = 0x02, 0x12

# protocol, address and port here, address and port there
Flow = tuple[int, IPAddress, int, IPAddress, int]


class Listeners(Protocol):
    def listens(self, port: int, version: int) -> bool:
        """Whether a TCP socket takes connections on this port. Raises OSError."""
        ...


class Flows:
    """Bounded; each call says the time in seconds."""

    def __init__(self, listeners: Listeners | None) -> None:
        self._listeners = listeners
        self._came: OrderedDict[Flow, float] = OrderedDict()
        self._begun: OrderedDict[Flow, float] = OrderedDict()

    def came_in(self, packet: Packet, now: float) -> None:
        """A packet from outside: it begins a flow, unless one was begun from here."""
        flow = _flow(packet, inbound=True)
        if flow is None or flow in self._begun:
            return
        if packet.protocol == UDP or packet.flags & _SYN_ACK == _SYN:
            _keep(self._came, flow, now)

    def begins(self, packet: Packet, now: float) -> None:
        """A packet left that is no answer."""
        flow = _flow(packet)
        if flow is not None:
            _keep(self._begun, flow, now)

    def is_answer(self, packet: Packet, now: float) -> bool:
        flow = _flow(packet)
        if flow is None or flow in self._begun:
            return False
        if packet.protocol == TCP:
            # A packet that opens a connection is no answer, whichever port it leaves from.
            return packet.flags & _SYN_ACK != _SYN and (flow in self._came or self._is_taken(packet))
        answers = now - self._came.get(flow, float("-inf")) <= UDP_FLOW_S
        if answers:
            _keep(self._came, flow, now)
        return answers

    def _is_taken(self, packet: Packet) -> bool:
        if self._listeners is None or packet.source_port is None:
            return False
        try:
            return self._listeners.listens(packet.source_port, packet.source.version)
        except OSError:
            return False


def _flow(packet: Packet, *, inbound: bool = False) -> Flow | None:
    if packet.source_port is None or packet.destination_port is None or packet.protocol not in (TCP, UDP):
        return None
    far, here = (packet.source, packet.source_port), (packet.destination, packet.destination_port)
    return (packet.protocol, *(here if inbound else far), *(far if inbound else here))


def _keep(flows: "OrderedDict[Flow, float]", flow: Flow, now: float) -> None:
    flows[flow] = now
    flows.move_to_end(flow)
    if len(flows) > MAX_FLOWS:
        flows.popitem(last=False)
