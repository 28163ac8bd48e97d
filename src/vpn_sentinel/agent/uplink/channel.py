"""What a transport offers the uplink, and how it fails."""

from enum import StrEnum
from typing import Protocol

from vpn_sentinel.domain.policy import IPAddress


class Fault(StrEnum):
    """What to do about a failure; the words beside it are for people."""

    BROKEN = "broken"  # try again, soon
    DENIED = "denied"  # the key or the name is not accepted: try again, slowly
    NO_WEBSOCKET = "no_websocket"  # something on the way takes no WebSocket: use POST
    REJECTED = "rejected"  # the message itself was refused: sending it again is no use


class ChannelError(Exception):
    def __init__(self, fault: Fault, reason: str) -> None:
        super().__init__(reason)
        self.fault = fault


class Channel(Protocol):
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
