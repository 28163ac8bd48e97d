"""A tunnel's quality from its pulses: loss, order, round trip, jitter; no I/O, and time is an argument.

One pulse a second is a small and slow sample. So the first missing one begins a close look: quick pulses until the
result is clear. The missing pulse that began the look is not counted, since it would bias the result. The probability
that a look finds a high loss, by the binomial distribution (`MIN_PULSES_CLEAR`, `MIN_PULSES`, `MIN_LOSS_REPORTED`,
`GOOD_LOSS_OFFSET` below), is

    link loses 1 %  less than 0.000 000 001     5 %  0.000 03     30 %  0.54 after 30 pulses, 0.95 after 60

and to change the state, the loss must also outlast its grace. While the loss is high, pulses stay quick. The end is
tested for as soon as 8 in a row are answered: by 40 quick pulses, of which a link that still loses 30 % loses 3 or
fewer with a probability of 0.000 6.
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

MIN_PULSES: Final = 60  # for a loss rate, unless it is clear after fewer
# Clear before that: of at least `MIN_PULSES_CLEAR`, more than `CLEAR_LOSS_OFFSET` plus a sixth of them were lost. That
# is the line of Wald's sequential test of a link that loses 5 % against one that loses 30 %.
MIN_PULSES_CLEAR: Final = 20
CLEAR_LOSS_OFFSET: Final = 4
# Above `HIGH_LOSS`, the rate is that of up to `MAX_PULSES_COUNTED` pulses since the loss began: otherwise a lucky
# series of a link that loses 30 % would look like a recovery.
HIGH_LOSS: Final = 0.2
LOW_LOSS: Final = 0.13  # the end of a high loss; a rate between the two changes nothing
MAX_PULSES_COUNTED: Final = 150
MIN_LOSS_REPORTED: Final = 0.1
MISSING_AFTER_S: Final = (0.3, 1.0)  # a pulse without a reply begins a close look: minimum and maximum
# Of at least `MIN_PULSES_GOOD`, `GOOD_LOSS_OFFSET` less than a tenth were lost (one of 30, two of 40): the line is
# good. Fewer pulses would fit between two interruptions.
MIN_PULSES_GOOD: Final = 30
GOOD_LOSS_OFFSET: Final = 2
MIN_PULSES_INTERRUPTED: Final = 3  # lost in a row: an interruption
CALM_PULSES: Final = 8  # answered in a row: then it is tested whether the loss is over
LOSS_OVER: Final = (3, 40)  # at most that many lost of that many: the loss is over
CLOSE_LOOK_EVERY_S: Final = 0.1  # pulses of a close look
LOSSY_EVERY_S: Final = 0.5  # pulses while the loss is high
_LOST_AFTER_S: Final = (1.0, 10.0)  # then a pulse without a reply is lost: minimum and maximum
_MAX_PULSES: Final = 600  # stored
# Answers less than `BURST_GAP_S` apart are a burst. If their pulses were sent over at least `MIN_STALL_S`, and over ten
# times as long as the burst, the other end or this process was stalled. Answers from a full queue are as far apart as
# their pulses.
BURST_GAP_S: Final = 0.05
MIN_STALL_S: Final = 1.0
STALL_RATIO: Final = 10


@dataclass(slots=True)
class _SentPulse:
    number: int
    at: float
    rtt: float | None = None
    counts: bool = True
    stalled: bool = False  # answered after a stall: its round trip is not that of the line


@dataclass(slots=True)
class _Burst:
    """Answers that came close together, and the values before the first of them."""

    samples: list[_SentPulse]
    began: float
    newest: float
    jitter: float | None
    rtt: float | None

    def is_at_once(self) -> bool:
        sent = [s.at for s in self.samples]
        span = max(sent) - min(sent)
        return span >= MIN_STALL_S and self.newest - self.began <= span / STALL_RATIO


class Samples:
    """The newest pulses and the result of each."""

    def __init__(self) -> None:
        self._sent: deque[_SentPulse] = deque(maxlen=_MAX_PULSES)
        self._by_number: dict[int, _SentPulse] = {}
        self._jitter: float | None = None
        self._last_rtt: float | None = None
        self._burst: _Burst | None = None
        self._newest = 0
        self._late: deque[float] = deque(maxlen=_MAX_PULSES)  # times of replies that came after later ones
        self._look_from: float | None = None  # start of the current close look
        self._looked_until = 0.0  # earlier pulses are evaluated
        self._counts_from = 0.0  # earlier pulses belong to a loss that is over
        self._reported: Quality | None = None
        self._high_from: float | None = None  # first pulse that counts for the high loss
        self._lossy_from = 0.0  # when the high loss may have begun
        self._interruptions = Interruptions()

    def sent(self, number: int, now: float, *, counts: bool = True) -> None:
        """A pulse was sent; `counts` is False while nothing answers at all, which is an outage and not poor quality."""
        if len(self._sent) == _MAX_PULSES:
            self._by_number.pop(self._sent[0].number, None)
        sample = _SentPulse(number, now, counts=counts)
        self._sent.append(sample)
        self._by_number[number] = sample

    def received(self, number: int, now: float) -> float | None:
        """A reply to that pulse came; returns its round trip in seconds, None for an unexpected one."""
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
            # RFC 3550, section 6.4.1, with round trips instead of transit times.
            difference = abs(sample.rtt - self._last_rtt)
            self._jitter = (self._jitter or 0.0) + (difference - (self._jitter or 0.0)) / 16
        self._last_rtt = sample.rtt
        self._leave_out_a_stall()
        return sample.rtt

    def _note_interruption(self, answered: _SentPulse) -> None:
        """Several pulses before this one have no answer: an interruption, with ends halfway between two pulses."""
        lost: list[_SentPulse] = []
        for sample in reversed(self._sent):
            if sample.at >= answered.at:
                continue
            if sample.rtt is not None:
                if len(lost) >= MIN_PULSES_INTERRUPTED:
                    self._interruptions.add((sample.at + lost[-1].at) / 2, (lost[0].at + answered.at) / 2)
                return
            lost.append(sample)

    def _gather(self, sample: _SentPulse, now: float) -> None:
        burst = self._burst
        if burst is None or now - burst.newest > BURST_GAP_S:
            self._burst = _Burst([sample], now, now, self._jitter, self._last_rtt)
            return
        burst.samples.append(sample)
        burst.newest = now

    def _leave_out_a_stall(self) -> None:
        """Answers in one burst after a stall show that the pulses were not lost, but not the delay of the line."""
        burst = self._burst
        if burst is None or not burst.is_at_once():
            return
        for sample in burst.samples:
            sample.stalled = True
        self._jitter, self._last_rtt = burst.jitter, burst.rtt

    def discard_since(self, since: float = 0.0) -> None:
        """Unanswered pulses since `since` no longer count: they belong to an outage or to a closed socket.

        One whose reply still comes counts.
        """
        for sample in self._sent:
            if sample.rtt is None and sample.at >= since:
                sample.counts = False
        self._end_look(self._sent[-1].at if self._sent else since)

    def pace(self, now: float) -> float | None:
        """The interval of quick pulses in seconds: during a close look, and while the loss is high. None otherwise."""
        self._interruptions.update(now)
        if self._look_from is not None:
            self._conclude(self._look_from, now)
        elif self._is_doubtful(now):
            self._look_from = now
        if self._look_from is not None:
            return CLOSE_LOOK_EVERY_S
        return LOSSY_EVERY_S if self.high or self._interruptions.may_recur(now) else None

    def _is_doubtful(self, now: float) -> bool:
        """Whether the last result may be outdated: a pulse is missing, or after a high loss none is missing."""
        if self._high_from is not None:
            recent = self._settled(now, CALM_PULSES, after=self._looked_until)
            return len(recent) == CALM_PULSES and all(s.rtt is not None for s in recent)
        least, most = MISSING_AFTER_S
        patience = least if self._last_rtt is None else min(most, max(least, 3 * self._last_rtt))
        newer = (s for s in reversed(self._sent) if s.at > self._looked_until)
        return self._newest > 0 and any(s.counts and s.rtt is None and now - s.at >= patience for s in islice(newer, 3))

    def _conclude(self, began: float, now: float) -> None:
        """End the close look as soon as its result is clear."""
        seen = self._settled(now, MAX_PULSES_COUNTED, after=began)
        lost = sum(s.rtt is None for s in seen)
        if self._high_from is not None:
            most, of = LOSS_OVER
            if lost > most:
                self._end_look(now)
            elif len(seen) >= of:
                self._high_from, self._counts_from = None, began
                self._end_look(now)
            return
        if self._is_high_loss(seen, lost):
            # From its onset on, without answered pulses before it, which would lower the rate.
            self._lossy_from = self._onset(began, _share_at_least(lost, len(seen)))
            since = [s for s in self._settled(now, MAX_PULSES_COUNTED) if s.at >= self._lossy_from]
            self._high_from = next((s.at for i, s in enumerate(since) if _share(since[i:]) > HIGH_LOSS), seen[0].at)
            self._end_look(now)
        elif self._is_good(seen, lost):
            self._end_look(now)

    @staticmethod
    def _is_high_loss(seen: Sequence[_SentPulse], lost: int) -> bool:
        """Whether the pulses of a close look show a high loss."""
        if len(seen) >= MIN_PULSES:
            return lost > HIGH_LOSS * len(seen)
        return len(seen) >= MIN_PULSES_CLEAR and lost > CLEAR_LOSS_OFFSET + len(seen) / 6

    @staticmethod
    def _is_good(seen: Sequence[_SentPulse], lost: int) -> bool:
        if len(seen) >= MIN_PULSES:
            return lost <= MIN_LOSS_REPORTED * len(seen)
        return len(seen) >= MIN_PULSES_GOOD and lost <= MIN_LOSS_REPORTED * len(seen) - GOOD_LOSS_OFFSET

    def _onset(self, look: float, share: float) -> float:
        """When a loss of at least `share` may have begun: some pulses are answered before the first that is lost.

        Their number has a geometric distribution; the onset is its mean plus three standard deviations earlier.
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
        """Whether a close look is running."""
        return self._look_from is not None

    @property
    def high(self) -> bool:
        """Whether the loss is high, by the last close look or by interruptions."""
        return self._high_from is not None or self._interruptions.found is not None

    @property
    def poor(self) -> bool:
        """Whether the last result is a loss that a round should report."""
        return (
            self._reported is not None
            and self._reported.lost > MIN_LOSS_REPORTED * self._reported.sent >= MIN_LOSS_REPORTED * MIN_PULSES
        )

    def _settled(self, now: float, last: int, after: float = -inf) -> list[_SentPulse]:
        """The `last` pulses sent after `after` that are known to be answered or lost, the oldest first."""
        least, most = _LOST_AFTER_S
        patience = least if self._last_rtt is None else min(most, max(least, 3 * self._last_rtt))
        newer = takewhile(lambda s: s.at > after, reversed(self._sent))
        found = (s for s in newer if s.rtt is not None or (s.counts and now - s.at >= patience))
        return list(islice(found, last))[::-1]

    def quality(self, now: float) -> Quality:
        """Of the last 60 pulses: a minute or, after a close look, some seconds. Of 19, while there are fewer.

        During a look the result before it stays: repeated tests until one is bad would find a bad one. More than
        `HIGH_LOSS` is only found by a look, and counted from the onset; it stays until the rate is at most `LOW_LOSS`
        or a look finds its end. Of 100 pulses at 25 % loss, 20 or fewer are lost with a probability of 0.15, 13 with
        0.002.
        """
        found, interrupted = self._counted(now), self._interruptions.found
        if interrupted is not None and found.lost < interrupted.share * found.sent:
            return _with_interruptions(found, interrupted, now)
        return found if self._high_from is None else replace(found, lossy_for=round(now - self._lossy_from, 1))

    def _counted(self, now: float) -> Quality:
        if self._look_from is not None and self._reported is not None:
            return self._reported
        if self._high_from is not None:
            recent = [s for s in self._settled(now, MAX_PULSES_COUNTED) if s.at >= self._high_from]
            lost = sum(s.rtt is None for s in recent)
            if lost <= LOW_LOSS * len(recent):
                self._high_from, self._counts_from = None, now
            elif lost <= HIGH_LOSS * len(recent) and self._reported is not None:
                return self._reported
        if self._high_from is None:
            recent = [s for s in self._settled(now, MIN_PULSES) if s.at >= self._counts_from]
            if len(recent) < MIN_PULSES or sum(s.rtt is None for s in recent) > HIGH_LOSS * len(recent):
                recent = recent[-(MIN_PULSES_JUDGED - 1) :]  # too few for a rate: the judge needs `MIN_PULSES_JUDGED`
        answered = [s for s in recent if s.rtt is not None]
        rtts = [s.rtt for s in answered if s.rtt is not None and not s.stalled]
        began = recent[0].at if recent else now
        self._reported = Quality(
            seconds=round(now - began, 1),
            sent=len(recent),
            lost=len(recent) - len(answered),
            reordered=sum(at >= began for at in self._late),
            rtt_ms=_ms(_median(rtts) if rtts else None),
            jitter_ms=_ms(self._jitter),
        )
        return self._reported


