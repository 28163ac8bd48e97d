"""Who is connected to one listener: how many of each address and network, who makes room, and what is said about it."""

import logging
import socket
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from math import inf
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

log = logging.getLogger(__name__)

_COMPLAINS_EVERY: Final = 60.0

# An IPv4 address, or the /64 that one IPv6 customer has; and the /24 or /48 around it.
Prefix = str | bytes


class Place:
    """One connection. It is idle until it says that it is busy."""

    __slots__ = ("_crowd", "address", "cut", "network")

    def __init__(self, crowd: "Crowd", address: Prefix, network: Prefix, cut: Callable[[], None]) -> None:
        self._crowd: Crowd | None = crowd
        self.address, self.network, self.cut = address, network, cut

    def busy(self) -> None:
        """It is being served, and yields to nobody."""
        if self._crowd is not None:
            self._crowd.idle.pop(self, None)

    def idle(self) -> None:
        """Nothing is asked on it. It yields after all that have been idle for longer."""
        if self._crowd is not None:
            self._crowd.idle[self] = None
            self._crowd.idle.move_to_end(self)

    def leave(self) -> None:
        """It has ended. May be called again."""
        if self._crowd is not None:
            crowd, self._crowd = self._crowd, None
            crowd.left(self)


class Crowd:
    """Where all places are taken, who has been idle for longest yields to who comes."""

    def __init__(self, connections: int, per_address: int, per_network: int) -> None:
        self._connections, self._per_address, self._per_network = connections, per_address, per_network
        self.open: Counter[Prefix] = Counter()  # by address
        self.idle: OrderedDict[Place, None] = OrderedDict()
        self.refused = dict.fromkeys(("all", "address", "network", "yielded"), 0)
        self._networks: Counter[Prefix] = Counter()
        self._total = 0
        self._full = False
        self._complained_at: dict[str, float] = {}
        self._unsaid: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._total

    def enter(self, host: str, now: float, cut: Callable[[], None]) -> Place | None:
        """Count a connection of `host`, which `cut` ends. None: there is no room."""
        address, network = _address(host), _network(host)
        for whole, taken, most in (
            ("address", self.open[address], self._per_address),
            ("network", self._networks[network], self._per_network),
        ):
            if taken >= most:
                self.refused[whole] += 1
                self.complain(f"connections are turned away: too many of one {whole}", host, now)
                return None
        yields = None
        if self._total >= self._connections:
            self._say_full()
            yields = next(iter(self.idle), None)
            self.refused["yielded" if yields else "all"] += 1
            if yields is None:
                return None
        self.open[address] += 1
        self._networks[network] += 1
        self._total += 1
        place = Place(self, address, network, cut)
        place.idle()
        if yields is not None:
            yields.leave()
            yields.cut()
        return place

    def left(self, place: Place) -> None:
        """For `Place.leave`."""
        self.idle.pop(place, None)
        self._total -= 1
        for counter, key in ((self.open, place.address), (self._networks, place.network)):
            counter[key] -= 1
            if not counter[key]:
                del counter[key]
        # Not at the first free place: an attack would have us say it a thousand times.
        if self._full and self._total <= self._connections * 7 // 8:
            self._full = False
            log.info("connections are taken again", extra={"connections": self._total})

    def complain(self, what: str, host: str, now: float) -> None:
        """Log `what` at most once a minute, with how often it happened since the last time."""
        self._unsaid[what] += 1
        if now - self._complained_at.get(what, -inf) >= _COMPLAINS_EVERY:
            self._complained_at[what] = now
            log.warning(what, extra={"address": host, "times": self._unsaid.pop(what)})

    def _say_full(self) -> None:
        if not self._full:
            self._full = True
            log.warning("all connections are taken: idle ones yield to new ones", extra={"connections": self._total})


class CrowdMetrics:
    """What Prometheus is told of connections; read when it asks."""

    def __init__(self, registry: CollectorRegistry, crowds: Mapping[str, Crowd]) -> None:
        """`crowds` by the name of their listener."""
        self._crowds = crowds
        registry.register(self)

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        held = GaugeMetricFamily("vpn_sentinel_connections", "Open TCP connections.", labels=("listener",))
        refused = CounterMetricFamily(
            "vpn_sentinel_connections_refused", "TCP connections turned away.", labels=("listener", "reason")
        )
        for name, crowd in self._crowds.items():
            held.add_metric((name,), len(crowd))
            for reason, count in crowd.refused.items():
                refused.add_metric((name, reason), count)
        yield held
        yield refused


def _is_ipv4(host: str) -> bool:
    return ":" not in host or "." in host


def _address(host: str) -> Prefix:
    return host if _is_ipv4(host) else _packed(host)[:8]


def _network(host: str) -> Prefix:
    return host.rpartition(":")[2].rpartition(".")[0] if _is_ipv4(host) else _packed(host)[:6]


def _packed(host: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
