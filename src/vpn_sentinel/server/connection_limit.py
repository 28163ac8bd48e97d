"""Who is connected to one listener: how many of each address and network, who makes room, and what is said about it."""

import logging
import resource
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from math import inf
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from vpn_sentinel.server.client import client_prefix, network_prefix

log = logging.getLogger(__name__)

_COMPLAINT_INTERVAL_S: Final = 60.0
TIME_TO_ASK_S: Final = 1.0  # seconds: a round trip or three, of TLS too
# More than this a process of ours cannot use; what is kept back is for the store, the channels and the listeners.
MAX_DESCRIPTORS: Final = 65_536
DESCRIPTORS_KEPT_BACK: Final = 128


class ConnectionSlot:
    """One connection. It is new until it says that it is busy, idle, or to be kept."""

    __slots__ = ("_connection_limit", "address", "cut", "network")

    def __init__(self, limit: "ConnectionLimit", address: bytes, network: bytes, cut: Callable[[], None]) -> None:
        self._connection_limit: ConnectionLimit | None = limit
        self.address, self.network, self.cut = address, network, cut

    def busy(self) -> None:
        """It is being served. It yields where none is idle, after all that have been served for longer."""
        if self._connection_limit is not None:
            self._connection_limit.new.pop(self, None)
            self._connection_limit.idle.pop(self, None)
            self._connection_limit.served[self] = None

    def idle(self) -> None:
        """We wait for the other side. It yields after all that have been idle for longer."""
        if self._connection_limit is not None:
            self._connection_limit.new.pop(self, None)
            self._connection_limit.served.pop(self, None)
            self._connection_limit.idle[self] = None
            self._connection_limit.idle.move_to_end(self)

    def keep(self) -> None:
        """It was let in for as long as it wants, and yields to nobody."""
        if self._connection_limit is not None:
            self._connection_limit.forget(self)

    def leave(self) -> None:
        """It has ended. May be called again."""
        if self._connection_limit is not None:
            limit, self._connection_limit = self._connection_limit, None
            limit.left(self)


class ConnectionLimit:
    """Where all slots are taken, one yields to who comes: who asked nothing within `TIME_TO_ASK_S`, else who has been
    idle for longest, else who has been served for longest. Who has just come yields where there is nobody else, or
    those who come at once would drive each other out before any of them is heard.
    """

    def __init__(self, connections: int, per_address: int, per_network: int) -> None:
        self._connections, self._per_address, self._per_network = connections, per_address, per_network
        self.open: Counter[bytes] = Counter()  # by address
        self.new: OrderedDict[ConnectionSlot, float] = OrderedDict()  # with when each came
        self.idle: OrderedDict[ConnectionSlot, None] = OrderedDict()
        self.served: OrderedDict[ConnectionSlot, None] = OrderedDict()
        self.refused = dict.fromkeys(("all", "address", "network", "yielded"), 0)
        self._networks: Counter[bytes] = Counter()
        self._total = 0
        self._full = False
        self._complained_at: dict[str, float] = {}
        self._unsaid: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._total

    def enter(self, host: str, now: float, cut: Callable[[], None]) -> ConnectionSlot | None:
        """Count a connection of `host`, which `cut` ends. None: there is no room."""
        address, network = client_prefix(host), network_prefix(host)
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
            yields = self._yields(now)
            self.refused["yielded" if yields else "all"] += 1
            if yields is None:
                return None
        self.open[address] += 1
        self._networks[network] += 1
        self._total += 1
        slot = ConnectionSlot(self, address, network, cut)
        self.new[slot] = now
        if yields is not None:
            yields.leave()
            yields.cut()
        return slot

    def left(self, slot: ConnectionSlot) -> None:
        """For `ConnectionSlot.leave`."""
        self.forget(slot)
        self._total -= 1
        for counter, key in ((self.open, slot.address), (self._networks, slot.network)):
            counter[key] -= 1
            if not counter[key]:
                del counter[key]
        # Not at the first free slot: an attack would have us say it a thousand times.
        if self._full and self._total <= self._connections * 7 // 8:
            self._full = False
            log.info("connections are taken again", extra={"connections": self._total})

    def forget(self, slot: ConnectionSlot) -> None:
        """It is none of those that yield."""
        self.new.pop(slot, None)
        self.idle.pop(slot, None)
        self.served.pop(slot, None)

    def unserved(self) -> list[ConnectionSlot]:
        """Those on which nothing is asked now."""
        return [*self.new, *self.idle]

    def _yields(self, now: float) -> ConnectionSlot | None:
        first = next(iter(self.new), None)
        if first is not None and now - self.new[first] >= TIME_TO_ASK_S:
            return first
        return next(iter(self.idle or self.served or self.new), None)

    def complain(self, what: str, host: str, now: float) -> None:
        """Log `what` at most once a minute, with how often it happened since the last time."""
        self._unsaid[what] += 1
        if now - self._complained_at.get(what, -inf) >= _COMPLAINT_INTERVAL_S:
            self._complained_at[what] = now
            log.warning(what, extra={"address": host, "times": self._unsaid.pop(what)})

    def _say_full(self) -> None:
        if not self._full:
            self._full = True
            log.warning("all connections are taken: others yield to new ones", extra={"connections": self._total})


class ConnectionMetrics:
    """What Prometheus is told of connections; read when it asks."""

    def __init__(self, registry: CollectorRegistry, connection_limits: Mapping[str, ConnectionLimit]) -> None:
        """`connection_limits` by the name of their listener."""
        self._limits = connection_limits
        registry.register(self)

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        held = GaugeMetricFamily("vpn_sentinel_connections", "Open TCP connections.", labels=("listener",))
        refused = CounterMetricFamily(
            "vpn_sentinel_connections_refused", "TCP connections turned away.", labels=("listener", "reason")
        )
        for name, limit in self._limits.items():
            held.add_metric((name,), len(limit))
            for reason, count in limit.refused.items():
                refused.add_metric((name, reason), count)
        yield held
        yield refused


def connections_for(sixteenths: int) -> int:
    """How many connections a listener may have that gets so much of the process's descriptors. All get sixteen."""
    return max(_descriptors() - DESCRIPTORS_KEPT_BACK, 64) * sixteenths // 16


def _descriptors() -> int:
    """How many descriptors this process may have, after asking for as many as are of use."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_DESCRIPTORS
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        log.info("limit of open files raised", extra={"before": soft, "now": wanted})
    return min(max(soft, wanted), MAX_DESCRIPTORS)
