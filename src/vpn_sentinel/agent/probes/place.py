"""Where an exit address is: files first, then services, asked seldom and never all.

A service is asked when the exit changed or its answer is six hours old, two at a time until two opinions agree: one
alone is often wrong about VPN exits. One that refuses rests for hours, one that fails for minutes.
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

PLACE_FRESH_S: Final = 6 * 3600.0  # seconds an opinion is good for
_REFUSED_REST: Final = 6 * 3600.0  # after 403 or 429
_FAILED_REST: Final = 60.0  # after the first failure, doubled by each that follows
_LONGEST_REST: Final = 3600.0
_WANTED: Final = 2  # opinions that agree
_REMEMBERED: Final = 16  # addresses

LookUp = Callable[[IPAddress], tuple[Place, ...]]


def _no_files(_address: IPAddress) -> tuple[Place, ...]:
    return ()


@dataclass(slots=True)
class _Rest:
    until: float = 0.0
    failures: int = 0


class Places:
    """What is known of addresses. Opinions are kept as they come, so a gathering that is cut short loses none."""

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
        self._rest = {service.name: _Rest() for service in services}

    def known(self, addresses: Iterable[IPAddress | None]) -> tuple[Place, ...]:
        """What files and earlier answers say of these addresses, without asking anyone."""
        found: list[Place] = []
        for address in dict.fromkeys(a for a in addresses if a is not None):
            found += self._look_up(address)
            found += self._opinions.get(address, {}).values()
        return tuple(found[: limits.MAX_PER_OBSERVATION])

    def due(self, exit_: IPAddress | None) -> bool:
        """Whether services should be asked about this exit now, and one is there that can be."""
        if exit_ is None or self._clock.boottime() - self._asked.get(exit_, -PLACE_FRESH_S) < PLACE_FRESH_S:
            return False
        return bool(self._awake())

    async def gather(self, exit_: IPAddress) -> None:
        """Ask services until two opinions on `exit_` agree, or none is left to ask."""
        self._forget_oldest()
        old = self._opinions.pop(exit_, {})
        answered = False
        try:
            queue = self._awake()
            while queue and not self._agreed(exit_):
                pair, queue = queue[:_WANTED], queue[_WANTED:]
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._ask(service, exit_.version)) for service in pair]
                answered = answered or any(t.result() for t in tasks)
        finally:
            for source, place in old.items():
                self._opinions.setdefault(exit_, {}).setdefault(source, place)
        if answered:
            self._asked[exit_] = self._clock.boottime()

    async def about(self, address: IPAddress, may_ask: Callable[[str], Awaitable[bool]]) -> Place | None:
        """What the first service that names a network says of an address that is nobody's exit here.

        `may_ask` tells of a service's base URL whether it may be asked now.
        """
        for service in self._awake():
            if not service.about or not await may_ask(service.base):
                continue
            place = await self._fetch(service, service.about.format(address), None)
            if place is not None and place.ip == address and place.asn is not None:
                return place
        return None

    def _awake(self) -> list[Service]:
        now = self._clock.boottime()
        return [s for s in self._services if self._rest[s.name].until <= now]

    def _agreed(self, exit_: IPAddress) -> bool:
        places = (*self._look_up(exit_), *self._opinions.get(exit_, {}).values())
        countries = [p.country for p in places if p.country]
        return any(countries.count(c) >= _WANTED for c in countries)

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
        rest = self._rest[service.name]
        if rest.failures:
            log.info("geolocation service answers again", extra={"service": service.name})
        rest.failures = 0
        if response.headers.get("x-rl") == "0":
            rest.until = self._clock.boottime() + _seconds(response.headers.get("x-ttl"), 60.0)
        return place

    def _refused(self, service: Service, response: Response) -> None:
        if response.status not in (403, 429):
            self._failed(service, f"HTTP {response.status}")
            return
        wait = _seconds(response.headers.get("x-ttl") or response.headers.get("retry-after"), _REFUSED_REST)
        self._rests(service, f"HTTP {response.status}", wait)

    def _failed(self, service: Service, why: str) -> None:
        failures = self._rest[service.name].failures
        self._rests(service, why, min(_FAILED_REST * 2.0 ** min(failures, 10), _LONGEST_REST))

    def _rests(self, service: Service, why: str, seconds: float) -> None:
        rest = self._rest[service.name]
        rest.until = self._clock.boottime() + seconds
        rest.failures += 1
        if rest.failures == 1:
            facts = {"service": service.name, "reason": why, "seconds": int(seconds)}
            log.info("geolocation service rests", extra=facts)

    def _forget_oldest(self) -> None:
        while len(self._opinions) >= _REMEMBERED:
            oldest = next(iter(self._opinions))
            del self._opinions[oldest]
            self._asked.pop(oldest, None)


def _seconds(text: str | None, default: float) -> float:
    """A whole number of seconds as services write it, at most a day."""
    return min(float(text), 86400.0) if text and text.isascii() and text.isdigit() else default
