"""Rate limits by key: a token bucket for each, in a bounded map. Every limit by key uses this class."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Final

MAX_KEYS: Final = 100_000


class RateLimit:
    """Allows each key `per_minute` requests, or bytes, a minute, and after a pause `burst` of them at once.

    `burst` defaults to the amount of one minute. At most `max_keys` keys are remembered.
    """

    def __init__(self, per_minute: float, burst: float | None = None, *, max_keys: int = MAX_KEYS) -> None:
        self._per_second = per_minute / 60
        self._burst = float(per_minute if burst is None else burst)
        self._max_keys = max_keys
        self._buckets: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        """The number of keys that are remembered."""
        return len(self._buckets)

    def wait(self, key: Hashable, now: float, cost: float = 1.0) -> float:
        """Take `cost` from the bucket of `key` at `now` (monotonic seconds). 0 when allowed, else seconds to wait.

        A cost above `burst` is never allowed.
        """
        tokens = self._tokens(key, now)
        allowed = tokens >= cost
        self._keep(key, tokens - cost if allowed else tokens, now)
        return 0.0 if allowed else (cost - tokens) / self._per_second

    def charge(self, key: Hashable, now: float, cost: float = 1.0) -> float:
        """Take `cost` in any case; returns the seconds after which it would have been allowed."""
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
