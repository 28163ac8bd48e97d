"""uvicorn inside our own loop: several ports, one process, bounds for strangers, an end within a second."""

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, Final

import httptools
import msgspec
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from vpn_sentinel.runtime.settings import SettingError
from vpn_sentinel.server.acceptor import Acceptor
from vpn_sentinel.server.alike import Alike
from vpn_sentinel.server.crowd import Crowd, Place, room
from vpn_sentinel.server.websocket import BoundedWebSocket
from vpn_sentinel.wire.problem import CONTENT_TYPE, problem

log = logging.getLogger(__name__)

# Bytes that CPython keeps of a header beside those that came: two objects, a pair of them, and its place in a list.
# Thousands of tiny ones are dearer than a long one.
_HEADER_COSTS: Final = 144
# The last of a link's address without its zone (ipv6(7)).
_NO_SUCH_ADDRESS: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL)
_OF_AN_OFFER: Final = (b"upgrade", b"http2-settings")
_WHOLE_BODY: Final = 10  # times as long as between two parts
# Bytes and seconds for what is left of a request's body when it is answered, and after that.
_BEFORE: Final = (64 * 1024, 1.0)
_AFTER: Final = (512 * 1024, 2.0)
_WAITING: Final = 2048  # connections that the kernel holds until they are taken
_ENDS_WITHIN: Final = 0.5
_TASKS_END_WITHIN: Final = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one listener grants. Times are seconds; `head` is bytes of the request line, the headers and the trailers,
    and of the heads of all requests that wait on one connection.

    `drained_within` is how long a client may leave an answer unread, `connections` how many may be open in all, half of
    them of one network (a /24, or a /48 of IPv6) and `per_address` of one address (or a /64). A body
    may come in so many `parts`, of which `body_within` may lie between two, and ten times that between the first and
    the last.
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


