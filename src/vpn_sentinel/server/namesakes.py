"""Several agents that report under one name: what is said of that tunnel is now the one's, now the other's.

Each agent's spool has a name of its own; copies of one host are told apart by `works.Arrival.name_of_spool`. One that
lost its data comes with a new spool, and never again with the old one; so a spool that comes back after another is the
mark of several. An agent that is replaced by another may overlap it for a while, and is none. An old client, which has
no spool, counts as one that all old clients share.
"""

from typing import Final, NamedTuple

TURNS: Final = 4  # so often one came back after another
APART: Final = 30.0  # seconds; of turns that are closer one counts
WITHIN: Final = 300.0  # seconds, or what six rounds of the slowest one take
_SPOOLS: Final = 64  # remembered of a name: of more agents than that nobody seems to come back


class _Turn(NamedTuple):
    at: float
    interval: float


class Namesakes:
    """By what reaches this process, and by what the database says of the report before."""

    def __init__(self) -> None:
        self._spools: dict[str, tuple[str, ...]] = {}
        self._turns: dict[str, tuple[_Turn, ...]] = {}

    def heard(self, name: str, spool: str, before: str, at: float, interval: float, *, known: bool) -> bool:
        """Whether several agents report as `name`, now that one's `spool` came at `at` after a report with `before`.

        `interval` is how many seconds its rounds are apart. `known` says that they were found to be several already: by
        another replica, or before this process began.
        """
        turn = _Turn(at, interval)
        turns = self._turns.get(name, (turn,) * TURNS if known else ())
        spools = self._spools.get(name, ())
        if spool not in spools:
            self._spools[name] = (*spools, spool)[-_SPOOLS:]
            if not _are_several(turns, at):
                turns = ()  # those before were another pair's
        elif before not in ("", spool) and not (turns and turns[-1].at <= at < turns[-1].at + APART):
            turns = (*turns, turn)[-TURNS:]
        if turns or name in self._turns:
            self._turns[name] = turns
        return _are_several(turns, at)

    def move(self, by: float) -> None:
        """The clock was set forward by so many seconds."""
        self._turns = {name: tuple(t._replace(at=t.at + by) for t in turns) for name, turns in self._turns.items()}


def _are_several(turns: tuple[_Turn, ...], at: float) -> bool:
    return len(turns) == TURNS and at - turns[0].at <= max(WITHIN, *(6 * turn.interval for turn in turns))
