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


class Gathered:
    """Holds packets until `seconds` after the first of them, and has them judged together."""

    def __init__(
        self, judge: Callable[[list[tuple[Packet, str, float]]], None], seconds: float, max_waiting: int
    ) -> None:
        """`judge` gets each packet with the name of its interface, and when it passed; callers heed `is_full`."""
        self._judge = judge
        self._seconds = seconds
        self._max_waiting = max_waiting
        self._waiting: list[tuple[Packet, str, float]] = []
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def is_full(self) -> bool:
        return len(self._waiting) >= self._max_waiting

    def add(self, packet: Packet, interface: str, passed: float) -> None:
        self._waiting.append((packet, interface, passed))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._expire)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _expire(self) -> None:
        self._timer = None
        waiting, self._waiting = self._waiting, []
        self._judge(waiting)
