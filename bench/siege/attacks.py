"""Attacks on a server of this machine: `python -m bench.siege.attacks '{"name": …}'`, the fields of `Target`.

Each begins from so many loopback addresses, a network each, and ends by itself. `token` is that of the tunnel `rogue`,
`old_token` one of the tunnel `rotated` that is revoked meanwhile: some hold them; strangers have none. Prints one JSON
object: what was sent, and the processor time that it took.
"""

import asyncio
import contextlib
import itertools
import json
import os
import socket
import ssl
import struct
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from bench.siege.honest import HOME, hello, report

CHUNKED = b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
_PIECE = 64 * 1024
_SPARED = 0.05  # seconds of rest after a connection that was refused


@dataclass(frozen=True, kw_only=True)
class Target:
    """Ports of 127.0.0.1, and what the attacker knows. `sent` counts what became of it."""

    name: str
    seconds: float
    addresses: int
    api: int = 0
    health: int = 0
    dashboard: int = 0
    canary: int = 0
    agent: int = 0
    token: str = ""
    old_token: str = ""
    sent: Counter[str] = field(default_factory=Counter)

    def source(self, n: int) -> str:
        """Each attack has a /16 of its own, so that what one is refused does not hinder the next."""
        return f"127.{1 + list(ALL).index(self.name)}.{n % self.addresses}.1"


async def _connect(at: Target, n: int, port: int) -> socket.socket:
    """Raises OSError."""
    made = socket.socket()
    made.setblocking(False)
    try:
        made.bind((at.source(n), 0))
        async with asyncio.timeout(2.0):
            await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", port))
    except OSError:
        made.close()
        at.sent["not connected"] += 1
        raise
    at.sent["connections"] += 1
    return made


async def _pour(
    at: Target,
    n: int,
    port: int,
    first: bytes,
    piece: bytes,
    *,
    read: bool = True,
    pause: float = 0.0,
    then: bytes | None = None,
) -> None:
    """Send `first`, then `piece` without end; connect anew when it is cut. An empty piece is a wait.

    `then` comes between them, once `first` is answered.
    """
    loop, end = asyncio.get_running_loop(), time.monotonic() + at.seconds
    while time.monotonic() < end:
        try:
            made = await _connect(at, n, port)
        except OSError:
            await asyncio.sleep(_SPARED)
            continue
        with made, contextlib.suppress(OSError):
            async with asyncio.timeout(max(0.1, end - time.monotonic())):
                await loop.sock_sendall(made, first)
                at.sent["bytes"] += len(first)
                if then is not None:
                    await loop.sock_recv(made, _PIECE)
                    await loop.sock_sendall(made, then)
                while True:
                    await loop.sock_sendall(made, piece)
                    at.sent["bytes"] += len(piece)
                    if read:
                        with contextlib.suppress(BlockingIOError):
                            if not made.recv(_PIECE):
                                break
                    await asyncio.sleep(pause)
        await asyncio.sleep(0.02)


async def _many(count: int, one: Callable[[int], Awaitable[None]]) -> None:
    await asyncio.gather(*(one(n) for n in range(count)))


async def chunks(at: Target) -> None:
    """One-byte chunks without end behind a request that has no key."""
    first = CHUNKED % b"/api/v1/keepalive"
    await _many(40, lambda n: _pour(at, n, at.api, first, b"1\r\nx\r\n" * 2000))


async def chunks_at_health(at: Target) -> None:
    """The same where nobody needs a key."""
    await _many(40, lambda n: _pour(at, n, at.health, CHUNKED % b"/health", b"1\r\nx\r\n" * 2000))


async def trailers(at: Target) -> None:
    """Trailers of four bytes without end."""
    first = CHUNKED % b"/api/v1/keepalive" + b"0\r\n"
    await _many(40, lambda n: _pour(at, n, at.api, first, b"a:b\r\n" * 500))


async def heads(at: Target) -> None:
    """Heads of thousands of tiny lines."""
    piece = b"a:b\r\n" * 1800 + b"\r\nGET / HTTP/1.1\r\n"
    await _many(40, lambda n: _pour(at, n, at.dashboard, b"GET / HTTP/1.1\r\n", piece))


async def slow(at: Target) -> None:
    """1,500 heads that come a line a second."""
    first = b"POST /api/v1/keepalive HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    await _many(1500, lambda n: _pour(at, n, at.api, first, b"a: b\r\n", pause=1.0))


