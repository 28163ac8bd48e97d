"""The protocol of one connection between agent and server, without I/O: bytes in, bytes and events out.

    NEW --open--> GREETING --Welcome--> READY --offer--> WAITING --Ack--> READY
    any of them --Refused, overdue, invalid message--> OVER

One message of reports is in flight at a time. Only an acknowledgement lets the spool delete reports, and only up to its
number. Times are seconds of a monotonic clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import msgspec

from vpn_sentinel.wire import codec
from vpn_sentinel.wire.messages import Ack, Echo, Exchange, FromServer, Hello, Known, Refused, Report, Reports, Welcome

_decode: Final = codec.decoder(FromServer)


class Phase(StrEnum):
    NEW = "new"
    GREETING = "greeting"
    READY = "ready"
    WAITING = "waiting"
    OVER = "over"


class ProtocolError(Exception):
    """The server violated the protocol."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeted:
    """The server has this spool up to `ack`. `stale`: that is more than the spool itself has ever numbered."""

    ack: int
    stale: bool
    seen_from: str | None
    echo: Echo | None
    canary_zone: str | None = None
    known: Known | None = None


@dataclass(frozen=True, slots=True)
class Acked:
    """All up to `up_to` is in the server's database, and it counted `thinned` dropped rows."""

    up_to: int
    thinned: int


@dataclass(frozen=True, slots=True)
class RefusedByServer:
    """`of` is the fingerprint of the refused message, "" when it is no message of reports."""

    reason: str
    retry: bool
    of: str = ""


Event = Greeted | Acked | RefusedByServer


class Session:
    def __init__(self, hello: Hello, *, last: int, answer_timeout_s: float) -> None:
        """`last` is the highest sequence number that can have been sent; `answer_timeout_s` is the time for an
        answer.
        """
        self.phase = Phase.NEW
        self._hello = hello
        self._last = last
        self._answer_timeout_s = answer_timeout_s
        self._deadline: float | None = None
        self._acked = 0
        self._sent = 0
        self._thinned = 0

    @property
    def acked(self) -> int:
        """The sequence number up to which the server has everything."""
        return self._acked

    @property
    def deadline(self) -> float | None:
        """When the awaited answer is overdue, None while none is awaited."""
        return self._deadline

    def open(self, now: float) -> bytes:
        """Begin the session; returns the first message to send."""
        self._expect(Phase.NEW)
        self.phase = Phase.GREETING
        self._deadline = now + self._answer_timeout_s
        return codec.encode(self._hello)

    def offer(self, reports: Sequence[Report], *, pending: int, thinned: int, now: float) -> bytes:
        """Send reports, in order and not empty. Only when READY."""
        self._expect(Phase.READY)
        self.phase = Phase.WAITING
        self._sent = reports[-1].seq
        self._thinned = thinned
        self._deadline = now + self._answer_timeout_s
        return codec.encode(Reports(items=list(reports), pending=pending, thinned=thinned))

    def exchange(self, reports: Sequence[Report], *, pending: int, thinned: int, now: float) -> bytes:
        """Greeting and reports in one message, for a POST; the Welcome in its response answers both."""
        self.open(now)
        self._last = max([self._last, *(r.seq for r in reports)])
        return codec.encode(
            Exchange(hello=self._hello, reports=Reports(items=list(reports), pending=pending, thinned=thinned))
        )

    def receive(self, data: bytes | str) -> Event:
        """Take one message. Raises ProtocolError for one that is invalid or out of order."""
        try:
            message = _decode(data)
        except (msgspec.DecodeError, ValueError) as e:
            raise self._fail(f"the server sent an invalid message: {e}") from e
        match message, self.phase:
            case Refused(), _:
                self.phase = Phase.OVER
                self._deadline = None
                return RefusedByServer(message.reason, message.retry, message.of)
            case Welcome(), Phase.GREETING:
                self.phase = Phase.READY
                self._deadline = None
                self._acked = message.ack
                stale = message.ack > self._last
                return Greeted(
                    ack=message.ack,
                    stale=stale,
                    seen_from=message.seen_from,
                    echo=message.echo,
                    canary_zone=message.canary_zone,
                    known=message.known,
                )
            case Ack(), Phase.WAITING:
                if not self._acked < message.seq <= self._sent:  # else the agent would send for ever
                    raise self._fail(f"the server acknowledges {message.seq}, {self._sent} was sent")
                self._acked = message.seq
                self._deadline = None
                self.phase = Phase.READY
                return Acked(message.seq, self._thinned)
            case _:
                raise self._fail(f"the server sent {type(message).__name__} while {self.phase}")

    def overdue(self, now: float) -> bool:
        """Whether the awaited answer is late; the session is over then."""
        if self._deadline is None or now < self._deadline:
            return False
        self.phase = Phase.OVER
        return True

    def _expect(self, phase: Phase) -> None:
        if self.phase is not phase:
            msg = f"the session is {self.phase}, not {phase}"
            raise RuntimeError(msg)

    def _fail(self, reason: str) -> ProtocolError:
        self.phase = Phase.OVER
        self._deadline = None
        return ProtocolError(reason)
