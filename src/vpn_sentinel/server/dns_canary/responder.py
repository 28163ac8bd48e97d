"""Turns the bytes of a query into the bytes of its answer, the same for UDP and TCP, without I/O."""

from enum import StrEnum
from ipaddress import IPv6Address, ip_address

from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.server.client import resolver_prefix
from vpn_sentinel.server.dns_canary import message
from vpn_sentinel.server.dns_canary.message import BadQueryError, DnsQuery
from vpn_sentinel.server.dns_canary.query_limit import QueryLimit
from vpn_sentinel.server.dns_canary.zone import Zone

_TCP_MESSAGE_BYTES = 65535


class QueryOutcome(StrEnum):
    """How a query was handled, for the metrics."""

    SIGHTED = "sighted"  # an agent's query: answered with the resolver's address
    TRUNCATED = "truncated"  # answered with the TC bit, so that the client asks over TCP
    ZONE = "zone"  # about the zone itself, or that a name has no such records
    NXDOMAIN = "nxdomain"
    REFUSED = "refused"  # of another zone, a transfer, or another class
    BAD_VERSION = "bad_version"
    MALFORMED = "malformed"
    LIMITED = "limited"


class Responder:
    """`respond` is all that a transport needs. It raises nothing for any bytes."""

    def __init__(self, zone: Zone, limit: QueryLimit) -> None:
        self._zone = zone
        self._limit = limit

    def respond(self, data: bytes, host: str, now: float, *, datagram: bool) -> tuple[bytes | None, QueryOutcome]:
        """Answer the bytes that came from `host` at `now` (monotonic seconds); None: send nothing.

        The answer to a datagram is never larger than the datagram: for a larger one the client has to ask over TCP,
        where it cannot forge its address.
        """
        if not self._limit.admits_any(now):
            return None, QueryOutcome.LIMITED
        network = resolver_prefix(host)
        try:
            query = message.parse(data)
        except BadQueryError as e:
            if e.reply is not None and not self._limit.admits(network, now, genuine=False):
                return None, QueryOutcome.LIMITED
            return e.reply, QueryOutcome.MALFORMED
        genuine = self._zone.genuine(query)
        if not self._limit.admits(network, now, genuine=genuine is not None):
            return None, QueryOutcome.LIMITED
        reply = self._zone.answer(query, _plain(host), genuine)
        limit = min(len(data), _payload(query)) if datagram else _TCP_MESSAGE_BYTES
        packed, truncated = message.pack(query, reply, limit=limit)
        if truncated:
            return packed, QueryOutcome.TRUNCATED
        return packed, _outcome(reply.rcode, sighted=genuine is not None and bool(reply.answers))


def _payload(query: DnsQuery) -> int:
    """The bytes that the client accepts in one datagram (RFC 6891, section 6.2.3), at most what we send."""
    return min(message.UDP_PAYLOAD_BYTES, max(512, query.edns.payload)) if query.edns else 512


def _plain(host: str) -> IPAddress:
    address = ip_address(host.partition("%")[0])
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address


def _outcome(rcode: int, *, sighted: bool) -> QueryOutcome:
    match rcode:
        case message.REFUSED:
            return QueryOutcome.REFUSED
        case message.NXDOMAIN:
            return QueryOutcome.NXDOMAIN
        case message.BADVERS:
            return QueryOutcome.BAD_VERSION
        case _:
            return QueryOutcome.SIGHTED if sighted else QueryOutcome.ZONE
