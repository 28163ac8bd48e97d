"""The AS number of an address by one DNS query: TXT <reversed>.origin.asn.cymru.com (Team Cymru's IP to ASN).

Asked only through the tunnel (by the default route where no tunnel is known), for the block and never for the host,
once per block, and cached for two weeks. An answer is `"64496 | 192.0.2.0/24 | NL | ripencc | 2001-01-01"`; a block
with several origins has several numbers. Without an answer within 0.3 s, the geolocation services are asked about the
block's first address too, by the same path, and the first answer counts: the report of a leak may depend on it.
"""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterable, Iterator
from ipaddress import ip_address, ip_network
from typing import Final

from vpn_sentinel.agent.net.endpoints import TCP
from vpn_sentinel.agent.net.facts import FactStore
from vpn_sentinel.agent.net.interfaces import Paths
from vpn_sentinel.agent.net.resolver import HostResolver, NotFoundError
from vpn_sentinel.agent.net.urls import split
from vpn_sentinel.agent.probes import dns, dnswire
from vpn_sentinel.agent.probes.placing import asn_of
from vpn_sentinel.domain.observation import Answer, Path, Place
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, is_public
from vpn_sentinel.runtime.clock import Clock

SOURCE: Final = "cymru.com"
ORIGIN_FRESH_S: Final = 14 * 86400.0
_RETRY_AFTER_S: Final = 600.0  # after no answer
_ANSWER_TIMEOUT_S, _RESEND_S = 1.0, 0.4
_DNS_HEAD_START_S: Final = 0.3  # until services are asked as well
_MAX_BLOCKS_PER_ROUND: Final = 8
_MAX_SERVICE_LOOKUPS: Final = 4  # per round
_SERVICE_TIMEOUT_S: Final = 2.0
_MAX_CACHED_BLOCKS: Final = 64
_FACT_NAME: Final = "origins"
_NEVER: Final = (0.0, (), SOURCE)
# For when no nameserver is reached through the tunnel.
_PUBLIC_RESOLVERS: Final = tuple(dns.Nameserver(ip_address(a)) for a in ("9.9.9.9", "1.1.1.1"))


# The place of an address by a service, None without an answer; the second argument says whether a URL may be asked.
Services = Callable[[IPAddress, Callable[[str], Awaitable[bool]]], Awaitable[Place | None]]
_Origin = tuple[float, tuple[int, ...], str]  # time of the lookup (wall clock), AS numbers, source
_Lookup = tuple[tuple[int, ...], str] | None  # AS numbers and source


