"""uvicorn's WebSocket protocol with bounds: frames that may come, and how long answers may stay unread."""

import asyncio
from collections.abc import Callable
from typing import Any, Final

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState

# Bytes that are parsed before the frames in them are counted: an empty frame has six (RFC 6455, section 5.2).
PIECE: Final = 2048
# Frames that may come at once, and that a second adds: a message of the largest size, cut small by a proxy, and pings.
FRAMES, FRAMES_A_SECOND = 512.0, 50.0
_POLICY_VIOLATION: Final = 1008  # RFC 6455, section 7.4.1


class BoundedWebSocket(WebSocketsSansIOProtocol):
    """uvicorn's, which says when it is over. Its pings find the dead.

    A frame costs as much as it is parsed, whether anything is in it or not, and a ping is answered: who sends more than
    `FRAMES` is refused, and nothing is read of who does not take the answers.
    """

    left: Callable[[], None] | None = None
    greeted: Callable[[], None] | None = None  # called when the application says its first word
    drained_within = 30.0  # seconds that answers may stay unread, then it is cut

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._frames, self._counted_at = FRAMES, self.loop.time()
        self._cut: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        for at in range(0, len(data), PIECE):
            super().data_received(data[at : at + PIECE])
            if self.transport.is_closing():
                return

    def handle_events(self) -> None:
        now = self.loop.time()
        self._frames = min(FRAMES, self._frames + (now - self._counted_at) * FRAMES_A_SECOND) - len(self.conn.events)
        self._counted_at = now
        if self._frames < 0 and self.conn.close_sent is None:
            self.conn.events_received()
            self.conn.fail(_POLICY_VIOLATION, "too many frames")
            self.handle_parser_exception()
            return
        try:
            super().handle_events()
        except InvalidState:  # a text that is none, and behind it the close: nobody is left to be told
            self.transport.abort()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.transport.pause_reading()
        self._cut_soon()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.transport.is_closing():
            return
        self._keep()
        if not self.read_paused:
            self.transport.resume_reading()

    async def receive(self) -> Any:
        await self.writable.wait()  # what is taken from the queue lets more be read
        return await super().receive()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.send" and self.greeted is not None:
            self.greeted()
            self.greeted = None
        if message["type"] == "websocket.http.response.body":
            self.handshake_complete = True  # else uvicorn logs each refused agent as a fault of ours

    async def run_asgi(self) -> None:
        try:
            await super().run_asgi()
        finally:
            self._cut_soon()  # closed, it would wait for ever for who does not read the rest

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self._cut_soon()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._keep()
        if self.left is not None:
            self.left()
            self.left = None

    def _cut_soon(self) -> None:
        if self._cut is None and not self.disconnected:
            self._cut = self.loop.call_later(self.drained_within, self.transport.abort)

    def _keep(self) -> None:
        if self._cut is not None:
            self._cut.cancel()
            self._cut = None
