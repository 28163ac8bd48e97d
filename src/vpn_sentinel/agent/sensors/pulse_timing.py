"""When to send a pulse, and when missing replies are a reason for a round; no I/O, and time is an argument.

Any reply ends the doubt, however late it is: on a line with a deep queue replies are seconds old, and the tunnel
works. Times are seconds by a clock that never jumps.
"""

import random
from typing import Final

REPLY_TIMEOUT_S: Final = (0.3, 1.0)  # a pulse without a reply: minimum and maximum until it is repeated
QUICK_PULSES: Final = 3  # sent after a pulse without a reply
QUICK_APART_S: Final = 0.175  # between them
LAST_TRY_TIMEOUT_S: Final = 0.25  # at least
# Interval and duration of pulses while nothing answers: they show the server that its replies do not arrive.
SILENT_PULSE_EVERY_S: Final = 0.4
SILENT_PULSES_FOR_S: Final = 4.0
INTERVAL_JITTER: Final = 0.1  # share by which the interval varies, so that agents are not synchronized
_REFUSED_IN_A_ROW: Final = 2


class PulseTiming:
    """Timing of one run of pulses to one target."""

    def __init__(self, every: float, rng: random.Random | None = None) -> None:
        self._every = every
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._next = 0.0
        self._tried = 0
        self._silent_since: float | None = None
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
        """Whether silence was reported, and nothing has answered since."""
        return self._silent_since is not None

    def _dead_at(self, since: float) -> float:
        return (
            since
            + self.patience
            + (QUICK_PULSES - 1) * QUICK_APART_S
            + max(LAST_TRY_TIMEOUT_S, min(1.0, 2 * (self._rtt or 0.0)))
        )

    def due(self, now: float) -> bool:
        """Whether a pulse is to be sent."""
        return now >= self._send_at()

    def wait(self, now: float) -> float:
        """Seconds until the next pulse, or the decision that nothing answers."""
        at = self._send_at()
        if self.unanswered_since is not None and self._silent_since is None:
            at = min(at, self._dead_at(self.unanswered_since))
        return max(0.0, at - now)

    def _send_at(self) -> float:
        since = self.unanswered_since
        if since is not None and self._silent_since is None and self._tried < QUICK_PULSES:
            return min(self._next, since + self.patience + self._tried * QUICK_APART_S)
        return self._next

    def sent(self, now: float) -> None:
        if self.unanswered_since is None:
            self.unanswered_since, self._tried = now, 0
        elif self._silent_since is None and now >= self.unanswered_since + self.patience:
            self._tried += 1
        if now >= self._next:
            self._next = now + self._interval(now)

    def _interval(self, now: float) -> float:
        if self._silent_since is not None and now < self._silent_since + SILENT_PULSES_FOR_S:
            return min(SILENT_PULSE_EVERY_S, self._every)
        return self._every * self._rng.uniform(1 - INTERVAL_JITTER, 1 + INTERVAL_JITTER)

    def refused(self, now: float) -> bool:
        """This host or a router refused a pulse; returns whether to start a round. The first is repeated."""
        if self.unanswered_since is None:
            self.unanswered_since, self._tried = now, 0
        self._refused += 1
        self._next = now + (QUICK_APART_S if self._refused < _REFUSED_IN_A_ROW else self._interval(now))
        if self._refused < _REFUSED_IN_A_ROW or self._silent_since is not None:
            return False
        self._silent_since = now
        return True

    def received(self, rtt: float) -> bool:
        """A reply came `rtt` seconds after its pulse; returns whether that is a reason for a round: it ended a silence.

        The smoothed round trip is TCP's (RFC 6298).
        """
        self._rtt = rtt if self._rtt is None else 0.875 * self._rtt + 0.125 * rtt
        was_silent, self._silent_since = self._silent_since is not None, None
        self.unanswered_since, self._tried, self._refused = None, 0, 0
        return was_silent

    def dead(self, now: float) -> bool:
        """Whether nothing answers any more; True once for each silence."""
        since = self.unanswered_since
        if since is None or self._silent_since is not None or self._tried < QUICK_PULSES or now < self._dead_at(since):
            return False
        self._silent_since = now
        self._next = now
        return True

    def hurry(self, now: float, every: float) -> None:
        """Send the next pulse at most `every` seconds from now, to measure quality."""
        self._next = min(self._next, now + every)
