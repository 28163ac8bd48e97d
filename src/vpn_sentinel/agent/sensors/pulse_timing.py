"""When to send a pulse, and when their silence is a reason to look; no I/O, and time is an argument.

Any reply that comes ends all doubt, however late: on a line with a deep queue replies are seconds old, and the tunnel
lives. Times are seconds by a clock that never jumps.
"""

import random
from typing import Final

REPLY_TIMEOUT_S: Final = (0.3, 1.0)  # a pulse without a reply: least and most seconds until it is asked again
TRIES: Final = 3  # pulses that are then sent
QUICK_APART_S: Final = 0.175  # seconds between them
LAST: Final = 0.25  # seconds that the last of them gets at least
# While nothing answers: pulses so often, for so long. The server learns by them that its replies are not heard.
URGENT: Final = 0.4
URGENT_FOR: Final = 4.0
SPREAD: Final = 0.1  # share by which the time between two pulses varies, so that agents do not beat in step
_REFUSED: Final = 2  # in a row


class PulseTiming:
    """Of one run of pulses to one target."""

    def __init__(self, every: float, rng: random.Random | None = None) -> None:
        self._every = every
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._next = 0.0
        self._tried = 0
        self._rang: float | None = None
        self._refused = 0
        self._rtt: float | None = None
        self.unanswered_since: float | None = None

    @property
    def patience(self) -> float:
        """Seconds until a pulse without a reply counts as missing: three round trips, within bounds."""
        least, most = REPLY_TIMEOUT_S
        return least if self._rtt is None else min(most, max(least, 3 * self._rtt))

    @property
    def silent(self) -> bool:
        """Whether it rang, and nothing has answered since."""
        return self._rang is not None

    def _dead_at(self, since: float) -> float:
        return since + self.patience + (TRIES - 1) * QUICK_APART_S + max(LAST, min(1.0, 2 * (self._rtt or 0.0)))

    def due(self, now: float) -> bool:
        """Whether a pulse is to be sent."""
        return now >= self._send_at()

    def wait(self, now: float) -> float:
        """Seconds until something is due: the next pulse, or the decision that nothing answers."""
        at = self._send_at()
        if self.unanswered_since is not None and self._rang is None:
            at = min(at, self._dead_at(self.unanswered_since))
        return max(0.0, at - now)

    def _send_at(self) -> float:
        since = self.unanswered_since
        if since is not None and self._rang is None and self._tried < TRIES:
            return min(self._next, since + self.patience + self._tried * QUICK_APART_S)
        return self._next

    def sent(self, now: float) -> None:
        if self.unanswered_since is None:
            self.unanswered_since, self._tried = now, 0
        elif self._rang is None and now >= self.unanswered_since + self.patience:
            self._tried += 1
        if now >= self._next:
            self._next = now + self._interval(now)

    def _interval(self, now: float) -> float:
        if self._rang is not None and now < self._rang + URGENT_FOR:
            return min(URGENT, self._every)
        return self._every * self._rng.uniform(1 - SPREAD, 1 + SPREAD)

    def refused(self, now: float) -> bool:
        """This host, or a router, refused a pulse: whether that is a reason to look. One alone is tried again."""
        if self.unanswered_since is None:
            self.unanswered_since, self._tried = now, 0
        self._refused += 1
        self._next = now + (QUICK_APART_S if self._refused < _REFUSED else self._interval(now))
        if self._refused < _REFUSED or self._rang is not None:
            return False
        self._rang = now
        return True

    def heard(self, rtt: float) -> bool:
        """A reply came, `rtt` seconds after its pulse: whether that is a reason to look, after a silence that was one.

        The smoothed round trip is TCP's (RFC 6298).
        """
        self._rtt = rtt if self._rtt is None else 0.875 * self._rtt + 0.125 * rtt
        again, self._rang = self._rang is not None, None
        self.unanswered_since, self._tried, self._refused = None, 0, 0
        return again

    def dead(self, now: float) -> bool:
        """Whether nothing answers any more; once for each silence."""
        since = self.unanswered_since
        if since is None or self._rang is not None or self._tried < TRIES or now < self._dead_at(since):
            return False
        self._rang = now
        self._next = now
        return True

    def hurry(self, now: float, every: float) -> None:
        """Send the next pulse no later than `every` seconds from now: quality is looked at closely."""
        self._next = min(self._next, now + every)
