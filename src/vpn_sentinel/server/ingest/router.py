"""The plain ASGI application in front of the API: reports go directly to the tracker, all else to Litestar.

A framework's routing, validation and injection cost more than storing the report does, and there are few routes here.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

import msgspec

from vpn_sentinel.server.access import Caller
from vpn_sentinel.server.ingest.admission import Admission, AdmittedPeer, Refusal, json_body, retry_header
from vpn_sentinel.server.ingest.keepalive import Keepalives
from vpn_sentinel.server.ingest.session import Sessions, parse
from vpn_sentinel.server.rate_limit import RateLimit
from vpn_sentinel.server.store.store import StoreUnavailable, TunnelLocked
from vpn_sentinel.server.tracking.group_commit import Busy
from vpn_sentinel.wire import limits, problem
from vpn_sentinel.wire.codec import encode
from vpn_sentinel.wire.messages import REFUSED_HEADER, Exchange, Hello, Refused, Reports, fingerprint

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S: Final = 10.0
# An agent without a session sends an observation within this time; an older one shows that it could not reach us.
_MAX_EXCHANGE_AGE_S: Final = 3.0
# Messages of reports that one tunnel may send over its WebSocket: many times what an agent sends.
MESSAGES_PER_MINUTE: Final = 300
# Bytes of them a minute, and the burst allowed after a pause: a whole spool (`agent.spool.spool.MAX_BYTES`).
BYTES_PER_MINUTE, BURST_BYTES = 2 * 1024 * 1024, 32 * 1024 * 1024
# WebSockets of one tunnel at once: an agent has one, and for a while some dead ones that no error has closed yet.
MAX_SOCKETS_PER_TUNNEL: Final = 8
# New WebSockets with one tunnel's own token.
CONNECTIONS_PER_MINUTE: Final = 60
# A larger message is decoded alone in an iteration of the event loop: the largest takes more than 10 ms.
LARGE_MESSAGE_BYTES: Final = 16 * 1024
T = TypeVar("T")
# Takes ASGI's scope and `receive`, and returns the answer's body. Raises Refusal.
RouteHandler = Callable[[Any, Any], Awaitable[bytes]]
# WebSocket close codes (RFC 6455, section 7.4.1, and IANA's registry).
_POLICY, _TOO_BIG, _TRY_LATER = 1008, 1009, 1013


class AgentSocket:
    """One of a tunnel's WebSockets, which a newer one may replace."""

    def __init__(self) -> None:
        self._ended = False
        self._waiting: asyncio.Timeout | None = None

    def end(self) -> None:
        """Close it as soon as it waits for a message, so that the one in work is still answered."""
        self._ended = True
        if self._waiting is not None:
            self._waiting.reschedule(0.0)

    async def wait_for(self, event: Awaitable[T]) -> T:
        """Raises Refusal (429) when `end` was called."""
        try:
            async with asyncio.timeout(0.0 if self._ended else None) as self._waiting:
                return await event
        except TimeoutError:
            raise Refusal(429, "too many connections of this tunnel") from None
        finally:
            self._waiting = None


