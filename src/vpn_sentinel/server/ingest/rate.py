"""How often one address may ask: a token bucket each, in a bounded map."""

from collections import OrderedDict
from typing import Final

_MOST: Final = 100_000


class RateLimit:
    """`per_minute` requests a minute for each key, all of which may come at once after a pause."""

    def __init__(self, per_minute: int) -> None:
        self._per_second = per_minute / 60
        self._most = float(per_minute)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, key: str, now: float) -> float:
        """Take one request of `key` at `now` (seconds that never jump). 0 when it is allowed, else seconds to wait."""
        tokens, then = self._buckets.pop(key, (self._most, now))
        tokens = min(self._most, tokens + (now - then) * self._per_second)
        allowed = tokens >= 1
        self._buckets[key] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > _MOST:
            self._buckets.popitem(last=False)  # the one unused for longest: its bucket is the fullest
        return 0.0 if allowed else (1 - tokens) / self._per_second
