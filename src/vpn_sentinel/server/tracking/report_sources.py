"""Several agents that report under one name: what is said of that tunnel is now the one's, now the other's.

Each agent's spool has a name of its own; copies of one host are told apart by `inputs.ReportBatch.name_of_spool`. One
that lost its data comes with a new spool, and never again with the old one; so a spool that comes back after another is
the mark of several. An agent that is replaced by another may overlap it for a while, and is none. An old client, which
has no spool, counts as one that all old clients share.
"""

from typing import Final, NamedTuple

RETURNS: Final = 4  # so often one came back after another
MIN_APART_S: Final = 30.0  # of returns that are closer one counts
WINDOW_S: Final = 300.0  # or what six rounds of the slowest one take
_MAX_SPOOLS: Final = 64  # remembered of a name: of more agents than that nobody seems to come back


class Return(NamedTuple):
    """A spool came back at `at`, after another; its rounds are `interval` seconds apart."""

    at: float
    interval: float


class ReportSources(NamedTuple):
    """Who reported under one name, by what reached this process. `returns` is None until one came back."""

    spools: tuple[str, ...] = ()
    returns: tuple[Return, ...] | None = None

    def are_several(self, at: float) -> bool:
        returns = self.returns or ()
        if len(returns) < RETURNS:
            return False
        return at - returns[0].at <= max(WINDOW_S, *(6 * r.interval for r in returns))

    def heard(self, spool: str, before: str, at: float, interval: float, *, known: bool) -> "ReportSources":
        """These, now that `spool` came at `at` after a report with the spool `before`.

        `interval` is how many seconds its rounds are apart. `known` says that they were found to be several already: by
        another replica, or before this process began.
        """
        now = Return(at, interval)
        returns, spools = self.returns, self.spools
        if returns is None and known:
            returns = (now,) * RETURNS
        if spool not in spools:
            spools = (*spools, spool)[-_MAX_SPOOLS:]
            if returns and not ReportSources(spools, returns).are_several(at):
                returns = ()  # those before were another pair's
        elif before not in ("", spool) and not (returns and returns[-1].at <= at < returns[-1].at + MIN_APART_S):
            returns = (*(returns or ()), now)[-RETURNS:]
        return self if spools is self.spools and returns is self.returns else ReportSources(spools, returns)

    def moved(self, by: float) -> "ReportSources":
        """The same by a clock that was set forward by so many seconds."""
        if not self.returns:
            return self
        return self._replace(returns=tuple(r._replace(at=r.at + by) for r in self.returns))
