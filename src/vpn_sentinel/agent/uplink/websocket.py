"""The WebSocket to `{url}{api_path}/agent` (RFC 6455).

wsproto frames; asyncio's streams carry. The client of `websockets` is more at home, and costs an agent 3 MB of its 25.
"""

import asyncio
import contextlib
import ssl
from http import HTTPStatus
from types import ModuleType
from typing import Final

from vpn_sentinel.agent.net.http import Response, connected, head, read_response, reason
from vpn_sentinel.agent.net.urls import ParsedUrl, split
from vpn_sentinel.agent.uplink.answers import own_refusal, strangers
from vpn_sentinel.agent.uplink.channel import ChannelError, Fault
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.imports import stand_ins
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.wire import codec, limits

with stand_ins({"h11": ModuleType("h11")}):  # for wsproto's own handshake; ours is HTTP as the agent has it anyway
    from wsproto.connection import Connection, ConnectionState, ConnectionType
    from wsproto.events import CloseConnection, Event, Message, Ping, TextMessage
    from wsproto.frame_protocol import CloseReason
    from wsproto.utilities import LocalProtocolError, generate_accept_token, generate_nonce

_QUIET: Final = 20.0  # seconds without a byte, then a ping; as many more, and the connection is dead
_MAX_PARTS: Final = 1000  # of one message: a proxy may cut it up, nobody needs that many
_NOT_ONE: Final = "the answer to the WebSocket handshake is not one"
_PIECE: Final = 16 * 1024  # bytes read at once
# Our server says why before it closes; who closes with such a code and no word is somebody else.
_REJECTED_CODES: Final = frozenset({1003, 1007, 1008, 1009})


class WebSocket:
    """A `MessageChannel`. Pings are answered while somebody receives."""

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
                        if len(found) > limits.MAX_BODY_BYTES or parts > _MAX_PARTS:
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
        """What comes next. Raises ChannelError when nothing does, not even the answer to a ping."""
        for last in (False, True):
            try:
                async with asyncio.timeout(_QUIET):
                    data = await self._reader.read(_PIECE)
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
        if self._protocol.state is ConnectionState.OPEN:  # nobody closed it: what came is no WebSocket any more
            return ChannelError(Fault.BROKEN, "the connection broke off")
        with contextlib.suppress(ChannelError):  # the other side need not wait for our answer
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
    where, sock, writer, channel = split(url), None, None, None
    try:
        async with asyncio.timeout(limit):
            sock = await connected(at, where.port)
            reader, writer = await asyncio.open_connection(
                sock=sock,
                ssl=tls if where.secure else None,
                server_hostname=where.host if where.secure else None,
                limit=_PIECE,
            )
            await _shake_hands(where, key, reader, writer)
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
    where: ParsedUrl, key: Secret, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    nonce = generate_nonce()
    asked = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": nonce.decode("ascii"),
        "X-API-Key": key.reveal(),
    }
    writer.write(head("GET", where, asked))
    try:
        response = await read_response(reader)
    except TimeoutError:
        raise
    except (OSError, ValueError, EOFError, asyncio.LimitOverrunError) as e:
        raise ChannelError(Fault.NO_WEBSOCKET, _NOT_ONE) from e
    if response.status != HTTPStatus.SWITCHING_PROTOCOLS:
        raise _refused(response)
    accept = response.headers.get("sec-websocket-accept", "")
    if accept != generate_accept_token(nonce).decode("ascii"):  # whoever repeats what it is sent is no server
        raise ChannelError(Fault.NO_WEBSOCKET, _NOT_ONE)


def _refused(response: Response) -> ChannelError:
    status = response.status
    why = own_refusal(status, response.headers, response.body)
    if why is None:
        return ChannelError(Fault.NO_WEBSOCKET, strangers(status))
    if status == HTTPStatus.METHOD_NOT_ALLOWED:  # nginx, by default, passes no Upgrade on
        return ChannelError(Fault.NO_WEBSOCKET, "something on the way takes the offer of a WebSocket out")
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return ChannelError(Fault.DENIED, f"the server refuses: {why} (HTTP {status})")
    return ChannelError(Fault.BROKEN, f"the server refuses: {why} (HTTP {status})")
