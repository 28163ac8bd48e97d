"""The state of each site's reference agents: its home networks, and when its internet connection was down.

A small table in memory, filled from the database at the start and refreshed with what other replicas stored. The
tracker adds what this server itself commits, so that the table is never older than a report of this server.
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
# How long an address still counts as home after a reference agent was last seen there.
HOME_KEPT_S: Final = 86400.0
_REFRESH_S: Final = 2.0
_MAX_HOMES: Final = 16
_MAX_STATE_CHANGES: Final = 64
_JUST_AFTER_S: Final = 0.001
_REPORT_TRANSIT_S: Final = 2.0
# A reference agent may detect an outage of home this much later than its tunnel does: a pulse interval and a margin.
_MAX_DETECTION_DELAY_S: Final = 3.0
# A pulse that arrives sooner than this (plus the tunnel's round trip) after the trouble began may have been sent before
# it. A dead tunnel is detected after 2.3 s at the earliest, and pulses are at most 1.7 s apart: so while home is well,
# one has arrived by then.
_PULSE_TRANSIT_S: Final = 0.1
# An agent whose last pulse is older than this has stopped sending them; pulses are at most 1.7 s apart.
_PULSE_TIMEOUT_S: Final = 2.0
# Begin and end of a time in which pulses came without a gap, in seconds since the epoch.
Span = tuple[float, float]

V = TypeVar("V")

_memory: Final = decoder(Memory)


@dataclass(frozen=True, slots=True)
class Reference:
    """One reference agent. `changes` are its states, each with the time since which it held, oldest first.

    `seen_at` is the time of its last observation, `well_at` of the last that found home well. At `deadline`,
    `silent_after` seconds after its last report, it counts as silent.
    """

    site: str
    homes: tuple[Home, ...] = ()
    changes: tuple[tuple[float, State], ...] = ()
    seen_at: float = 0.0
    well_at: float = 0.0
    deadline: float | None = None
    silent_after: float = 0.0

    def moved(self, by: float) -> "Reference":
        """The same after the clock was set forward by `by` seconds."""
        return replace(
            self,
            homes=tuple(Home(network=h.network, seen_at=h.seen_at + by) for h in self.homes),
            changes=tuple((since + by, state) for since, state in self.changes),
            seen_at=self.seen_at + by,
            well_at=self.well_at + by,
            deadline=None if self.deadline is None else self.deadline + by,
        )

    def with_state(self, since: float, state: State) -> "Reference":
        """The same with `state` from `since` on; any later changes were assumptions and are dropped."""
        changes = tuple(c for c in self.changes if c[0] < since)
        if not changes or changes[-1][1] is not state:
            changes = (*changes, (since, state))[-_MAX_STATE_CHANGES:]
        return self if changes == self.changes else replace(self, changes=changes)

    def up(self, at: float, well_until: float, began: float, rtt: float, pulsed: Span | None) -> bool | None:
        """Whether home had internet at `at`; None: unknown.

        The tunnel that asks was well until `well_until` and in trouble since `began`; `rtt` is its round trip in
        seconds. A silent reference agent means that home had none, unless the tunnel still worked in that time. An
        observation from before the trouble proves nothing about it. Pulses without a gap from before the trouble until
        after it began prove that home was up; pulses that only came back after an outage do not.
        """
        state, since = State.UNKNOWN, 0.0
        for changed_at, new in self.changes:
            if changed_at > at:
                # Both died together; the reference agent's first missing pulse was only due later than the tunnel's.
                if new is State.DOWN and changed_at < began + _MAX_DETECTION_DELAY_S:
                    return False
                break
            state, since = new, changed_at
        if state is State.DOWN:
            return False
        if state is State.PROTECTED and self.deadline is not None and at > self.deadline > self.seen_at:
            state, since = State.SILENT, self.seen_at
        if state is State.SILENT:
            return False if well_until <= since + self.silent_after else None
        through = pulsed is not None and pulsed[0] < began and pulsed[1] >= began + rtt + _PULSE_TRANSIT_S
        return True if state is State.PROTECTED and (self.well_at >= began or through) else None

    def works(self, now: float) -> bool:
        """Whether its last state was good, and it is not silent."""
        silent = self.deadline is not None and now > self.deadline
        return bool(self.changes) and self.changes[-1][1] is State.PROTECTED and not silent


class SiteView:
    """What one decision knows of home connections: read from `Sites`, and changed only in this view.

    `changed` are the reference agents that the decision changed, None for one that is a reference agent no longer:
    `Sites.apply` takes them over once the decision is committed.
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

    def add_observation(
        self, name: str, site: str, homes: tuple[Home, ...], since: float, at: float, state: State
    ) -> None:
        """Add one observation of the reference agent `name`, made at `at`; `state` has held since `since`."""
        known = self._of_name(name)
        if known is None or known.site != site:
            known = Reference(site)
        if state in (State.PROTECTED, State.DOWN):
            known = known.with_state(min(since, at), state)
        well_at = max(known.well_at, at) if state is State.PROTECTED else known.well_at
        self.put(name, replace(known, homes=homes, seen_at=max(known.seen_at, at), well_at=well_at))

    def set_deadline(self, name: str, deadline: float, silent_after: float) -> None:
        if (known := self._of_name(name)) is not None:
            self.put(name, replace(known, deadline=deadline, silent_after=silent_after))

    def add_silence(self, name: str, silent_after: float) -> None:
        """Note that nothing came from `name` for `silent_after` seconds: it is silent since its last observation."""
        if (known := self._of_name(name)) is not None:
            known = known.with_state(known.seen_at + _JUST_AFTER_S, State.SILENT)
            self.put(name, replace(known, deadline=None, silent_after=silent_after))

    def forget(self, name: str) -> None:
        """`name` is a reference agent no longer."""
        if self._of_name(name) is not None:
            self.put(name, None)

    def homes(self, site: str) -> tuple[IPNetwork, ...]:
        """The home networks of `site`: an address in them shows that traffic left outside the tunnel."""
        return tuple(home.network for known in self._of_site(site).values() for home in known.homes)

    def up(self, site: str, at: float, well_until: float, began: float, rtt: float = 0.0) -> bool | None:
        """Whether the internet of `site` worked at `at`; None when no reference agent knows. See `Reference.up`."""
        known = self._of_site(site).items()
        answers = {reference.up(at, well_until, began, rtt, self._pulsed(name)) for name, reference in known}
        return True if True in answers else False if False in answers else None

    def pulses(self, name: str, now: float) -> bool:
        """Whether pulses of the agent `name` arrive, with or without reports."""
        span = self._pulsed(name)
        return span is not None and now - span[1] < _PULSE_TIMEOUT_S

    def has_working_reference(self, site: str, now: float) -> bool:
        """Whether a reference agent of `site` was well at its last report: it would soon report that home is down."""
        return any(known.works(now) for known in self._of_site(site).values())

    def merged(self) -> tuple[dict[str, Reference], dict[str, dict[str, Reference]]]:
        """All reference agents as this view has them, by name and by site."""
        return _merged(self._by_name, self.changed), _merged(self._by_site, self._changed_sites)

    def _of_name(self, name: str) -> Reference | None:
        return self.changed[name] if name in self.changed else self._by_name.get(name)

    def _of_site(self, site: str) -> Mapping[str, Reference]:
        if not site:
            return {}
        changed = self._changed_sites.get(site)
        return changed if changed is not None else self._by_site.get(site, {})

    def put(self, name: str, reference: Reference | None) -> None:
        """Set what is known of the agent `name`; None: it is no reference agent."""
        before = self._of_name(name)
        self.changed[name] = reference
        if before is not None and (reference is None or reference.site != before.site):
            del self._writable(before.site)[name]
        if reference is not None:
            self._writable(reference.site)[name] = reference

    def _writable(self, site: str) -> dict[str, Reference]:
        """This view's own copy of a site's reference agents, in their order; copied at the first call."""
        if (own := self._changed_sites.get(site)) is None:
            own = self._changed_sites[site] = dict(self._by_site.get(site, {}))
        return own


