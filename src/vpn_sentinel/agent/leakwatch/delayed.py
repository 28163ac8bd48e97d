"""Packets that wait before they are judged: what lets them out may become known a moment later."""

import asyncio
from collections.abc import Callable, Hashable

from vpn_sentinel.agent.net.packets import Packet


class Delayed:
    """Holds one packet for each key: those that follow it while it waits are not judged."""

    def __init__(self, judge: Callable[[Packet, str, float], None], max_waiting: int | None = None) -> None:
        """`judge` gets the packet, the name of its interface, and when it passed."""
        self._judge = judge
        self._max_waiting = max_waiting
        self._waiting: dict[Hashable, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: Hashable, seconds: float, packet: Packet, interface: str, passed: float) -> None:
        """Hold the packet for `seconds`, unless one of this key waits already or `max_waiting` do."""
        full = self._max_waiting is not None and len(self._waiting) >= self._max_waiting
        if key not in self._waiting and not full:
            loop = asyncio.get_running_loop()
            self._waiting[key] = loop.call_later(seconds, self._expire, key, packet, interface, passed)

    def close(self) -> None:
        for timer in self._waiting.values():
            timer.cancel()

    def _expire(self, key: Hashable, packet: Packet, interface: str, passed: float) -> None:
        del self._waiting[key]
        self._judge(packet, interface, passed)
