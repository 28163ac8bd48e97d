"""What a channel is, and the three kinds of failure of a delivery.

The rule for every channel: **a notice is given up only where it is proved that this one message is the cause.** A
channel whose message is refused sends a plainer or shorter form first; when even the shortest is refused, the message
was not the cause. Every other answer, known or not, is a failure of the set-up or a temporary one: the notice is kept,
tried again, and the failure logged.

The dispatcher uses only the type; `reason` is a short word for the log, the `attempts` table and the metric. It never
holds an address, a token, or text from the receiver's answer. Raise these outside the `except` block of an HTTP error:
that error carries the request and so its URL, and would stay attached as `__context__`.
"""

from typing import Protocol

from vpn_sentinel.domain.notice import Notice


class DeliveryError(Exception):
    """A notice was not delivered."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TransientError(DeliveryError):
    """Trying again may help. `retry_after` is the seconds that the receiver asked for, None when it did not.

    `binding`: the receiver counts requests, and each further one makes it worse (429). Otherwise the wait is the
    receiver's estimate of its own trouble (503), and an alarm may be tried earlier.
    """

    def __init__(self, reason: str, *, retry_after: float | None = None, binding: bool = False) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        self.binding = binding


class SetupError(DeliveryError):
    """Nothing can be delivered until the owner repairs the channel: a wrong token, a chat that excludes the bot.

    Also for every unknown answer. Tried slowly and for long, because the repair may come at any time.
    """


class PermanentError(DeliveryError):
    """The receiver says that it will never accept this form of this notice; it may accept another form."""


class Channel(Protocol):
    """A service that notifies people, one notice at a time."""

    @property
    def name(self) -> str:
        """Its name in the outbox, the metrics and the settings."""
        ...

    async def send(self, notice: Notice, delivery_id: int) -> None:
        """Return when the receiver has accepted the notice. Raises a DeliveryError.

        A notice can come twice (after a crash between sending and marking it) with the same `delivery_id`.
        """
        ...