class Bounded(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, which by itself bounds neither the head, nor the queue, nor the time.

    One timer per connection: it re-arms itself from `_deadline`, which is all that a request moves.
    """

    def __init__(self, crowd: Crowd, limits: Limits, place: Place, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._crowd, self._limits = crowd, limits
        self._place: Place | None = place  # until it is left, or another protocol's
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = self._deadline = self._drained_by = inf
        self._running: RequestResponseCycle | None = None
        self._ended = False  # nothing more comes, and who said all still waits for an answer
        self._reading = False  # inside a message
        self._headed = False  # past its head
        self._unframed = 0  # bytes since the last that were a body's
        self._parts = 0  # in which the body came so far
        self._body_by = inf
        self._head = 0
        self._waiting_heads = 0  # of the requests that wait for the answer to one before
        self._refused = ""
        self._declined: bytes | None = None  # the head of a request whose offer of another protocol is not taken

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._place is not None:
            self._place.cut = transport.abort
        self._wait(self._limits.head_within)

    def connection_lost(self, exc: Exception | None) -> None:
        self._release()
        super().connection_lost(exc)
        # uvicorn tells the newest request alone; the one that runs may be an older one, and would wait for ever.
        if (running := self._unanswered) is not None:
            running.disconnected = True
            running.message_event.set()
        self._running = None
        self.pipeline.clear()
        # One that never ran refers to this for ever, and keeps its body until there is a full collection.
        self.cycle = None  # type: ignore[assignment]

    def eof_received(self) -> bool:  # type: ignore[override]
        """Whether the transport is to stay open: who has said all waits for an answer that has not begun.

        One that has may be a stream without an end. Over TLS asyncio closes both ways.
        """
        running = self._unanswered
        waits = running is not None and not running.response_started and not self._reading
        self._ended = waits and self.scheme == "http"
        return self._ended

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._unframed += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response(self._refused or "This is not an HTTP request.")
        else:
            if self._unframed > self._limits.head:
                self.send_400_response("The head is too large.")

    def _feed(self, data: bytes) -> None:
        """Raises httptools.HttpParserError. The parser stops behind the head that offers another protocol."""
        while data:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as e:
                if self._declined is None:
                    self.handle_websocket_upgrade()
                    return
                head, self._declined = self._declined, None
                data = head + data[e.args[0] :]
            else:
                return

    def _should_upgrade(self) -> bool:
        """Whether this is a WebSocket's handshake (RFC 6455, section 4.1), and not what some proxies write on all."""
        key = any(name == b"sec-websocket-key" for name, _ in self.headers)
        return key and self.parser.get_method() == b"GET" and bool(super()._should_upgrade())

    def _without_offer(self) -> bytes:
        """The head of this request once more, without the protocol that it offers (RFC 9110, section 7.8)."""
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                value = b",".join(v for v in value.split(b",") if v.strip().lower() not in _OF_AN_OFFER)
            if name not in _OF_AN_OFFER:
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def handle_websocket_upgrade(self) -> None:
        place, self._place = self._place, None
        self._release()
        super().handle_websocket_upgrade()
        # Which holds this one, that nobody needs any more.
        self.parser = None  # type: ignore[assignment]
        protocol = self.transport.get_protocol()
        if isinstance(protocol, BoundedWebSocket) and place is not None:
            place.idle()  # until the agent's hello was answered
            protocol.greeted = place.keep
            protocol.left, protocol.drained_within = place.leave, self._limits.drained_within

    def send_400_response(self, msg: str) -> None:
        """Refuse what was sent and close. An answer that has begun, or that others wait before, is cut instead."""
        self._crowd.complain(f"requests are refused: {msg}", self._host, self.loop.time())
        running = self._unanswered
        if running is not None:
            running.disconnected = True
            running.message_event.set()
            if running.response_started or self.pipeline:
                self.transport.abort()
                return
        body = msgspec.json.encode(problem(400, msg))
        content = [STATUS_LINE[400]]
        for name, value in self.server_state.default_headers:
            content += [name, b": ", value, b"\r\n"]
        content.append(b"content-type: %b\r\ncontent-length: %d\r\n" % (CONTENT_TYPE.encode(), len(body)))
        content += [b"connection: close\r\n\r\n", body]
        self.transport.write(b"".join(content))
        self.transport.close()
        self._wait(self._limits.head_within)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._reading, self._headed = True, False
        self._unframed = self._head = self._parts = 0
        self._wait(self._limits.head_within)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head += len(name) + len(value) + _HEADER_COSTS
        if self._head > self._limits.head:
            self._refuse("The head is too large.")
        # A trailer is no header: uvicorn would add it to those of a request that may have been judged already.
        if not self._headed:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and not self._should_upgrade() and self.parser.get_method() != b"CONNECT":
            self._declined = self._without_offer()
            return
        self._headed = True
        self._head += len(self.url)
        if self._head > self._limits.head:
            self._refuse("The head is too large.")
        answered = self._unanswered is None
        self._waiting_heads = 0 if answered else self._waiting_heads + self._head
        if len(self.pipeline) >= self._limits.queue or self._waiting_heads > self._limits.head:
            self._refuse("Too many requests wait for their answers.")
        if not answered and self.parser.should_upgrade():
            self._refuse("A connection cannot change its protocol before all is answered.")
        if self._place is not None:
            self._place.busy()
        self._body_by = self.loop.time() + _WHOLE_BODY * self._limits.body_within
        self._wait(self._limits.body_within)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unframed = 0
        self._parts += 1
        if self._parts > self._limits.parts:
            self._refuse("The body comes in too many parts.")
        self._wait(min(self._limits.body_within, self._body_by - self.loop.time()))
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._declined is not None:
            return
        super().on_message_complete()
        self._reading = False
        self._unframed = 0
        if self._running is None or not self._running.response_complete:
            self._deadline = inf  # it is the application's turn
        else:
            self._wait(self._limits.idle)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self._wait(self._limits.drained_within)
        elif self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._ended:
            self.transport.close()
            self._wait(self._limits.drained_within)
        else:
            self.flow.resume_reading()
            if not self._reading:
                self._wait(self._limits.idle)
                if self._place is not None:
                    self._place.idle()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._drained_by = self.loop.time() + self._limits.drained_within
        self._arm(self._drained_by)
        if self._place is not None:
            self._place.idle()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._drained_by = inf
        if self._place is not None and self._unanswered is not None:
            self._place.busy()

    @property
    def _unanswered(self) -> RequestResponseCycle | None:
        """The request that is being answered."""
        running = self._running
        return None if running is None or running.response_complete else running

    @property
    def _host(self) -> str:
        return self.client[0] if self.client else ""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, partial(self._answer, cycle, app))

    async def _answer(self, cycle: RequestResponseCycle, app: Any, scope: Any, receive: Any, send: Any) -> None:
        """Run `app`; an answer before the end of its request is the last one of the connection."""
        comes = True

        async def answer(message: Any) -> None:
            nonlocal comes
            if message["type"] == "http.response.start" and cycle.more_body:
                comes = not cycle.waiting_for_100_continue  # else it waits to be asked for
                if comes:
                    # Mostly it is on its way, and to be cut while it sends would cost the client the answer.
                    await self._drained(cycle, *_BEFORE)
                cycle.keep_alive = cycle.keep_alive and not cycle.more_body
            elif cycle.more_body and comes and not message.get("more_body"):
                await send(message | {"more_body": True})
                await self._drained(cycle, *_AFTER)
                message = {"type": message["type"]}
            await send(message)
            if message.get("more_body") and self._place is not None and self._drained_by == inf:
                self._place.keep()  # a stream, or a long answer that is being taken

        await app(scope, receive, answer)

    async def _drained(self, cycle: RequestResponseCycle, size: int, seconds: float) -> None:
        """See `_drain`. What it waits for is of no use to anybody, so it yields."""
        if self._place is not None:
            self._place.idle()
        await _drain(cycle, size, seconds)

    def _refuse(self, why: str) -> None:
        self._refused = why
        raise ValueError(why)

    def _release(self) -> None:
        self._deadline = self._drained_by = inf
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._place is not None:
            self._place.leave()
            self._place = None

    def _wait(self, seconds: float) -> None:
        self._deadline = self.loop.time() + seconds
        if self._deadline < self._rings_at:
            self._arm(self._deadline)

    def _arm(self, at: float) -> None:
        if at < self._rings_at:
            if self._timer is not None:
                self._timer.cancel()
            self._rings_at = at
            self._timer = self.loop.call_at(at, self._ring)

    def _ring(self) -> None:
        self._timer, self._rings_at = None, inf
        now = self.loop.time()
        closing = self.transport.is_closing()
        if now >= self._drained_by or (now >= self._deadline and closing):
            self.transport.abort()
            return
        if now >= self._deadline and self.flow.read_paused:
            # It is we who do not read: the client cannot go on.
            self._deadline = now + self._limits.body_within
        elif now >= self._deadline:
            if self._reading:
                self.transport.abort()
                return
            self.transport.close()
            self._deadline = now + self._limits.drained_within
        if (at := min(self._deadline, self._drained_by)) < inf:
            self._arm(at)


