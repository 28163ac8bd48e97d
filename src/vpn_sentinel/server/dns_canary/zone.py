"""The zone: which names exist in it, and their records. No I/O, no clock, no memory.

It holds its apex, the names of its servers, and one name for each query that an agent can make. Nothing else exists.
Nothing is stored: the answer itself carries what the agent wants to know.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from typing import Final

from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.server.dns_canary import message
from vpn_sentinel.server.dns_canary.message import DnsQuery, DnsResponse, ResourceRecord
from vpn_sentinel.wire import canary

_SERVERS_TTL_S: Final = 3600  # the servers of the zone rarely change
_ADDRESS_TTL_S: Final = 300
_UNCACHED_TTL_S: Final = 0  # each query is made once
_NEGATIVE_TTL_S: Final = 1
_TRANSFERS: Final = frozenset({message.IXFR, message.AXFR})


@dataclass(frozen=True, slots=True, kw_only=True)
class Zone:
    """`name` and `servers` are names in lower case without a final dot; `addresses` gives the servers' addresses.

    `secret` is the installation's, from which agents' keys are derived.
    """

    name: str
    servers: tuple[str, ...]
    addresses: Callable[[], Iterable[IPAddress]]
    secret: bytes
    _apex: tuple[bytes, ...] = field(init=False)
    _soa: ResourceRecord = field(init=False)

    def __post_init__(self) -> None:
        apex = labels_of(self.name)
        numbers = b"".join(n.to_bytes(4) for n in (1, 3600, 600, 86400, _NEGATIVE_TTL_S))
        names = message.wire(labels_of(self.servers[0])) + message.wire((b"hostmaster", *apex))
        object.__setattr__(self, "_apex", apex)
        object.__setattr__(
            self, "_soa", ResourceRecord(message.wire(apex), message.SOA, _NEGATIVE_TTL_S, names + numbers)
        )

    def genuine(self, query: DnsQuery) -> tuple[bytes, bytes] | None:
        """The nonce and the key of an agent's query, None for any other."""
        if query.klass != message.IN or len(query.labels) != len(self._apex) + 1 or query.labels[1:] != self._apex:
            return None
        return canary.read_label(query.labels[0], self.secret)

    def answer(self, query: DnsQuery, asker: IPAddress, genuine: tuple[bytes, bytes] | None) -> DnsResponse:
        """Answer a query from the address `asker`; `genuine` is the result of the method `genuine` for it."""
        if query.edns is not None and query.edns.version != 0:
            return DnsResponse(rcode=message.BADVERS, authoritative=False)
        depth = len(self._apex)
        inside = query.labels[-depth:] == self._apex
        if query.klass != message.IN or not inside or query.kind in _TRANSFERS:
            return DnsResponse(rcode=message.REFUSED, authoritative=False)
        if genuine is not None:
            nonce, key = genuine
            records = [ResourceRecord(None, message.TXT, _UNCACHED_TTL_S, texts(canary.answer(asker, nonce, key)))]
            # getaddrinfo(3) asks only for addresses: only these records show which resolver programs use.
            records.append(ResourceRecord(None, _kind(asker), _UNCACHED_TTL_S, asker.packed))
            return self._of(query, records)
        if len(query.labels) == depth:
            return self._of(query, [self._soa, *self._ns()], additional=self._glue())
        own = [labels_of(server) for server in self.servers]
        if query.labels in own:
            return self._of(query, self._addresses(None))
        if any(server[-len(query.labels) :] == query.labels for server in own):
            return self._of(query, [])  # it has no records, but the name of a server is below it (RFC 8020)
        return DnsResponse(rcode=message.NXDOMAIN, authority=(self._soa,))

    def _of(
        self, query: DnsQuery, records: list[ResourceRecord], additional: Iterable[ResourceRecord] = ()
    ) -> DnsResponse:
        """The name's records of the requested type; without any, the SOA says how long to cache that (RFC 2308)."""
        wanted = [r for r in records if query.kind in (r.kind, message.ANY)]
        if not wanted:
            return DnsResponse(rcode=message.NOERROR, authority=(self._soa,))
        more = tuple(additional) if any(r.kind == message.NS for r in wanted) else ()
        return DnsResponse(rcode=message.NOERROR, answers=wanted, additional=more)

    def _ns(self) -> list[ResourceRecord]:
        apex = message.wire(self._apex)
        return [
            ResourceRecord(apex, message.NS, _SERVERS_TTL_S, message.wire(labels_of(server))) for server in self.servers
        ]

    def _glue(self) -> Iterable[ResourceRecord]:
        for server in self.servers:
            name = labels_of(server)
            if name[-len(self._apex) :] == self._apex:
                yield from self._addresses(message.wire(name))

    def _addresses(self, owner: bytes | None) -> list[ResourceRecord]:
        return [ResourceRecord(owner, _kind(a), _ADDRESS_TTL_S, a.packed) for a in self.addresses()]


def _kind(address: IPAddress) -> int:
    return message.AAAA if isinstance(address, IPv6Address) else message.A


def labels_of(name: str) -> tuple[bytes, ...]:
    return tuple(part.encode("ascii") for part in name.split("."))


def texts(strings: Iterable[str]) -> bytes:
    """The data of a TXT record; each string at most 255 bytes."""
    return b"".join(bytes([len(raw)]) + raw for raw in (s.encode("ascii") for s in strings))
