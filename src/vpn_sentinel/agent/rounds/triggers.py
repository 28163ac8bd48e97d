"""Reasons to look that wait for the scheduler. Made before everybody who gives one, and handed to them."""

import asyncio
from collections.abc import Callable
from typing import Final

from vpn_sentinel.domain.observation import Trigger

# The more telling one wins when several wait.
_BY_WEIGHT: Final = (
    Trigger.RECHECK, Trigger.TIMER, Trigger.DEVICE, Trigger.CANARY, Trigger.NETWORK, Trigger.LEAK, Trigger.START,
)  # fmt: skip


def outweighs(one: Trigger, other: Trigger) -> bool:
    """Whether `one` tells more than `other`."""
    return _BY_WEIGHT.index(one) > _BY_WEIGHT.index(other)


class TriggerQueue:
    """Holds one trigger: of several, the most telling stays."""

    def __init__(self) -> None:
        self._came = asyncio.Event()
        self._waiting: Trigger | None = None

    def put(self, trigger: Trigger) -> None:
        if self._waiting is None or outweighs(trigger, self._waiting):
            self._waiting = trigger
        self._came.set()

    async def wait(self, matters: Callable[[Trigger], bool] = lambda _: True) -> None:
        """Until a trigger waits that `matters`. It goes on waiting, and so do others."""
        while self._waiting is None or not matters(self._waiting):
            self._came.clear()
            await self._came.wait()

    def take(self) -> Trigger | None:
        trigger, self._waiting = self._waiting, None
        return trigger
