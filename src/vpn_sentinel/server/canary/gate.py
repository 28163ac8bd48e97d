"""How much one network, and everybody together, may ask: token buckets in a bounded map (RFC 8085, section 3.1)."""

import socket
from collections import OrderedDict
from typing import Final

# Questions a second. What only our agents can ask is nearly free: a VPN's resolver asks for all of its customers.
GENUINE: Final = 1000.0
STRANGE: Final = 20.0
TOTAL: Final = 10_000.0  # some 0.4 of a core
_SECONDS: Final = 2.0  # of asking that may come at once
_MOST: Final = 20_000  # networks remembered

Network = str | bytes


class Gate:
    """Each network's bucket fills by `genuine` tokens a second; a stranger's question costs so many of them that no
    more than `strange` a second can be had. All rates are questions a second.
    """

    def __init__(self, *, genuine: float = GENUINE, strange: float = STRANGE, total: float = TOTAL) -> None:
        self._rate, self._price, self._total = genuine, genuine / strange, total
        self._left, self._then = total * _SECONDS, 0.0
        self._buckets: OrderedDict[Network, tuple[float, float]] = OrderedDict()

    @property
    def networks(self) -> int:
        """How many are remembered."""
        return len(self._buckets)

    def open(self, now: float) -> bool:
        """Take one question of all; asked before anything is read. `now` is seconds that never jump."""
        self._left = min(self._total * _SECONDS, self._left + (now - self._then) * self._total)
        self._then = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def admits(self, network: Network, now: float, *, genuine: bool) -> bool:
        """Take one question of `network`."""
        most = self._rate * _SECONDS
        left, then = self._buckets.pop(network, (most, now))
        left = min(most, left + (now - then) * self._rate)
        price = 1.0 if genuine else self._price
        allowed = left >= price
        self._buckets[network] = (left - price if allowed else left, now)
        if len(self._buckets) > _MOST:
            self._buckets.popitem(last=False)  # unused for longest, so its bucket is the fullest
        return allowed


def network_of(host: str) -> Network:
    """The /24 or the /56 that an address belongs to, in a form to compare; a mapped address counts as IPv4."""
    if "." in host:
        return host.rpartition(":")[2].rpartition(".")[0]
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:7]
