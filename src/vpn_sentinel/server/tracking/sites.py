"""What the reference agents of each site know: where home is, and when its internet was away.

A small table in memory, filled from the database at the start and refreshed for what other replicas took. The tracker
tells it what it takes itself, so that it is never behind a report of this server.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

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
HOME_KEPT_S: Final = 86400.0
_REFRESH_S: Final = 2.0
_MAX_HOMES: Final = 16
_MAX_TURNS: Final = 64
_JUST_AFTER_S: Final = 0.001
_REPORT_TRANSIT_S: Final = 2.0
# Seconds between two pulses, and some: so much later than its tunnel a reference agent may find out that home died.
_PULSE_INTERVAL_S: Final = 3.0
# A pulse that arrives sooner than so many seconds (and the tunnel's round trip) after the trouble began may have been
# sent before it. A dead tunnel is known 2.3 s into it at the soonest, and two pulses are 1.7 s apart at most: so while
# home is well, one has come by then.
_PULSE_TRANSIT_S: Final = 0.1
# So many seconds after its last pulse, 1.7 s being the most between two, an agent still counts as one that sends them.
_PULSING_S: Final = 2.0
# From when to when pulses came without a gap, in seconds since the epoch.
Span = tuple[float, float]

V = TypeVar("V")

_memory: Final = decoder(Memory)


@dataclass(frozen=True, slots=True)
class Reference:
    """One reference agent. `turns` are the times since when each of its words held, oldest first.

    `seen_at` is its last observation, `well_at` the last that found home well; `deadline` when it counts as silent,
    `patience` seconds after it was heard.
    """

    site: str
    homes: tuple[Home, ...] = ()
    turns: tuple[tuple[float, State], ...] = ()
    seen_at: float = 0.0
    well_at: float = 0.0
    deadline: float | None = None
    patience: float = 0.0

    def moved(self, by: float) -> "Reference":
        """The same by a clock that was set forward by so many seconds."""
        return replace(
            self,
            homes=tuple(Home(network=h.network, seen_at=h.seen_at + by) for h in self.homes),
            turns=tuple((since + by, state) for since, state in self.turns),
            seen_at=self.seen_at + by,
            well_at=self.well_at + by,
            deadline=None if self.deadline is None else self.deadline + by,
        )

    def said(self, since: float, state: State) -> "Reference":
        """The same, which from `since` on says `state`; what was only supposed of the time after is void."""
        turns = tuple(t for t in self.turns if t[0] < since)
        if not turns or turns[-1][1] is not state:
            turns = (*turns, (since, state))[-_MAX_TURNS:]
        return self if turns == self.turns else replace(self, turns=turns)

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
                if was is State.DOWN and turn < began + _PULSE_INTERVAL_S:
                    return False
                break
            state, since = was, turn
        if state is State.DOWN:
            return False
        if state is State.PROTECTED and self.deadline is not None and at > self.deadline > self.seen_at:
            state, since = State.SILENT, self.seen_at
        if state is State.SILENT:
            return False if well_until <= since + self.patience else None
        through = pulsed is not None and pulsed[0] < began and pulsed[1] >= began + rtt + _PULSE_TRANSIT_S
        return True if state is State.PROTECTED and (self.well_at >= began or through) else None

    def works(self, now: float) -> bool:
        """Whether the last that was heard of it was good, and it is not silent."""
        silent = self.deadline is not None and now > self.deadline
        return bool(self.turns) and self.turns[-1][1] is State.PROTECTED and not silent


class SiteView:
    """What is known of home connections within one decision: read from `Sites`, changed here alone.

    `changed` are the reference agents that the decision leaves otherwise than it found them, None for one that is none
    any more: `Sites.apply` takes them once the decision is committed.
    """

    def __init__(
        self,
        by_name: Mapping[str, Reference],
        by_site: Mapping[str, dict[str, Reference]],
        pulsed: Callable[[str], Span | None],
    ) -> None:
        self._by_name = by_name
        self._by_site = by_site
        self._pulsed = pulsed
        self.changed: dict[str, Reference | None] = {}
        self._changed_sites: dict[str, dict[str, Reference]] = {}

    def saw(self, name: str, site: str, homes: tuple[Home, ...], since: float, at: float, state: State) -> None:
        """Take one observation of the reference agent `name`, made at `at`, whose verdict held since `since`."""
        known = self._of_name(name)
        if known is None or known.site != site:
            known = Reference(site)
        if state in (State.PROTECTED, State.DOWN):
            known = known.said(min(since, at), state)
        well_at = max(known.well_at, at) if state is State.PROTECTED else known.well_at
        self.put(name, replace(known, homes=homes, seen_at=max(known.seen_at, at), well_at=well_at))

    def heard(self, name: str, deadline: float, patience: float) -> None:
        if (known := self._of_name(name)) is not None:
            self.put(name, replace(known, deadline=deadline, patience=patience))

    def silent(self, name: str, patience: float) -> None:
        """Nothing came from `name` for so many seconds: from its last word on, nothing is known of it."""
        if (known := self._of_name(name)) is not None:
            known = known.said(known.seen_at + _JUST_AFTER_S, State.SILENT)
            self.put(name, replace(known, deadline=None, patience=patience))

    def forget(self, name: str) -> None:
        """`name` is no reference agent any more."""
        if self._of_name(name) is not None:
            self.put(name, None)

    def homes(self, site: str) -> tuple[IPNetwork, ...]:
        """The networks that must not be seen outside the tunnels of `site`."""
        return tuple(home.network for known in self._of_site(site).values() for home in known.homes)

    def up(self, site: str, at: float, well_until: float, began: float, rtt: float = 0.0) -> bool | None:
        """Whether the internet of `site` worked at `at`; None when nobody can tell. See `Reference.up`."""
        known = self._of_site(site).items()
        said = {reference.up(at, well_until, began, rtt, self._pulsed(name)) for name, reference in known}
        return True if True in said else False if False in said else None

    def pulses(self, name: str, now: float) -> bool:
        """Whether pulses of the agent `name` come, whatever becomes of its reports."""
        span = self._pulsed(name)
        return span is not None and now - span[1] < _PULSING_S

    def may_tell(self, site: str, now: float) -> bool:
        """Whether a reference agent of `site` was well when last heard of: it tells soon if home has no internet."""
        return any(known.works(now) for known in self._of_site(site).values())

    def merged(self) -> tuple[dict[str, Reference], dict[str, dict[str, Reference]]]:
        """All reference agents as they are here, by name and by site."""
        return _merged(self._by_name, self.changed), _merged(self._by_site, self._changed_sites)

    def _of_name(self, name: str) -> Reference | None:
        return self.changed[name] if name in self.changed else self._by_name.get(name)

    def _of_site(self, site: str) -> Mapping[str, Reference]:
        if not site:
            return {}
        changed = self._changed_sites.get(site)
        return changed if changed is not None else self._by_site.get(site, {})

    def put(self, name: str, reference: Reference | None) -> None:
        """From now on `reference` is what is known of the agent `name`; None: it is no reference agent."""
        was = self._of_name(name)
        self.changed[name] = reference
        if was is not None and (reference is None or reference.site != was.site):
            del self._own(was.site)[name]
        if reference is not None:
            self._own(reference.site)[name] = reference

    def _own(self, site: str) -> dict[str, Reference]:
        """The reference agents of a site, to be changed here: copied once, in their order."""
        if (own := self._changed_sites.get(site)) is None:
            own = self._changed_sites[site] = dict(self._by_site.get(site, {}))
        return own


class Sites:
    """Reference agents by name and by site, as the committed reports left them.

    `pulsed` tells when, by the server's clock, pulses of an agent last came over the internet; `moved` by how much that
    clock has been set: see `domain.machine.Memory`.
    """

    def __init__(
        self, pulsed: Callable[[str], Span | None] = lambda _: None, moved: Callable[[], float] = lambda: 0.0
    ) -> None:
        self._pulsed = pulsed
        self._moved = moved
        self._by_name: dict[str, Reference] = {}
        self._by_site: dict[str, dict[str, Reference]] = {}

    def view(self) -> SiteView:
        """For one decision. Neither this nor what it was made from changes the other."""
        return SiteView(self._by_name, self._by_site, self._pulsed)

    def apply(self, changed: Mapping[str, Reference | None]) -> None:
        """Take over what a committed decision changed (`SiteView.changed`)."""
        if changed:
            view = self.view()
            for name, reference in changed.items():
                view.put(name, reference)
            self._by_name, self._by_site = view.merged()

    def move(self, by: float) -> None:
        """The clock was set forward by so many seconds."""
        self._put({name: reference.moved(by) for name, reference in self._by_name.items()})

    def _put(self, references: dict[str, Reference]) -> None:
        by_site: dict[str, dict[str, Reference]] = {}
        for name, known in references.items():
            by_site.setdefault(known.site, {})[name] = known
        self._by_name, self._by_site = references, by_site

    async def load(self, store: Store, now: float) -> None:
        """Take over what the database holds, where it is newer than what is here. Raises StoreUnavailable."""
        c, moved_by = tunnels.c, self._moved()
        found = await store.read(
            select(c.id, c.name, c.site, c.state, c.since, c.memory, c.seen_at, c.last_seen, c.deadline).where(
                c.site > "", c.role == REFERENCE
            )
        )
        lately = or_(incidents.c.closed_at.is_(None), incidents.c.closed_at > now - HOME_KEPT_S)
        spans = await store.read(
            select(incidents).join(tunnels, c.id == incidents.c.tunnel_id).where(c.role == REFERENCE, lately)
        ) if found else ()  # fmt: skip
        if moved_by != self._moved():
            return  # the clock was set meanwhile: these times are of before, or some of them
        fresh: dict[str, Reference] = {}
        for row in found:
            known = self._by_name.get(row.name)
            if known is not None and known.site == row.site and known.seen_at >= row.seen_at:
                fresh[row.name] = replace(known, deadline=row.deadline)
            elif (read := _read(row, spans, moved_by)) is not None:
                fresh[row.name] = read
        self._put(fresh)

    async def run(self, store: Store, clock: Clock) -> None:
        """Refresh for ever."""
        while True:
            await asyncio.sleep(_REFRESH_S)
            try:
                await self.load(store, clock.wall())
            except StoreUnavailable as e:
                log.debug("sites were not read", extra={"reason": e.reason})


def _merged(base: Mapping[str, V], changed: Mapping[str, V | None]) -> dict[str, V]:
    """`base` with what was changed; what is None or empty is gone. Costs far less than grouping all by site again."""
    whole = dict(base)
    for name, value in changed.items():
        if value:
            whole[name] = value
        else:
            whole.pop(name, None)
    return whole


def newest(homes: Sequence[Home], seen: Iterable[IPNetwork], at: float) -> tuple[Home, ...]:
    """The homes of a reference agent after it was seen in the networks `seen`: those it left stay for a day."""
    ages: Mapping[IPNetwork, float] = {h.network: h.seen_at for h in homes} | dict.fromkeys(seen, at)
    last = max(ages.values(), default=at)
    kept = sorted(
        (Home(network=n, seen_at=t) for n, t in ages.items() if t > last - HOME_KEPT_S), key=lambda h: h.seen_at
    )
    return tuple(kept[-_MAX_HOMES:])


def silent_too(row: TunnelRow, company: Sequence[Row[Any]], now: float) -> tuple[str, ...]:
    """All others that reported from the site of `row` as late as it did, when none of them is heard any more.

    `company` are rows of the site: name, site, interval, last_seen.
    """
    if not row.site:
        return ()
    others = [m for m in company if m.site == row.site and m.name != row.name]
    lately = [m for m in others if m.last_seen > row.last_seen - m.interval - row.interval - _REPORT_TRANSIT_S]
    if all(now - m.last_seen > m.interval + _REPORT_TRANSIT_S for m in lately):
        return tuple(sorted(m.name for m in lately))
    return ()


def _read(row: Row[Any], spans: Sequence[Row[Any]], moved_by: float) -> Reference | None:
    try:
        memory = _memory(row.memory) if row.memory else Memory(moved=moved_by)
    except (ValueError, RecursionError):
        log.warning("a reference agent's past cannot be read", extra={"tunnel": row.name})
        return None
    memory = moved(memory, moved_by - memory.moved)
    patience = max(0.0, row.deadline - row.last_seen) if row.deadline is not None else 0.0
    well = memory.state is State.PROTECTED and memory.candidate is None
    known = Reference(
        row.site,
        memory.homes,
        seen_at=row.seen_at,
        well_at=row.seen_at if well else 0.0,
        deadline=row.deadline,
        patience=patience,
    )
    if memory.state is not State.PENDING:
        known = known.said(0.0, State.PROTECTED)
    for span in sorted((s for s in spans if s.tunnel_id == row.id), key=lambda s: s.opened_at):
        known = known.said(span.opened_at, State.DOWN if span.worst == State.DOWN else State.SILENT)
        if span.closed_at is not None:
            known = known.said(span.closed_at, State.PROTECTED)
    if memory.candidate is not None and memory.candidate.state in (State.DOWN, State.PROTECTED):
        known = known.said(memory.candidate.since, memory.candidate.state)
    return known