class ReportRouter:
    """`per_client` is the number of POST exchanges a minute that one client may make, for all tunnels behind it."""

    def __init__(
        self,
        admission: Admission,
        keepalives: Keepalives,
        sessions: Sessions,
        api: Any,
        path: str,
        *,
        per_client: int = 300,
    ) -> None:
        self._admission = admission
        self._sessions = sessions
        self._api = api
        self._agent = f"{path}/agent"
        self._handlers: dict[str, RouteHandler] = {f"{path}/keepalive": keepalives.take, self._agent: self._exchange}
        self._messages = RateLimit(MESSAGES_PER_MINUTE)
        self._bytes = RateLimit(BYTES_PER_MINUTE, BURST_BYTES)
        self._per_client = RateLimit(per_client)
        self._connections = RateLimit(CONNECTIONS_PER_MINUTE)
        self._large_message_lock = asyncio.Lock()
        self._sockets_by_tunnel: dict[str, list[AgentSocket]] = {}
        self._last_failure: str | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if scope["type"] == "websocket" and path == self._agent:
            await self._socket(scope, receive, send)
        elif scope["type"] == "http" and path in self._handlers:
            await self._http(scope, receive, send, path)
        else:
            await self._api(scope, receive, send)

    async def _http(self, scope: Any, receive: Any, send: Any, path: str) -> None:
        extra: list[tuple[bytes, bytes]] = []
        status, kind = 200, b"application/json"
        try:
            if scope["method"] != "POST":
                extra = [(b"allow", b"POST")]
                raise Refusal(405, "this route takes POST")  # noqa: TRY301
            body = await self._stored(self._handlers[path](scope, receive))
        except Refusal as e:
            status, kind = e.status, problem.CONTENT_TYPE.encode()
            body = encode(problem.problem(e.status, e.detail))
            refused = [(REFUSED_HEADER.encode(), e.refused_reports.encode())] if e.refused_reports else []
            extra += [problem.MARK_BYTES, *refused, *retry_header(e.retry_after)]
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *extra]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _guarded(self, work: Awaitable[T]) -> T:
        """Turn a failure to store into a refusal, and log it when its reason changes, not for each report."""
        try:
            return await work
        except TunnelLocked as e:  # the store has said it
            raise Refusal(503, "another program holds this tunnel in the database; nothing was stored", 2) from e
        except StoreUnavailable as e:
            if self._last_failure != e.reason:
                self._last_failure = e.reason
                log.error("reports cannot be stored", extra={"reason": e.reason, "detail": str(e)})  # noqa: TRY400
            raise Refusal(503, "the database does not take reports now; nothing was stored", 5) from e
        except Busy as e:
            raise Refusal(503, "too many reports wait; nothing was stored", 2) from e
        except Refusal:
            raise
        except Exception as e:
            log.exception("a report was not taken")
            raise Refusal(500, "the server failed on this report; nothing was stored") from e

    async def _stored(self, work: Awaitable[T]) -> T:
        """As `_guarded`, for work that ends in a commit: only a commit shows that the failure is over."""
        done = await self._guarded(work)
        if self._last_failure is not None:
            log.info("reports are stored again", extra={"after": self._last_failure})
            self._last_failure = None
        return done

    async def _exchange(self, scope: Any, receive: Any) -> bytes:
        """An agent that cannot hold a WebSocket open. Caller: any key; a tunnel's own token only as that tunnel."""
        peer = await self._admission.admit(scope)
        body = await json_body(receive, peer.headers)
        await self._yield_before_large(len(body))
        with _marking_refused(body):
            exchange = parse(body)
        if not isinstance(exchange, Exchange):
            raise Refusal(422, "an exchange is needed")
        # By tunnel, as many may share one exit; and by client, as one key could use any number of names.
        client = peer.client(exchange.hello.client_id)
        self._admission.rate_limit(f"{client} {exchange.hello.client_id[:100]}")
        if (wait := self._per_client.wait(client, self._sessions.ticks())) > 0:
            raise Refusal(429, "too many reports a minute from this address", wait)
        if (wait := self._bytes.wait(exchange.hello.client_id, self._sessions.ticks(), len(body))) > 0:
            raise Refusal(429, "too many bytes a minute from this tunnel", wait)
        hello_ticks = self._sessions.ticks()
        welcome = await self._sessions.welcome(exchange.hello, peer.caller, peer.address)
        await self._yield_before_large(len(body))
        with _marking_refused(body):
            ack = await self._sessions.store(
                exchange.hello, exchange.reports, hello_ticks, peer.address, earlier_s=_MAX_EXCHANGE_AGE_S
            )
        return encode(msgspec.structs.replace(welcome, ack=max(ack.seq, welcome.ack)))

    async def _socket(self, scope: Any, receive: Any, send: Any) -> None:
        """An agent's WebSocket. Caller: any key; a tunnel's own token only as that tunnel."""
        if (await receive())["type"] != "websocket.connect":
            return
        try:
            peer = await self._guarded(self._admission.admit(scope))
            self._check_connection_rate(peer.caller)
        except Refusal as e:
            await _deny(scope, send, e)
            return
        await send({"type": "websocket.accept"})
        try:
            await self._serve_session(peer, receive, send)
        except Refusal as e:
            retry = e.status in (429, 500, 503)
            refused = encode(Refused(reason=e.detail, retry=retry, of=e.refused_reports)).decode()
            await _send_quietly(send, {"type": "websocket.send", "text": refused})
            code = _TRY_LATER if retry else _TOO_BIG if e.status == 413 else _POLICY
            await _send_quietly(send, {"type": "websocket.close", "code": code, "reason": _short(e.detail)})

    async def _serve_session(self, peer: AdmittedPeer, receive: Any, send: Any) -> None:
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                first = await receive()
        except TimeoutError:
            raise Refusal(422, f"no hello within {HELLO_TIMEOUT_S:.0f} s") from None
        if first["type"] == "websocket.disconnect":
            return
        hello = _message(_text(first))
        if not isinstance(hello, Hello):
            raise Refusal(422, "a hello comes first")
        hello_ticks = self._sessions.ticks()
        welcome = await self._guarded(self._sessions.welcome(hello, peer.caller, peer.address))
        with self._registered(hello.client_id) as socket:
            await _send_quietly(send, {"type": "websocket.send", "text": encode(welcome).decode()})
            await self._receive_reports(peer, hello, hello_ticks, socket, receive, send)

    async def _receive_reports(
        self, peer: AdmittedPeer, hello: Hello, hello_ticks: float, socket: AgentSocket, receive: Any, send: Any
    ) -> None:
        """Receive reports until the connection ends, or the tunnel has too many newer ones."""
        while (event := await socket.wait_for(receive()))["type"] == "websocket.receive":
            body = _text(event)
            await self._yield_before_large(len(body))
            with _marking_refused(body):
                reports = _message(body)
            if not isinstance(reports, Reports):
                raise Refusal(422, "after the hello only reports are expected")
            try:
                await self._guarded(self._admission.recheck(peer))
            except Refusal as e:
                if e.status == 403:
                    self._sessions.key_revoked(hello, peer.caller)
                raise
            await self._throttle(hello.client_id, len(body))
            await self._yield_before_large(len(body))
            with _marking_refused(body):
                ack = await self._stored(self._sessions.store(hello, reports, hello_ticks, peer.address))
            await _send_quietly(send, {"type": "websocket.send", "text": encode(ack).decode()})

    def _check_connection_rate(self, caller: Caller) -> None:
        """Raises Refusal (429) when a tunnel's own token connects too often; many agents may use a shared key."""
        if not caller.shared and (wait := self._connections.wait(caller.name, self._sessions.ticks())) > 0:
            raise Refusal(429, "too many connections a minute from this tunnel", wait)

    @contextmanager
    def _registered(self, name: str) -> Iterator[AgentSocket]:
        """Register a tunnel's WebSocket, and end the oldest of too many: its agent is the likeliest to be gone."""
        sockets, socket = self._sockets_by_tunnel.setdefault(name, []), AgentSocket()
        sockets.append(socket)
        if len(sockets) > MAX_SOCKETS_PER_TUNNEL:
            sockets.pop(0).end()
        try:
            yield socket
        finally:
            if socket in sockets:
                sockets.remove(socket)
            if not sockets and self._sockets_by_tunnel.get(name) is sockets:
                del self._sockets_by_tunnel[name]

    async def _yield_before_large(self, size: int) -> None:
        """Let one large message be decoded in each iteration of the event loop: other work that is due (deadlines,
        deliveries, health) then waits for one, not for those of all connections.
        """
        if size > LARGE_MESSAGE_BYTES:
            async with self._large_message_lock:
                await asyncio.sleep(0)

    async def _throttle(self, name: str, size: int) -> None:
        """A replay may come in a burst; a sender that exceeds it waits here, so its connection is not read."""
        for limit, cost in ((self._messages, 1), (self._bytes, size)):
            if (wait := limit.charge(name, self._sessions.ticks(), cost)) > 0:
                await asyncio.sleep(wait)


