"""The reason for the next round, as it waits for the scheduler. Made first, and passed to all that put one in."""

import asyncio
from collections.abc import Callable
from typing import Final

from vpn_sentinel.domain.observation import Trigger

# In order of weight: when several wait, the heaviest wins.
_BY_WEIGHT: Final = (
    Trigger.RECHECK, Trigger.TIMER, Trigger.DEVICE, Trigger.CANARY, Trigger.NETWORK, Trigger.LEAK, Trigger.START,
)  # fmt: skip


def outweighs(one: Trigger, other: Trigger) -> bool:
    """Whether `one` has more weight than `other`."""
    return _BY_WEIGHT.index(one) > _BY_WEIGHT.index(other)


class TriggerQueue:
    """Holds one trigger: of several, the one with the most weight stays."""

    def __init__(self) -> None:
        self._arrived = asyncio.Event()
        self._pending: Trigger | None = None

    def put(self, trigger: Trigger) -> None:
        if self._pending is None or outweighs(trigger, self._pending):
            self._pending = trigger
        self._arrived.set()

    async def wait(self, matters: Callable[[Trigger], bool] = lambda _: True) -> None:
        """Wait until there is a trigger for which `matters` is true. The trigger stays in the queue."""
        while self._pending is None or not matters(self._pending):
            self._arrived.clear()
            await self._arrived.wait()

    def take(self) -> Trigger | None:
        trigger, self._pending = self._pending, None
        return trigger
