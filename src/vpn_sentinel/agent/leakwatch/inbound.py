"""Which flows were begun from outside: what leaves in such a flow is an answer, as its owner wants it.

TCP: a connection that the other side began, seen by its first packet, or one of a port that takes connections here.
UDP: a packet of that very flow came in first. A flow that was begun from here never becomes one. Which was first is
told by the kernel's times of both, since packets may be read long after they passed, and in another order.
"""

from collections import OrderedDict
from typing import Final, Protocol, TypeVar

from vpn_sentinel.agent.endpoints import TCP, UDP
from vpn_sentinel.agent.leakwatch.packets import Packet
from vpn_sentinel.domain.policy import IPAddress

T = TypeVar("T")

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
    """Bounded. Each call says the time, `now`, and when the packet `passed` by the kernel's clock, in seconds."""

    def __init__(self, listeners: Listeners | None) -> None:
        self._listeners = listeners
        # When it was heard of last, and until an answer left, when its first packet passed.
        self._came: OrderedDict[Flow, tuple[float, float]] = OrderedDict()
        self._begun: OrderedDict[Flow, float] = OrderedDict()

    def came_in(self, packet: Packet, now: float, passed: float) -> None:
        """A packet from outside: it begins a flow, unless one was begun from here."""
        flow = _flow(packet, inbound=True)
        if flow is None or flow in self._begun:
            return
        if packet.protocol == UDP or packet.flags & _SYN_ACK == _SYN:
            _keep(self._came, flow, (now, self._came.get(flow, (now, passed))[1]))

    def begins(self, packet: Packet, now: float) -> None:
        """A packet left that is no answer."""
        flow = _flow(packet)
        if flow is not None:
            _keep(self._begun, flow, now)
            self._came.pop(flow, None)

    def is_answer(self, packet: Packet, now: float, passed: float) -> bool:
        flow = _flow(packet)
        if flow is None or flow in self._begun:
            return False
        if packet.protocol == TCP:
            # A packet that opens a connection is no answer, whichever port it leaves from.
            return packet.flags & _SYN_ACK != _SYN and (flow in self._came or self._is_taken(packet))
        heard, first = self._came.get(flow, (float("-inf"), 0.0))
        answers = now - heard <= UDP_FLOW_S and first <= passed
        if answers:
            _keep(self._came, flow, (now, float("-inf")))  # from here on a clock that is set changes nothing
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


def _keep(flows: "OrderedDict[Flow, T]", flow: Flow, what: T) -> None:
    flows[flow] = what
    flows.move_to_end(flow)
    if len(flows) > MAX_FLOWS:
        flows.popitem(last=False)
