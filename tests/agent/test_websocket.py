"""The agent's WebSocket against another program's, and against what is none."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.utils import accept_key

from vpn_sentinel.agent.uplink import websocket
from vpn_sentinel.agent.uplink.channel import ChannelError, Fault
from vpn_sentinel.agent.uplink.websocket import WebSocket, open_websocket
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.wire import limits

HOME = ipaddress.ip_address("127.0.0.1")
Raw = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def opened(port: int) -> WebSocket:
    return await open_websocket(f"http://127.0.0.1:{port}/a", HOME, Secret("key"), None, limit=5)


@asynccontextmanager
async def library(handler: Callable[[ServerConnection], Awaitable[None]]) -> AsyncIterator[int]:
    """The port of a server that `websockets` runs."""
    async with serve(handler, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


@asynccontextmanager
async def raw(after: Raw) -> AsyncIterator[int]:
    """The port of a server that shakes hands and then does what `after` does."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        nonce = next(line for line in head.splitlines() if line.lower().startswith("sec-websocket-key:"))
        answer = accept_key(nonce.partition(":")[2].strip())
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + answer.encode() + b"\r\n\r\n"
        )
        try:
            await after(reader, writer)
        except ConnectionError:
            pass  # the agent left first
        finally:
            writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_messages_arrive_whole_both_ways_and_the_end_is_a_handshake() -> None:
    seen: list[object] = []

    async def handler(ws: ServerConnection) -> None:
        seen.extend([ws.request.headers["X-API-Key"] if ws.request else None, await ws.recv()])
        await ws.send(["in ", "three ", "parts"])
        await ws.ping()
        await ws.send(b"x" * limits.MAX_BODY_BYTES)
        seen.append(await ws.recv())
        await ws.wait_closed()
        seen.append(ws.close_code)

    async with library(handler) as port:
        channel = await opened(port)
        await channel.send("größe".encode())
        assert await channel.receive() == b"in three parts"
        assert len(await channel.receive()) == limits.MAX_BODY_BYTES
        await channel.send(b"b" * 70_000)
        receiving = asyncio.create_task(channel.receive())
        await channel.close()
        with pytest.raises(ChannelError):
            await receiving
        assert channel.local == HOME
    assert seen == ["key", "größe", "b" * 70_000, 1000]


async def test_a_ping_is_answered_and_one_is_sent_into_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "_PING_AFTER_S", 0.2)

    async def handler(ws: ServerConnection) -> None:
        await asyncio.wait_for(await ws.ping(), 5)
        await asyncio.sleep(1)  # longer than quiet: the library answers the agent's pings
        await ws.send("still here")

    async with library(handler) as port:
        channel = await opened(port)
        assert await channel.receive() == b"still here"
        channel.abort()


async def test_who_answers_no_ping_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(websocket, "_PING_AFTER_S", 0.1)
    came: list[bytes] = []

    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            came.append(data)

    async with raw(silent) as port:
        channel = await opened(port)
        with pytest.raises(ChannelError) as failed:
            await channel.receive()
        channel.abort()
    assert failed.value.fault is Fault.BROKEN
    assert came[0][0] == 0x89  # a ping, whole (RFC 6455, 5.2)


@pytest.mark.parametrize(
    ("frames", "fault"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", Fault.BROKEN),
        (b"\xc1\x01x", Fault.BROKEN),  # a reserved bit, where no extension was agreed on
        (b"\x81\x81abcdx", Fault.BROKEN),  # masked: only clients do that
        (b"\x81\x01\xff", Fault.BROKEN),  # not UTF-8: our own finding, not a word of the server
        (b"\x81\x7f" + (1 << 40).to_bytes(8, "big") + b"x" * (limits.MAX_BODY_BYTES + 1), Fault.BROKEN),
        (b"\x01\x00" + b"\x00\x00" * 2000, Fault.BROKEN),  # a message of nothing but parts
        (b"\x88\x02\x03\xf1", Fault.CUT),  # 1009, too big
        (b"\x88\x0c\x03\xf0looked at", Fault.BROKEN),  # shorter than it says: then the line goes dead
        (b"\x88\x00", Fault.BROKEN),
        (b"", Fault.BROKEN),
    ],
)
async def test_what_is_no_message_ends_the_connection(frames: bytes, fault: Fault) -> None:
    async def odd(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frames)
        await writer.drain()

    async with raw(odd) as port:
        channel = await opened(port)
        with pytest.raises(ChannelError) as failed:
            await channel.receive()
        channel.abort()
    assert failed.value.fault is fault


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 302 Found\r\nLocation: http://login.example/\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\ncut",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x15\x03\x01\x00\x02\x02\x46",
        b"",
    ],
)
async def test_what_shakes_no_hands_is_left_for_another_way(answer: bytes) -> None:
    async def stranger(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(stranger, "127.0.0.1", 0)
    async with server:
        with pytest.raises(ChannelError) as failed:
            await opened(server.sockets[0].getsockname()[1])
    assert failed.value.fault is Fault.NO_WEBSOCKET
