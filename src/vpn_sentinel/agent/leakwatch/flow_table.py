"""The packets that left outside the tunnel, counted by flow. Bounded, and without a clock: each call says the time."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from vpn_sentinel.agent.net.packets import Packet
from vpn_sentinel.domain.observation import Escape
from vpn_sentinel.domain.policy import IPAddress

TOLD_FOR_S: Final = 10.0  # seconds that a flow is told of after its last packet
# And where its packets left because they were routed there, and are routed through the tunnel again: nothing of that
# kind can leave any more. What left against the routes, by a socket bound to a device, may leave again.
TOLD_WHEN_ROUTED_AGAIN_S: Final = 2.0
MAX_FLOWS: Final = 32
MAX_NAMES_PER_SERVER: Final = 8  # different names asked of one nameserver that are kept apart
_MAX_INTERFACE_CHARS: Final = 64  # characters of an interface's name


class Direction(Enum):
    """Where a flow's packets would go now. UNKNOWN also where the tunnel is down, or a kill switch refuses them."""

    OUTSIDE = auto()
    TUNNEL = auto()
    UNKNOWN = auto()


@dataclass(slots=True)
class _Flow:
    interface: str
    packet: Packet
    first: float
    last: float
    packets: int = 0
    size: int = 0
    routed: bool = False
    user: int | None = None

    def escape(self, now: float) -> Escape:
        packet = self.packet
        return Escape(
            interface=self.interface[:_MAX_INTERFACE_CHARS],
            protocol=packet.called,
            source=packet.source,
            destination=packet.destination,
            source_port=packet.source_port,
            destination_port=packet.destination_port,
            packets=self.packets,
            size=self.size,
            first_age=round(max(0.0, now - self.first), 3),
            last_age=round(max(0.0, now - self.last), 3),
            name=packet.name,
            user=self.user,
        )


_Kind = tuple[int, IPAddress, int | None]
_Key = tuple[int, IPAddress, int | None, IPAddress, str | None]


class FlowTable:
    """Flows by protocol, ends and name asked; source ports are not told apart, the first packet's is shown."""

    def __init__(self) -> None:
        self._flows: dict[_Key, _Flow] = {}
        self._kinds: Counter[_Kind] = Counter()

    def see(
        self, packet: Packet, interface: str, now: float, *, routed: bool = False, user: int | None = None
    ) -> Escape | None:
        """Count one packet; `routed` is whether the routes lead its destination outside, for everybody.

        `user` is whose it is, of a flow's first packet.

        Returns the flow when nothing else in the book went to that destination and port.
        """
        kind = packet.protocol, packet.destination, packet.destination_port
        key = (*kind, packet.source, packet.name)
        flow = self._flows.get(key)
        new_kind = kind not in self._kinds
        if flow is None and self._kinds[kind] >= MAX_NAMES_PER_SERVER:
            flow = next(f for k, f in self._flows.items() if k[:3] == kind)
        if flow is None:
            if len(self._flows) >= MAX_FLOWS:
                self._drop(min(self._flows, key=lambda k: self._flows[k].last))
            flow = self._flows[key] = _Flow(interface, packet, first=now, last=now, user=user)
            self._kinds[kind] += 1
        flow.last = now
        flow.routed = routed
        flow.packets += 1
        flow.size += packet.size
        return flow.escape(now) if new_kind else None

    def has(self, packet: Packet) -> bool:
        """Whether something in the book went to that destination and port."""
        return (packet.protocol, packet.destination, packet.destination_port) in self._kinds

    def missed(self, packets: int, now: float) -> None:
        """Packets that left while nobody read: put down to the flow that was busiest, at its packets' mean size."""
        flow = max(self._flows.values(), key=lambda f: (f.last, f.packets), default=None)
        if flow is None or packets <= 0:
            return
        flow.size += packets * (flow.size // flow.packets)
        flow.packets += packets
        flow.last = now

    def tell(self, now: float) -> tuple[Escape, ...]:
        """All flows, the latest first."""
        return tuple(f.escape(now) for f in sorted(self._flows.values(), key=lambda f: -f.last))

    def forget(self, now: float, way: Callable[[Escape], Direction]) -> float | None:
        """Drop what is over; `way` says where the flow's packets would go now.

        Returns the seconds until the next one is over, if no packet comes; None when that is not known of any.
        """
        left = {key: self._left(flow, now, way) for key, flow in self._flows.items()}
        for key in [k for k, seconds in left.items() if seconds is not None and seconds < 0]:
            self._drop(key)
        return min((s for s in left.values() if s is not None and s >= 0), default=None)

    @staticmethod
    def _left(flow: _Flow, now: float, way: Callable[[Escape], Direction]) -> float | None:
        match way(flow.escape(now)):
            case Direction.OUTSIDE:
                return None
            case Direction.TUNNEL if flow.routed:
                return flow.last + TOLD_WHEN_ROUTED_AGAIN_S - now
            case _:
                return flow.last + TOLD_FOR_S - now

    def clear(self) -> None:
        self._flows.clear()
        self._kinds.clear()

    def _drop(self, key: _Key) -> None:
        del self._flows[key]
        kind = key[:3]
        self._kinds[kind] -= 1
        if not self._kinds[kind]:
            del self._kinds[kind]
