"""What a channel is, and the three ways in which it can fail.

The rule, for every channel: **a notice is given up only where it is proved that this one message is at fault.** A
channel that is told so sends a plainer or shorter form first; when even the shortest is refused, the message was not
the cause. Whatever else the other side answers, known or not, is trouble of the set-up or of the moment: kept, tried
again, said.

The dispatcher looks at the type alone; `reason` is a short word for the log, the `attempts` table and the metric. It
never holds an address, a token, or what the other side answered. Raise these outside the `except` block of an HTTP
error, so that the error, which carries the request and so its URL, does not hang on as `__context__`.
"""

from typing import Protocol

from vpn_sentinel.domain.notice import Notice


class DeliveryError(Exception):
    """A notice was not delivered."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TransientError(DeliveryError):
    """Trying again may help. `retry_after` is how many seconds the other side asked for, None when it did not say.

    `binding`: it counts requests, and each further one makes it worse (429). Else the wait is its guess at its own
    trouble (503), and an alarm may ask before.
    """

    def __init__(self, reason: str, *, retry_after: float | None = None, binding: bool = False) -> None:
        super().__init__(reason)
        self.retry_after = retry_after
        self.binding = binding


class SetupError(DeliveryError):
    """Nothing can be delivered until the owner repairs the channel: a wrong token, a chat that shuts the bot out.

    Also for every answer that nobody here understands. Tried slowly and for long, because that repair may come at any
    time.
    """


class PermanentError(DeliveryError):
    """The other side will never take this form of this notice, by its own word; it may well take another."""


class Channel(Protocol):
    """A way to tell people. One notice at a time."""

    @property
    def name(self) -> str:
        """As it stands in the outbox, the metrics and the settings."""
        ...

    async def send(self, notice: Notice, delivery_id: int) -> None:
        """Return when the other side took the notice. Raises a DeliveryError.

        A notice can come twice (after a crash between sending and marking it) with the same `delivery_id`.
        """
        ...
