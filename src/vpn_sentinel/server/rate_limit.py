"""How often one key may ask: a token bucket each, in a bounded map. Every limit by key is one of these."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

MAX_KEYS: Final = 100_000


class RateLimit:
    """`per_minute` requests, or bytes, a minute for each key; after a pause `burst` may come at once.

    That is a minute's worth unless it is said. At most `max_keys` are remembered.
    """

    def __init__(self, per_minute: float, burst: float | None = None, *, max_keys: int = MAX_KEYS) -> None:
        self._per_second = per_minute / 60
        self._burst = float(per_minute if burst is None else burst)
        self._max_keys = max_keys
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        """How many keys are remembered."""
        return len(self._buckets)

    def wait(self, key: Hashable, now: float, cost: float = 1.0) -> float:
        """Take `cost` of `key` at `now` (seconds that never jump). 0 when it is allowed, else seconds to wait.

        What costs more than may come at once is never allowed.
        """
        tokens = self._tokens(key, now)
        allowed = tokens >= cost
        self._keep(key, tokens - cost if allowed else tokens, now)
        return 0.0 if allowed else (cost - tokens) / self._per_second

    def owe(self, key: Hashable, now: float, cost: float = 1.0) -> float:
        """Take `cost` in any case; the seconds after which it would have been allowed."""
        tokens = self._tokens(key, now) - cost
        self._keep(key, tokens, now)
        return max(0.0, -tokens / self._per_second)

    def _tokens(self, key: Hashable, now: float) -> float:
        tokens, then = self._buckets.pop(key, (self._burst, now))
        return min(self._burst, tokens + (now - then) * self._per_second)

    def _keep(self, key: Hashable, tokens: float, now: float) -> None:
        self._buckets[key] = tokens, now
        if len(self._buckets) > self._max_keys:
            self._buckets.popitem(last=False)  # the one unused for longest: its bucket is the fullest
