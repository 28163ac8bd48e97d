"""The pulse port: tells an agent the address that its datagram came from. See `wire.echo` and `wire.pulse`."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from sqlalchemy import func, or_, select

from vpn_sentinel.server.ingest.pulse_registry import PulseNews, PulseRegistry
from vpn_sentinel.server.rate_limit import RateLimit
from vpn_sentinel.server.store.schema import tokens, tunnels
from vpn_sentinel.server.store.store import Store, StoreUnavailable
from vpn_sentinel.server.tracking.group_commit import Busy
from vpn_sentinel.server.tracking.inputs import PulseObservation
from vpn_sentinel.wire import pulse
from vpn_sentinel.wire.echo import is_genuine

log = logging.getLogger(__name__)

# Strangers' MACs that are checked in a second, to learn of a tunnel that another replica greeted.
CHECKS_PER_SECOND: Final = 50
# News that wait at most; each tunnel has one line at a time, so this is never reached by those that are known.
_MAX_SIGHTINGS: Final = 100_000
_SIGHTINGS_PER_BATCH: Final = 256
# Seconds for which a revoked key may still have been taken (see access), and some.
_REVOKED_S: Final = 10.0


class PulseProtocol(asyncio.DatagramProtocol):
    """Answers genuine requests and is silent to everything else. Caller: holders of a key given in a welcome."""

    def __init__(
        self, pulse_registry: PulseRegistry, now: Callable[[], float], *, missed: Callable[[], None] = lambda: None
    ) -> None:
        """`now` is a clock that never jumps; `missed` is called for a genuine request of a tunnel not known here."""
        self._registry = pulse_registry
        self._now = now
        self._missed = missed
        self._transport: asyncio.DatagramTransport | None = None
        self._checks = RateLimit(CHECKS_PER_SECOND * 60, CHECKS_PER_SECOND)
        self.counts = dict.fromkeys(("answered", "malformed", "unknown", "forged", "replayed"), 0)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.counts[self._answer(data, addr)] += 1

    def error_received(self, exc: Exception) -> None:
        """An ICMP error for a reply: that agent is gone, and its silence tells."""

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
        said = pulse.read(data)
        if said.numbered and not self._registry.take(record, said, self._now()):
            return "replayed"
        if self._transport is not None:
            self._transport.sendto(pulse.reply(data, packed, addr[1], record.key), addr)
        return "answered"

    def _look_up(self, data: bytes) -> None:
        """Only a bounded number of MACs a second: garbage must not cost more than its reading."""
        if self._checks.wait(None, self._now()) == 0 and is_genuine(data, self._registry.key_for(pulse.ident_of(data))):
            self._missed()


class KnownTunnels:
    """Keeps the pulse_registry knowing the tunnels that the database holds: at the start, and when one is missed."""

    def __init__(
        self, pulse_registry: PulseRegistry, read: Callable[[], Awaitable[Mapping[str, float]]], *, apart: float = 5.0
    ) -> None:
        self._registry = pulse_registry
        self._read = read
        self._apart = apart
        self._asked = asyncio.Event()
        self._asked.set()

    def missed(self) -> None:
        self._asked.set()

    async def run(self) -> None:
        while True:
            await self._asked.wait()
            self._registry.know(await self._read())
            self._asked.clear()
            await asyncio.sleep(self._apart)


async def names_of(store: Store) -> dict[str, float]:
    """When each tunnel of the database reported last, the newest at the end, without those of revoked tokens alone.

    The key of a pulse is made from the name, so a revoked agent has it still. One that has reported since came by
    another key.
    """
    own = select(tokens.c.name, func.max(tokens.c.revoked_at).label("at")).where(tokens.c.shared == 0)
    gone = own.group_by(tokens.c.name).having(func.count() == func.count(tokens.c.revoked_at)).subquery()
    held = select(tunnels.c.name, tunnels.c.last_seen).outerjoin(gone, gone.c.name == tunnels.c.name)
    held = held.where(or_(gone.c.at.is_(None), tunnels.c.last_seen > gone.c.at + _REVOKED_S)).order_by(tunnels.c.id)
    try:
        return {row.name: row.last_seen for row in await store.read(held)}
    except StoreUnavailable:
        return {}  # whoever is greeted is known all the same, and the next pulse of another asks again


class SightingQueue:
    """Brings news of pulses to the tracker, out of the datagram's way: the latest of each tunnel and family.

    What cannot be stored now is tried again, unless something newer has come.
    """

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._news: dict[tuple[str, int], PulseObservation] = {}
        self._arrived = asyncio.Event()

    def note(self, seen: PulseNews) -> None:
        self._add(PulseObservation(tunnel=seen.name, address=seen.address, unheard=seen.unheard, at=self._wall()))

    def _add(self, sighting: PulseObservation) -> None:
        key = (sighting.tunnel, sighting.address.version)
        if len(self._news) < _MAX_SIGHTINGS or key in self._news:
            self._news[key] = sighting
            self._arrived.set()

    async def run(self, submit: Callable[[PulseObservation], Awaitable[None]]) -> None:
        """Hand what waits to `submit`, for ever."""
        while True:
            await self._arrived.wait()
            # Together, so that they are committed together.
            batch = [self._news.pop(key) for key in list(self._news)[:_SIGHTINGS_PER_BATCH]]
            ends = await asyncio.gather(*(submit(s) for s in batch), return_exceptions=True)
            refused = [(s, e) for s, e in zip(batch, ends, strict=True) if isinstance(e, BaseException)]
            for sighting, error in refused:
                if not isinstance(error, StoreUnavailable | Busy):
                    log.error("a sighting was not taken", extra={"tunnel": sighting.tunnel}, exc_info=error)
                elif (sighting.tunnel, sighting.address.version) not in self._news:
                    self._add(sighting)
            if not self._news:
                self._arrived.clear()
            elif refused:
                await asyncio.sleep(1.0)


class PulseMetrics:
    """What Prometheus is told of pulses; read when it asks, so that a pulse costs no more than an addition."""

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
