"""What Prometheus is told about deliveries."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge

from vpn_sentinel.server.notify.outbox import DeliveryOutcome, Pending


class NotifyMetrics:
    """Tries by channel, result and reason; what is owed by channel. One registry takes one of these."""

    def __init__(self, registry: CollectorRegistry, channels: Iterable[str] = ()) -> None:
        self._channels = tuple(channels)
        self._tries = Counter(
            "vpn_sentinel_deliveries",
            "Tries to deliver a notice, by how they ended (done, transient, permanent) and why they failed.",
            ("channel", "result", "reason"),
            registry=registry,
        )
        self._given_up = Counter(
            "vpn_sentinel_deliveries_given_up", "Notices that will never be delivered.", ("channel",), registry=registry
        )
        self._owed = Gauge(
            "vpn_sentinel_outbox_depth", "Notices owed and not settled.", ("channel",), registry=registry
        )
        self._oldest = Gauge(
            "vpn_sentinel_outbox_oldest_due_seconds",
            "How long the oldest unsettled notice has been owed; 0 when nothing is.",
            ("channel",),
            registry=registry,
        )
        for channel in self._channels:  # a series that exists from the start can be alerted on
            self._given_up.labels(channel)
        self.set_pending((), 0.0)

    def tried(self, channel: str, outcome: DeliveryOutcome) -> None:
        self._tries.labels(channel, str(outcome.result), outcome.reason).inc()
        if outcome.given_up:
            self._given_up.labels(channel).inc()

    def set_pending(self, pending: Iterable[Pending], now: float) -> None:
        by_channel = {p.channel: p for p in pending}
        for channel in self._channels:
            waiting = by_channel.get(channel)
            self._owed.labels(channel).set(waiting.count if waiting else 0)
            self._oldest.labels(channel).set(max(0.0, now - waiting.since) if waiting else 0.0)
