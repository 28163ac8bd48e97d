"""Rate limits of queries, by network and in all (RFC 8085, section 3.1)."""

from typing import Final

from vpn_sentinel.server.rate_limit import RateLimit

# Queries that only our agents can make cost little: a VPN's resolver sends those of all of its customers.
GENUINE_PER_SECOND: Final = 1000.0
OTHER_PER_SECOND: Final = 20.0
TOTAL_PER_SECOND: Final = 10_000.0  # costs about 0.4 of a core
_BURST_S: Final = 2.0  # queries of this time may come at once
MAX_NETWORKS: Final = 20_000


class QueryLimit:
    """Each network's bucket gets `genuine` tokens a second; a query that is not an agent's costs so many of them that
    at most `other` a second are admitted. All rates are queries a second.
    """

    def __init__(
        self, *, genuine: float = GENUINE_PER_SECOND, other: float = OTHER_PER_SECOND,
        total: float = TOTAL_PER_SECOND,
    ) -> None:  # fmt: skip
        self._other_cost = genuine / other
        self._all = RateLimit(total * 60, total * _BURST_S)
        self._by_network = RateLimit(genuine * 60, genuine * _BURST_S, max_keys=MAX_NETWORKS)

    @property
    def networks(self) -> int:
        """The number of networks that are remembered."""
        return len(self._by_network)

    def admits_any(self, now: float) -> bool:
        """Count one query in all; called before it is parsed. `now` is in monotonic seconds."""
        return self._all.wait(None, now) == 0

    def admits(self, network: bytes, now: float, *, genuine: bool) -> bool:
        """Count one query of `network`, see `client.resolver_prefix`."""
        return self._by_network.wait(network, now, 1.0 if genuine else self._other_cost) == 0
