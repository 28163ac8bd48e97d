"""The packets that left outside the tunnel, counted by flow. Bounded, and without a clock: each call says the time."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.agent.leakwatch.packets import Packet
from vpn_sentinel.domain.observation import Escape
from vpn_sentinel.domain.policy import IPAddress

HOLD: Final = 10.0  # seconds that a flow is told of after its last packet
FLOWS: Final = 32
NAMES: Final = 8  # different names asked of one nameserver that are kept apart
_NAME: Final = 64  # characters of an interface's name


@dataclass(slots=True)
class _Flow:
    interface: str
    packet: Packet
    first: float
    last: float
    packets: int = 0
    size: int = 0

    def escape(self, now: float) -> Escape:
        packet = self.packet
        return Escape(
            interface=self.interface[:_NAME],
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
        )


_Kind = tuple[int, IPAddress, int | None]
_Key = tuple[int, IPAddress, int | None, IPAddress, str | None]


class Book:
    """Flows by protocol, ends and name asked; source ports are not told apart, the first packet's is shown."""

    def __init__(self) -> None:
        self._flows: dict[_Key, _Flow] = {}
        self._kinds: Counter[_Kind] = Counter()

    def see(self, packet: Packet, interface: str, now: float) -> Escape | None:
        """Count one packet. Returns the flow when nothing else in the book went to that destination and port."""
        kind = packet.protocol, packet.destination, packet.destination_port
        key = (*kind, packet.source, packet.name)
        flow = self._flows.get(key)
        new_kind = kind not in self._kinds
        if flow is None and self._kinds[kind] >= NAMES:
            flow = next(f for k, f in self._flows.items() if k[:3] == kind)
        if flow is None:
            if len(self._flows) >= FLOWS:
                self._drop(min(self._flows, key=lambda k: self._flows[k].last))
            flow = self._flows[key] = _Flow(interface, packet, first=now, last=now)
            self._kinds[kind] += 1
        flow.last = now
        flow.packets += 1
        flow.size += packet.size
        return flow.escape(now) if new_kind else None

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

    def forget(self, now: float, still: Callable[[Escape], bool]) -> None:
        """Drop flows without a packet in the last ten seconds, unless `still` says that they would leave again."""
        for key in [k for k, f in self._flows.items() if now - f.last > HOLD and not still(f.escape(now))]:
            self._drop(key)

    def clear(self) -> None:
        self._flows.clear()
        self._kinds.clear()

    def _drop(self, key: _Key) -> None:
        del self._flows[key]
        kind = key[:3]
        self._kinds[kind] -= 1
        if not self._kinds[kind]:
            del self._kinds[kind]
