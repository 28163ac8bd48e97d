"""When to look at routes and endpoints anew for a packet in doubt: news of them come later than packets.

Where tables are full a look takes a while: it holds for longer, and the kernel's news are waited for.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

LOOK_S: Final = 0.2  # that a look holds for further doubts, at least
CHEAP_LOOK_S: Final = 1.0  # where a look holds no longer, the next one comes soon whatever happened
LOOK_TIMES, MAX_LOOK_S = 20, 10.0  # times as long as it took, and seconds at most


class LookTiming:
    """No clock of its own. `looked` is when the last look was, `turned` when what may leave changed."""

    def __init__(self) -> None:
        self.looked = float("-inf")
        self.turned = float("-inf")
        self._holds_s = LOOK_S

    @property
    def is_cheap(self) -> bool:
        return self._holds_s <= CHEAP_LOOK_S

    def is_due(self, now: float) -> bool:
        return now - self.looked > self._holds_s

    def comes_soon(self, now: float) -> bool:
        """Whether one look follows another: where they are cheap, or one thing has changed, as more may."""
        return self.is_cheap or now - self.turned <= LOOK_S

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around a look: by what it takes it is known for how long the next one holds."""
        began = time.thread_time()  # of this thread: on a busy machine a cheap look takes long, and stays cheap
        yield
        self._holds_s = min(max(LOOK_S, LOOK_TIMES * (time.thread_time() - began)), MAX_LOOK_S)
