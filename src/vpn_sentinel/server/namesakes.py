"""Two agents that report under one name: what is said of that tunnel is now the one's, now the other's.

Each agent's spool has a name of its own. One that lost its data comes with a new spool, and never again with the old
one; so a spool that comes back after another is the mark of two. One that is replaced by another may overlap it for a
report or two, and is none. An old client, which has no spool, counts as one that all old clients share.
"""

from collections import deque
from typing import Final

TURNS: Final = 4  # so often one came back after the other
WITHIN: Final = 300.0  # seconds, or what six rounds of the slower one take
_SPOOLS: Final = 8  # remembered of a name


class Namesakes:
    """By what reaches this process, and by what the database says of the report before."""

    def __init__(self) -> None:
        self._heard: dict[str, deque[str]] = {}
        self._turns: dict[str, deque[float]] = {}

    def heard(self, name: str, spool: str, before: str, at: float, interval: float, *, known: bool) -> bool:
        """Whether two agents report as `name`, now that one's `spool` came at `at` after a report with `before`.

        `interval` is how many seconds its rounds are apart. `known` says that they were found to be two already: by
        another replica, or before this process began.
        """
        spools = self._heard.setdefault(name, deque(maxlen=_SPOOLS))
        turns = self._turns.get(name)
        if turns is None:
            turns = self._turns[name] = deque([at] * TURNS if known else (), maxlen=TURNS)
        if spool not in spools:
            spools.append(spool)
        elif before not in ("", spool):
            turns.append(at)
        return len(turns) == TURNS and at - turns[0] <= max(WITHIN, 6 * interval)
