"""What the pulses say of a tunnel's quality: loss, order, round trip, jitter; no I/O, and time is an argument.

One pulse a second tells little, and late. So the first one that is missing begins a close look: quick pulses until it
is plain what they show. They are counted apart from the one that began the look, which would bias them. The odds that a
look calls too many lost, by the binomial distribution (`SOON`, `MIN_PULSES`, `WORTH_TELLING`, `FEW` below), are

    link loses 1 %  less than 0.000 000 001     5 %  0.000 03     30 %  0.54 after 30 pulses, 0.95 after 60

and to become a state the loss must outlast its grace besides. Once too many are lost, pulses stay quick. The end is
looked for as soon as 8 in a row are answered: 40 quick pulses, of which a link that still loses 30 % loses 3 or fewer
with odds of 0.000 6.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile
from math import inf, sqrt
from typing import Final

from vpn_sentinel.agent.sensors.interruptions import Interrupted, Interruptions
from vpn_sentinel.domain.judge import MIN_PULSES_JUDGED
from vpn_sentinel.domain.observation import Link, Quality

MIN_PULSES: Final = 60  # pulses that a share is told of, where it is not plain after fewer
# Plain before that: of so many at least, more than `ODD` and a sixth of them were lost. That line is the one of Wald's
# sequential test of a link that loses 5 % against one that loses 30 %.
SOON: Final = 20
ODD: Final = 4
# Once so large a share is lost, it is told of up to so many, counted from when it began: else a lucky stretch of a
# link that loses 30 % would read as a recovery.
HIGH: Final = 0.2
LOW: Final = 0.13  # so few lost of all since then are an end; what lies between proves nothing new
WIDE: Final = 150
WORTH_TELLING: Final = 0.1
MISSING: Final = (0.3, 1.0)  # seconds after which a pulse without a reply is a reason to look: least and most
# Of so many at least, `FEW` less than a tenth were lost, one of 30, two of 40: the line is well. Fewer would fit
# between two interruptions.
WELL: Final = 30
FEW: Final = 2
RUN: Final = 3  # lost in a row: the line was interrupted
CALM: Final = 8  # answered in a row: a reason to look whether the loss is over
LOSS_OVER: Final = (3, 40)  # no more than so many lost of so many: it is
BURST_EVERY: Final = 0.1  # seconds between the pulses of a close look
POOR_EVERY: Final = 0.5  # and while too many are lost
_SETTLED: Final = (1.0, 10.0)  # a pulse is lost when no reply has come for so many seconds: least and most
_MAX_PULSES: Final = 600  # pulses kept
# Answers that come within this many seconds of one another came at once when their pulses were sent over so many
# seconds at least, and over ten times as long: the far end, or this process, stood still. Those from a full queue come
# as far apart as their pulses went out.
AT_ONCE: Final = 0.05
LATE_S: Final = 1.0
STALL_TIMES: Final = 10


@dataclass(slots=True)
class _Sent:
    number: int
    at: float
    rtt: float | None = None
    counts: bool = True
    stalled: bool = False  # answered, by somebody who stood still meanwhile: its round trip is not the line's


@dataclass(slots=True)
class _Burst:
    """Answers that came close together, and what was known before the first of them."""

    samples: list[_Sent]
    began: float
    newest: float
    jitter: float | None
    rtt: float | None

    def is_at_once(self) -> bool:
        sent = [s.at for s in self.samples]
        span = max(sent) - min(sent)
        return span >= LATE_S and self.newest - self.began <= span / STALL_TIMES


class Samples:
    """The newest pulses and what became of each."""

    def __init__(self) -> None:
        self._sent: deque[_Sent] = deque(maxlen=_MAX_PULSES)
        self._by_number: dict[int, _Sent] = {}
        self._jitter: float | None = None
        self._last_rtt: float | None = None
        self._burst: _Burst | None = None
        self._newest = 0
        self._late: deque[float] = deque(maxlen=_MAX_PULSES)  # when replies came behind later ones
        self._look_from: float | None = None  # when the close look began that runs
        self._looked_until = 0.0  # what was sent before has been looked into
        self._counts_from = 0.0  # what was sent before was under a loss that is over
        self._told: Quality | None = None
        self._high_from: float | None = None  # when the pulses began of which too many were lost
        self._lossy_from = 0.0  # when that loss may have begun, while too many are lost
        self._interruptions = Interruptions()

    def sent(self, number: int, now: float, *, counts: bool = True) -> None:
        """A pulse went out; `counts` is False while nothing answers at all, which is no matter of quality."""
        if len(self._sent) == _MAX_PULSES:
            self._by_number.pop(self._sent[0].number, None)
        sample = _Sent(number, now, counts=counts)
        self._sent.append(sample)
        self._by_number[number] = sample

    def heard(self, number: int, now: float) -> float | None:
        """A reply to that pulse came: its round trip in seconds, None for one that is not waited for."""
        sample = self._by_number.get(number)
        if sample is None or sample.rtt is not None:
            return None
        sample.rtt = now - sample.at
        self._note_interruption(sample)
        if number < self._newest:
            self._late.append(now)
        self._newest = max(self._newest, number)
        self._gather(sample, now)
        if self._last_rtt is not None:
            # RFC 3550, section 6.4.1; two round trips take the place of two transit times.
            difference = abs(sample.rtt - self._last_rtt)
            self._jitter = (self._jitter or 0.0) + (difference - (self._jitter or 0.0)) / 16
        self._last_rtt = sample.rtt
        self._leave_out_a_stall()
        return sample.rtt

    def _note_interruption(self, answered: _Sent) -> None:
        """Several pulses before this one have no answer: nothing passed, from the middle of two pulses to another."""
        lost: list[_Sent] = []
        for sample in reversed(self._sent):
            if sample.at >= answered.at:
                continue
            if sample.rtt is not None:
                if len(lost) >= RUN:
                    self._interruptions.add((sample.at + lost[-1].at) / 2, (lost[0].at + answered.at) / 2)
                return
            lost.append(sample)

    def _gather(self, sample: _Sent, now: float) -> None:
        burst = self._burst
        if burst is None or now - burst.newest > AT_ONCE:
            self._burst = _Burst([sample], now, now, self._jitter, self._last_rtt)
            return
        burst.samples.append(sample)
        burst.newest = now

    def _leave_out_a_stall(self) -> None:
        """Answers that came all at once say that the pulses were not lost, and nothing of the line's delay."""
        burst = self._burst
        if burst is None or not burst.is_at_once():
            return
        for sample in burst.samples:
            sample.stalled = True
        self._jitter, self._last_rtt = burst.jitter, burst.rtt

    def discard_since(self, since: float = 0.0) -> None:
        """Pulses sent from `since` on that still wait count no more: an outage, or a socket that is closed now.

        One whose reply comes after all counts.
        """
        for sample in self._sent:
            if sample.rtt is None and sample.at >= since:
                sample.counts = False
        self._end_look(self._sent[-1].at if self._sent else since)

    def pace(self, now: float) -> float | None:
        """Seconds between pulses while they have to be quick: in doubt, and while too many are lost. None else."""
        self._interruptions.look(now)
        if self._look_from is not None:
            self._conclude(self._look_from, now)
        elif self._is_doubtful(now):
            self._look_from = now
        if self._look_from is not None:
            return BURST_EVERY
        return POOR_EVERY if self.high or self._interruptions.doubtful(now) else None

    def _is_doubtful(self, now: float) -> bool:
        """Whether what was said last may be true no more: a pulse is missing, or none any more after many."""
        if self._high_from is not None:
            recent = self._settled(now, CALM, after=self._looked_until)
            return len(recent) == CALM and all(s.rtt is not None for s in recent)
        least, most = MISSING
        patience = least if self._last_rtt is None else min(most, max(least, 3 * self._last_rtt))
        newer = (s for s in reversed(self._sent) if s.at > self._looked_until)
        return self._newest > 0 and any(s.counts and s.rtt is None and now - s.at >= patience for s in islice(newer, 3))

    def _conclude(self, began: float, now: float) -> None:
        """End the close look as soon as it is plain what it shows."""
        seen = self._settled(now, WIDE, after=began)
        lost = sum(s.rtt is None for s in seen)
        if self._high_from is not None:
            most, of = LOSS_OVER
            if lost > most:
                self._end_look(now)
            elif len(seen) >= of:
                self._high_from, self._counts_from = None, began
                self._end_look(now)
            return
        if self._is_plain(seen, lost):
            # From its onset on, as far as what passed before does not talk down what the look found.
            self._lossy_from = self._onset(began, _share_at_least(lost, len(seen)))
            since = [s for s in self._settled(now, WIDE) if s.at >= self._lossy_from]
            self._high_from = next((s.at for i, s in enumerate(since) if _share(since[i:]) > HIGH), seen[0].at)
            self._end_look(now)
        elif self._is_well(seen, lost):
            self._end_look(now)

    @staticmethod
    def _is_plain(seen: Sequence[_Sent], lost: int) -> bool:
        """Whether too many of the pulses of a close look are lost."""
        if len(seen) >= MIN_PULSES:
            return lost > HIGH * len(seen)
        return len(seen) >= SOON and lost > ODD + len(seen) / 6

    @staticmethod
    def _is_well(seen: Sequence[_Sent], lost: int) -> bool:
        if len(seen) >= MIN_PULSES:
            return lost <= WORTH_TELLING * len(seen)
        return len(seen) >= WELL and lost <= WORTH_TELLING * len(seen) - FEW

    def _onset(self, look: float, share: float) -> float:
        """When a loss of at least `share` may have begun: some pulses are answered before the first that is lost.

        Their number is geometrically distributed; its mean and three standard deviations are taken back.
        """
        before = [s for s in self._sent if s.at <= look and s.counts]
        first = next((i for i in range(len(before) - 1, -1, -1) if before[i].rtt is not None), -1) + 1
        index = max(0, first - round((1 - share + 3 * (1 - share) ** 0.5) / share))
        return before[index].at if before else look

    def _end_look(self, now: float) -> None:
        if self._look_from is not None:
            self._look_from, self._looked_until = None, now

    @property
    def looking(self) -> bool:
        """Whether a close look runs."""
        return self._look_from is not None

    @property
    def high(self) -> bool:
        """Whether too many are lost, by the last close look or by interruptions."""
        return self._high_from is not None or self._interruptions.found is not None

    @property
    def poor(self) -> bool:
        """Whether what was told last is a share of lost pulses that a round should tell."""
        return (
            self._told is not None and self._told.lost > WORTH_TELLING * self._told.sent >= WORTH_TELLING * MIN_PULSES
        )

    def _settled(self, now: float, last: int, after: float = -inf) -> list[_Sent]:
        """Those sent `after` then of which it is known whether they were lost: the `last` ones, the oldest first."""
        least, most = _SETTLED
        patience = least if self._last_rtt is None else min(most, max(least, 3 * self._last_rtt))
        newer = takewhile(lambda s: s.at > after, reversed(self._sent))
        found = (s for s in newer if s.rtt is not None or (s.counts and now - s.at >= patience))
        return list(islice(found, last))[::-1]

    def quality(self, now: float) -> Quality:
        """Of the last 60 pulses: a minute or, after a close look, some seconds. Of 19, while there are not so many.

        While a look runs, what was said before it stays: to look again and again until it is bad would find it bad.
        More than `HIGH` is told by a look alone, and from the loss's beginning on; it stays until `LOW` is reached or a
        look finds its end. Of 100 pulses at 25 % loss, 20 or fewer are lost with odds of 0.15, 13 with 0.002.
        """
        found, interrupted = self._counted(now), self._interruptions.found
        if interrupted is not None and found.lost < interrupted.share * found.sent:
            return _with_interruptions(found, interrupted, now)
        return found if self._high_from is None else replace(found, lossy_for=round(now - self._lossy_from, 1))

    def _counted(self, now: float) -> Quality:
        if self._look_from is not None and self._told is not None:
            return self._told
        if self._high_from is not None:
            recent = [s for s in self._settled(now, WIDE) if s.at >= self._high_from]
            lost = sum(s.rtt is None for s in recent)
            if lost <= LOW * len(recent):
                self._high_from, self._counts_from = None, now
            elif lost <= HIGH * len(recent) and self._told is not None:
                return self._told
        if self._high_from is None:
            recent = [s for s in self._settled(now, MIN_PULSES) if s.at >= self._counts_from]
            if len(recent) < MIN_PULSES or sum(s.rtt is None for s in recent) > HIGH * len(recent):
                recent = recent[-(MIN_PULSES_JUDGED - 1) :]  # too few for a share, and the judge reads none into them
        answered = [s for s in recent if s.rtt is not None]
        told = [s.rtt for s in answered if s.rtt is not None and not s.stalled]
        began = recent[0].at if recent else now
        self._told = Quality(
            seconds=round(now - began, 1),
            sent=len(recent),
            lost=len(recent) - len(answered),
            reordered=sum(at >= began for at in self._late),
            rtt_ms=_ms(_median(told) if told else None),
            jitter_ms=_ms(self._jitter),
        )
        return self._told


def _with_interruptions(found: Quality, interrupted: Interrupted, now: float) -> Quality:
    """As many as would be lost of pulses sent at an even pace; those really sent crowd within interruptions."""
    seconds = now - interrupted.began
    sent = max(MIN_PULSES, round(seconds / POOR_EVERY))
    lost = round(sent * interrupted.share)
    return replace(found, seconds=round(seconds, 1), sent=sent, lost=lost, lossy_for=round(seconds, 1))


def _share(pulses: Sequence[_Sent]) -> float:
    """The part of them, at least one, that was lost."""
    return sum(s.rtt is None for s in pulses) / len(pulses)


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


def _median(values: Sequence[float]) -> float:
    """Of at least one; the module `statistics` would cost the agent 200 KB."""
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 1)


def _share_at_least(lost: int, sent: int) -> float:
    """The least share that a line loses, by one standard deviation: the lower bound of Wilson's interval (1927).

    A look of 20 pulses may find half of them lost where the line loses 30 %.
    """
    share = lost / sent
    spread = sqrt(share * (1 - share) / sent + 1 / (4 * sent * sent))
    return (share + 1 / (2 * sent) - spread) / (1 + 1 / sent)
