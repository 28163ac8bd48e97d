"""What a transport offers the uplink, and how it fails."""

from enum import StrEnum
from typing import Final, Protocol

from vpn_sentinel.domain.policy import IPAddress

CHANGED: Final = "something on the way changes the reports: what the server refuses is not what was sent"


class Fault(StrEnum):
    """What to do about a failure; the words beside it are for people."""

    BROKEN = "broken"  # try again, soon
    DENIED = "denied"  # the server itself does not accept the key or the name: try again, slowly
    NO_WEBSOCKET = "no_websocket"  # no WebSocket leads to the server, whoever stops it: use POST
    HELD = "held"  # connected, and not a word came back: this address, or any WebSocket to it, leads nowhere
    REJECTED = "rejected"  # the server itself refused these very reports: sending them again is no use
    CUT = "cut"  # somebody closed the connection because of a message: send less, or by POST


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
        """Let go at once: no closing handshake, which a dead path would never finish."""
        ...

    async def close(self) -> None:
        """Say goodbye, within half a second."""
        ...
