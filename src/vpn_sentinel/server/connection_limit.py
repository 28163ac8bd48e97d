"""The connections of one listener: limits by address and network, eviction when it is full, and logging of both."""

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
FIRST_REQUEST_TIMEOUT_S: Final = 1.0  # up to three round trips, with TLS
# The process cannot use more than this; the reserve is for the store, the channels and the listeners.
MAX_DESCRIPTORS: Final = 65_536
RESERVED_DESCRIPTORS: Final = 128


class ConnectionSlot:
    """One connection. It is new until it is marked as busy, idle, or to be kept."""

    __slots__ = ("_connection_limit", "address", "cut", "network")

    def __init__(self, limit: "ConnectionLimit", address: bytes, network: bytes, cut: Callable[[], None]) -> None:
        self._connection_limit: ConnectionLimit | None = limit
        self.address, self.network, self.cut = address, network, cut

    def busy(self) -> None:
        """It is being served: evicted only when none is idle, after all that have been served for longer."""
        if self._connection_limit is not None:
            self._connection_limit.new.pop(self, None)
            self._connection_limit.idle.pop(self, None)
            self._connection_limit.served[self] = None

    def idle(self) -> None:
        """We wait for the client: evicted after all that have been idle for longer."""
        if self._connection_limit is not None:
            self._connection_limit.new.pop(self, None)
            self._connection_limit.served.pop(self, None)
            self._connection_limit.idle[self] = None
            self._connection_limit.idle.move_to_end(self)

    def keep(self) -> None:
        """It may stay for as long as it wants, and is never evicted."""
        if self._connection_limit is not None:
            self._connection_limit.forget(self)

    def release(self) -> None:
        """It has ended. Further calls have no effect."""
        if self._connection_limit is not None:
            limit, self._connection_limit = self._connection_limit, None
            limit.released(self)


class ConnectionLimit:
    """When all slots are taken, a new connection evicts one: one without a request within `FIRST_REQUEST_TIMEOUT_S`,
    else the one idle for longest, else the one served for longest. One that has just come is evicted only if there is
    no other; otherwise connections that come at once would evict each other before any of them is served.
    """

    def __init__(self, connections: int, per_address: int, per_network: int) -> None:
        self._connections, self._per_address, self._per_network = connections, per_address, per_network
        self.open: Counter[bytes] = Counter()  # by address
        self.new: OrderedDict[ConnectionSlot, float] = OrderedDict()  # with the time of each
        self.idle: OrderedDict[ConnectionSlot, None] = OrderedDict()
        self.served: OrderedDict[ConnectionSlot, None] = OrderedDict()
        self.refused = dict.fromkeys(("all", "address", "network", "yielded"), 0)
        self._networks: Counter[bytes] = Counter()
        self._total = 0
        self._full = False
        self._complained_at: dict[str, float] = {}
        self._suppressed: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._total

    def enter(self, host: str, now: float, cut: Callable[[], None]) -> ConnectionSlot | None:
        """Count a connection from `host`, which `cut` ends. None: there is no room."""
        address, network = client_prefix(host), network_prefix(host)
        for scope, taken, limit in (
            ("address", self.open[address], self._per_address),
            ("network", self._networks[network], self._per_network),
        ):
            if taken >= limit:
                self.refused[scope] += 1
                self.log_limited(f"connections are turned away: too many of one {scope}", host, now)
                return None
        evicted = None
        if self._total >= self._connections:
            self._log_full()
            evicted = self._slot_to_evict(now)
            self.refused["yielded" if evicted else "all"] += 1
            if evicted is None:
                return None
        self.open[address] += 1
        self._networks[network] += 1
        self._total += 1
        slot = ConnectionSlot(self, address, network, cut)
        self.new[slot] = now
        if evicted is not None:
            evicted.release()
            evicted.cut()
        return slot

    def released(self, slot: ConnectionSlot) -> None:
        """For `ConnectionSlot.release`."""
        self.forget(slot)
        self._total -= 1
        for counter, key in ((self.open, slot.address), (self._networks, slot.network)):
            counter[key] -= 1
            if not counter[key]:
                del counter[key]
        # Not at the first free slot: during an attack it would be logged a thousand times.
        if self._full and self._total <= self._connections * 7 // 8:
            self._full = False
            log.info("there are free connections again", extra={"connections": self._total})

    def forget(self, slot: ConnectionSlot) -> None:
        """Exclude it from eviction."""
        self.new.pop(slot, None)
        self.idle.pop(slot, None)
        self.served.pop(slot, None)

    def unserved(self) -> list[ConnectionSlot]:
        """Those without a request now."""
        return [*self.new, *self.idle]

    def _slot_to_evict(self, now: float) -> ConnectionSlot | None:
        first = next(iter(self.new), None)
        if first is not None and now - self.new[first] >= FIRST_REQUEST_TIMEOUT_S:
            return first
        return next(iter(self.idle or self.served or self.new), None)

    def log_limited(self, what: str, host: str, now: float) -> None:
        """Log `what` at most once a minute, with how often it happened since the last time."""
        self._suppressed[what] += 1
        if now - self._complained_at.get(what, -inf) >= _COMPLAINT_INTERVAL_S:
            self._complained_at[what] = now
            log.warning(what, extra={"address": host, "times": self._suppressed.pop(what)})

    def _log_full(self) -> None:
        if not self._full:
            self._full = True
            log.warning("all connections are taken: new ones evict others", extra={"connections": self._total})


class ConnectionMetrics:
    """The metrics of connections, collected at a scrape."""

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
    """The connections of a listener that gets so many sixteenths of the process's descriptors; all share 16 of them."""
    return max(_descriptors() - RESERVED_DESCRIPTORS, 64) * sixteenths // 16


def _descriptors() -> int:
    """The limit of descriptors of this process, after raising it as far as useful."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return MAX_DESCRIPTORS
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        log.info("limit of open files raised", extra={"before": soft, "now": wanted})
    return min(max(soft, wanted), MAX_DESCRIPTORS)
