"""The packets that left outside the tunnel, counted by flow. Bounded, and without a clock: callers pass the time."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from vpn_sentinel.agent.net.packets import Packet
from vpn_sentinel.domain.observation import Escape
from vpn_sentinel.domain.policy import IPAddress

REPORTED_FOR_S: Final = 10.0  # how long a flow is reported after its last packet
# The same where its packets followed the routes, and the routes lead through the tunnel again: no more such packets can
# leave. What left against the routes, by a socket bound to a device, may leave again.
REPORTED_WHEN_ROUTED_AGAIN_S: Final = 2.0
MAX_FLOWS: Final = 32
MAX_NAMES_PER_SERVER: Final = 8  # queried names of one nameserver that have a flow each
_MAX_INTERFACE_CHARS: Final = 64


class Direction(Enum):
    """Where a flow's packets would go now. UNKNOWN also where the tunnel is down, or a kill switch blocks them."""

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
            protocol=packet.protocol_name,
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
    """Flows by protocol, ends and queried name. Source ports are not distinguished; the first packet's is shown."""

    def __init__(self) -> None:
        self._flows: dict[_Key, _Flow] = {}
        self._kinds: Counter[_Kind] = Counter()

    def count(
        self, packet: Packet, interface: str, now: float, *, routed: bool = False, user: int | None = None
    ) -> Escape | None:
        """Count one packet; `routed`: the routes lead to its destination outside the tunnel, for everybody.

        `user` is the user id of the sender, if known; that of a flow's first packet is kept.

        Returns the flow when no other in the table has that destination and port.
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
        """Whether a flow in the table has that destination and port."""
        return (packet.protocol, packet.destination, packet.destination_port) in self._kinds

    def missed(self, packets: int, now: float) -> None:
        """Add packets that left unread to the flow that was busiest last, at its packets' mean size."""
        flow = max(self._flows.values(), key=lambda f: (f.last, f.packets), default=None)
        if flow is None or packets <= 0:
            return
        flow.size += packets * (flow.size // flow.packets)
        flow.packets += packets
        flow.last = now

    def entries(self, now: float) -> tuple[Escape, ...]:
        """All flows, the latest first."""
        return tuple(f.escape(now) for f in sorted(self._flows.values(), key=lambda f: -f.last))

    def forget(self, now: float, direction: Callable[[Escape], Direction]) -> float | None:
        """Drop the flows that are over; `direction` returns where a flow's packets would go now.

        Returns the seconds until the next flow is over if no packet comes, None when no flow has an end yet.
        """
        remaining = {key: self._seconds_left(flow, now, direction) for key, flow in self._flows.items()}
        for key in [k for k, seconds in remaining.items() if seconds is not None and seconds < 0]:
            self._drop(key)
        return min((s for s in remaining.values() if s is not None and s >= 0), default=None)

    @staticmethod
    def _seconds_left(flow: _Flow, now: float, direction: Callable[[Escape], Direction]) -> float | None:
        match direction(flow.escape(now)):
            case Direction.OUTSIDE:
                return None
            case Direction.TUNNEL if flow.routed:
                return flow.last + REPORTED_WHEN_ROUTED_AGAIN_S - now
            case _:
                return flow.last + REPORTED_FOR_S - now

    def clear(self) -> None:
        self._flows.clear()
        self._kinds.clear()

    def _drop(self, key: _Key) -> None:
        del self._flows[key]
        kind = key[:3]
        self._kinds[kind] -= 1
        if not self._kinds[kind]:
            del self._kinds[kind]