class Origins:
    """The known origins of addresses. Without `facts` they do not outlive the process."""

    def __init__(
        self,
        clock: Clock,
        facts: FactStore | None = None,
        *,
        path_to: Callable[[dns.Nameserver, Paths], Path] = dns.path_to,
        services: Services | None = None,
        names: HostResolver | None = None,
    ) -> None:
        """`services` are asked when the DNS query has no answer; `names` resolves their addresses."""
        self._services, self._names = services, names or HostResolver()
        self._path_to = path_to
        self._clock = clock
        self._facts = facts
        self._known: dict[str, _Origin] = _read(facts.fact(_FACT_NAME) if facts else None)
        self._tried: dict[str, float] = {}

    def known(self, addresses: Iterable[IPAddress]) -> tuple[Place, ...]:
        """From earlier answers, without a query. A block with several origins makes several places."""
        found: list[Place] = []
        for address in dict.fromkeys(addresses):
            _, numbers, source = self._known.get(str(block(address)), _NEVER)
            found += [Place(ip=address, source=source, asn=n) for n in numbers]
        return tuple(found)

    async def learn(
        self,
        addresses: Iterable[IPAddress],
        servers: Iterable[dns.Nameserver],
        paths: Paths,
        *,
        enough: Callable[[], bool] = lambda: False,
    ) -> None:
        """Look up what is unknown or too old, for 2.3 seconds at most, or until `enough` is true.

        No query is sent beside the tunnel.
        """
        server = next((s for s in (*servers, *_PUBLIC_RESOLVERS) if _may_ask_by(self._path_to(s, paths), paths)), None)
        due = [b for b in dict.fromkeys(block(a) for a in addresses if is_public(a)) if self._due(str(b))][
            :_MAX_BLOCKS_PER_ROUND
        ]
        if not due:
            return
        service_slots = iter(range(_MAX_SERVICE_LOOKUPS))
        async with asyncio.TaskGroup() as group:
            asking = {group.create_task(self._look_up(network, server, paths, service_slots)) for network in due}
            while asking and not enough():
                _, asking = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            for task in asking:
                task.cancel()
        for kept in (self._known, self._tried):
            while len(kept) > _MAX_CACHED_BLOCKS:
                del kept[next(iter(kept))]
        if self._facts is not None:
            self._facts.keep(_FACT_NAME, json.dumps(self._known))

    async def _look_up(
        self, network: IPNetwork, server: dns.Nameserver | None, paths: Paths, service_slots: Iterator[int]
    ) -> None:
        """Look up one block. Each use of the services takes one of `service_slots`."""
        async with asyncio.TaskGroup() as group:
            asking: set[asyncio.Task[_Lookup]] = set()
            found: _Lookup = None
            if server is not None:
                done, asking = await asyncio.wait({group.create_task(_ask(server, network))}, timeout=_DNS_HEAD_START_S)
                found = next((task.result() for task in done), None)
            if not found and self._services is not None and next(service_slots, None) is not None:
                asking.add(group.create_task(self._ask_services(self._services, network, paths)))
            while asking and not found:
                done, asking = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
                found = next((result for task in done if (result := task.result())), None)
            for task in asking:
                task.cancel()
        if server is not None:
            self._tried[str(network)] = self._clock.boottime()
        if found:
            self._known.pop(str(network), None)
            self._known[str(network)] = (self._clock.wall(), *found)

    async def _ask_services(self, services: Services, network: IPNetwork, paths: Paths) -> _Lookup:
        async def may_ask(url: str) -> bool:
            inside = await self._is_inside(url, paths)
            if inside:
                self._tried[str(network)] = self._clock.boottime()
            return inside

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SERVICE_TIMEOUT_S):
                place = await services(network.network_address, may_ask)
                if place is not None and place.asn is not None:
                    return (place.asn,), place.source
        return None

    async def _is_inside(self, url: str, paths: Paths) -> bool:
        where = split(url)
        try:
            there = await self._names.addresses(where.host, patience=_ANSWER_TIMEOUT_S)
        except NotFoundError:
            return False
        return all(_may_ask_by(paths.of(address, where.port, TCP), paths) for address in there)

    def _due(self, network: str) -> bool:
        since, *_ = self._known.get(network, _NEVER)
        if 0 <= self._clock.wall() - since < ORIGIN_FRESH_S:
            return False
        return self._clock.boottime() - self._tried.get(network, -_RETRY_AFTER_S) >= _RETRY_AFTER_S


def _may_ask_by(path: Path, paths: Paths) -> bool:
    """Whether a query may take this path. Without a known tunnel no path is beside it."""
    return path is Path.TUNNEL or paths.survey.tunnel is None


def block(address: IPAddress) -> IPNetwork:
    """The /24 or /48 of an address: the usual unit of routing, and all that third parties learn of the address."""
    return ip_network((address, 24 if address.version == 4 else 48), strict=False)


def question(network: IPNetwork) -> str:
    """The DNS name with the origin of a block."""
    if network.version == 4:
        return ".".join(reversed(str(network.network_address).split(".")[:3])) + ".origin.asn.cymru.com"
    nibbles = network.network_address.packed.hex()[: network.prefixlen // 4]
    return ".".join(reversed(nibbles)) + ".origin6.asn.cymru.com"


def read(reply: dnswire.DnsReply, network: IPNetwork) -> tuple[int, ...]:
    """The AS numbers of the longest prefix that covers the block; empty when the answer has none."""
    best: tuple[int, tuple[int, ...]] = (-1, ())
    for strings in reply.texts:
        numbers, _, rest = "".join(strings).partition("|")
        try:
            prefix = ip_network(rest.partition("|")[0].strip())
        except ValueError:
            continue
        found = tuple(n for w in numbers.split() if (n := asn_of(w)))
        covers = prefix.version == network.version and network.network_address in prefix
        if covers and found and prefix.prefixlen > best[0]:
            best = (prefix.prefixlen, found[:4])
    return best[1]


async def _ask(server: dns.Nameserver, network: IPNetwork) -> _Lookup:
    numbers: list[int] = []

    def take(reply: dnswire.DnsReply) -> dns.Revealed:
        numbers.extend(read(reply, network))
        return dns.Revealed()

    method = dns.Method("origin", question(network), dnswire.TXT, take)
    outcome = await dns.lookup(server, method, limit=_ANSWER_TIMEOUT_S, resend=_RESEND_S)
    return (tuple(numbers), SOURCE) if numbers and outcome.answer is Answer.ANSWERED else None


def _read(text: str | None) -> dict[str, _Origin]:
    """The stored origins; empty if they are damaged."""
    try:
        found = json.loads(text or "{}")
        return {
            str(k): (float(at), tuple(int(n) for n in numbers), str(who[0]) if who else SOURCE)
            for k, (at, numbers, *who) in found.items()
        }
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
