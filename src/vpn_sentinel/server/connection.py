"""One client's connection in front of uvicorn: limits on size and time, and when it may be evicted for others.

Nothing here depends on uvicorn's internals. uvicorn gets one request at a time, as a client would send it, through a
transport of ours; the application's answers are observed at the ASGI interface.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from math import inf
from typing import Any, Final

import msgspec
from websockets.exceptions import InvalidState

from vpn_sentinel.server.connection_limit import ConnectionLimit, ConnectionSlot
from vpn_sentinel.server.request_stream import BadRequest, RequestHead, RequestStream, plain_request
from vpn_sentinel.server.websocket import TOO_MANY_FRAMES, FrameMeter
from vpn_sentinel.wire.problem import CONTENT_TYPE, problem

BODY_TIME_FACTOR: Final = 10  # a whole body may take this many times as long as the pause between two parts
MAX_QUEUED_BYTES: Final = 64 * 1024  # of pipelined requests that wait; above this the connection is not read
# How much of an unwanted request body is read and discarded, before the answer and after it.
DISCARD_BEFORE_BYTES: Final = 64 * 1024
DISCARD_BEFORE_S: Final = 1.0
DISCARD_AFTER_BYTES: Final = 512 * 1024
DISCARD_AFTER_S: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of one listener. Times are in seconds; `head` bounds the bytes of the request line, the headers and
    the trailers, and of the heads of all requests that wait on one connection.

    `drained_within` is how long a client may leave an answer unread. At most `connections` may be open, half of them
    from one network (a /24, or a /48 of IPv6) and `per_address` from one address (or a /64). A body may come in
    `parts`, with at most `body_within` between two, and ten times that between the first and the last.
    """

    connections: int
    per_address: int = 1000
    head: int = 64 * 1024
    queue: int = 8
    parts: int = 1024
    head_within: float = 10.0
    body_within: float = 15.0
    idle: float = 5.0
    drained_within: float = 30.0


@dataclass(slots=True)
class _Request:
    """`chunks` are not forwarded yet; `complete` says that all of it has been received."""

    head: RequestHead
    chunks: list[bytes] = field(default_factory=list)
    complete: bool = False