class Sites:
    """Reference agents by name and by site, as the committed reports left them.

    `pulsed` gives the last time span, by the server's clock, in which an agent's pulses came over the internet;
    `clock_moved` by how much that clock has been set: see `domain.machine.Memory`.
    """

    def __init__(
        self, pulsed: Callable[[str], Span | None] = lambda _: None, clock_moved: Callable[[], float] = lambda: 0.0
    ) -> None:
        self._pulsed = pulsed
        self._clock_moved = clock_moved
        self._by_name: dict[str, Reference] = {}
        self._by_site: dict[str, dict[str, Reference]] = {}

    def view(self) -> SiteView:
        """A view for one decision. Changes in it do not reach this object, nor the reverse."""
        return SiteView(self._by_name, self._by_site, self._pulsed)

    def apply(self, changed: Mapping[str, Reference | None]) -> None:
        """Take over the changes of a committed decision (`SiteView.changed`)."""
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
        """Take over what the database holds, where it is newer than this table. Raises StoreUnavailable."""
        c, moved_by = tunnels.c, self._clock_moved()
        found = await store.read(
            select(c.id, c.name, c.site, c.state, c.since, c.memory, c.seen_at, c.last_seen, c.deadline).where(
                c.site > "", c.role == REFERENCE
            )
        )
        lately = or_(incidents.c.closed_at.is_(None), incidents.c.closed_at > now - HOME_KEPT_S)
        spans = await store.read(
            select(incidents).join(tunnels, c.id == incidents.c.tunnel_id).where(c.role == REFERENCE, lately)
        ) if found else ()  # fmt: skip
        if moved_by != self._clock_moved():
            return  # the clock was set meanwhile: some or all of these times are by the old clock
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
    """`base` with the changes; what is None or empty is removed. Much cheaper than grouping all by site again."""
    whole = dict(base)
    for name, value in changed.items():
        if value:
            whole[name] = value
        else:
            whole.pop(name, None)
    return whole