async def unread(at: Target) -> None:
    """800 connections that ask for the metrics and read no answer."""
    asked = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 8
    await _many(800, lambda n: _pour(at, n, at.health, b"", asked, read=False))


async def unfinished(at: Target) -> None:
    """800 connections to the port of /health whose request never ends."""
    first = b"POST /health HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n"
    await _many(800, lambda n: _pour(at, n, at.health, first, b"", pause=0.1))


async def wrong_keys(at: Target) -> None:
    """Reports with a wrong key."""
    head = (
        b"POST /api/v1/keepalive HTTP/1.1\r\nHost: 127.0.0.1\r\nX-API-Key: wrong\r\nContent-Type: application/json\r\n"
    )
    await _many(60, lambda n: _pour(at, n, at.api, b"", head + b"Content-Length: 2\r\n\r\n{}"))


async def _hold(at: Target, port: int, most: int) -> None:
    """So many connections that say nothing, the oldest one closed for a new one."""
    end, held = time.monotonic() + at.seconds, list[socket.socket]()
    for n in itertools.count():
        if time.monotonic() > end:
            break
        with contextlib.suppress(OSError):
            held.append(await _connect(at, n, port))
        if len(held) >= most:
            held.pop(0).close()
        if n % 50 == 0:
            await asyncio.sleep(0.01)
    for made in held:
        made.close()


async def idle(at: Target) -> None:
    """7,500 connections to the API's port that say nothing."""
    await _hold(at, at.api, 7500)


async def tls(at: Target) -> None:
    """7,500 plain TCP connections to the API's port, where it speaks TLS."""
    await _hold(at, at.api, 7500)


async def handshakes(at: Target) -> None:
    """TLS handshakes without a request, one behind the other."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    async def one(n: int) -> None:
        end = time.monotonic() + at.seconds
        while time.monotonic() < end:
            try:
                async with asyncio.timeout(5.0):
                    _, writer = await asyncio.open_connection(
                        "127.0.0.1", at.api, ssl=context, local_addr=(at.source(n), 0)
                    )
            except OSError:  # ssl.SSLError and TimeoutError are
                at.sent["not connected"] += 1
                await asyncio.sleep(_SPARED)
            else:
                at.sent["connections"] += 1
                writer.transport.abort()

    await _many(50, one)


async def dns(at: Target) -> None:
    """2,000 connections to the DNS canary that ask nothing."""
    await _hold(at, at.canary, 2000)


async def churn(at: Target) -> None:
    """Connections that are cut as soon as they are made."""

    async def one(n: int) -> None:
        end = time.monotonic() + at.seconds
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                made = await _connect(at, n, at.api)
                made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                made.close()
            await asyncio.sleep(0)

    await _many(20, one)


def frame(opcode: int, payload: bytes = b"", fin: int = 0x80) -> bytes:
    """A client's WebSocket frame (RFC 6455, section 5.2), masked with zeros."""
    size = len(payload)
    if size < 126:
        length = bytes([0x80 | size])
    elif size <= 0xFFFF:
        length = b"\xfe" + struct.pack("!H", size)
    else:
        length = b"\xff" + struct.pack("!Q", size)
    return bytes([fin | opcode]) + length + bytes(4) + payload


def upgrade(token: str) -> bytes:
    return (
        "GET /api/v1/agent HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nX-API-Key: {token}\r\n\r\n"
    ).encode()


def _greeting(name: str) -> bytes:
    """For after the handshake's answer: what comes with it is not heard (RFC 6455, section 4.1)."""
    return frame(1, hello(name, 1.0).encode())


async def pings(at: Target) -> None:
    """A tunnel's own agent pings and reads no answers."""
    piece = frame(9, b"x" * 125) * 400
    await _many(10, lambda n: _pour(at, n, at.api, upgrade(at.token), piece, read=False, then=b""))


async def continuations(at: Target) -> None:
    """A message of empty frames without end."""
    begun, piece = frame(1, b"{", fin=0), frame(0, fin=0) * 5000
    await _many(10, lambda n: _pour(at, n, at.api, upgrade(at.token), piece, then=begun))


