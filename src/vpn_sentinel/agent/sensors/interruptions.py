"""Short interruptions that come again and again: none is an outage worth a word, together they are loss.

A line that is dead for 1.5 s in every 6 s loses a quarter of what is sent. No look at single pulses finds that, since
an outage ends it. So what counts is the time in which nothing was answered, of the time from one beginning to another.
No I/O, and time is an argument, in seconds by a clock that never jumps.
"""

from collections import deque
from typing import Final, NamedTuple

MIN_INTERRUPTION_S: Final = 0.5  # seconds: what is shorter is for a look at single pulses
BRIEF: Final = 4.0  # seconds: what lasts longer is an outage, and told as one
WITHIN: Final = 21.0  # seconds in which they are counted together
MANY: Final = 3  # of them are enough
MUCH: Final = 5.0  # seconds: so are two that lasted so long together
# They are over after so many times the mean time from one to the next without one, and after so many seconds.
INTERRUPTIONS_OVER: Final = (2, 15.0)
WORTH_TELLING: Final = 0.2  # share of the time


class _Interruption(NamedTuple):
    began: float
    ended: float


class Interrupted(NamedTuple):
    """What interruptions that are not over took of the time since `began`, as a share from 0 to 1."""

    began: float
    share: float


class Interruptions:
    """Of one line. Each is known to within half the time between two pulses, at both ends."""

    def __init__(self) -> None:
        self._lately: deque[_Interruption] = deque(maxlen=round(4 * WITHIN))
        self._found = False

    def add(self, began: float, ended: float) -> None:
        """Nothing was answered in that time."""
        if ended - began > BRIEF:
            self._lately.clear()
            self._found = False
        elif ended - began >= MIN_INTERRUPTION_S:
            self._lately.append(_Interruption(began, ended))

    def doubtful(self, now: float) -> bool:
        """Whether there was one lately, and there may be more: pulses should be close enough to measure them."""
        return bool(self._lately) and now - self._lately[-1].ended <= WITHIN

    def look(self, now: float) -> None:
        """Settle whether they are worth telling, and whether they are over."""
        lately = self._lately
        while lately and lately[0].began < now - (3 * WITHIN if self._found else WITHIN):
            lately.popleft()
        if self._found:
            self._found = len(lately) > 1 and now - lately[-1].ended <= min(
                INTERRUPTIONS_OVER[0] * self._period(), INTERRUPTIONS_OVER[1]
            )
            if not self._found:
                lately.clear()
        elif len(lately) > 1:
            enough = len(lately) >= MANY or sum(i.ended - i.began for i in lately) >= MUCH
            self._found = enough and self._share() > WORTH_TELLING

    @property
    def found(self) -> Interrupted | None:
        """None while there are none that are worth telling."""
        return Interrupted(self._lately[0].began, self._share()) if self._found else None

    def _share(self) -> float:
        """Of at least two: their mean length by the mean time from one beginning to the next."""
        return sum(i.ended - i.began for i in self._lately) / len(self._lately) / self._period()

    def _period(self) -> float:
        return (self._lately[-1].began - self._lately[0].began) / (len(self._lately) - 1)
