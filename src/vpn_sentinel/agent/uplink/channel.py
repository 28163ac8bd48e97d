"""The interface of a transport, and its failures."""

from enum import StrEnum
from typing import Final, Protocol

from vpn_sentinel.domain.policy import IPAddress

ALTERED: Final = "something on the way changes the reports: the server refuses something else than was sent"


class Fault(StrEnum):
    """What to do about a failure; the exception's text is for people."""

    BROKEN = "broken"  # try again, soon
    DENIED = "denied"  # the server itself does not accept the key or the name: try again, slowly
    NO_WEBSOCKET = "no_websocket"  # something lets no WebSocket through to the server: use POST
    HELD = "held"  # connected, but no byte came back: this address, or any WebSocket to it, does not work
    REJECTED = "rejected"  # the server itself refused exactly these reports: do not send them again
    CUT = "cut"  # the connection was closed because of a message: send less, or by POST


class ChannelError(Exception):
    def __init__(self, fault: Fault, reason: str) -> None:
        super().__init__(reason)
        self.fault = fault


class MessageChannel(Protocol):
    """A connection that carries whole messages. All methods but `abort` raise ChannelError."""

    @property
    def local(self) -> IPAddress: ...

    async def send(self, data: bytes) -> None: ...

    async def receive(self) -> bytes: ...

    def abort(self) -> None:
        """Close at once, without a closing handshake, which never ends on a dead path."""
        ...

    async def close(self) -> None:
        """Close with a handshake, within half a second."""
        ...