def newest(homes: Sequence[Home], seen: Iterable[IPNetwork], at: float) -> tuple[Home, ...]:
    """The homes of a reference agent after it was seen in the networks `seen`; one that it left is kept for a day."""
    ages: Mapping[IPNetwork, float] = {h.network: h.seen_at for h in homes} | dict.fromkeys(seen, at)
    last = max(ages.values(), default=at)
    kept = sorted(
        (Home(network=n, seen_at=t) for n, t in ages.items() if t > last - HOME_KEPT_S), key=lambda h: h.seen_at
    )
    return tuple(kept[-_MAX_HOMES:])


def silent_too(row: TunnelRow, site_members: Sequence[Row[Any]], now: float) -> tuple[str, ...]:
    """The names of all others that reported from the site of `row` as late as it did, if all of them are silent now.

    `site_members` are rows of the site: name, site, interval, last_seen.
    """
    if not row.site:
        return ()
    others = [m for m in site_members if m.site == row.site and m.name != row.name]
    lately = [m for m in others if m.last_seen > row.last_seen - m.interval - row.interval - _REPORT_TRANSIT_S]
    if all(now - m.last_seen > m.interval + _REPORT_TRANSIT_S for m in lately):
        return tuple(sorted(m.name for m in lately))
    return ()


def _read(row: Row[Any], spans: Sequence[Row[Any]], moved_by: float) -> Reference | None:
    try:
        memory = _memory(row.memory) if row.memory else Memory(moved=moved_by)
    except (ValueError, RecursionError):
        log.warning("a reference agent's memory cannot be read", extra={"tunnel": row.name})
        return None
    memory = moved(memory, moved_by - memory.moved)
    silent_after = max(0.0, row.deadline - row.last_seen) if row.deadline is not None else 0.0
    well = memory.state is State.PROTECTED and memory.candidate is None
    known = Reference(
        row.site,
        memory.homes,
        seen_at=row.seen_at,
        well_at=row.seen_at if well else 0.0,
        deadline=row.deadline,
        silent_after=silent_after,
    )
    if memory.state is not State.PENDING:
        known = known.with_state(0.0, State.PROTECTED)
    for span in sorted((s for s in spans if s.tunnel_id == row.id), key=lambda s: s.opened_at):
        known = known.with_state(span.opened_at, State.DOWN if span.worst == State.DOWN else State.SILENT)
        if span.closed_at is not None:
            known = known.with_state(span.closed_at, State.PROTECTED)
    if memory.candidate is not None and memory.candidate.state in (State.DOWN, State.PROTECTED):
        known = known.with_state(memory.candidate.since, memory.candidate.state)
    return known