class HttpConnection(asyncio.Protocol):
    """The protocol of a connection: forwards requests within the limits to another protocol, `server`.

    There is one timer for each connection; it sets itself again from `_deadline`, which is all that a request changes.
    """

    def __init__(
        self, limit: ConnectionLimit, limits: Limits, slot: ConnectionSlot,
        *, server: Callable[["HttpConnection"], asyncio.Protocol], websockets: bool, connections: "set[HttpConnection]",
    ) -> None:  # fmt: skip
        """`server` makes the protocol to forward to; `websockets` says whether it accepts them. An open connection is
        in `connections`.
        """
        self._connection_limit, self._limits, self._slot = limit, limits, slot
        self._make, self._connections = server, connections
        self._loop = asyncio.get_running_loop()
        self._stream: RequestStream | None = RequestStream(
            self, head_bytes=limits.head, parts=limits.parts, websockets=websockets
        )
        self._frames: FrameMeter | None = None  # set for a WebSocket
        self._server: asyncio.Protocol | None = None  # None once its connection_lost was called
        self._lost: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = self._deadline = self._write_deadline = self._body_by = inf
        self._current: _Request | None = None  # the one that is being answered
        self._answering = False  # its answer has begun
        self._waiting: deque[_Request] = deque()
        self._reading = False  # within a request
        self._eof = False  # the client has sent everything and waits for an answer
        self._server_paused = self._paused = False

    # Called by the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # uvloop's are not instances of asyncio's classes
        self._slot.cut = self._transport.abort
        self._connections.add(self)
        self._server = self._make(self)
        self._server.connection_made(_ServerTransport(self))
        self._set_deadline(self._limits.head_within)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the server needs no reason
        self._deadline = self._write_deadline = inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._slot.release()
        self._connections.discard(self)
        self._end_server()
        self._waiting.clear()
        self._current = None
        self._end_stream()
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self._transport.is_closing() or self._server is None:
            return
        if self._stream is None:
            self._frames_received(self._server, data)
            return
        if not self._reading and self._current is None and (head := plain_request(data)) is not None:
            self.request_began()
            self.head_complete(head)
            self.request_complete(b"")
            self._forward()
            return
        try:
            self._stream.feed(data)
        except BadRequest as e:
            if self._current is not None and self._current.complete:  # else it is the bad one
                self._forward()
            self._refuse(str(e))
        else:
            self._forward()
            self._read_or_pause()

    def eof_received(self) -> bool:
        """Whether the transport stays open: the client waits for an answer that has not begun.

        An answer that has begun may be an endless stream. With TLS, asyncio closes both directions.
        """
        waits = self._current is not None and not self._answering and not self._reading
        self._eof = waits and self._transport.get_extra_info("sslcontext") is None
        return self._eof

    def pause_writing(self) -> None:
        self._write_deadline = self._loop.time() + self._limits.drained_within
        self._arm(self._write_deadline)
        if self._frames is None:
            self._slot.idle()
        if self._server is not None:
            self._server.pause_writing()
        self._read_or_pause()

    def resume_writing(self) -> None:
        self._write_deadline = inf
        if self._current is not None:
            self._slot.busy()
        if self._server is not None:
            self._server.resume_writing()
        self._read_or_pause()

    # Called by the request stream.

    def request_began(self) -> None:
        self._reading = True
        self._set_deadline(self._limits.head_within)

    def head_complete(self, head: RequestHead) -> None:
        request = _Request(head, [head.text])
        if self._current is None:
            self._current = request
        else:
            heads = head.size + sum(waiting.head.size for waiting in self._waiting)
            if len(self._waiting) >= self._limits.queue or heads > self._limits.head:
                msg = "Too many requests wait for their answers."
                raise BadRequest(msg)
            if head.is_websocket:
                msg = "A connection cannot change its protocol before all is answered."
                raise BadRequest(msg)
            self._waiting.append(request)
        self._slot.busy()
        self._body_by = self._loop.time() + BODY_TIME_FACTOR * self._limits.body_within
        self._set_deadline(self._limits.body_within)

    def body_part(self, part: bytes) -> None:
        self._set_deadline(min(self._limits.body_within, self._body_by - self._loop.time()))
        if (request := self._last) is not None:
            request.chunks.append(part)

    def request_complete(self, end: bytes) -> None:
        self._reading = False
        if (request := self._last) is not None:
            request.complete = True
            request.chunks.append(end)
        if self._current is not None:
            self._deadline = inf  # the application's time is not limited
        else:
            self._set_deadline(self._limits.idle)

    @property
    def _last(self) -> _Request | None:
        return self._waiting[-1] if self._waiting else self._current

    # Between the client and the server protocol.

    def _forward(self) -> None:
        """Forward the received part of the current request to the server."""
        request, server = self._current, self._server
        if request is None or server is None or not request.chunks:
            return
        data, request.chunks = b"".join(request.chunks), []
        server.data_received(data)
        if self._server is not server:  # it has put a WebSocket's protocol in its place, and is finished
            server.connection_lost(ConnectionAbortedError())
            self._current = None
            self._end_stream()

    def replace_server(self, server: asyncio.Protocol) -> None:
        """From now on `server`, a WebSocket's protocol, serves the client."""
        self._server = server
        self._frames = FrameMeter(self._loop.time())
        self._deadline = inf
        self._slot.idle()  # until the agent's hello is answered

    def _frames_received(self, server: asyncio.Protocol, data: bytes) -> None:
        if self._frames is not None and not self._frames.allows(data, self._loop.time()):
            self._end_server()
            self._transport.write(TOO_MANY_FRAMES)
            self.close()
            return
        try:
            server.data_received(data)
        except InvalidState:  # invalid UTF-8, followed by a Close frame: there is nobody to answer any more
            self._transport.abort()

    def _refuse(self, why: str) -> None:
        """Answer 400 and close. If an answer has begun, or others are due first, the connection is aborted instead."""
        peer = self._transport.get_extra_info("peername")
        self._connection_limit.log_limited(f"requests are refused: {why}", peer[0] if peer else "", self._loop.time())
        self._end_server()
        if self._current is not None and (self._answering or self._waiting):
            self._transport.abort()
            return
        body = msgspec.json.encode(problem(400, why))
        head = (
            f"HTTP/1.1 400 Bad Request\r\ndate: {formatdate(usegmt=True)}\r\ncontent-type: {CONTENT_TYPE}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self._transport.write(head.encode() + body)
        self._transport.close()
        self._set_deadline(self._limits.head_within)

    def _end_server(self) -> None:
        """End the server protocol, and through it the application."""
        server, self._server = self._server, None
        if server is not None:
            server.connection_lost(None)

    def _end_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    # Called by the server protocol through its transport.

    @property
    def transport(self) -> asyncio.Transport:
        return self._transport

    def server_writes(self, data: Any) -> None:
        if self._server is not None:
            self._transport.write(data)

    def server_closes(self) -> None:
        if self._server is not None:
            self.close()

    def server_pauses(self, *, paused: bool) -> None:
        self._server_paused = paused
        self._read_or_pause()

    def close(self) -> None:
        """Close once all is sent, or when the client has left it unread for too long."""
        self._transport.close()
        self._set_deadline(self._limits.drained_within)

    def abort(self) -> None:
        self._transport.abort()

    def _read_or_pause(self) -> None:
        if self._transport.is_closing():
            return
        queued = sum(len(chunk) for request in self._waiting for chunk in request.chunks) if self._waiting else 0
        unread = self._frames is not None and self._write_deadline < inf  # frames are answered, so read no more of them
        paused = self._server_paused or queued > MAX_QUEUED_BYTES or unread
        if paused != self._paused:
            self._paused = paused
            (self._transport.pause_reading if paused else self._transport.resume_reading)()

    # The calls of the application.

    async def serve_http(self, app: Any, scope: Any, receive: Any, send: Any) -> None:
        """Run `app`; an answer before the end of its request is the connection's last one."""
        request = self._current
        if request is None:
            return
        body_wanted, body_comes = False, True

        async def receive_body() -> Any:
            nonlocal body_wanted
            body_wanted = True
            return await receive()

        async def answer(message: Any) -> None:
            nonlocal body_comes
            starts = message["type"] == "http.response.start"
            more = starts or message.get("more_body", False)
            if starts and not request.complete:
                body_comes = body_wanted or not request.head.expects_continue  # else it waits for "100 Continue"
                if body_comes:
                    # Mostly the body is in flight, and a connection that is cut while it sends loses the answer.
                    await self._discard_body(request, receive, DISCARD_BEFORE_BYTES, DISCARD_BEFORE_S)
                if not request.complete:
                    message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            elif not more and body_comes and not request.complete:
                await send(message | {"more_body": True})
                await self._discard_body(request, receive, DISCARD_AFTER_BYTES, DISCARD_AFTER_S)
                message = {"type": message["type"]}
            self._answering = True
            await send(message)
            if not more:
                self._answered(request)
            elif not starts and self._write_deadline == inf:
                self._slot.keep()  # a stream, or a long answer that the client reads

        await app(scope, receive_body, answer)

    async def serve_websocket(self, app: Any, scope: Any, receive: Any, send: Any) -> None:
        greeted = denied = False

        async def answer(message: Any) -> None:
            nonlocal greeted, denied
            await send(message)
            if message["type"] == "websocket.send" and not greeted:
                greeted = True
                self._slot.keep()
            denied = denied or message["type"] == "websocket.http.response.body"

        await app(scope, receive, answer)
        if denied and self._server is not None:
            # uvicorn treats it as an error of the application if it ends before the connection does.
            self._lost = self._loop.create_future()
            await self._lost

    def _answered(self, request: _Request) -> None:
        if self._current is not request:
            return
        self._current, self._answering = None, False
        if self._transport.is_closing():
            return
        if self._waiting:
            self._current = self._waiting.popleft()
            self._forward()
            self._read_or_pause()
        elif self._eof:
            self.close()
        elif not self._reading:
            self._set_deadline(self._limits.idle)
            self._slot.idle()

    async def _discard_body(self, request: _Request, receive: Any, size: int, seconds: float) -> None:
        """Read and discard the rest of an unwanted body, at most `size` bytes (RFC 9112, section 9.6)."""
        self._slot.idle()  # it may be evicted: the body is of no use
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not request.complete and size > 0:
                    event = await receive()
                    if event["type"] != "http.request":
                        return
                    size -= len(event["body"])

    # The timer.

    def _set_deadline(self, seconds: float) -> None:
        self._deadline = self._loop.time() + seconds
        if self._deadline < self._timer_at:
            self._arm(self._deadline)

    def _arm(self, at: float) -> None:
        if at < self._timer_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = at
            self._timer = self._loop.call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._timer_at = None, inf
        now = self._loop.time()
        if now >= self._write_deadline or (now >= self._deadline and self._transport.is_closing()):
            self._transport.abort()
            return
        if now >= self._deadline and self._paused:
            # We do not read at the moment, so the client cannot go on.
            self._deadline = now + self._limits.body_within
        elif now >= self._deadline:
            if self._reading:
                self._transport.abort()
                return
            self.close()
        if (at := min(self._deadline, self._write_deadline)) < inf:
            self._arm(at)


class _ServerTransport(asyncio.Transport):
    """The transport of the server protocol behind a connection."""

    def __init__(self, connection: HttpConnection) -> None:
        super().__init__()
        self._connection = connection

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._connection.transport.get_extra_info(name, default)

    def is_closing(self) -> bool:
        return self._connection.transport.is_closing()

    def close(self) -> None:
        self._connection.server_closes()

    def abort(self) -> None:
        self._connection.abort()

    def write(self, data: Any) -> None:
        self._connection.server_writes(data)

    def pause_reading(self) -> None:
        self._connection.server_pauses(paused=True)

    def resume_reading(self) -> None:
        self._connection.server_pauses(paused=False)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._connection.replace_server(protocol)  # type: ignore[arg-type]