async def _drain(cycle: RequestResponseCycle, size: int, seconds: float) -> None:
    """Read what is left of a request's body, which nobody wants, `size` bytes at most (RFC 9112, section 9.6)."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while cycle.more_body and size > 0:
                event = await cycle.receive()
                if event["type"] != "http.request":
                    return
                size -= len(event["body"])


class EmbeddedServer(uvicorn.Server):
    """A server that leaves the signals to whoever runs the process."""

    def __init__(self, config: uvicorn.Config, limits: Limits) -> None:
        super().__init__(config)
        self.crowd = Crowd(limits.connections, limits.per_address, max(limits.connections // 2, 1))
        self._limits = limits

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's for bound sockets, but for who takes the connections."""
        await self.lifespan.startup()
        self.servers = []
        for bound in sockets or []:
            taking: Any = Acceptor(
                bound, self.crowd, self.protocol,
                waiting=self.config.backlog, context=self.config.ssl, seconds=self._limits.head_within,
            )  # fmt: skip
            self.servers.append(taking)
        self.started = True

    def abort(self) -> None:
        """End every connection now, sent or not."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def cancel(self) -> None:
        """End every request that outlived its connection."""
        for task in list(self.server_state.tasks):
            task.cancel()

    def protocol(self, place: Place) -> Bounded:
        """What serves the connection at `place`."""
        return Bounded(
            self.crowd, self._limits, place,
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state,
        )  # fmt: skip


def embedded(
    app: Any, *, cert: Path | None = None, key: Path | None = None, side: bool = False, limits: Limits | None = None
) -> EmbeddedServer:
    """A server for `app`, to be run with `serve(sockets=[…])`.

    A `side` door takes no WebSockets and two sixteenths of the process's descriptors; the main one takes eleven.
    """
    if limits is None:
        limits = Limits(connections=room(2 if side else 11))
    config = uvicorn.Config(
        Alike(app),
        loop="none",
        http=Bounded,
        ws="none" if side else BoundedWebSocket,
        ws_per_message_deflate=False,  # costs 32 KB a connection, and reports are small
        ws_max_size=512 * 1024,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # ours are believed only from listed networks
        timeout_graceful_shutdown=1,
        backlog=_WAITING,
        ssl_certfile=str(cert) if cert else None,
        ssl_keyfile=str(key) if key else None,
    )
    return EmbeddedServer(config, limits)


def listen(
    host: str, port: int, setting: str, kind: socket.SocketKind = socket.SOCK_STREAM, *, host_setting: str = ""
) -> socket.socket:
    """Bind a socket; `::` takes IPv4 too, and is IPv4 alone on a machine without IPv6.

    Raises SettingError when it cannot be had: it names `host_setting` where the address is to blame, else `setting`,
    the port's.
    """
    try:
        try:
            return _bound(host, port, kind)
        except OSError as e:
            if host != "::" or e.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
        return _bound("0.0.0.0", port, kind)  # noqa: S104 - the same, without IPv6
    except OSError as e:
        if host_setting and (isinstance(e, socket.gaierror) or e.errno in _NO_SUCH_ADDRESS):
            raise SettingError(host_setting, f"cannot listen on {host}: {e.strerror}") from e
        name = "udp" if kind is socket.SOCK_DGRAM else "tcp"
        raise SettingError(setting, f"cannot listen on {host} port {port}/{name}: {e.strerror}") from e


def _bound(host: str, port: int, kind: socket.SocketKind) -> socket.socket:
    """Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, kind)
    try:
        if kind is socket.SOCK_STREAM:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)
        bound.setblocking(False)
        bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    return bound


async def serve_until(server: EmbeddedServer, bound: socket.socket, closing: asyncio.Event) -> None:
    """Serve `bound` until `closing` is set; the streams of `server` watch the same event.

    What has not ended half a second later is cut: a client that stalls does not decide when we stop.
    """
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(server.serve(sockets=[bound]))
        await closing.wait()
        server.should_exit = True
        for patience, cut in ((_ENDS_WITHIN, server.abort), (_TASKS_END_WITHIN, server.cancel)):
            done, _ = await asyncio.wait({serving}, timeout=patience)
            if not done:
                cut()
        await serving