async def sockets(at: Target) -> None:
    """3,000 WebSockets of one tunnel, all greeted and then still."""
    first, then = upgrade(at.token), _greeting("rogue")
    await _many(3000, lambda n: _pour(at, n, at.api, first, b"", pause=0.5, then=then))


async def notices(at: Target) -> None:
    """A tunnel that leaks, goes down and heals without end, with reports of the last hour."""
    loop, end, seq = asyncio.get_running_loop(), time.monotonic() + at.seconds, 0
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            made = await _connect(at, 0, at.api)
            with made:
                async with asyncio.timeout(max(0.1, end - time.monotonic())):
                    await loop.sock_sendall(made, upgrade(at.token))
                    await loop.sock_recv(made, _PIECE)
                    await loop.sock_sendall(made, _greeting("rogue"))
                    while True:
                        seq += 1
                        age, up = max(0.0, 3600.0 - seq * 5), seq % 3 > 0
                        said = report(seq, age=age, up=up, address=HOME if seq % 2 == 0 else None)
                        await loop.sock_sendall(made, frame(1, said.encode()))
                        at.sent["reports"] += 1
                        with contextlib.suppress(BlockingIOError):
                            if not made.recv(_PIECE):
                                break
                        await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)


async def flood(at: Target) -> None:
    """Reports of nearly the largest size that is taken, one behind the other."""
    body = report(1).encode()[:-3] + b',"x":"' + b"y" * 240_000 + b'"}]}'
    await _many(4, lambda n: _pour(at, n, at.api, upgrade(at.token), frame(1, body), then=_greeting("rogue")))


async def revoked(at: Target) -> None:
    """An agent that reports with a key that is revoked meanwhile, and comes back again and again."""
    first, then = upgrade(at.old_token), _greeting("rotated")

    async def one(n: int) -> None:
        # The key is good until it is revoked; after that each try is turned away at the handshake.
        await _pour(at, n, at.api, first, frame(1, report(1).encode()), pause=0.2, then=then)

    await _many(20, one)


async def datagrams(at: Target) -> None:
    """Datagrams to the pulse port that look like pulses."""
    end, made = time.monotonic() + at.seconds, [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(8)]
    for n, sock in enumerate(made):
        sock.bind((at.source(n), 0))
        sock.setblocking(False)
    while time.monotonic() < end:
        for sock in made:
            for _ in range(200):
                with contextlib.suppress(OSError):
                    sock.sendto(b"VSE1\x01" + os.urandom(59), ("127.0.0.1", at.api))
                    at.sent["datagrams"] += 1
        await asyncio.sleep(0)
    for sock in made:
        sock.close()


async def nested(at: Target) -> None:
    """JSON in JSON in JSON, 100,000 deep."""
    deep = b"[" * 100_000
    head = b"POST /api/v1/agent HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += b"X-API-Key: %b\r\nContent-Length: %d\r\n\r\n" % (at.token.encode(), len(deep))
    await _many(10, lambda n: _pour(at, n, at.api, b"", head + deep))


async def streams(at: Target) -> None:
    """400 live streams of the dashboard and its pages, as fast as they come."""
    asked = b"GET %b HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

    async def one(n: int) -> None:
        if n % 10:
            await _pour(at, n, at.dashboard, asked % b"/live", b"", pause=0.1)
        else:
            await _pour(at, n, at.dashboard, b"", asked % b"/", pause=0.01)

    await _many(400, one)


async def agent(at: Target) -> None:
    """500 connections to an agent's health port: heads that come byte by byte, and some that say nothing."""
    first = b"GET /client/health HTTP/1.1\r\n"
    await _many(500, lambda n: _pour(at, n, at.agent, first if n % 2 else b"", b"a" if n % 2 else b"", pause=0.02))


# In this order they are tried. Those of the first line worked, once.
ALL: dict[str, Callable[[Target], Awaitable[None]]] = {
    made.__name__: made
    for made in (
        chunks, pings, continuations, notices, flood, revoked, dns, agent, tls,
        chunks_at_health, trailers, heads, slow, unread, unfinished, wrong_keys, idle, churn, sockets, datagrams,
        nested, streams, handshakes,
    )
}  # fmt: skip


async def main(words: list[str]) -> None:
    at = Target(**json.loads(words[0]))
    await ALL[at.name](at)
    print(json.dumps({"sent": at.sent, "cpu": time.process_time()}))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
