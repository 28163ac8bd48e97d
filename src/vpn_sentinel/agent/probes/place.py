"""The place of an exit address: from files first, then from services, which are asked rarely and never all of them.

A service is asked when the exit changed or its answer is six hours old, two at a time until two agree: a single one is
often wrong about VPN exits. A service that refuses is not asked for hours, one that fails for minutes.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.agent.net.http import Client, HttpError, Response
from vpn_sentinel.agent.probes.placing import BadAnswerError, Service
from vpn_sentinel.domain.observation import Place
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.wire import limits

log = logging.getLogger(__name__)

PLACE_FRESH_S: Final = 6 * 3600.0  # then an opinion is outdated
_REFUSED_RETRY_S: Final = 6 * 3600.0  # after 403 or 429
_FAILED_RETRY_S: Final = 60.0  # after the first failure, doubled by each that follows
_MAX_RETRY_S: Final = 3600.0
_AGREEING_OPINIONS: Final = 2  # then no more services are asked
_MAX_CACHED_ADDRESSES: Final = 16

LookUp = Callable[[IPAddress], tuple[Place, ...]]


def _no_files(_address: IPAddress) -> tuple[Place, ...]:
    return ()


@dataclass(slots=True)
class _Pause:
    until: float = 0.0
    failures: int = 0


class Places:
    """Known places of addresses. Answers are stored at once, so a cancelled `gather` loses none."""

    def __init__(
        self,
        http: Client,
        services: Sequence[Service],
        clock: Clock,
        *,
        look_up: LookUp = _no_files,
        limit: float = 5.0,
    ) -> None:
        """`look_up` asks files; `limit` is the time in seconds that one service gets."""
        self._http = http
        self._services = tuple(services)
        self._clock = clock
        self._look_up = look_up
        self._limit = limit
        self._opinions: dict[IPAddress, dict[str, Place]] = {}
        self._asked: dict[IPAddress, float] = {}
        self._pauses = {service.name: _Pause() for service in services}

    def known(self, addresses: Iterable[IPAddress | None]) -> tuple[Place, ...]:
        """From files and earlier answers, without asking a service."""
        found: list[Place] = []
        for address in dict.fromkeys(a for a in addresses if a is not None):
            found += self._look_up(address)
            found += self._opinions.get(address, {}).values()
        return tuple(found[: limits.MAX_PER_OBSERVATION])

    def due(self, exit_: IPAddress | None) -> bool:
        """Whether services should be asked about this exit now, and at least one is available."""
        if exit_ is None or self._clock.boottime() - self._asked.get(exit_, -PLACE_FRESH_S) < PLACE_FRESH_S:
            return False
        return bool(self._available())

    async def gather(self, exit_: IPAddress) -> None:
        """Ask services until two agree about `exit_`, or none is left."""
        self._forget_oldest()
        old = self._opinions.pop(exit_, {})
        answered = False
        try:
            queue = self._available()
            while queue and not self._agreed(exit_):
                pair, queue = queue[:_AGREEING_OPINIONS], queue[_AGREEING_OPINIONS:]
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._ask(service, exit_.version)) for service in pair]
                answered = answered or any(t.result() for t in tasks)
        finally:
            for source, place in old.items():
                self._opinions.setdefault(exit_, {}).setdefault(source, place)
        if answered:
            self._asked[exit_] = self._clock.boottime()

    async def about(self, address: IPAddress, may_ask: Callable[[str], Awaitable[bool]]) -> Place | None:
        """The answer of the first service that knows the network of an address that is not an exit of this host.

        `may_ask` says whether a service may be asked now, by its base URL.
        """
        for service in self._available():
            if not service.about or not await may_ask(service.base):
                continue
            place = await self._fetch(service, service.about.format(address), None)
            if place is not None and place.ip == address and place.asn is not None:
                return place
        return None

    def _available(self) -> list[Service]:
        now = self._clock.boottime()
        return [s for s in self._services if self._pauses[s.name].until <= now]

    def _agreed(self, exit_: IPAddress) -> bool:
        places = (*self._look_up(exit_), *self._opinions.get(exit_, {}).values())
        countries = [p.country for p in places if p.country]
        return any(countries.count(c) >= _AGREEING_OPINIONS for c in countries)

    async def _ask(self, service: Service, family: int) -> bool:
        place = await self._fetch(service, service.path, family)
        if place is not None:
            self._opinions.setdefault(place.ip, {})[service.name] = place
        return place is not None

    async def _fetch(self, service: Service, path: str, family: int | None) -> Place | None:
        try:
            response = await self._http.get(service.base + path, limit=self._limit, family=family)
            if response.status != 200:
                self._refused(service, response)
                return None
            place = service.read(response.body)
        except (HttpError, BadAnswerError) as e:
            self._failed(service, str(e))
            return None
        pause = self._pauses[service.name]
        if pause.failures:
            log.info("geolocation service answers again", extra={"service": service.name})
        pause.failures = 0
        if response.headers.get("x-rl") == "0":
            pause.until = self._clock.boottime() + _seconds(response.headers.get("x-ttl"), 60.0)
        return place

    def _refused(self, service: Service, response: Response) -> None:
        if response.status not in (403, 429):
            self._failed(service, f"HTTP {response.status}")
            return
        wait = _seconds(response.headers.get("x-ttl") or response.headers.get("retry-after"), _REFUSED_RETRY_S)
        self._pause_service(service, f"HTTP {response.status}", wait)

    def _failed(self, service: Service, why: str) -> None:
        failures = self._pauses[service.name].failures
        self._pause_service(service, why, min(_FAILED_RETRY_S * 2.0 ** min(failures, 10), _MAX_RETRY_S))

    def _pause_service(self, service: Service, why: str, seconds: float) -> None:
        pause = self._pauses[service.name]
        pause.until = self._clock.boottime() + seconds
        pause.failures += 1
        if pause.failures == 1:
            facts = {"service": service.name, "reason": why, "seconds": int(seconds)}
            log.info("geolocation service rests", extra=facts)

    def _forget_oldest(self) -> None:
        while len(self._opinions) >= _MAX_CACHED_ADDRESSES:
            oldest = next(iter(self._opinions))
            del self._opinions[oldest]
            self._asked.pop(oldest, None)


def _seconds(text: str | None, default: float) -> float:
    """A whole number of seconds as services write it, at most a day."""
    return min(float(text), 86400.0) if text and text.isascii() and text.isdigit() else default
