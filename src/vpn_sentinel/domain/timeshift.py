"""A clock that was set back: what is remembered of times that have not come yet.

The machine never lets time run backwards, so without this every observation would count as simultaneous with the last
one, and no grace would end, until the clock has caught up with itself.
"""

from dataclasses import replace
from typing import Final

from vpn_sentinel.domain.machine import Memory

# Seconds by which the clocks of servers that share a database may differ.
TOLERATED: Final = 8.0


def not_after(memory: Memory, now: float) -> Memory:
    """The memory without times after `now`, seconds since the epoch: what lies there counts as of now.

    A memory that has none, but for `TOLERATED` seconds, is given back as it is. A silence that a replay could void is
    no more to be told from others, and stays.
    """
    if max(memory.seen_at, memory.since) <= now + TOLERATED:
        return memory

    def at(time: float) -> float:
        return min(time, now)

    candidate, outage = memory.candidate, memory.outage
    return replace(
        memory,
        since=at(memory.since),
        seen_at=at(memory.seen_at),
        candidate=None if candidate is None else replace(candidate, since=at(candidate.since)),
        before=None,
        trouble_since=None if memory.trouble_since is None else at(memory.trouble_since),
        outage=None if outage is None else replace(outage, began=at(outage.began)),
        turns=tuple(at(t) for t in memory.turns),
        blinks=tuple(at(t) for t in memory.blinks),
        port_checked_at=at(memory.port_checked_at),
        unheard_since=at(memory.unheard_since),
        refuted=at(memory.refuted),
        homes=tuple(replace(h, seen_at=at(h.seen_at)) for h in memory.homes),
    )
