"""How much one network, and everybody together, may ask (RFC 8085, section 3.1)."""

from typing import Final

from vpn_sentinel.server.rate_limit import RateLimit

# Questions a second. What only our agents can ask is nearly free: a VPN's resolver asks for all of its customers.
GENUINE_PER_SECOND: Final = 1000.0
STRANGE_PER_SECOND: Final = 20.0
TOTAL_PER_SECOND: Final = 10_000.0  # some 0.4 of a core
_BURST_S: Final = 2.0  # of asking that may come at once
MAX_NETWORKS: Final = 20_000  # remembered


class QueryLimit:
    """Each network's bucket fills by `genuine` tokens a second; a stranger's question costs so many of them that no
    more than `strange` a second can be had. All rates are questions a second.
    """

    def __init__(
        self, *, genuine: float = GENUINE_PER_SECOND, strange: float = STRANGE_PER_SECOND,
        total: float = TOTAL_PER_SECOND,
    ) -> None:  # fmt: skip
        self._strangers_cost = genuine / strange
        self._all = RateLimit(total * 60, total * _BURST_S)
        self._by_network = RateLimit(genuine * 60, genuine * _BURST_S, max_keys=MAX_NETWORKS)

    @property
    def networks(self) -> int:
        """How many are remembered."""
        return len(self._by_network)

    def admits_any(self, now: float) -> bool:
        """Take one question of all; asked before anything is read. `now` is seconds that never jump."""
        return self._all.wait(None, now) == 0

    def admits(self, network: bytes, now: float, *, genuine: bool) -> bool:
        """Take one question of `network`, see `client.resolver_prefix`."""
        return self._by_network.wait(network, now, 1.0 if genuine else self._strangers_cost) == 0
