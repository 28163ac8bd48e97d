"""The DNS canary's sockets: UDP, and TCP with limits (RFC 7766). Anybody on the internet may send queries."""

import asyncio
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter

from vpn_sentinel.domain.policy import IPAddress, IPNetwork
from vpn_sentinel.server.acceptor import Acceptor
from vpn_sentinel.server.connection_limit import ConnectionLimit, ConnectionSlot, connections_for
from vpn_sentinel.server.dns_canary.query_limit import QueryLimit
from vpn_sentinel.server.dns_canary.responder import QueryOutcome, Responder
from vpn_sentinel.server.dns_canary.zone import Zone
from vpn_sentinel.server.part_health import PartHealth
from vpn_sentinel.server.settings import DnsCanarySettings

MAX_CONNECTIONS: Final = 512
LISTEN_BACKLOG: Final = 256  # connections that the kernel queues until they are accepted


class DnsCanaryMetrics:
    """Counts queries by outcome. One for each registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        counter = Counter("vpn_sentinel_canary_queries", "DNS queries by outcome.", ("outcome",), registry=registry)
        self._by_outcome = {outcome: counter.labels(outcome.value) for outcome in QueryOutcome}

    def note(self, outcome: QueryOutcome) -> None:
        self._by_outcome[outcome].inc()


class Datagrams(asyncio.DatagramProtocol):
    """One query in each datagram; an answer never has more bytes than the query."""

    def __init__(self, responder: Responder, note: Callable[[QueryOutcome], None]) -> None:
        self._responder = responder
        self._note = note
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        answer, outcome = self._responder.respond(data, addr[0], self._loop.time(), datagram=True)
        self._note(outcome)
        # No program can receive on port 0: such a datagram only tries to cause an error.
        if answer is not None and self._transport is not None and addr[1]:
            self._transport.sendto(answer, addr)


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpLimits:
    """Limits for TCP. `idle` is the seconds for a query to arrive, or an answer to be read; `message` one's bytes."""

    connections: int = MAX_CONNECTIONS
    per_network: int = 64
    idle: float = 5.0
    message: int = 1232


class TcpStream(asyncio.Protocol):
    """One connection: queries one after another, each with its length in two bytes before it."""

    def __init__(
        self, responder: Responder, note: Callable[[QueryOutcome], None], slot: ConnectionSlot, limits: TcpLimits
    ) -> None:
        self._responder, self._note, self._slot, self._limits = responder, note, slot, limits
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._host = ""
        self._timer: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        self._slot.cut = self.abort
        peer = transport.get_extra_info("peername")
        if not peer:  # closed already
            self.abort()
            return
        self._host = peer[0]
        self._restart_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._slot.release()
        if self._timer is not None:
            self._timer.cancel()

    def eof_received(self) -> bool:
        return False  # all queries have been answered

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) >= 2 and self._transport is not None and not self._transport.is_closing():
            length = int.from_bytes(self._buffer[:2])
            if length > self._limits.message:
                self._note(QueryOutcome.MALFORMED)
                self.abort()
                return
            if len(self._buffer) < 2 + length:
                return
            asked, self._buffer = self._buffer[2 : 2 + length], self._buffer[2 + length :]
            answer, outcome = self._responder.respond(asked, self._host, self._loop.time(), datagram=False)
            self._note(outcome)
            if answer is None:  # it sends too many queries, or something that is no query
                self.abort()
                return
            self._transport.write(len(answer).to_bytes(2) + answer)
            self._restart_timer()  # only a whole query gives more time
            self._slot.idle()

    def pause_writing(self) -> None:
        """The client does not read the answers: read no more queries until it does, at most for `idle` seconds."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _restart_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._limits.idle, self.abort)


class DnsListener:
    """Serves UDP and TCP sockets that are already bound."""

    def __init__(self, responder: Responder, metrics: DnsCanaryMetrics, limits: TcpLimits | None = None) -> None:
        self._responder, self._metrics = responder, metrics
        self._limits = limits or TcpLimits(connections=min(connections_for(1), MAX_CONNECTIONS))
        self.connection_limit = ConnectionLimit(
            self._limits.connections, self._limits.per_network, self._limits.per_network
        )
        self._endpoints: list[asyncio.BaseTransport] = []
        self._servers: list[Acceptor] = []

    async def open(self, sockets: Sequence[socket.socket]) -> None:
        loop = asyncio.get_running_loop()
        note = self._metrics.note
        for sock in sockets:
            if sock.type == socket.SOCK_DGRAM:
                endpoint, _ = await loop.create_datagram_endpoint(lambda: Datagrams(self._responder, note), sock=sock)
                self._endpoints.append(endpoint)
            else:
                self._servers.append(Acceptor(sock, self.connection_limit, self._stream, backlog=LISTEN_BACKLOG))

    def _stream(self, slot: ConnectionSlot) -> TcpStream:
        return TcpStream(self._responder, self._metrics.note, slot, self._limits)

    def healthy(self) -> PartHealth:
        """Whether every socket is open; what is wrong, in words without addresses."""
        shut = any(d.is_closing() for d in self._endpoints) or not all(s.is_serving() for s in self._servers)
        return (
            PartHealth(ok=False, detail="a socket was closed") if shut or not self._endpoints else PartHealth(ok=True)
        )

    def close(self) -> None:
        for server in self._servers:
            server.close()
        for endpoint in self._endpoints:
            endpoint.close()
        for slot in self.connection_limit.unserved():  # between two queries, all connections are unserved
            slot.cut()


def build_dns_canary(
    settings: DnsCanarySettings,
    secret: bytes,
    own_address: Callable[[], tuple[IPNetwork, ...]],
    registry: CollectorRegistry,
) -> DnsListener:
    """A listener for the zone of `settings`. Where no addresses are set, the server's own address is used."""

    def addresses() -> tuple[IPAddress, ...]:
        return settings.addresses or tuple(n.network_address for n in own_address())

    zone = Zone(name=settings.zone, servers=settings.servers, addresses=addresses, secret=secret)
    return DnsListener(Responder(zone, QueryLimit()), DnsCanaryMetrics(registry))
