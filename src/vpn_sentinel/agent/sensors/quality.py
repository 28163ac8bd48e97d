"""What the pulses say of a tunnel's quality: loss, order, round trip, jitter; no I/O, and time is an argument.

One pulse every two seconds tells little: of 20 pulses on a link that loses 5 %, five are lost by chance (which would
read as more than 20 %) in 0.3 % of all cases. So a share is told of no fewer than 60 pulses, and where two of the last
ten are lost, 50 more are sent within some seconds, once a minute at most. By the binomial distribution, of 60 pulses
more than 12 are lost with the odds

    link loses    in any 60      when 2 of the first 10 are known to be lost
     5 %          0.000 007      0.000 03
    30 %          0.94           0.96

and 12 tunnels at 5 % for half an hour, which look closely once a minute, read wrongly in one such half hour of a
hundred; to become a state it has to last longer than its grace besides.
"""

from collections import deque
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Final

from vpn_sentinel.domain.judge import LEAST_PULSES
from vpn_sentinel.domain.observation import Link, Quality

LEAST: Final = 60  # pulses that a share is told of
# Once so large a share is lost, it is told of up to so many, counted from when it began: else a lucky stretch of a
# link that loses 30 % would read as a recovery.
HIGH: Final = 0.2
WIDE: Final = 150
WORTH_TELLING: Final = 0.1
_SUSPICIOUS: Final = (2, 10)  # so many lost of the last so many
BURST: Final = 50
BURST_EVERY: Final = 0.15  # seconds between its pulses
_BURST_APART: Final = 60.0  # seconds from the start of one to the start of the next, at least
_SETTLED: Final = (1.0, 10.0)  # a pulse is lost when no reply has come for so many seconds: least and most
_MOST: Final = 600  # pulses kept


@dataclass(slots=True)
class _Sent:
    number: int
    at: float
    rtt: float | None = None
    counts: bool = True


class Samples:
    """The newest pulses and what became of each."""

    def __init__(self) -> None:
        self._sent: deque[_Sent] = deque(maxlen=_MOST)
        self._by_number: dict[int, _Sent] = {}
        self._jitter: float | None = None
        self._last_rtt: float | None = None
        self._newest = 0
        self._late: deque[float] = deque(maxlen=_MOST)  # when replies came behind later ones
        self._burst_left = 0
        self._burst_at: float | None = None
        self._told: Quality | None = None
        self._high_from: float | None = None  # when the pulses began of which too many were lost

    def sent(self, number: int, now: float, *, counts: bool = True) -> None:
        """A pulse went out; `counts` is False while nothing answers at all, which is no matter of quality."""
        if len(self._sent) == _MOST:
            self._by_number.pop(self._sent[0].number, None)
        sample = _Sent(number, now, counts=counts)
        self._sent.append(sample)
        self._by_number[number] = sample
        self._burst_left = max(0, self._burst_left - 1)

    def heard(self, number: int, now: float) -> float | None:
        """A reply to that pulse came: its round trip in seconds, None for one that is not waited for."""
        sample = self._by_number.get(number)
        if sample is None or sample.rtt is not None:
            return None
        sample.rtt = now - sample.at
        if number < self._newest:
            self._late.append(now)
        self._newest = max(self._newest, number)
        if self._last_rtt is not None:
            # RFC 3550, section 6.4.1; two round trips take the place of two transit times.
            difference = abs(sample.rtt - self._last_rtt)
            self._jitter = (self._jitter or 0.0) + (difference - (self._jitter or 0.0)) / 16
        self._last_rtt = sample.rtt
        return sample.rtt

    def forgive(self, since: float = 0.0) -> None:
        """Pulses sent from `since` on that still wait count no more: an outage, or a socket that is closed now.

        One whose reply comes after all counts.
        """
        for sample in self._sent:
            if sample.rtt is None and sample.at >= since:
                sample.counts = False
        self._burst_left = 0

    def look_closely(self, now: float) -> bool:
        """Whether a burst runs; one begins when too many of the last pulses are lost, or none any more after many."""
        if self._burst_left:
            return True
        if self._burst_at is not None and now < self._burst_at + _BURST_APART:
            return False
        lost, of = _SUSPICIOUS
        recent = self._settled(now, of)
        missing = sum(s.rtt is None for s in recent)
        if missing == len(recent):
            return False  # nothing at all comes back: that is no matter of quality
        if missing < lost and (missing or not self.poor):
            return False
        self._burst_left, self._burst_at = BURST, now
        return True

    @property
    def poor(self) -> bool:
        """Whether what was told last is a share of lost pulses that a round should tell."""
        return self._told is not None and self._told.lost > WORTH_TELLING * self._told.sent >= WORTH_TELLING * LEAST

    def _settled(self, now: float, last: int) -> list[_Sent]:
        """The newest of which it is known whether they were lost, so many at most, the oldest first."""
        least, most = _SETTLED
        patience = least if self._last_rtt is None else min(most, max(least, 3 * self._last_rtt))
        found = (s for s in reversed(self._sent) if s.rtt is not None or (s.counts and now - s.at >= patience))
        return list(islice(found, last))[::-1]

    def quality(self, now: float) -> Quality:
        """Of the last 60 pulses: two minutes or, after a burst, some seconds. Of 19, while there are not so many.

        While a burst runs, what was said before it stays: to look again and again until it is bad would find it bad.
        """
        if self._burst_left and self._told is not None:
            return self._told
        recent = self._settled(now, LEAST)
        if self._high_from is not None:
            recent = [s for s in self._settled(now, WIDE) if s.at >= self._high_from]
        if len(recent) < LEAST:
            recent = recent[-(LEAST_PULSES - 1) :]  # too few for a share, and the judge reads none into them
        answered = [s.rtt for s in recent if s.rtt is not None]
        began = recent[0].at if recent else now
        if len(recent) - len(answered) <= HIGH * len(recent):
            self._high_from = None
        elif self._high_from is None and len(recent) >= LEAST:
            self._high_from = began
        self._told = Quality(
            seconds=round(now - began, 1),
            sent=len(recent),
            lost=len(recent) - len(answered),
            reordered=sum(at >= began for at in self._late),
            rtt_ms=_ms(median(answered) if answered else None),
            jitter_ms=_ms(self._jitter),
        )
        return self._told


class Rates:
    """Bytes a second through the tunnel, from one round's counters to the next's."""

    def __init__(self) -> None:
        self._last: tuple[float, Link] | None = None

    def of(self, link: Link | None, now: float) -> tuple[float | None, float | None]:
        """Received and sent; None without an earlier look, or when the interface was made anew."""
        before, self._last = self._last, (now, link) if link is not None and link.present else None
        if before is None or self._last is None or now - before[0] < 0.5:
            return None, None
        seconds, old = now - before[0], before[1]
        received, sent = self._last[1].rx_bytes - old.rx_bytes, self._last[1].tx_bytes - old.tx_bytes
        if old.name != self._last[1].name or received < 0 or sent < 0:
            return None, None
        return round(received / seconds, 1), round(sent / seconds, 1)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 1)
