"""The WebSocket to `{url}{api_path}/agent` (RFC 6455).

wsproto makes the frames, asyncio's streams carry them. The client of `websockets` is better known, and would cost an
agent 3 MB of its 25.
"""

import asyncio
import contextlib
import ssl
from http import HTTPStatus
from types import ModuleType
from typing import Final

from vpn_sentinel.agent.net.http import Response, connected, head, read_response, reason
from vpn_sentinel.agent.net.urls import ParsedUrl, split
from vpn_sentinel.agent.uplink.answers import foreign_answer, own_refusal
from vpn_sentinel.agent.uplink.channel import ChannelError, Fault
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.imports import stand_ins
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.wire import codec, limits

with stand_ins({"h11": ModuleType("h11")}):  # for wsproto's handshake; the agent uses its own HTTP
    from wsproto.connection import Connection, ConnectionState, ConnectionType
    from wsproto.events import CloseConnection, Event, Message, Ping, TextMessage
    from wsproto.frame_protocol import CloseReason
    from wsproto.utilities import LocalProtocolError, generate_accept_token, generate_nonce

_PING_AFTER_S: Final = 20.0  # without a byte, then a ping; after as long again the connection is dead
_MAX_FRAMES: Final = 1000  # of one message: a proxy may split it, but not into so many
_NO_HANDSHAKE: Final = "the answer to the WebSocket handshake is invalid"
_READ_BYTES: Final = 16 * 1024  # at once
# The server sends a reason before it closes; a close with such a code and no reason comes from something in between.
_REJECTED_CODES: Final = frozenset({1003, 1007, 1008, 1009})


class WebSocket:
    """A `MessageChannel`. Pings are answered while `receive` runs."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._protocol = Connection(ConnectionType.CLIENT)
        self._events = self._protocol.events()
        self._over = asyncio.Event()
        self.local: IPAddress = codec.address(str(writer.get_extra_info("sockname")[0]).partition("%")[0])

    async def send(self, data: bytes) -> None:
        await self._send(TextMessage(data.decode()))

    async def receive(self) -> bytes:
        try:
            return await self._message()
        except ChannelError:
            self._over.set()
            raise

    def abort(self) -> None:
        self._writer.transport.abort()

    async def close(self) -> None:
        try:
            async with asyncio.timeout(0.5):
                await self._send(CloseConnection(CloseReason.NORMAL_CLOSURE))
                await self._over.wait()
        except (TimeoutError, ChannelError):
            pass
        self.abort()

    async def _message(self) -> bytes:
        found, parts = bytearray(), 0
        while True:
            for event in self._events:
                match event:
                    case Message(data=data):
                        found += data.encode() if isinstance(data, str) else data
                        parts += 1
                        if len(found) > limits.MAX_BODY_BYTES or parts > _MAX_FRAMES:
                            raise ChannelError(Fault.BROKEN, "the server sends too large a message")
                        if event.message_finished:
                            return bytes(found)
                    case Ping():
                        await self._send(event.response())
                    case CloseConnection():
                        raise await self._closed(event)
            self._protocol.receive_data(await self._read())
            self._events = self._protocol.events()

    async def _read(self) -> bytes:
        """The next bytes. Raises ChannelError when nothing comes, not even the answer to a ping."""
        for last in (False, True):
            try:
                async with asyncio.timeout(_PING_AFTER_S):
                    data = await self._reader.read(_READ_BYTES)
            except TimeoutError:
                if not last:
                    await self._send(Ping())
                continue
            except OSError as e:
                raise ChannelError(Fault.BROKEN, "the connection broke off") from e
            if data:
                return data
            break
        raise ChannelError(Fault.BROKEN, "the connection broke off")

    async def _closed(self, event: CloseConnection) -> ChannelError:
        if self._protocol.state is ConnectionState.OPEN:  # not closed: what came is no WebSocket frame
            return ChannelError(Fault.BROKEN, "the connection broke off")
        with contextlib.suppress(ChannelError):  # the other side need not wait for the answer
            await self._send(event.response())
        if event.code in _REJECTED_CODES:
            return ChannelError(Fault.CUT, f"the connection was closed: {event.reason or event.code}")
        return ChannelError(Fault.BROKEN, "the connection was closed")

    async def _send(self, event: Event) -> None:
        try:
            self._writer.write(self._protocol.send(event))
            await self._writer.drain()
        except (LocalProtocolError, OSError) as e:
            raise ChannelError(Fault.BROKEN, "the connection broke off") from e


async def open_websocket(
    url: str, at: IPAddress, key: Secret, tls: ssl.SSLContext | None, *, limit: float
) -> WebSocket:
    """Connect to the server's address `at`; `url` names the host that its certificate must be for.

    Raises ChannelError.
    """
    parts, sock, writer, channel = split(url), None, None, None
    try:
        async with asyncio.timeout(limit):
            sock = await connected(at, parts.port)
            reader, writer = await asyncio.open_connection(
                sock=sock,
                ssl=tls if parts.secure else None,
                server_hostname=parts.host if parts.secure else None,
                limit=_READ_BYTES,
            )
            await _shake_hands(parts, key, reader, writer)
            channel = WebSocket(reader, writer)
            return channel
    except TimeoutError as e:
        if sock is None:
            raise ChannelError(Fault.BROKEN, f"no connection within {limit:g} s") from e
        raise ChannelError(Fault.HELD, f"no answer to the WebSocket handshake within {limit:g} s") from e
    except OSError as e:
        raise ChannelError(Fault.BROKEN, reason(e)) from e
    finally:
        if channel is None and writer is not None:
            writer.transport.abort()
        elif channel is None and sock is not None:
            sock.close()


async def _shake_hands(
    parts: ParsedUrl, key: Secret, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    nonce = generate_nonce()
    asked = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": nonce.decode("ascii"),
        "X-API-Key": key.reveal(),
    }
    writer.write(head("GET", parts, asked))
    try:
        response = await read_response(reader)
    except TimeoutError:
        raise
    except (OSError, ValueError, EOFError, asyncio.LimitOverrunError) as e:
        raise ChannelError(Fault.NO_WEBSOCKET, _NO_HANDSHAKE) from e
    if response.status != HTTPStatus.SWITCHING_PROTOCOLS:
        raise _refused(response)
    accept = response.headers.get("sec-websocket-accept", "")
    if accept != generate_accept_token(nonce).decode("ascii"):  # something that only echoes the request is no server
        raise ChannelError(Fault.NO_WEBSOCKET, _NO_HANDSHAKE)


def _refused(response: Response) -> ChannelError:
    status = response.status
    why = own_refusal(status, response.headers, response.body)
    if why is None:
        return ChannelError(Fault.NO_WEBSOCKET, foreign_answer(status))
    if status == HTTPStatus.METHOD_NOT_ALLOWED:  # nginx, by default, does not forward Upgrade
        return ChannelError(Fault.NO_WEBSOCKET, "something on the way removes the WebSocket upgrade")
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return ChannelError(Fault.DENIED, f"the server refuses: {why} (HTTP {status})")
    return ChannelError(Fault.BROKEN, f"the server refuses: {why} (HTTP {status})")
