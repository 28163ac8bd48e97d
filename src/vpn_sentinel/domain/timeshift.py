"""Move the times of a memory when the clock was set, so that no duration changes by that.

See docs/adr/0011-a-clock-that-is-set.md.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from vpn_sentinel.domain.machine import Memory

# The clocks of servers that share a database may differ by this.
TOLERATED_S: Final = 8.0


def moved(memory: Memory, by: float) -> Memory:
    """The memory after the clock was set forward by `by` seconds; a time of 0.0 means "never", and stays."""
    if not by:
        return memory
    before = memory.before
    if before is not None:
        waiting = before.candidate and replace(before.candidate, since=before.candidate.since + by)
        before = replace(before, since=_moved(before.since, by), candidate=waiting)
    return replace(_each(memory, lambda time: _moved(time, by)), before=before, moved=memory.moved + by)


def not_after(memory: Memory, now: float) -> Memory:
    """The memory without times after `now`, seconds since the epoch: later times become `now`.

    The machine never lets time run backwards: every observation would count as simultaneous with the last one, and no
    grace would end, until the clock has caught up. A memory with no time later than `TOLERATED_S` after `now` is
    returned unchanged. A silence that a replay could void cannot be distinguished from others any more, and stays.
    """
    if max(memory.seen_at, memory.since) <= now + TOLERATED_S:
        return memory
    return replace(_each(memory, lambda time: min(time, now)), before=None)


def _moved(time: float, by: float) -> float:
    return time + by if time else time


def _each(memory: Memory, at: Callable[[float], float]) -> Memory:
    """The memory with `at` applied to each of its times, except those of `before`."""
    candidate, outage = memory.candidate, memory.outage
    return replace(
        memory,
        since=at(memory.since),
        seen_at=at(memory.seen_at),
        candidate=None if candidate is None else replace(candidate, since=at(candidate.since)),
        trouble_since=None if memory.trouble_since is None else at(memory.trouble_since),
        outage=None if outage is None else replace(outage, began=at(outage.began)),
        turns=tuple(at(t) for t in memory.turns),
        blinks=tuple(at(t) for t in memory.blinks),
        port_checked_at=at(memory.port_checked_at),
        unheard_since=at(memory.unheard_since),
        refuted=at(memory.refuted),
        homes=tuple(replace(h, seen_at=at(h.seen_at)) for h in memory.homes),
    )
