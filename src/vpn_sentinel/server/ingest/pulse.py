"""The pulse port: replies to an agent's datagram with the address it came from. See `wire.echo` and `wire.pulse`."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from sqlalchemy import func, or_, select

from vpn_sentinel.server.ingest.pulse_registry import REVOKED_KEY_MARGIN_S, PulseChange, PulseRegistry
from vpn_sentinel.server.rate_limit import RateLimit
from vpn_sentinel.server.store.schema import tokens, tunnels
from vpn_sentinel.server.store.store import Store, StoreUnavailable
from vpn_sentinel.server.tracking.group_commit import Busy
from vpn_sentinel.server.tracking.inputs import PulseObservation
from vpn_sentinel.wire import pulse
from vpn_sentinel.wire.echo import is_genuine

log = logging.getLogger(__name__)

# MACs of unknown senders that are checked, to find a tunnel that another replica has welcomed.
CHECKS_PER_SECOND: Final = 50
# Observations that may wait. Each tunnel has one for each IP version, so known tunnels never reach this.
_MAX_QUEUED: Final = 100_000
_MAX_BATCH: Final = 256


class PulseProtocol(asyncio.DatagramProtocol):
    """Answers genuine requests and ignores everything else. Caller: holders of a key given in a welcome."""

    def __init__(
        self, pulse_registry: PulseRegistry, now: Callable[[], float], *, on_unknown: Callable[[], None] = lambda: None
    ) -> None:
        """`now` is a monotonic clock; `on_unknown` is called for a genuine request of a tunnel not known here."""
        self._registry = pulse_registry
        self._now = now
        self._on_unknown = on_unknown
        self._transport: asyncio.DatagramTransport | None = None
        self._checks = RateLimit(CHECKS_PER_SECOND * 60, CHECKS_PER_SECOND)
        self.counts = dict.fromkeys(("answered", "malformed", "unknown", "forged", "replayed"), 0)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.counts[self._answer(data, addr)] += 1

    def error_received(self, exc: Exception) -> None:
        """An ICMP error for a reply: the agent is gone, which its missing pulses will show."""

    def _answer(self, data: bytes, addr: tuple[str, int]) -> str:
        if not pulse.is_request(data):
            return "malformed"
        record = self._registry.find(pulse.ident_of(data))
        if record is None:
            self._look_up(data)
            return "unknown"
        if not is_genuine(data, record.key):
            return "forged"
        packed = self._registry.came_from(record, addr[0])
        received = pulse.read(data)
        if received.numbered and not self._registry.take(record, received, self._now()):
            return "replayed"
        if self._transport is not None:
            self._transport.sendto(pulse.reply(data, packed, addr[1], record.key), addr)
        return "answered"

    def _look_up(self, data: bytes) -> None:
        """Check only a bounded number of MACs a second: garbage must not cost more than reading it."""
        if self._checks.wait(None, self._now()) == 0 and is_genuine(data, self._registry.key_for(pulse.ident_of(data))):
            self._on_unknown()


class KnownTunnels:
    """Adds the tunnels of the database to the pulse registry: at the start, and when an unknown one sends."""

    def __init__(
        self,
        pulse_registry: PulseRegistry,
        read: Callable[[], Awaitable[Mapping[str, float]]],
        *,
        min_interval_s: float = 5.0,
    ) -> None:
        self._registry = pulse_registry
        self._read = read
        self._apart = min_interval_s
        self._asked = asyncio.Event()
        self._asked.set()

    def refresh(self) -> None:
        self._asked.set()

    async def run(self) -> None:
        while True:
            await self._asked.wait()
            self._registry.add_known(await self._read())
            self._asked.clear()
            await asyncio.sleep(self._apart)


async def known_names(store: Store) -> dict[str, float]:
    """The time of the last report of each tunnel in the database, the newest tunnel last.

    Without tunnels whose tokens are all revoked: the key of a pulse is derived from the name, so a revoked agent still
    has it. A tunnel that has reported since the revocation used another key, and is included.
    """
    own = select(tokens.c.name, func.max(tokens.c.revoked_at).label("at")).where(tokens.c.shared == 0)
    gone = own.group_by(tokens.c.name).having(func.count() == func.count(tokens.c.revoked_at)).subquery()
    held = select(tunnels.c.name, tunnels.c.last_seen).outerjoin(gone, gone.c.name == tunnels.c.name)
    since = tunnels.c.last_seen > gone.c.at + REVOKED_KEY_MARGIN_S
    held = held.where(or_(gone.c.at.is_(None), since)).order_by(tunnels.c.id)
    try:
        return {row.name: row.last_seen for row in await store.read(held)}
    except StoreUnavailable:
        return {}  # welcomed tunnels are known anyway, and the next pulse of an unknown one asks again


class PulseQueue:
    """Submits changes seen in pulses to the tracker, outside datagram handling: the latest of each tunnel and family.

    One that cannot be stored now is tried again, unless a newer one has come.
    """

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._changes: dict[tuple[str, int], PulseObservation] = {}
        self._wake = asyncio.Event()

    def note(self, seen: PulseChange) -> None:
        self._add(PulseObservation(tunnel=seen.name, address=seen.address, unheard=seen.unheard, at=self._wall()))

    def _add(self, observation: PulseObservation) -> None:
        key = (observation.tunnel, observation.address.version)
        if len(self._changes) < _MAX_QUEUED or key in self._changes:
            self._changes[key] = observation
            self._wake.set()

    async def run(self, submit: Callable[[PulseObservation], Awaitable[None]]) -> None:
        """Pass what waits to `submit`, for ever."""
        while True:
            await self._wake.wait()
            # At once, so that they are committed together.
            batch = [self._changes.pop(key) for key in list(self._changes)[:_MAX_BATCH]]
            ends = await asyncio.gather(*(submit(s) for s in batch), return_exceptions=True)
            refused = [(s, e) for s, e in zip(batch, ends, strict=True) if isinstance(e, BaseException)]
            for observation, error in refused:
                if not isinstance(error, StoreUnavailable | Busy):
                    log.error(
                        "a pulse observation was not stored", extra={"tunnel": observation.tunnel}, exc_info=error
                    )
                elif (observation.tunnel, observation.address.version) not in self._changes:
                    self._add(observation)
            if not self._changes:
                self._wake.clear()
            elif refused:
                await asyncio.sleep(1.0)


class PulseMetrics:
    """The metrics of pulses; collected when Prometheus scrapes, so that a pulse costs only an addition."""

    def __init__(self, registry: CollectorRegistry, counts: Callable[[], dict[str, int]]) -> None:
        self._counts = counts
        registry.register(self)

    def collect(self) -> Iterable[CounterMetricFamily]:
        family = CounterMetricFamily(
            "vpn_sentinel_pulses", "Datagrams to the pulse port by what became of them.", labels=("result",)
        )
        for result, count in self._counts().items():
            family.add_metric((result,), count)
        yield family
