"""The plain ASGI application in front of the API: reports go straight to the tracker, all else to Litestar.

Routing, validation and injection of a framework cost more than storing the report does; the routes here are few.
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
from vpn_sentinel.server.store.store import StoreUnavailable
from vpn_sentinel.server.tracking.group_commit import Busy
from vpn_sentinel.wire import limits, problem
from vpn_sentinel.wire.codec import encode
from vpn_sentinel.wire.messages import REFUSED_HEADER, Exchange, Hello, Refused, Reports, fingerprint

log = logging.getLogger(__name__)

HELLO_TIMEOUT_S: Final = 10.0
# An agent without a session sends what it saw within this time, in seconds; older means that it could not reach us.
_EXCHANGE_S: Final = 3.0
# Messages of reports a minute that one tunnel may send over its WebSocket: many times what an agent ever does.
MESSAGES_PER_MINUTE: Final = 300
# Bytes of them a minute, and at once after a pause: a whole spool (`agent.spool.spool.MAX_BYTES`).
BYTES_PER_MINUTE, BYTES_BURST = 2 * 1024 * 1024, 32 * 1024 * 1024
# WebSockets of one tunnel at once: an agent has one, or for a while some that died unheard.
MAX_SOCKETS: Final = 8
# And that come with its own token in a minute.
ARRIVALS_PER_MINUTE: Final = 60
# Bytes above which a message is read in turn with others of its kind: the largest takes more than ten milliseconds.
LARGE_MESSAGE_BYTES: Final = 16 * 1024
T = TypeVar("T")
# What stands behind a route: it takes ASGI's scope and `receive`, and raises Refusal.
Take = Callable[[Any, Any], Awaitable[bytes]]
# WebSocket close codes (RFC 6455, section 7.4.1, and IANA's registry).
_POLICY, _TOO_BIG, _TRY_LATER = 1008, 1009, 1013


class AgentSocket:
    """One WebSocket among those of its tunnel."""

    def __init__(self) -> None:
        self._ended = False
        self._waiting: asyncio.Timeout | None = None

    def end(self) -> None:
        """Once it has no message in hand."""
        self._ended = True
        if self._waiting is not None:
            self._waiting.reschedule(0.0)

    async def waits(self, event: Awaitable[T]) -> T:
        """Raises Refusal (429) where it was ended."""
        try:
            async with asyncio.timeout(0.0 if self._ended else None) as self._waiting:
                return await event
        except TimeoutError:
            raise Refusal(429, "too many connections of this tunnel") from None
        finally:
            self._waiting = None


class Switch:
    """`per_client` is how many exchanges a minute one client may make for all the tunnels behind it."""

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
        self._takes: dict[str, Take] = {f"{path}/keepalive": keepalives.take, self._agent: self._exchange}
        self._messages = RateLimit(MESSAGES_PER_MINUTE)
        self._bytes = RateLimit(BYTES_PER_MINUTE, BYTES_BURST)
        self._per_client = RateLimit(per_client)
        self._arrivals = RateLimit(ARRIVALS_PER_MINUTE)
        self._turnstile = asyncio.Lock()
        self._sockets_of: dict[str, list[AgentSocket]] = {}
        self._said: str | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if scope["type"] == "websocket" and path == self._agent:
            await self._socket(scope, receive, send)
        elif scope["type"] == "http" and path in self._takes:
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
            body = await self._stored(self._takes[path](scope, receive))
        except Refusal as e:
            status, kind = e.status, problem.CONTENT_TYPE.encode()
            body = encode(problem.problem(e.status, e.detail))
            of = [(REFUSED_HEADER.encode(), e.of.encode())] if e.of else []
            extra += [problem.MARK_BYTES, *of, *retry_header(e.retry_after)]
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *extra]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _guarded(self, work: Awaitable[T]) -> T:
        """Turn what stops the server from storing into a refusal, and say it once, not once a report."""
        try:
            return await work
        except StoreUnavailable as e:
            if self._said != e.reason:
                self._said = e.reason
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
        """The same for work that ends in a commit: only that shows that a trouble is over."""
        done = await self._guarded(work)
        if self._said is not None:
            log.info("reports are stored again", extra={"after": self._said})
            self._said = None
        return done

    async def _exchange(self, scope: Any, receive: Any) -> bytes:
        """An agent that cannot hold a WebSocket open. Caller: any key; a tunnel's own token only as that tunnel."""
        peer = await self._admission.admit(scope)
        body = await json_body(receive, peer.headers)
        await self._one_a_turn(len(body))
        with _about(body):
            said = parse(body)
        if not isinstance(said, Exchange):
            raise Refusal(422, "an exchange is needed")
        # By tunnel, for many may sit behind one exit; and by address, or one key could make names without end.
        client = peer.client(said.hello.client_id)
        self._admission.rate_limit(f"{client} {said.hello.client_id[:100]}")
        if (wait := self._per_client.wait(client, self._sessions.ticks())) > 0:
            raise Refusal(429, "too many reports a minute from this address", wait)
        if (wait := self._bytes.wait(said.hello.client_id, self._sessions.ticks(), len(body))) > 0:
            raise Refusal(429, "too many bytes a minute of this tunnel", wait)
        greeted = self._sessions.ticks()
        welcome = await self._sessions.welcome(said.hello, peer.caller, peer.address)
        await self._one_a_turn(len(body))
        with _about(body):
            ack = await self._sessions.take(said.hello, said.reports, greeted, peer.address, before=_EXCHANGE_S)
        return encode(msgspec.structs.replace(welcome, ack=max(ack.seq, welcome.ack)))

    async def _socket(self, scope: Any, receive: Any, send: Any) -> None:
        """An agent's WebSocket. Caller: any key; a tunnel's own token only as that tunnel."""
        if (await receive())["type"] != "websocket.connect":
            return
        try:
            peer = await self._guarded(self._admission.admit(scope))
            self._pace(peer.caller)
        except Refusal as e:
            await _deny(scope, send, e)
            return
        await send({"type": "websocket.accept"})
        try:
            await self._talk(peer, receive, send)
        except Refusal as e:
            retry = e.status in (429, 500, 503)
            refused = encode(Refused(reason=e.detail, retry=retry, of=e.of)).decode()
            await _send_quietly(send, {"type": "websocket.send", "text": refused})
            code = _TRY_LATER if retry else _TOO_BIG if e.status == 413 else _POLICY
            await _send_quietly(send, {"type": "websocket.close", "code": code, "reason": _short(e.detail)})

    async def _talk(self, peer: AdmittedPeer, receive: Any, send: Any) -> None:
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
        greeted = self._sessions.ticks()
        welcome = await self._guarded(self._sessions.welcome(hello, peer.caller, peer.address))
        with self._counted(hello.client_id) as socket:
            await _send_quietly(send, {"type": "websocket.send", "text": encode(welcome).decode()})
            await self._hear(peer, hello, greeted, socket, receive, send)

    async def _hear(
        self, peer: AdmittedPeer, hello: Hello, greeted: float, socket: AgentSocket, receive: Any, send: Any
    ) -> None:
        """Reports until the connection ends, or the tunnel has too many newer ones."""
        while (event := await socket.waits(receive()))["type"] == "websocket.receive":
            body = _text(event)
            await self._one_a_turn(len(body))
            with _about(body):
                reports = _message(body)
            if not isinstance(reports, Reports):
                raise Refusal(422, "after the hello only reports are expected")
            try:
                await self._guarded(self._admission.recheck(peer))
            except Refusal as e:
                if e.status == 403:
                    self._sessions.refused(hello, peer.caller)
                raise
            await self._in_turn(hello.client_id, len(body))
            await self._one_a_turn(len(body))
            with _about(body):
                ack = await self._stored(self._sessions.take(hello, reports, greeted, peer.address))
            await _send_quietly(send, {"type": "websocket.send", "text": encode(ack).decode()})

    def _pace(self, caller: Caller) -> None:
        """Raises Refusal (429) when a tunnel's own token comes too often; behind a shared key are many agents."""
        if not caller.shared and (wait := self._arrivals.wait(caller.name, self._sessions.ticks())) > 0:
            raise Refusal(429, "too many connections a minute of this tunnel", wait)

    @contextmanager
    def _counted(self, name: str) -> Iterator[AgentSocket]:
        """Of too many connections of one tunnel the oldest ends: its agent may have died, the newest one's has not."""
        sockets, socket = self._sockets_of.setdefault(name, []), AgentSocket()
        sockets.append(socket)
        if len(sockets) > MAX_SOCKETS:
            sockets.pop(0).end()
        try:
            yield socket
        finally:
            if socket in sockets:
                sockets.remove(socket)
            if not sockets and self._sockets_of.get(name) is sockets:
                del self._sockets_of[name]

    async def _one_a_turn(self, size: int) -> None:
        """Let one large message be read in each turn of the loop: what is due besides (deadlines, deliveries, health)
        waits for one, not for those of all connections.
        """
        if size > LARGE_MESSAGE_BYTES:
            async with self._turnstile:
                await asyncio.sleep(0)

    async def _in_turn(self, name: str, size: int) -> None:
        """A replay comes in a burst; beyond that a sender waits, and its connection with it."""
        for limit, cost in ((self._messages, 1), (self._bytes, size)):
            if (wait := limit.owe(name, self._sessions.ticks(), cost)) > 0:
                await asyncio.sleep(wait)


@contextmanager
def _about(body: bytes) -> Iterator[None]:
    """What is refused in here for its content is this message of reports, unless msgspec says that the hello is."""
    try:
        yield
    except Refusal as e:
        if e.status in (400, 413, 422) and "`$.hello" not in e.detail:
            e.of = fingerprint(body)
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
    """A close frame holds at most 123 bytes of reason (RFC 6455, section 5.5)."""
    return reason.encode()[:123].decode(errors="ignore")


async def _send_quietly(send: Any, message: Any) -> None:
    """Send to a peer that may just have gone: what it misses it asks for again."""
    try:
        await send(message)
    except (OSError, RuntimeError):
        log.debug("the agent was gone before it was answered")
