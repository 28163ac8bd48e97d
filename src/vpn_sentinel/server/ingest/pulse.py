"""The UDP echo: tells an agent the address that its datagram came from. See `wire.echo`."""

import asyncio

from vpn_sentinel.wire import echo


class EchoProtocol(asyncio.DatagramProtocol):
    """Answers genuine requests and is silent to everything else. Caller: holders of a key given in a welcome."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        answer = echo.reply(data, addr[0], addr[1], self._secret)
        if answer is not None and self._transport is not None:
            self._transport.sendto(answer, addr)
