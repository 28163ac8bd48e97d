"""When to read routes and endpoints again for a packet in doubt: the kernel's notifications come later than packets.

Where tables are full, reading is slow: its result holds for longer, and the notifications are waited for.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

REFRESH_S: Final = 0.2  # how long a refresh holds for further packets in doubt, at least
CHEAP_REFRESH_S: Final = 1.0  # where a refresh holds no longer than this, it counts as cheap
HOLD_FACTOR: Final = 20  # a refresh holds for so many times the time it took
MAX_HOLD_S: Final = 10.0  # but no longer than this


class RefreshTiming:
    """No clock of its own. `refreshed` is the time of the last refresh, `rules_changed` that of the last change of
    rules.
    """

    def __init__(self) -> None:
        self.refreshed = float("-inf")
        self.rules_changed = float("-inf")
        self._holds_s = REFRESH_S

    @property
    def is_cheap(self) -> bool:
        return self._holds_s <= CHEAP_REFRESH_S

    def is_due(self, now: float) -> bool:
        return now - self.refreshed > self._holds_s

    def worth_waiting_for(self, now: float) -> bool:
        """Whether a packet in doubt should wait for the next refresh rather than be reported at once.

        It should where a refresh is cheap and so comes soon, or where the rules have just changed: a VPN's program
        changes several, and the one that lets the packet out may be the next.
        """
        return self.is_cheap or now - self.rules_changed <= REFRESH_S

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure the refresh in this context: the time it takes decides how long it holds."""
        started_at = time.thread_time()  # CPU time of this thread, as a busy machine makes a cheap refresh slow
        yield
        self._holds_s = min(max(REFRESH_S, HOLD_FACTOR * (time.thread_time() - started_at)), MAX_HOLD_S)