@contextmanager
def _marking_refused(body: bytes) -> Iterator[None]:
    """Mark a refusal for invalid content as one of this message of reports, unless msgspec names the hello in it."""
    try:
        yield
    except Refusal as e:
        if e.status in (400, 413, 422) and "`$.hello" not in e.detail:
            e.refused_reports = fingerprint(body)
        raise


def _text(event: Any) -> bytes:
    return (event.get("text") or "").encode() or event.get("bytes") or b""


def _message(body: bytes) -> Any:
    if len(body) > limits.MAX_BODY_BYTES:
        raise Refusal(413, f"a message takes at most {limits.MAX_BODY_BYTES} bytes")
    return parse(body)


async def _deny(scope: Any, send: Any, refusal: Refusal) -> None:
    """Answer the handshake with an HTTP status where the server can (ASGI's denial response), else close."""
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": _POLICY, "reason": _short(refusal.detail)})
        return
    body = encode(problem.problem(refusal.status, refusal.detail))
    headers = [
        (b"content-type", problem.CONTENT_TYPE.encode()),
        (b"content-length", str(len(body)).encode()),
        problem.MARK_BYTES,
        *retry_header(refusal.retry_after),
    ]
    await send({"type": "websocket.http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})


def _short(reason: str) -> str:
    """The reason cut to 123 bytes, which a close frame holds (RFC 6455, section 5.5)."""
    return reason.encode()[:123].decode(errors="ignore")


async def _send_quietly(send: Any, message: Any) -> None:
    """Send to a peer that may have just disconnected: it asks again for an answer that it missed."""
    try:
        await send(message)
    except (OSError, RuntimeError):
        log.debug("the agent disconnected before the answer")
