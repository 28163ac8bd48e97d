"""Detects that several agents report under one name, so that what is shown of the tunnel alternates between them.

Each agent's spool has a name of its own; `inputs.ReportBatch.name_of_spool` distinguishes copies of one host. An agent
that lost its data has a new spool, and never uses the old one again; so when reports from one spool come again after
those of another, there are several agents. An agent that replaces another may overlap it for a while, which does not
count. Old clients have no spool; all of them count as one.
"""

from typing import Final, NamedTuple

SHARED_AFTER_RETURNS: Final = 4  # returns of a spool within the window that show several agents
MIN_RETURN_INTERVAL_S: Final = 30.0  # returns closer together than this count as one
RETURN_WINDOW_S: Final = 300.0  # or six rounds of the slowest agent, if that is longer
_MAX_SPOOLS: Final = 64  # kept for each name; of more agents than this none is seen to come back


class Return(NamedTuple):
    """The time at which a spool came back after another one, and the interval of its rounds in seconds."""

    at: float
    interval: float


class ReportSources(NamedTuple):
    """The spools that reported under one name to this process, and the latest returns of one after another.

    `returns` is None until one came back; then a name that is known to be shared counts as shared at once. It is ()
    when a new agent came and the earlier returns were too few or too old: from then on only what this process sees
    counts.
    """

    spools: tuple[str, ...] = ()
    returns: tuple[Return, ...] | None = None

    def are_several(self, at: float) -> bool:
        returns = self.returns or ()
        if len(returns) < SHARED_AFTER_RETURNS:
            return False
        return at - returns[0].at <= max(RETURN_WINDOW_S, *(6 * r.interval for r in returns))

    def with_report(self, spool: str, before: str, at: float, interval: float, *, was_shared: bool) -> "ReportSources":
        """The same after a report from `spool` at `at`; the report before it came from the spool `before`.

        `interval` is the interval of its rounds in seconds. `was_shared`: the name is already known to be shared,
        found by another replica, or before this process started.
        """
        latest = Return(at, interval)
        returns, spools = self.returns, self.spools
        if returns is None and was_shared:
            returns = (latest,) * SHARED_AFTER_RETURNS
        if spool not in spools:
            spools = (*spools, spool)[-_MAX_SPOOLS:]
            if returns and not ReportSources(spools, returns).are_several(at):
                returns = ()  # the earlier ones were of another pair of agents
        elif before not in ("", spool) and not (
            returns and returns[-1].at <= at < returns[-1].at + MIN_RETURN_INTERVAL_S
        ):
            returns = (*(returns or ()), latest)[-SHARED_AFTER_RETURNS:]
        return self if spools is self.spools and returns is self.returns else ReportSources(spools, returns)

    def moved(self, by: float) -> "ReportSources":
        """The same after the clock was set forward by `by` seconds."""
        if not self.returns:
            return self
        return self._replace(returns=tuple(r._replace(at=r.at + by) for r in self.returns))
