"""The AS number of an address by one DNS question: TXT <reversed>.origin.asn.cymru.com (Team Cymru's IP to ASN).

Asked through the tunnel only (by the one way out where no tunnel is in sight), of the block and never of the host, once
a block, and kept for two weeks. An answer is
`"64496 | 192.0.2.0/24 | NL | ripencc | 2001-01-01"`; a block with several origins names several numbers. Where it has
not answered within 0.3 s, the geolocation services are asked of the block's first address too, in the same way, and the
first answer counts: a leak may be waiting to be told.
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
ORIGIN_FRESH_S: Final = 14 * 86400.0  # seconds
_REST: Final = 600.0  # seconds after no answer
_ANSWER_TIMEOUT_S, _RESEND_S = 1.0, 0.4  # seconds
_HEAD_START: Final = 0.3  # seconds that the DNS question has before services are asked
_MAX_ASKED: Final = 8  # blocks in a round
_MAX_SERVED: Final = 4  # blocks in a round that services are asked about
_SERVED_WITHIN: Final = 2.0  # seconds
_MAX_KEPT: Final = 64  # blocks
_FACT: Final = "origins"
_NEVER: Final = (0.0, (), SOURCE)
# Public resolvers for where no nameserver lies inside the tunnel.
_PUBLIC: Final = tuple(dns.Nameserver(ip_address(a)) for a in ("9.9.9.9", "1.1.1.1"))


# What a service says of an address, None when none does; the second argument tells which may be asked, by its URL.
Services = Callable[[IPAddress, Callable[[str], Awaitable[bool]]], Awaitable[Place | None]]
_Origin = tuple[float, tuple[int, ...], str]  # when it was asked (wall clock), the AS numbers, and who said so
_Said = tuple[tuple[int, ...], str] | None  # the AS numbers, and who said so


class Origins:
    """What is known of the origin of addresses. Without `facts` it is forgotten with the process."""

    def __init__(
        self,
        clock: Clock,
        facts: FactStore | None = None,
        *,
        path_to: Callable[[dns.Nameserver, Paths], Path] = dns.path_to,
        services: Services | None = None,
        names: HostResolver | None = None,
    ) -> None:
        """`services` stand in where the DNS question has no answer; `names` knows where they are."""
        self._services, self._names = services, names or HostResolver()
        self._path_to = path_to
        self._clock = clock
        self._facts = facts
        self._known: dict[str, _Origin] = _read(facts.fact(_FACT) if facts else None)
        self._tried: dict[str, float] = {}

    def known(self, addresses: Iterable[IPAddress]) -> tuple[Place, ...]:
        """What earlier answers say, without asking anyone. A block with several origins makes several places."""
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
        """Ask for what is not known or too old, at most 2.3 seconds, or until what is known is `enough`.

        Nobody is asked beside the tunnel.
        """
        server = next((s for s in (*servers, *_PUBLIC) if _may_go(self._path_to(s, paths), paths)), None)
        due = [b for b in dict.fromkeys(block(a) for a in addresses if is_public(a)) if self._due(str(b))][:_MAX_ASKED]
        if not due:
            return
        turns = iter(range(_MAX_SERVED))
        async with asyncio.TaskGroup() as group:
            asking = {group.create_task(self._look_up(network, server, paths, turns)) for network in due}
            while asking and not enough():
                _, asking = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
            for task in asking:
                task.cancel()
        for kept in (self._known, self._tried):
            while len(kept) > _MAX_KEPT:
                del kept[next(iter(kept))]
        if self._facts is not None:
            self._facts.keep(_FACT, json.dumps(self._known))

    async def _look_up(
        self, network: IPNetwork, server: dns.Nameserver | None, paths: Paths, turns: Iterator[int]
    ) -> None:
        """Ask about one block. `turns` are those that services may still be asked about."""
        async with asyncio.TaskGroup() as group:
            asking: set[asyncio.Task[_Said]] = set()
            found: _Said = None
            if server is not None:
                done, asking = await asyncio.wait({group.create_task(_ask(server, network))}, timeout=_HEAD_START)
                found = next((task.result() for task in done), None)
            if not found and self._services is not None and next(turns, None) is not None:
                asking.add(group.create_task(self._ask_services(self._services, network, paths)))
            while asking and not found:
                done, asking = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
                found = next((said for task in done if (said := task.result())), None)
            for task in asking:
                task.cancel()
        if server is not None:
            self._tried[str(network)] = self._clock.boottime()
        if found:
            self._known.pop(str(network), None)
            self._known[str(network)] = (self._clock.wall(), *found)

    async def _ask_services(self, services: Services, network: IPNetwork, paths: Paths) -> _Said:
        async def may_ask(url: str) -> bool:
            inside = await self._is_inside(url, paths)
            if inside:
                self._tried[str(network)] = self._clock.boottime()
            return inside

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SERVED_WITHIN):
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
        return all(_may_go(paths.of(address, where.port, TCP), paths) for address in there)

    def _due(self, network: str) -> bool:
        since, *_ = self._known.get(network, _NEVER)
        if 0 <= self._clock.wall() - since < ORIGIN_FRESH_S:
            return False
        return self._clock.boottime() - self._tried.get(network, -_REST) >= _REST


def _may_go(path: Path, paths: Paths) -> bool:
    """Whether a question may take this path. Without a tunnel in sight there is no way beside it."""
    return path is Path.TUNNEL or paths.survey.tunnel is None


def block(address: IPAddress) -> IPNetwork:
    """The /24 or /48 of an address: what is routed, and all that a stranger is told of it."""
    return ip_network((address, 24 if address.version == 4 else 48), strict=False)


def question(network: IPNetwork) -> str:
    """The name that holds the origin of a block."""
    if network.version == 4:
        return ".".join(reversed(str(network.network_address).split(".")[:3])) + ".origin.asn.cymru.com"
    nibbles = network.network_address.packed.hex()[: network.prefixlen // 4]
    return ".".join(reversed(nibbles)) + ".origin6.asn.cymru.com"


def read(reply: dnswire.DnsReply, network: IPNetwork) -> tuple[int, ...]:
    """The AS numbers of the longest prefix that covers the block; none when the answer tells none."""
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


async def _ask(server: dns.Nameserver, network: IPNetwork) -> _Said:
    numbers: list[int] = []

    def take(reply: dnswire.DnsReply) -> dns.Revealed:
        numbers.extend(read(reply, network))
        return dns.Revealed()

    method = dns.Method("origin", question(network), dnswire.TXT, take)
    outcome = await dns.lookup(server, method, limit=_ANSWER_TIMEOUT_S, resend=_RESEND_S)
    return (tuple(numbers), SOURCE) if numbers and outcome.answer is Answer.ANSWERED else None


def _read(text: str | None) -> dict[str, _Origin]:
    """What was kept; nothing of what is damaged."""
    try:
        said = json.loads(text or "{}")
        return {
            str(k): (float(at), tuple(int(n) for n in numbers), str(who[0]) if who else SOURCE)
            for k, (at, numbers, *who) in said.items()
        }
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
