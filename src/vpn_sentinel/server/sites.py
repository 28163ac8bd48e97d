"""What the reference agents of each site know: where home is, and when its internet was away.

A small table in memory, filled from the database at the start and refreshed for what other replicas took. The tracker
tells it what it takes itself, so that it is never behind a report of this server.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import Row, or_, select

from vpn_sentinel.domain.machine import Home, Memory
from vpn_sentinel.domain.policy import IPNetwork
from vpn_sentinel.domain.timeshift import moved
from vpn_sentinel.domain.verdict import State
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.store.schema import incidents, tunnels
from vpn_sentinel.server.store.store import Store, StoreUnavailable, TunnelRow
from vpn_sentinel.wire.codec import decoder

log = logging.getLogger(__name__)

REFERENCE: Final = "reference"
# How long an address that a reference agent has left still counts as home.
LEFT: Final = 86400.0
_EVERY: Final = 2.0
_MOST_HOMES: Final = 16
_MOST_TURNS: Final = 64
_AFTER: Final = 0.001
# Seconds for the way of a report.
_SLACK: Final = 2.0
# Seconds between two pulses, and some: so much later than its tunnel a reference agent may find out that home died.
_PULSE: Final = 3.0
# A pulse that arrives sooner than so many seconds (and the tunnel's round trip) after the trouble began may have been
# sent before it. A dead tunnel is known 2.3 s into it at the soonest, and two pulses are 1.7 s apart at most: so while
# home is well, one has come by then.
_LATER: Final = 0.1
# So many seconds after its last pulse, 1.7 s being the most between two, an agent still counts as one that sends them.
_PULSING: Final = 2.0
# From when to when pulses came without a gap, in seconds since the epoch.
Span = tuple[float, float]

_memory: Final = decoder(Memory)


@dataclass(slots=True)
class Reference:
    """One reference agent. `turns` are the times since when each of its words held, oldest first.

    `seen_at` is its last observation, `well_at` the last that found home well; `deadline` when it counts as silent,
    `patience` seconds after it was heard.
    """

    site: str
    homes: tuple[Home, ...] = ()
    turns: list[tuple[float, State]] = field(default_factory=list)
    seen_at: float = 0.0
    well_at: float = 0.0
    deadline: float | None = None
    patience: float = 0.0

    def move(self, by: float) -> None:
        """The clock was set forward by so many seconds."""
        self.homes = tuple(Home(network=h.network, seen_at=h.seen_at + by) for h in self.homes)
        self.turns = [(since + by, state) for since, state in self.turns]
        self.seen_at, self.well_at = self.seen_at + by, self.well_at + by
        self.deadline = None if self.deadline is None else self.deadline + by

    def said(self, since: float, state: State) -> None:
        """From `since` on it says `state`; what was only supposed of the time after is void."""
        while self.turns and self.turns[-1][0] >= since:
            self.turns.pop()
        if not self.turns or self.turns[-1][1] is not state:
            self.turns = [*self.turns, (since, state)][-_MOST_TURNS:]

    def up(self, at: float, well_until: float, began: float, rtt: float, pulsed: Span | None) -> bool | None:
        """Whether home had internet at `at`, to a tunnel that was well until `well_until` and in trouble since `began`.

        A silence says that it had none, unless the tunnel still worked in it. A word from before the trouble says
        nothing of it; pulses that came without a gap from before it until after it began do, and those that only came
        back after an outage do not. `rtt` is the tunnel's round trip in seconds.
        """
        state, since = State.UNKNOWN, 0.0
        for turn, was in self.turns:
            if turn > at:
                # Both died together; its pulse that stayed away was only later due than the tunnel's.
                if was is State.DOWN and turn < began + _PULSE:
                    return False
                break
            state, since = was, turn
        if state is State.DOWN:
            return False
        if state is State.PROTECTED and self.deadline is not None and at > self.deadline > self.seen_at:
            state, since = State.SILENT, self.seen_at
        if state is State.SILENT:
            return False if well_until <= since + self.patience else None
        through = pulsed is not None and pulsed[0] < began and pulsed[1] >= began + rtt + _LATER
        return True if state is State.PROTECTED and (self.well_at >= began or through) else None

    def works(self, now: float) -> bool:
        """Whether the last that was heard of it was good, and it is not silent."""
        silent = self.deadline is not None and now > self.deadline
        return bool(self.turns) and self.turns[-1][1] is State.PROTECTED and not silent


class Sites:
    """Reference agents by name. Its methods are called from the thread that writes and from the event loop.

    `pulsed` tells when, by the server's clock, pulses of an agent last came over the internet; `moved` by how much that
    clock has been set: see `domain.machine.Memory`.
    """

    def __init__(
        self, pulsed: Callable[[str], Span | None] = lambda _: None, moved: Callable[[], float] = lambda: 0.0
    ) -> None:
        self._pulsed = pulsed
        self._moved = moved
        self._references: dict[str, Reference] = {}
        self._by_site: dict[str, dict[str, Reference]] = {}

    def saw(self, name: str, site: str, homes: tuple[Home, ...], since: float, at: float, state: State) -> None:
        """Take one observation of the reference agent `name`, made at `at`, whose verdict held since `since`."""
        known = self._references.get(name)
        if known is None or known.site != site:
            known = Reference(site)
            self._put({**self._references, name: known})
        known.homes = homes
        if state in (State.PROTECTED, State.DOWN):
            known.said(min(since, at), state)
        known.seen_at = max(known.seen_at, at)
        if state is State.PROTECTED:
            known.well_at = max(known.well_at, at)

    def heard(self, name: str, deadline: float, patience: float) -> None:
        if (known := self._references.get(name)) is not None:
            known.deadline, known.patience = deadline, patience

    def silent(self, name: str, patience: float) -> None:
        """Nothing came from `name` for so many seconds: from its last word on, nothing is known of it."""
        if (known := self._references.get(name)) is not None:
            known.said(known.seen_at + _AFTER, State.SILENT)
            known.deadline, known.patience = None, patience

    def move(self, by: float) -> None:
        """The clock was set forward by so many seconds."""
        for known in self._references.values():
            known.move(by)

    def forget(self, name: str) -> None:
        """`name` is no reference agent any more."""
        if name in self._references:
            self._put({n: r for n, r in self._references.items() if n != name})

    def homes(self, site: str) -> tuple[IPNetwork, ...]:
        """The networks that must not be seen outside the tunnels of `site`."""
        return tuple(home.network for known in self._of(site).values() for home in known.homes)

    def up(self, site: str, at: float, well_until: float, began: float, rtt: float = 0.0) -> bool | None:
        """Whether the internet of `site` worked at `at`; None when nobody can tell. See `Reference.up`."""
        said = {known.up(at, well_until, began, rtt, self._pulsed(name)) for name, known in self._of(site).items()}
        return True if True in said else False if False in said else None

    def pulses(self, name: str, now: float) -> bool:
        """Whether pulses of the agent `name` come, whatever becomes of its reports."""
        span = self._pulsed(name)
        return span is not None and now - span[1] < _PULSING

    def may_tell(self, site: str, now: float) -> bool:
        """Whether a reference agent of `site` was well when last heard of: it tells soon if home has no internet."""
        return any(known.works(now) for known in self._of(site).values())

    def _of(self, site: str) -> Mapping[str, Reference]:
        return self._by_site.get(site, {}) if site else {}

    def _put(self, references: dict[str, Reference]) -> None:
        by_site: dict[str, dict[str, Reference]] = {}
        for name, known in references.items():
            by_site.setdefault(known.site, {})[name] = known
        self._references, self._by_site = references, by_site

    async def load(self, store: Store, now: float) -> None:
        """Take over what the database holds, where it is newer than what is here. Raises StoreUnavailable."""
        c, moved_by = tunnels.c, self._moved()
        found = await store.read(
            select(c.id, c.name, c.site, c.state, c.since, c.memory, c.seen_at, c.last_seen, c.deadline).where(
                c.site > "", c.role == REFERENCE
            )
        )
        lately = or_(incidents.c.closed_at.is_(None), incidents.c.closed_at > now - LEFT)
        spans = await store.read(
            select(incidents).join(tunnels, c.id == incidents.c.tunnel_id).where(c.role == REFERENCE, lately)
        ) if found else ()  # fmt: skip
        if moved_by != self._moved():
            return  # the clock was set meanwhile: these times are of before, or some of them
        fresh: dict[str, Reference] = {}
        for row in found:
            known = self._references.get(row.name)
            if known is not None and known.site == row.site and known.seen_at >= row.seen_at:
                known.deadline = row.deadline
                fresh[row.name] = known
            elif (read := _read(row, spans, moved_by)) is not None:
                fresh[row.name] = read
        self._put(fresh)

    async def run(self, store: Store, clock: Clock) -> None:
        """Refresh for ever."""
        while True:
            await asyncio.sleep(_EVERY)
            try:
                await self.load(store, clock.wall())
            except StoreUnavailable as e:
                log.debug("sites were not read", extra={"reason": e.reason})


def newest(homes: Sequence[Home], seen: Iterable[IPNetwork], at: float) -> tuple[Home, ...]:
    """The homes of a reference agent after it was seen in the networks `seen`: those it left stay for a day."""
    ages: Mapping[IPNetwork, float] = {h.network: h.seen_at for h in homes} | dict.fromkeys(seen, at)
    last = max(ages.values(), default=at)
    kept = sorted((Home(network=n, seen_at=t) for n, t in ages.items() if t > last - LEFT), key=lambda h: h.seen_at)
    return tuple(kept[-_MOST_HOMES:])


def silent_too(row: TunnelRow, company: Sequence[Row[Any]], now: float) -> tuple[str, ...]:
    """All others that reported from the site of `row` as late as it did, when none of them is heard any more.

    `company` are rows of the site: name, site, interval, last_seen.
    """
    if not row.site:
        return ()
    others = [m for m in company if m.site == row.site and m.name != row.name]
    lately = [m for m in others if m.last_seen > row.last_seen - m.interval - row.interval - _SLACK]
    if all(now - m.last_seen > m.interval + _SLACK for m in lately):
        return tuple(sorted(m.name for m in lately))
    return ()


def _read(row: Row[Any], spans: Sequence[Row[Any]], moved_by: float) -> Reference | None:
    try:
        memory = _memory(row.memory) if row.memory else Memory(moved=moved_by)
    except (ValueError, RecursionError):
        log.warning("a reference agent's past cannot be read", extra={"tunnel": row.name})
        return None
    memory = moved(memory, moved_by - memory.moved)
    known = Reference(row.site, memory.homes, seen_at=row.seen_at, deadline=row.deadline)
    known.patience = max(0.0, row.deadline - row.last_seen) if row.deadline is not None else 0.0
    if memory.state is not State.PENDING:
        known.said(0.0, State.PROTECTED)
    if memory.state is State.PROTECTED and memory.candidate is None:
        known.well_at = row.seen_at
    for span in sorted((s for s in spans if s.tunnel_id == row.id), key=lambda s: s.opened_at):
        known.said(span.opened_at, State.DOWN if span.worst == State.DOWN else State.SILENT)
        if span.closed_at is not None:
            known.said(span.closed_at, State.PROTECTED)
    if memory.candidate is not None and memory.candidate.state in (State.DOWN, State.PROTECTED):
        known.said(memory.candidate.since, memory.candidate.state)
    return known
