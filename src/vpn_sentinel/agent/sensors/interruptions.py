"""Short interruptions that recur: each is too short to be reported as an outage, together they are packet loss.

A line that is interrupted for 1.5 s in every 6 s loses a quarter of the packets. A close look at single pulses cannot
measure that, since an outage ends it. So the loss is the duration of the interruptions, relative to their period.
No I/O, and time is an argument, in seconds by a clock that never jumps.
"""

from collections import deque
from typing import Final, NamedTuple

MIN_INTERRUPTION_S: Final = 0.5  # shorter ones are measured by a close look at single pulses
MAX_INTERRUPTION_S: Final = 4.0  # a longer one is an outage, and reported as such
WINDOW_S: Final = 21.0  # in which interruptions are counted together
MIN_INTERRUPTIONS: Final = 3  # that many are reported, of any duration
MIN_INTERRUPTED_S: Final = 5.0  # or two, with this duration in total
# They are over after that many periods, or that many seconds, without one.
INTERRUPTIONS_OVER: Final = (2, 15.0)
MIN_SHARE_REPORTED: Final = 0.2  # of the time


class _Interruption(NamedTuple):
    began: float
    ended: float


class Interrupted(NamedTuple):
    """Current interruptions: their share of the time since `began`, from 0 to 1."""

    began: float
    share: float


class Interruptions:
    """Of one line. Start and end are accurate to half the time between two pulses."""

    def __init__(self) -> None:
        self._recent: deque[_Interruption] = deque(maxlen=round(4 * WINDOW_S))
        self._found = False

    def add(self, began: float, ended: float) -> None:
        """Note that no pulse was answered in that time."""
        if ended - began > MAX_INTERRUPTION_S:
            self._recent.clear()
            self._found = False
        elif ended - began >= MIN_INTERRUPTION_S:
            self._recent.append(_Interruption(began, ended))

    def may_recur(self, now: float) -> bool:
        """Whether there was one recently, and there may be more: pulses should be frequent enough to measure them."""
        return bool(self._recent) and now - self._recent[-1].ended <= WINDOW_S

    def update(self, now: float) -> None:
        """Decide whether they are to be reported, and whether they are over."""
        recent = self._recent
        while recent and recent[0].began < now - (3 * WINDOW_S if self._found else WINDOW_S):
            recent.popleft()
        if self._found:
            self._found = len(recent) > 1 and now - recent[-1].ended <= min(
                INTERRUPTIONS_OVER[0] * self._period(), INTERRUPTIONS_OVER[1]
            )
            if not self._found:
                recent.clear()
        elif len(recent) > 1:
            enough = len(recent) >= MIN_INTERRUPTIONS or sum(i.ended - i.began for i in recent) >= MIN_INTERRUPTED_S
            self._found = enough and self._share() > MIN_SHARE_REPORTED

    @property
    def found(self) -> Interrupted | None:
        """None while there are none to report."""
        return Interrupted(self._recent[0].began, self._share()) if self._found else None

    def _share(self) -> float:
        """Of at least two: their mean duration divided by their period."""
        return sum(i.ended - i.began for i in self._recent) / len(self._recent) / self._period()

    def _period(self) -> float:
        return (self._recent[-1].began - self._recent[0].began) / (len(self._recent) - 1)
