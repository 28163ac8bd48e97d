"""The canary on real sockets: UDP and TCP, both families, patient and impatient clients."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from dnslib import QTYPE, RCODE, DNSRecord
from prometheus_client import CollectorRegistry

from bench.dns_seeds import question
from tests.server.dns_canary.test_responder import KEY, NONCE, ZONE, own_name, responder
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.settings import SettingError
from vpn_sentinel.server.dns_canary.listener import DnsCanaryMetrics, DnsListener, TcpLimits
from vpn_sentinel.server.serving import listen
from vpn_sentinel.wire import canary

LIMITS = TcpLimits(connections=4, per_network=3, idle=0.4)


class Served:
    def __init__(self, port: int, listener: DnsListener, registry: CollectorRegistry) -> None:
        self.port, self.listener, self.registry = port, listener, registry

    def counted(self, outcome: str) -> float:
        return self.registry.get_sample_value("vpn_sentinel_canary_queries_total", {"outcome": outcome}) or 0.0


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    tcp = listen("::", 0, "VPN_SENTINEL_CANARY_PORT")
    port = tcp.getsockname()[1]
    udp = listen("::", port, "VPN_SENTINEL_CANARY_PORT", socket.SOCK_DGRAM)
    registry = CollectorRegistry()
    made = DnsListener(responder(), DnsCanaryMetrics(registry), LIMITS)
    assert made.healthy() == (False, "a socket was closed")
    await made.open([udp, tcp])
    try:
        yield Served(port, made, registry)
    finally:
        made.close()
        await asyncio.sleep(0)


async def by_udp(port: int, data: bytes, host: str = "127.0.0.1") -> bytes | None:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect((host, port))
        await loop.sock_sendall(sock, data)
        try:
            async with asyncio.timeout(0.5):
                return await loop.sock_recv(sock, 4096)
        except TimeoutError:
            return None


class Tcp:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int, host: str = "127.0.0.1", source: str = "") -> "Tcp":
        local = (source, 0) if source else None
        return cls(*await asyncio.open_connection(host, port, local_addr=local))

    def send(self, *messages: bytes) -> None:
        self.writer.write(b"".join(len(m).to_bytes(2) + m for m in messages))

    async def read(self) -> bytes:
        async with asyncio.timeout(5):
            return await self.reader.readexactly(int.from_bytes(await self.reader.readexactly(2)))

    async def ended(self) -> bool:
        """Whether the server ends it within five seconds."""
        async with asyncio.timeout(5):
            try:
                return await self.reader.read(1) == b""
            except ConnectionError:
                return True

    async def close(self) -> None:
        self.writer.transport.abort()
        await asyncio.sleep(0)


def told(packed: bytes) -> IPAddress | None:
    (record,) = DNSRecord.parse(packed).rr
    return canary.read_answer(tuple(s.decode() for s in record.rdata.data), NONCE, KEY)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_over_udp_a_question_is_sent_to_tcp_where_it_is_answered(served: Served, host: str) -> None:
    asked = question(own_name(), QTYPE.TXT)
    short = await by_udp(served.port, asked, host)
    assert short is not None
    assert DNSRecord.parse(short).header.tc
    assert len(short) <= len(asked)
    client = await Tcp.open(served.port, host)
    client.send(asked)
    assert str(told(await client.read())) == host
    await client.close()
    assert (served.counted("truncated"), served.counted("sighted")) == (1, 1)
    assert served.listener.healthy() == (True, "")


async def test_garbage_gets_no_more_than_a_header(served: Served) -> None:
    assert await by_udp(served.port, b"x") is None
    answer = await by_udp(served.port, bytes(100))
    assert answer is not None
    assert len(answer) == 12
    assert DNSRecord.parse(answer).header.rcode == RCODE.FORMERR
    assert served.counted("malformed") == 2


async def test_questions_in_a_row_are_answered_in_order(served: Served) -> None:
    client = await Tcp.open(served.port)
    client.send(*(question(own_name(), QTYPE.TXT, ident=i) for i in range(20)))
    assert [int.from_bytes((await client.read())[:2]) for _ in range(20)] == list(range(20))
    await client.close()


async def test_a_question_in_pieces_is_answered(served: Served) -> None:
    asked = question(own_name(), QTYPE.TXT)
    client = await Tcp.open(served.port)
    for byte in len(asked).to_bytes(2) + asked:
        client.writer.write(bytes([byte]))
        await asyncio.sleep(0)
    assert str(told(await client.read())) == "127.0.0.1"
    await client.close()


async def test_who_keeps_us_waiting_is_let_go(served: Served) -> None:
    idle, slow = await Tcp.open(served.port), await Tcp.open(served.port)
    slow.writer.write(b"\x00")  # bytes alone earn no time
    assert await idle.ended()
    assert await slow.ended()
    assert len(served.listener.connection_limit) == 0
    await idle.close()
    await slow.close()


async def test_what_is_too_long_or_no_question_ends_the_connection(served: Served) -> None:
    for data in ((LIMITS.message + 1).to_bytes(2), b"\x00\x00", b"\x00\x03abc"):
        client = await Tcp.open(served.port)
        client.writer.write(data)
        assert await client.ended()
        await client.close()


async def test_one_network_does_not_take_every_connection(served: Served) -> None:
    clients = [await Tcp.open(served.port) for _ in range(LIMITS.per_network)]
    for client in clients:
        client.send(question(ZONE, QTYPE.SOA))
        await client.read()
    refused = await Tcp.open(served.port)
    assert await refused.ended()
    other = await Tcp.open(served.port, "::1")
    other.send(question(ZONE, QTYPE.SOA))
    assert DNSRecord.parse(await other.read()).header.rcode == RCODE.NOERROR
    for client in (*clients, refused, other):
        await client.close()


async def test_idle_connections_yield_to_new_ones(served: Served) -> None:
    """Networks enough take every connection, and say nothing."""
    hosts = ("127.0.0.1", "127.0.1.1", "127.0.2.1", "127.0.3.1")
    idle = [await Tcp.open(served.port, source=host) for host in hosts]
    for _ in range(3):
        client = await Tcp.open(served.port, "::1")
        client.send(question(ZONE, QTYPE.SOA))
        assert DNSRecord.parse(await client.read()).header.rcode == RCODE.NOERROR
        await client.close()
    assert await idle[0].ended()
    assert served.listener.connection_limit.refused["yielded"] >= 1
    for client in idle:
        await client.close()


async def test_who_asks_and_does_not_read_is_let_go(served: Served) -> None:
    client = await Tcp.open(served.port)
    asked = question(own_name(), QTYPE.TXT)
    client.send(asked)
    await client.read()
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.send(*[asked] * 1500)  # some 200 KB of answers
    async with asyncio.timeout(5):
        while len(served.listener.connection_limit):  # noqa: ASYNC110 - the listener has no event to wait for
            await asyncio.sleep(0.02)
    await client.close()


async def test_a_busy_port_is_told_in_one_line(served: Served) -> None:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with pytest.raises(SettingError, match=rf"^VPN_SENTINEL_CANARY_PORT: .* port {served.port}/.*in use$"):
            listen("::", served.port, "VPN_SENTINEL_CANARY_PORT", kind)
