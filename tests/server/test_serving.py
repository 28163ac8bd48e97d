"""What a stranger may hold of a listener: real connections on loopback, with limits short enough to wait for."""

import asyncio
import errno
import gc
import json
import logging
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
import websockets
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from lab.certs import Authority
from tests.conftest import until
from vpn_sentinel.runtime.settings import SettingError, Source
from vpn_sentinel.server.connection import Limits
from vpn_sentinel.server.connection_limit import ConnectionLimit
from vpn_sentinel.server.serving import EmbeddedServer, embedded, listen, serve_until
from vpn_sentinel.server.settings import ServerSettings

HEAD = b"GET / HTTP/1.1\r\nHost: a\r\n"
SHORT: dict[str, Any] = {"head_within": 0.2, "body_within": 0.3, "idle": 0.15, "drained_within": 0.3}


class App:
    """Answers with what it was sent; `/stream` talks until the client goes, `/big` and `/hang` do not end.

    `/refuse` reads nothing, `/slow` takes some turns of the loop.
    """

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.left = 0
        self.read = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(scope)
        if scope["type"] == "websocket":
            await receive()
            await self._socket(scope, receive, send)
            return
        match scope["path"]:
            case "/stream":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                gone = asyncio.ensure_future(self._gone(receive))
                while not gone.done():
                    await send({"type": "http.response.body", "body": b"tick\n", "more_body": True})
                    await asyncio.wait({gone}, timeout=0.05)
                self.left += 1
            case "/big":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                for _ in range(1000):
                    await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
            case "/slow" | "/hang":
                await asyncio.sleep(30 if scope["path"] == "/hang" else 0.05)
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
                await send({"type": "http.response.body", "body": b"slow"})
            case "/refuse":
                await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
                await send({"type": "http.response.body", "body": b"no"})
            case _:
                body = b""
                while (event := await receive())["type"] == "http.request":
                    body += event["body"]
                    self.read += len(event["body"])
                    if not event["more_body"]:
                        break
                answer = str(len(body)).encode()
                headers = [(b"content-length", str(len(answer)).encode())]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": answer})

    async def _socket(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/denied":
            await send({"type": "websocket.http.response.start", "status": 403, "headers": []})
            await send({"type": "websocket.http.response.body", "body": b"no"})
            return
        await send({"type": "websocket.accept"})
        while (event := await receive())["type"] == "websocket.receive":
            await send({"type": "websocket.send", "text": event["text"]})

    async def _gone(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


class House:
    def __init__(self, app: App, server: EmbeddedServer, port: int, closing: asyncio.Event) -> None:
        self.app, self.server, self.port, self.closing = app, server, port, closing
        self.writers: list[asyncio.StreamWriter] = []

    async def connect(self, source: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=(source, 0))
        self.writers.append(writer)
        return reader, writer

    async def flood(self, first: bytes, piece: Callable[[int], bytes]) -> tuple[int, bytes]:
        """Send until it is cut: how many bytes went out, and what came back."""
        reader, writer = await self.connect()
        writer.write(first)
        sent = len(first)
        for n in range(5000):
            writer.write(piece(n))
            sent += len(piece(n))
            try:
                await writer.drain()
            except ConnectionError:
                break
            await asyncio.sleep(0)
            if reader.at_eof() or self._open() == 0:
                break
        return sent, await rest(reader)

    def _open(self) -> int:
        return self.server.connection_limit.open.total()


class Hand:
    """The loop's clock in a test's hand: it stands until it is moved, and goes on by itself at the end."""

    def __enter__(self) -> "Hand":
        self._loop = asyncio.get_running_loop()
        self._real = self._loop.time
        self.now = self._real()
        self._loop.time = lambda: self.now  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        real, ahead = self._real, self.now - self._real()
        self._loop.time = lambda: real() + ahead  # type: ignore[method-assign]

    async def go(self, seconds: float) -> None:
        """Move it, and let every timer that is due ring."""
        self.now += seconds
        for _ in range(5):
            await asyncio.sleep(0)

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for `condition()` to hold while it stands."""
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end
            await asyncio.sleep(0)


async def rest(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the connection ends."""
    got = b""
    try:
        async with asyncio.timeout(5):
            while piece := await reader.read(65536):
                got += piece
    except ConnectionError:
        pass
    return got


@asynccontextmanager
async def house(
    *, side: bool = False, cert: Path | None = None, key: Path | None = None, **limits: Any
) -> AsyncIterator[House]:
    app, closing = App(), asyncio.Event()
    server = embedded(app, side=side, cert=cert, key=key, limits=Limits(**{"connections": 100} | limits))
    bound = listen("127.0.0.1", 0, "PORT")
    async with asyncio.TaskGroup() as group:
        serving = group.create_task(serve_until(server, bound, closing))
        await until(lambda: server.started)
        made = House(app, server, bound.getsockname()[1], closing)
        try:
            yield made
        finally:
            closing.set()
            for writer in made.writers:
                writer.close()
            await serving
            await asyncio.gather(*(w.wait_closed() for w in made.writers), return_exceptions=True)
    assert not server.connection_limit.open


CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
FLOODS = {
    "headers": (HEAD, lambda n: b"X-%d: " % n + b"v" * 4000 + b"\r\n"),
    "tiny headers": (HEAD, lambda n: b"a:b\r\n" * 800),
    "one value": (HEAD + b"X: ", lambda n: b"v" * 4096),
    "one name": (HEAD, lambda n: b"v" * 4096),
    "url": (b"GET /", lambda n: b"v" * 4096),
    "blank lines": (b"", lambda n: b"\r\n" * 2048),
    "trailers": (
        b"POST /stream HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n",
        lambda n: b"X-%d: " % n + b"v" * 4000 + b"\r\n",
    ),
    "chunk extensions": (
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1;",
        lambda n: b"v" * 4096,
    ),
    "chunks of one byte": (CHUNKED, lambda n: b"1\r\nx\r\n" * 100),
    "chunks of one byte, refused": (CHUNKED.replace(b"/", b"/refuse", 1), lambda n: b"1\r\nx\r\n" * 100),
    "chunks, refused": (CHUNKED.replace(b"/", b"/refuse", 1), lambda n: b"1000\r\n" + b"x" * 4096 + b"\r\n"),
    "pipeline": (b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n" + (HEAD + b"\r\n") * 9, lambda n: HEAD + b"\r\n"),
    "heads that wait": (b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n", lambda n: (HEAD + b"a:b\r\n" * 200 + b"\r\n") * 3),
}


@pytest.mark.parametrize(("first", "piece"), FLOODS.values(), ids=FLOODS.keys())
async def test_a_flood_is_cut(first: bytes, piece: Callable[[int], bytes]) -> None:
    async with house() as at:
        sent, answer = await at.flood(first, piece)
        assert sent < 1_000_000
        assert at.server.connection_limit.open.total() == 0
        if answer.startswith(b"HTTP/1.1 400"):
            head, _, body = answer.partition(b"\r\n\r\n")
            assert b"application/problem+json" in head
            assert json.loads(body)["status"] == 400


async def test_garbage_is_answered_as_a_problem_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    async with house() as at:
        for _ in range(5):
            reader, writer = await at.connect()
            writer.write(b"\x16\x03\x01 nonsense\r\n\r\n")
            answer = await rest(reader)
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400 Bad Request")
            assert b"content-type: application/problem+json" in head
            assert json.loads(body) == {
                "status": 400,
                "title": "Bad Request",
                "detail": "This is not an HTTP request.",
                "type": "about:blank",
            }
    said = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 1
    assert vars(said[0])["address"] == "127.0.0.1"


BAD_AFTER_THE_HEAD = {
    "gzip alone": b"Transfer-Encoding: gzip\r\n\r\n",
    "identity": b"Transfer-Encoding: identity\r\n\r\n",
    "ends with chunked": b"Transfer-Encoding: xchunked\r\n\r\n",
    "a parameter": b"Transfer-Encoding: chunked;x\r\n\r\n",
    "a length as well": b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
    "no chunk": b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a chunk without its end": b"Transfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
}


@pytest.mark.parametrize("bad", BAD_AFTER_THE_HEAD.values(), ids=BAD_AFTER_THE_HEAD.keys())
async def test_what_is_bad_after_the_head_is_refused_like_any_other(
    bad: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with house() as at:
        for _ in range(3):
            reader, writer = await at.connect()
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\n" + bad)
            head, _, _body = (await rest(reader)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400 ")
            assert b"content-type: application/problem+json" in head
        assert not at.app.seen
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1


def test_what_repeats_is_counted_until_it_is_said_again(caplog: pytest.LogCaptureFixture) -> None:
    limit = ConnectionLimit(1, 1, 1)
    for now in (0, 1, 30, 59, 61):
        limit.log_limited("garbage", "a", now)
    assert [vars(r)["times"] for r in caplog.records] == [1, 4]


IDLE = {
    "nothing": b"",
    "blank lines": b"\r\n\r\n",
    "half a head": HEAD,
    "half a body": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc",
    "no more requests": HEAD + b"X:\r\n\r\n",
    "an unread answer": b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n",
    "half a request behind a stream": b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\nGET",
}


@pytest.mark.parametrize("sent", IDLE.values(), ids=IDLE.keys())
async def test_who_stalls_is_closed(sent: bytes) -> None:
    async with house(**SHORT) as at:
        _, writer = await at.connect()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(sent)
        await until(lambda: at.server.connection_limit.open.total() == 1)
        await until(lambda: not at.server.connection_limit.open)


async def test_who_drips_a_head_is_closed() -> None:
    async with house(**SHORT) as at:
        with Hand() as clock:
            _, writer = await at.connect()
            await clock.until(lambda: at.server.connection_limit.open.total() == 1)
            started = clock.now
            for byte in HEAD * 10:
                writer.write(bytes([byte]))
                await clock.go(0.03)
                if not at.server.connection_limit.open:
                    break
            assert 0.15 < clock.now - started < 0.6


async def test_who_drips_a_body_is_closed() -> None:
    async with house(**SHORT) as at:
        _, writer = await at.connect()
        with Hand() as clock:
            writer.write(CHUNKED)
            await clock.until(lambda: at.app.seen)
            started = clock.now
            for n in range(1, 100):
                await clock.go(0.2)
                if not at.server.connection_limit.open:
                    break
                writer.write(b"1\r\nx\r\n")
                await clock.until(lambda n=n: at.app.read == n or not at.server.connection_limit.open)
            assert 2.9 < clock.now - started < 3.6  # ten times what may lie between two parts


async def test_a_refusal_costs_no_connection_when_the_body_follows() -> None:
    """Python's http.client sends the head and the body apart, and would lose the answer if it were cut."""
    async with house() as at:
        reader, writer = await at.connect()
        for _ in range(3):
            writer.write(b"POST /refuse HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
            await asyncio.sleep(0.05)
            writer.write(b"hello")
            head = await reader.readuntil(b"\r\n\r\nno")
            assert head.startswith(b"HTTP/1.1 401")
            assert b"connection: close" not in head


async def test_a_refusal_of_a_long_body_comes_through_and_ends_the_connection() -> None:
    async with house() as at:
        reader, writer = await at.connect()
        writer.write(b"POST /refuse HTTP/1.1\r\nHost: a\r\nContent-Length: 400000\r\n\r\n" + b"x" * 300_000)
        answer = await rest(reader)
        assert answer.startswith(b"HTTP/1.1 401")
        assert b"connection: close" in answer
        assert answer.endswith(b"\r\n\r\nno")


async def test_a_body_that_waits_to_be_asked_for_is_refused_at_once() -> None:
    async with house() as at:
        reader, writer = await at.connect()
        with Hand():
            writer.write(b"POST /refuse HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
            assert (await rest(reader)).startswith(b"HTTP/1.1 401")


async def test_a_slow_body_and_later_requests_are_served() -> None:
    async with house(**SHORT) as at:
        reader, writer = await at.connect()
        with Hand() as clock:
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\n\r\n")
            await clock.until(lambda: at.app.seen)
            for n in range(1, 7):  # longer than any one limit
                await clock.go(0.12)
                writer.write(b"x")
                await clock.until(lambda n=n: at.app.read == n)
            assert (await reader.readuntil(b"\r\n\r\n6")).startswith(b"HTTP/1.1 200")
            for _ in range(8):
                await clock.go(0.08)
                writer.write(HEAD + b"\r\n")
                assert (await reader.readuntil(b"\r\n\r\n0")).startswith(b"HTTP/1.1 200")
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 400000\r\n\r\n" + b"x" * 400_000)
            assert await reader.readuntil(b"400000")


async def test_a_short_pipeline_is_answered_in_order() -> None:
    async with house(**SHORT) as at:
        reader, writer = await at.connect()
        posts = b"".join(
            b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b" % (n, b"x" * n) for n in range(9)
        )
        writer.write(posts)
        for n in range(9):
            await reader.readuntil(b"\r\n\r\n%d" % n)


async def test_many_tiny_headers_are_as_dear_as_what_is_kept_of_them() -> None:
    async with house(**SHORT) as at:
        reader, writer = await at.connect()
        writer.write(HEAD + b"a:b\r\n" * 600 + b"\r\n")
        assert (await rest(reader)).startswith(b"HTTP/1.1 400")


async def test_a_stream_and_a_websocket_outlive_every_timer() -> None:
    async with house(**SHORT) as at:
        reader, writer = await at.connect()
        writer.write(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n")
        async with websockets.connect(f"ws://127.0.0.1:{at.port}/") as ws:
            await asyncio.sleep(0.8)
            await ws.send("still here")
            assert await ws.recv() == "still here"
            await reader.readuntil(b"tick\n" * 1)
            assert not reader.at_eof()
            assert at.server.connection_limit.open.total() == 2
        await until(lambda: at.server.connection_limit.open.total() == 1)


async def test_a_refused_websocket_is_no_error_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    async with house() as at:
        with pytest.raises(websockets.InvalidStatus) as refused:
            await websockets.connect(f"ws://127.0.0.1:{at.port}/denied")
        await until(lambda: not at.server.connection_limit.open)
    assert (refused.value.response.status_code, refused.value.response.body) == (403, b"no")
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []


async def test_a_stream_with_a_request_behind_it_ends_with_its_connection() -> None:
    async with house() as at:
        _, writer = await at.connect()
        writer.write(b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n" + HEAD + b"\r\n")
        await until(lambda: bool(at.app.seen))
        writer.transport.abort()
        await until(lambda: at.app.left == 1)


async def test_what_waited_in_a_connection_that_is_cut_is_freed_at_once() -> None:
    async with house() as at:
        gc.collect()
        gc.disable()
        try:
            for path in (b"/refuse", b"/slow", b"/stream"):
                _, writer = await at.connect()
                writer.write(
                    (b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: 50000\r\n\r\n" % path + b"x" * 50_000) * 4
                )
                await until(lambda path=path: at.app.seen and at.app.seen[-1]["path"].encode() == path)
                writer.transport.abort()
            await until(lambda: not at.server.connection_limit.open)
            at.app.seen.clear()
            await until(lambda: not any(isinstance(o, RequestResponseCycle) for o in gc.get_objects()))
        finally:
            gc.enable()


async def test_a_trailer_is_no_header() -> None:
    async with house() as at:
        reader, writer = await at.connect()
        writer.write(
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX-Evil: 1\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n1")
        assert b"x-evil" not in dict(at.app.seen[0]["headers"])


async def test_a_side_door_takes_no_websocket(caplog: pytest.LogCaptureFixture) -> None:
    async with house(side=True) as at:
        reader, writer = await at.connect()
        key = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        writer.write(HEAD + b"Connection: Upgrade\r\nUpgrade: websocket\r\n" + key + b"\r\n")
        assert (await reader.readuntil(b"\r\n\r\n0")).startswith(b"HTTP/1.1 200")
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


OFFERS = {
    "HTTP/2": b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n",
    "TLS, and more": b"Connection: keep-alive, Upgrade\r\nUpgrade: TLS/1.0\r\n",
    "a WebSocket, on everything": b"Connection: upgrade\r\nUpgrade: websocket\r\n",
    "a WebSocket, with its key": b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\n",
    "nothing": b"Connection: upgrade\r\nUpgrade: \r\n",
}
POST = b"POST /api HTTP/1.1\r\nHost: a\r\nX-Mine: 1\r\n"


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS.keys())
@pytest.mark.parametrize("apart", [False, True], ids=["at once", "byte by byte"])
async def test_an_offer_of_another_protocol_costs_no_body(offer: bytes, apart: bool) -> None:
    """curl --http2, Java's client, Apache, and a common line for nginx: a server may pass it over (RFC 9110, 7.8)."""
    sent = POST + offer + b"Content-Length: 5\r\n\r\nhello"
    sent += POST + offer + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" + HEAD + b"\r\n"
    async with house() as at:
        reader, writer = await at.connect()
        for part in [bytes([b]) for b in sent] if apart else [sent]:
            writer.write(part)
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            for length in (b"5", b"3", b"0"):
                assert (await reader.readuntil(b"\r\n\r\n" + length)).startswith(b"HTTP/1.1 200")
        assert [(s["type"], s["path"]) for s in at.app.seen] == [("http", "/api"), ("http", "/api"), ("http", "/")]
        assert all((b"x-mine", b"1") in s["headers"] for s in at.app.seen[:2])
        assert not any(name == b"upgrade" and value for s in at.app.seen for name, value in s["headers"])


async def test_offers_do_not_lengthen_a_pipeline() -> None:
    async with house() as at:
        reader, writer = await at.connect()
        writer.write(b"GET /hang HTTP/1.1\r\nHost: a\r\n\r\n" + (POST + OFFERS["HTTP/2"] + b"\r\n") * 2000)
        assert await rest(reader) == b""
        assert len(at.app.seen) == 1


@pytest.mark.parametrize("limits", [{"connections": 16}, {"per_address": 8}], ids=["one network", "one address"])
async def test_more_connections_than_granted_are_closed_at_once(
    limits: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vpn_sentinel")
    async with house(**limits) as at:
        kept = [await at.connect() for _ in range(8)]
        await until(lambda: at.server.connection_limit.open.total() == 8)
        for _ in range(5):
            reader, _ = await at.connect()
            assert await rest(reader) == b""
        for _, writer in kept:
            writer.close()
        await until(lambda: at.server.connection_limit.open.total() == 0)
        reader, writer = await at.connect()
        writer.write(HEAD + b"\r\n")
        await reader.readuntil(b"\r\n\r\n0")
    said = [r.message for r in caplog.records if r.name.startswith("vpn_sentinel") and "turned away" in r.message]
    assert len(said) == 1


async def test_where_all_connections_are_taken_the_idle_ones_yield(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vpn_sentinel")
    stream = b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n"
    async with house(connections=8) as at:
        streams = []
        for source in ("127.0.1.1", "127.0.2.1"):
            for _ in range(2):
                reader, writer = await at.connect(source)
                writer.write(stream)
                await reader.readuntil(b"tick\n")
                streams.append(reader)
        idle = [await at.connect(f"127.0.3.{n}") for n in range(1, 5)]
        await until(lambda: len(at.server.connection_limit) == 8)
        for n in range(4):  # each of which has asked for something, and goes on
            reader, writer = await at.connect(f"127.0.4.{n + 1}")
            writer.write(stream)
            await reader.readuntil(b"tick\n")
            assert await rest(idle[n][0]) == b""
        reader, _ = await at.connect("127.0.5.1")
        assert await rest(reader) == b""  # all are streams
        assert not any(r.at_eof() for r in streams)
        assert at.server.connection_limit.refused == {"all": 1, "address": 0, "network": 0, "yielded": 4}
        for writer in at.writers:
            writer.close()
        await until(lambda: len(at.server.connection_limit) == 0)
    said = [r.message for r in caplog.records if r.name == "vpn_sentinel.server.connection_limit"]
    assert said == ["all connections are taken: new ones evict others", "there are free connections again"]


HOLD: dict[str, bytes] = {
    "a refused request that never ends": b"POST /refuse HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n",
    "a request that never ends": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n",
    "an answer that nobody reads": b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n",
    "requests, one behind the other": b"GET /hang HTTP/1.1\r\nHost: a\r\n\r\n" * 4,
    "a WebSocket that says nothing": HEAD
    + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
}


@pytest.mark.parametrize("held", HOLD.values(), ids=HOLD.keys())
async def test_who_takes_all_connections_shuts_nobody_out(held: bytes) -> None:
    """Not even from many networks, and whatever keeps them open: a health check comes in, as does an agent."""
    async with house(connections=8) as at:
        ours = await websockets.connect(f"ws://127.0.0.1:{at.port}/", proxy=None)
        await ours.send("hello")
        assert await ours.recv() == "hello"
        for n in range(12):
            reader, writer = await at.connect(f"127.0.{n + 1}.1")
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(held)
            await until(lambda n=n: len(at.app.seen) > n + 1)
        reader, writer = await at.connect("127.0.200.1")
        writer.write(HEAD + b"\r\n")
        await reader.readuntil(b"\r\n\r\n0")
        await ours.send("still here")
        assert await ours.recv() == "still here"
        await ours.close()


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio's", "uvloop's"])
def test_a_connection_without_a_tls_handshake_is_counted_and_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(_handshakes(tmp_path))
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


async def _handshakes(tmp_path: Path) -> None:
    """The server runs on uvloop's loop, whose transports are none of asyncio's classes."""
    authority = Authority(tmp_path)
    pair = authority.issue("server", ["localhost"])
    trusting = ssl.create_default_context(cafile=str(authority.file))
    async with house(cert=pair.cert, key=pair.key, per_address=3, head_within=0.5) as at:
        for _ in range(5):
            await at.connect("127.0.1.1")
        await until(lambda: at.server.connection_limit.refused["address"] == 2)
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port, ssl=trusting, server_hostname="localhost")
        for _ in range(2):
            writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello")
            await reader.readuntil(b"\r\n\r\n5")
        assert len(at.server.connection_limit) == 4
        writer.close()
        await until(lambda: len(at.server.connection_limit) == 0)  # those that never shook hands were given up


def test_an_ipv6_customer_is_one_and_mapped_ipv4_are_many() -> None:
    limit = ConnectionLimit(10, 1, 10)
    assert limit.enter("2001:db8::1", 0, lambda: None)
    assert not limit.enter("2001:db8::2", 0, lambda: None)
    assert limit.enter("2001:db8:0:1::1", 0, lambda: None)
    assert limit.enter("::ffff:192.0.2.1", 0, lambda: None)
    assert limit.enter("::ffff:192.0.2.2", 0, lambda: None)
    assert limit.enter("fe80::1%eth0", 0, lambda: None)


STALLS = {
    "half a body": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc",
    "an unread answer": b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n" * 5,
    "half a head": HEAD,
    "a request that hangs": b"GET /hang HTTP/1.1\r\nHost: a\r\n\r\n",
}


@pytest.mark.parametrize("sent", STALLS.values(), ids=STALLS.keys())
async def test_the_end_comes_within_a_second(sent: bytes) -> None:
    loop = asyncio.get_running_loop()
    async with house() as at:
        _, writer = await at.connect()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(sent)
        await asyncio.sleep(0.2)
        asked = loop.time()
        at.closing.set()
        await until(lambda: not (at.server.server_state.connections or at.server.server_state.tasks))
        at.writers.clear()
        writer.close()
    assert loop.time() - asked < 5  # a stock server waits for ever


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_by_default_both_families_are_listened_to(kind: socket.SocketKind) -> None:
    settings = ServerSettings.read(Source(env={"VPN_SENTINEL_DASHBOARD_PUBLIC": "true"}))
    assert (settings.host, settings.health_host, settings.dashboard_host) == ("::", "::", "::")
    with listen(settings.host, 0, "X", kind) as bound:
        port = bound.getsockname()[1]
        if kind is socket.SOCK_STREAM:
            bound.listen()
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            with socket.socket(family, kind) as caller:
                caller.connect((address, port))


@pytest.mark.parametrize("host", ["192.0.2.1", "2001:db8::1", "fe80::1", "eth0.invalid"])
def test_an_address_of_another_host_is_blamed_on_its_setting(host: str) -> None:
    with pytest.raises(SettingError, match=f"^HOST: cannot listen on {host}: ."):
        listen(host, 0, "PORT", host_setting="HOST")


def test_a_port_that_is_taken_is_blamed_on_its_own() -> None:
    with listen("127.0.0.1", 0, "PORT") as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingError, match=f"^PORT: cannot listen on 127.0.0.1 port {port}/tcp: Address already"):
            listen("127.0.0.1", port, "PORT", host_setting="HOST")


def test_a_machine_without_ipv6_listens_by_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def without(family: int = socket.AF_INET, *words: Any) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return real(family, *words)

    monkeypatch.setattr("vpn_sentinel.server.serving.socket.socket", without)
    with listen("::", 0, "X") as bound:
        assert bound.family is socket.AF_INET


LOOPS = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


@pytest.mark.parametrize("times", [1, 2])
@LOOPS
def test_who_has_said_all_and_ends_its_side_gets_the_answer(
    loop: Callable[[], asyncio.AbstractEventLoop], times: int
) -> None:
    """As `nc -N` does, or a script over a socket."""

    async def ask() -> None:
        async with house() as made:
            reader, writer = await made.connect()
            writer.write(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n" * times)
            writer.write_eof()
            async with asyncio.timeout(5):
                said = await reader.read()
            assert said.count(b"HTTP/1.1 200") == said.count(b"slow") == times
            await until(lambda: not made.server.connection_limit.open)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(ask())


ENDS = {
    "nothing": b"",
    "an answered request": HEAD + b"\r\n",
    "half a head": HEAD,
    "half a body": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nabc",
    "half a request behind one": HEAD + b"\r\n" + HEAD,
    "a stream": b"GET /stream HTTP/1.1\r\nHost: a\r\n\r\n",
}


@pytest.mark.parametrize("sent", ENDS.values(), ids=ENDS.keys())
@LOOPS
def test_who_ends_its_side_elsewhere_is_gone(sent: bytes, loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def ends() -> None:
        async with house(head_within=30, body_within=30, idle=30, drained_within=30) as made:
            _, writer = await made.connect()
            writer.write(sent)
            await until(lambda: len(made.server.connection_limit) == 1)
            await asyncio.sleep(0.05)
            writer.write_eof()
            async with asyncio.timeout(5):  # sooner than any limit
                await until(lambda: not made.server.connection_limit.open)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(ends())