def _with_interruptions(found: Quality, interrupted: Interrupted, now: float) -> Quality:
    """The loss for pulses at a constant rate; the real ones were sent more often during interruptions."""
    seconds = now - interrupted.began
    sent = max(MIN_PULSES, round(seconds / LOSSY_EVERY_S))
    lost = round(sent * interrupted.share)
    return replace(found, seconds=round(seconds, 1), sent=sent, lost=lost, lossy_for=round(seconds, 1))


def _share(pulses: Sequence[_SentPulse]) -> float:
    """The share of them that was lost; `pulses` is not empty."""
    return sum(s.rtt is None for s in pulses) / len(pulses)


class Rates:
    """Bytes a second through the tunnel, from one round's counters to the next's."""

    def __init__(self) -> None:
        self._last: tuple[float, Link] | None = None

    def of(self, link: Link | None, now: float) -> tuple[float | None, float | None]:
        """Received and sent; None without an earlier value, or when the interface was recreated."""
        before, self._last = self._last, (now, link) if link is not None and link.present else None
        if before is None or self._last is None or now - before[0] < 0.5:
            return None, None
        seconds, old = now - before[0], before[1]
        received, sent = self._last[1].rx_bytes - old.rx_bytes, self._last[1].tx_bytes - old.tx_bytes
        if old.name != self._last[1].name or received < 0 or sent < 0:
            return None, None
        return round(received / seconds, 1), round(sent / seconds, 1)


def _median(values: Sequence[float]) -> float:
    """`values` is not empty. The module `statistics` would cost the agent 200 KB."""
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 1)


def _share_at_least(lost: int, sent: int) -> float:
    """The loss rate of the line, less one standard deviation: the lower bound of Wilson's interval (1927).

    A look of 20 pulses may find half of them lost where the line loses 30 %.
    """
    share = lost / sent
    spread = sqrt(share * (1 - share) / sent + 1 / (4 * sent * sent))
    return (share + 1 / (2 * sent) - spread) / (1 + 1 / sent)
