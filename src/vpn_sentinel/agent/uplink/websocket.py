"""The WebSocket to `{url}{api_path}/agent`."""

import asyncio
import socket
import ssl
from http import HTTPStatus
from typing import Final

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI, WebSocketException
from websockets.http11 import Response

from vpn_sentinel.agent.http import connected, reason, split
from vpn_sentinel.agent.uplink.answers import own_refusal, strangers
from vpn_sentinel.agent.uplink.channel import ChannelError, Fault
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.wire import codec, limits

# Our server says why before it closes; who closes with such a code and no word is somebody else.
_REJECTED_CODES: Final = frozenset({1003, 1007, 1008, 1009})


class WebSocket:
    """A `Channel`."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self.local: IPAddress = codec.address(str(connection.local_address[0]).partition("%")[0])

    async def send(self, data: bytes) -> None:
        try:
            await self._connection.send(data, text=True)
        except (ConnectionClosed, OSError) as e:
            raise _closed(e) from e

    async def receive(self) -> bytes:
        try:
            return await self._connection.recv(decode=False)
        except (ConnectionClosed, OSError) as e:
            raise _closed(e) from e

    def abort(self) -> None:
        self._connection.transport.abort()

    async def close(self) -> None:
        try:
            async with asyncio.timeout(0.5):
                await self._connection.close()
        except TimeoutError:
            self.abort()


async def open_websocket(
    url: str, at: IPAddress, key: Secret, tls: ssl.SSLContext | None, *, limit: float
) -> WebSocket:
    """Connect to the server's address `at`; `url` names the host that its certificate must be for.

    Raises ChannelError.
    """
    where = split(url)
    sock: socket.socket | None = None
    try:
        async with asyncio.timeout(limit):
            sock = await connected(at, where.port)
            connection = await connect(
                url.replace("http", "ws", 1),
                sock=sock,
                ssl=tls if where.secure else None,
                server_hostname=where.host if where.secure else None,
                additional_headers={"X-API-Key": key.reveal()},
                user_agent_header="vpn-sentinel",
                # Reports are small, and each compressor would cost both sides some 300 KB.
                compression=None,
                proxy=None,
                open_timeout=None,
                ping_interval=20,
                ping_timeout=20,
                close_timeout=0.5,
                max_size=limits.BODY_BYTES,
            )
    except TimeoutError as e:
        _close(sock)
        if sock is None:
            raise ChannelError(Fault.BROKEN, f"no connection within {limit:g} s") from e
        raise ChannelError(Fault.HELD, f"no answer to the WebSocket handshake within {limit:g} s") from e
    except InvalidStatus as e:
        raise _refused(e.response) from e
    except (InvalidHandshake, InvalidURI, ValueError) as e:  # a redirect to a page is an InvalidURI
        raise ChannelError(Fault.NO_WEBSOCKET, "the answer to the WebSocket handshake is not one") from e
    except (OSError, WebSocketException, EOFError) as e:
        _close(sock)
        raise ChannelError(Fault.BROKEN, reason(e)) from e
    except BaseException:
        _close(sock)
        raise
    return WebSocket(connection)


def _close(sock: socket.socket | None) -> None:
    if sock is not None:
        sock.close()


def _refused(response: Response) -> ChannelError:
    status = response.status_code
    headers = {name.lower(): value for name, value in response.headers.raw_items()}
    why = own_refusal(status, headers, bytes(response.body or b""))
    if why is None:
        return ChannelError(Fault.NO_WEBSOCKET, strangers(status))
    if status == HTTPStatus.METHOD_NOT_ALLOWED:  # nginx, by default, passes no Upgrade on
        return ChannelError(Fault.NO_WEBSOCKET, "something on the way takes the offer of a WebSocket out")
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return ChannelError(Fault.DENIED, f"the server refuses: {why} (HTTP {status})")
    return ChannelError(Fault.BROKEN, f"the server refuses: {why} (HTTP {status})")


def _closed(error: Exception) -> ChannelError:
    received = error.rcvd if isinstance(error, ConnectionClosed) else None
    if received is not None and received.code in _REJECTED_CODES:
        return ChannelError(Fault.CUT, f"the connection was closed: {received.reason or received.code}")
    return ChannelError(Fault.BROKEN, "the connection was closed" if received else "the connection broke off")
