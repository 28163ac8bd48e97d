"""How often one address may ask: a token bucket each, in a bounded map."""

from collections import OrderedDict
from typing import Final

_MOST: Final = 100_000


class RateLimit:
    """`per_minute` requests, or bytes, a minute for each key; after a pause `most` may come at once.

    That is a minute's worth unless it is said.
    """

    def __init__(self, per_minute: int, most: int | None = None) -> None:
        self._per_second = per_minute / 60
        self._most = float(per_minute if most is None else most)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, key: str, now: float, cost: int = 1) -> float:
        """Take `cost` of `key` at `now` (seconds that never jump). 0 when it is allowed, else seconds to wait.

        What costs more than may come at once is never allowed.
        """
        tokens = self._tokens(key, now)
        allowed = tokens >= cost
        self._keep(key, tokens - cost if allowed else tokens, now)
        return 0.0 if allowed else (cost - tokens) / self._per_second

    def owe(self, key: str, now: float, cost: int = 1) -> float:
        """Take `cost` in any case; the seconds after which it would have been allowed."""
        tokens = self._tokens(key, now) - cost
        self._keep(key, tokens, now)
        return max(0.0, -tokens / self._per_second)

    def _tokens(self, key: str, now: float) -> float:
        tokens, then = self._buckets.pop(key, (self._most, now))
        return min(self._most, tokens + (now - then) * self._per_second)

    def _keep(self, key: str, tokens: float, now: float) -> None:
        self._buckets[key] = tokens, now
        if len(self._buckets) > _MOST:
            self._buckets.popitem(last=False)  # the one unused for longest: its bucket is the fullest
