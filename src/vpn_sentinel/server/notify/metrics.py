"""The metrics of deliveries."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge

from vpn_sentinel.server.notify.outbox import DeliveryOutcome, Pending


class NotifyMetrics:
    """Attempts by channel, result and reason; pending deliveries by channel. One for each registry."""

    def __init__(self, registry: CollectorRegistry, channels: Iterable[str] = ()) -> None:
        self._channels = tuple(channels)
        self._attempts = Counter(
            "vpn_sentinel_deliveries",
            "Attempts to deliver a notice, by result (done, transient, permanent) and reason of a failure.",
            ("channel", "result", "reason"),
            registry=registry,
        )
        self._given_up = Counter(
            "vpn_sentinel_deliveries_given_up", "Notices that will never be delivered.", ("channel",), registry=registry
        )
        self._depth = Gauge(
            "vpn_sentinel_outbox_depth", "Pending notices: not settled yet.", ("channel",), registry=registry
        )
        self._oldest = Gauge(
            "vpn_sentinel_outbox_oldest_due_seconds",
            "Age of the oldest pending notice; 0 when there is none.",
            ("channel",),
            registry=registry,
        )
        for channel in self._channels:  # an alert needs a series that exists from the start
            self._given_up.labels(channel)
        self.set_pending((), 0.0)

    def tried(self, channel: str, outcome: DeliveryOutcome) -> None:
        self._attempts.labels(channel, str(outcome.result), outcome.reason).inc()
        if outcome.given_up:
            self._given_up.labels(channel).inc()

    def set_pending(self, pending: Iterable[Pending], now: float) -> None:
        by_channel = {p.channel: p for p in pending}
        for channel in self._channels:
            waiting = by_channel.get(channel)
            self._depth.labels(channel).set(waiting.count if waiting else 0)
            self._oldest.labels(channel).set(max(0.0, now - waiting.since) if waiting else 0.0)
