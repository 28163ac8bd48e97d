"""The one transaction: read the tunnels' states, judge, advance, write what follows, all or nothing.

Whatever enters, a report, a sighting or a passed deadline, goes through here; nothing else changes a tunnel's state.
"""

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

from sqlalchemy import select

from vpn_sentinel.domain import timeshift
from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.machine import Event, Memory, Moved, Revised, advance, overdue, silence_finding
from vpn_sentinel.domain.notice import notices
from vpn_sentinel.domain.observation import Observation, Trigger
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, Policy, is_public
from vpn_sentinel.domain.verdict import Code, Finding, State
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server import works as entering
from vpn_sentinel.server.groupcommit import GroupCommit
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.namesakes import Namesakes
from vpn_sentinel.server.showing import CLOCK_SKEW, complete, of_receipt, show
from vpn_sentinel.server.sites import REFERENCE, Sites, silent_too
from vpn_sentinel.server.store.owing import owed
from vpn_sentinel.server.store.schema import tunnels
from vpn_sentinel.server.store.store import Changes, Store, TunnelRow
from vpn_sentinel.server.weighing import Scales, silence_between
from vpn_sentinel.server.works import Arrival, PortTried, Sighting, Work
from vpn_sentinel.server.writes import Writes, record
from vpn_sentinel.wire.codec import decoder, encode, encode_observation

log = logging.getLogger(__name__)

# A tunnel whose row trips the program is looked at again after so many seconds.
_AGAIN: Final = 300.0
# Pulses that were seen in trouble so many seconds ago are a sign of life: no silence, though reports stay away.
_PULSED: Final = 15.0
# So many seconds the agent's own word, that its tunnel is alive, stands against "your pulses are unheard".
_REFUTED: Final = 600.0
# Ports below belong to a system's own services: no VPN forwards them, and nobody should be made to knock there.
_LEAST_PORT: Final = 1024
# Seconds before an agent could speak that what it saw still stands for now.
_LATELY: Final = 2.0
# Seconds that a reference agent gets to find out that home is down, when a tunnel there died: three of its pulses.
_HOME_TELLS: Final = 6.0
_MAYBE_HOME: Final = frozenset({Code.NO_TRAFFIC, Code.UPLINK_DOWN})


_memory: Final = decoder(Memory)
_policy: Final = decoder(Policy)


class Tracker:
    """Takes arrivals, answers when they are durable.

    `channels` are the names of the channels that every notice is owed to; `on_commit` is called after each commit that
    owes something. `own_address` gives the server's own public address, which stands for the home of old clients
    whose owner declared none, as the replaced system had it. `moved` is by how much the clock has been set: see
    `domain.machine.Memory`.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        hub: Hub,
        policy: Policy,
        channels: Sequence[str] = (),
        on_commit: Callable[[], None] = lambda: None,
        own_address: Callable[[], tuple[IPNetwork, ...]] = lambda: (),
        sites: Sites | None = None,
        moved: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._store = store
        self._clock = clock
        self._hub = hub
        self._default = policy
        self._channels = tuple(channels)
        self._on_commit = on_commit
        self._own_address = own_address
        self._moved = moved
        self._keepalive_policy = policy
        # By tunnel: what its last keepalive said and left it in, and the verdict, where it moved nothing.
        self._steady: dict[str, tuple[int, str]] = {}
        self._sites = sites or Sites()
        self._scales = Scales(policy, self._sites)
        # By tunnel: the addresses of either version that its pulses came from.
        self._sighted: dict[str, dict[int, IPAddress]] = {}
        # Tunnels whose agents report beside them on purpose: what of theirs comes from home proves nothing.
        self._beside: set[str] = set()
        self._namesakes = Namesakes()
        self._shared: set[str] = set()  # names of which it was logged that several agents use them
        # By tunnel: the forwarded port, at an address that its packets really came from.
        self.forwarded: dict[str, tuple[IPAddress, int]] = {}
        self._commits = GroupCommit(self._take)

    async def submit(self, arrival: Arrival) -> None:
        """Return when `arrival` is committed. Raises StoreUnavailable, or Busy when too many wait."""
        await self._commits.put(arrival)

    async def sighted(self, sighting: Sighting) -> None:
        """Take what the server itself saw of a tunnel's pulses; only trouble is stored. Raises as `submit` does.

        Without effect for a name that has no tunnel, and for a reference agent.
        """
        await self._commits.put(sighting)

    async def tried(self, port: PortTried) -> None:
        """Keep how an attempt to reach a forwarded port ended, to judge what the agent sees next by it.

        Raises as `submit` does.
        """
        await self._commits.put(port)

    async def run(self) -> None:
        """Commit what waits, for ever. On cancellation whoever waits is told that the server is going."""
        await self._commits.run()

    async def _take(self, works: Sequence[Work]) -> None:
        """Commit works of one kind: arrivals, which make the tunnels that they name, or notes, which do not."""
        now = self._clock.wall()
        # What a reference agent says counts for what the tunnels of its site say at the same moment.
        works = sorted(works, key=lambda w: isinstance(w, Arrival) and w.role != REFERENCE)
        writes = Writes()

        def decide(found: Mapping[str, TunnelRow]) -> Changes:
            nonlocal writes
            writes = Writes()
            for work in works:
                if isinstance(work, Arrival):
                    self._apply(found[work.tunnel], work, now, writes)
                elif (row := found.get(work.tunnel)) is not None and isinstance(work, Sighting):
                    self._sight(row, work, now, writes)
                elif row is not None and isinstance(work, PortTried):
                    self._keep_port_check(row, work, writes)
            return writes.changes()

        names = list(dict.fromkeys(w.tunnel for w in works))
        await self._store.transact(names, now, decide, create=isinstance(works[0], Arrival))
        self._committed(writes)

    @asynccontextmanager
    async def still(self) -> AsyncIterator[Callable[[float], None]]:
        """Nothing is committed meanwhile. Yields what to call in it when the clock was set, with the seconds: all that
        waits and all that is known here goes with it.
        """
        async with self._commits.busy:
            yield self._move

    def _move(self, by: float) -> None:
        self._commits.amend(lambda work: entering.moved(work, by))
        self._sites.move(by)
        self._namesakes.move(by)

    async def sweep(self, names: Sequence[str], now: float, grace: float = 0.0) -> None:
        """Make those of the tunnels `names` silent whose deadline has really passed, `grace` seconds ago or earlier.

        Raises StoreUnavailable.

        The deadline is read again under the row's lock, so of many replicas exactly one makes the transition, and a
        report that came in between keeps the tunnel alive.
        """
        writes = Writes()
        c, own = tunnels.c, tunnels.alias()
        sites = select(own.c.site).where(own.c.name.in_(names), own.c.site != "")
        company = await self._store.read(select(c.name, c.site, c.interval, c.last_seen).where(c.site.in_(sites)))

        def decide(found: Mapping[str, TunnelRow]) -> Changes:
            nonlocal writes
            writes = Writes()
            for row in found.values():
                if row.deadline is None or row.deadline > now - grace:
                    continue
                writes.take(self._silenced(row, row.deadline, now, silent_too(row, company, now)))
            return writes.changes()

        await self._store.transact(names, now, decide, create=False)
        self._committed(writes)

    def _silenced(self, row: TunnelRow, deadline: float, now: float, others: Sequence[str]) -> Writes:
        writes = Writes()
        if row.seen_at > row.last_seen and abs(now - row.seen_at) < _PULSED:
            row.deadline = now + _PULSED
            return Writes(tunnels={row.id: row})
        try:
            before = self._load(row, now)
            pulses = self._sites.pulses(row.name, now)
            finding = silence_finding(row.last_seen, deadline, row.site, others, pulses=pulses)
            memory, events = overdue(before, deadline, finding)
            row.deadline = None
            if row.role == REFERENCE:
                self._sites.silent(row.name, deadline - row.last_seen)
            self._follow(row, before, memory, events, now, writes, caught_up=True)
        except Exception:
            # One bad row, say of a newer version, must not keep the others from being watched.
            log.exception("a deadline could not be judged", extra={"tunnel": row.name})
            row.deadline = now + _AGAIN
            return Writes(tunnels={row.id: row})
        return writes

    def _committed(self, writes: Writes) -> None:
        for name, moved in writes.moves:
            _say(name, moved)
        self._hub.publish({row.name for row in (*writes.tunnels.values(), *writes.touched.values())})
        if writes.deliveries:
            self._on_commit()

    def _apply(self, row: TunnelRow, arrival: Arrival, now: float, writes: Writes) -> None:
        policy = self._policy_for(arrival)
        if arrival.spool is None and self._same_again(row, arrival, writes):
            return
        _introduce(row, arrival)
        was, before = row.memory, self._load(row, now)
        memory, events, home_known, well = before, list[Event](), False, False
        spool = arrival.name_of_spool(row.spool, row.seq)
        last = row.seq if row.spool == spool else 0
        sighted = self._sighted.get(row.name, {}).values()
        came_from = tuple(a for a in (arrival.peer, *sighted) if a is not None and arrival.spool is not None)
        extra = self._of_receipt(row, arrival, spool, memory)
        for item in arrival.observations:
            # Milliseconds, so that the numbers go on where they were when a tunnel's other kind of sender stops.
            seq = item.seq if arrival.spool is not None else max(last + 1, int(1000 * item.at))
            if seq <= last:
                continue  # a replay of what the database holds changes nothing
            if arrival.spool is not None and seq == last + 1:
                memory, gap = silence_between(memory, item.at, arrival.silent_after)
                events += gap
            last = seq
            seen = self._scales.informed(row, memory, item.observation, item.at, came_from)
            home_known = seen.reference_up is not None
            memory, verdict, more = self._scales.weigh(row, memory, seen, item.at, policy, extra)
            events += more
            well = verdict.state in (State.PROTECTED, State.DEGRADED)
            writes.saw(row.id, spool, seq, item.at, arrival.received_at, verdict, seen)
            show(row, seen)
        row.spool, row.seq = spool, last
        if well and arrival.caught_up:
            self._note_way(row, arrival, policy.with_home(self._scales.home(row.site, memory.home)))
        self._note_sender(row, arrival)
        # After a silence the first words are of the time before the agent could speak; how things stand now follows.
        # That all is well is as good as new: an agent that was started looks around before it connects.
        lately = _LATELY if memory.state is State.PROTECTED else 0.0
        stale = before.told is State.SILENT and memory.seen_at < min(arrival.connected_at, now) - lately
        waits = not home_known and self._waits_for_home(row, memory, now)
        self._follow(row, before, memory, events, now, writes, caught_up=arrival.caught_up and not stale and not waits)
        if arrival.spool is None:
            self._steady.pop(row.name, None)
            # The same again would move as little: what depends on time (a grace, a wrong clock) is not of this kind.
            if row.memory == was and memory.candidate is None and not extra:
                self._steady[row.name] = (_mark(row, arrival, seen), verdict.state.value)

    def _waits_for_home(self, row: TunnelRow, memory: Memory, now: float) -> bool:
        """Whether a dead tunnel is not told yet, because its reference agent may be about to say that home is down.

        That one pulses too, so while home is well this server knows it at once, and nothing waits; unless the pulses go
        to another replica, or come over a LAN, or not at all. An interface that is gone waits never: home has no part
        in that.
        """
        fresh = memory.state is State.DOWN and memory.seen_at - memory.since < _HOME_TELLS
        return fresh and any(f.code in _MAYBE_HOME for f in memory.findings) and self._sites.may_tell(row.site, now)

    def _of_receipt(self, row: TunnelRow, arrival: Arrival, spool: str, memory: Memory) -> tuple[Finding, ...]:
        """What this server finds beside the agent's rounds."""
        known = any(f.code is Code.NAME_SHARED for f in memory.findings)
        shared = self._namesakes.heard(row.name, spool, row.spool, arrival.received_at, arrival.interval, known=known)
        if shared and row.name not in self._shared:
            self._shared.add(row.name)
            log.warning(
                "several agents report as one tunnel: what is told of it is now the one's, now the other's",
                extra={"tunnel": row.name, "remedy": "give each its own VPN_SENTINEL_CLIENT_ID"},
            )
        # A reference agent has no verdict of its own that could be the other's.
        return of_receipt(arrival.skew, arrival.thinned, shared=shared and row.role != REFERENCE)

    def _note_sender(self, row: TunnelRow, arrival: Arrival) -> None:
        """That it was heard, and what that means for its site and its forwarded port."""
        row.last_seen = arrival.received_at
        row.deadline = arrival.received_at + arrival.silent_after
        if row.role == REFERENCE:
            self._sites.heard(row.name, row.deadline, arrival.silent_after)
            return
        self._sites.forget(row.name)
        if arrival.spool is not None and arrival.caught_up and arrival.observations:
            self._note_port(row, arrival.observations[-1].observation, arrival.peer)

    def _note_way(self, row: TunnelRow, arrival: Arrival, policy: Policy) -> None:
        """Whether an agent that sees its tunnel well reports from home, and declares that something may go there."""
        declared = arrival.policy is not None and arrival.policy.allowed_outside
        if declared and arrival.peer is not None and policy.is_home(arrival.peer):
            self._beside.add(row.name)
        else:
            self._beside.discard(row.name)

    def _note_port(self, row: TunnelRow, seen: Observation, peer: IPAddress | None) -> None:
        """Whether the forwarded port may be tried: only at an address that this tunnel's packets came from."""
        came_from = {peer, *self._sighted.get(row.name, {}).values()}
        where = next((e for e in (seen.exit(4), seen.exit(6)) if e and e in came_from and is_public(e)), None)
        if where is None or seen.forwarded_port is None or seen.forwarded_port < _LEAST_PORT:
            self.forwarded.pop(row.name, None)
        else:
            self.forwarded[row.name] = (where, seen.forwarded_port)

    def _sight(self, row: TunnelRow, sighting: Sighting, now: float, writes: Writes) -> None:
        if row.role == REFERENCE or row.source != "agent":
            return
        public = is_public(sighting.address)
        if public:
            self._sighted.setdefault(row.name, {})[sighting.address.version] = sighting.address
        # One of a LAN tells no exit.
        address = sighting.address if public and row.name not in self._beside else None
        seen = Observation(trigger=Trigger.PULSE, reported_from=address, unheard=sighting.unheard)
        before = self._load(row, now)
        said = _policy(row.policy) if row.policy else None
        policy = self._scales.rules(said).with_home(self._scales.home(row.site, before.home))
        verdict = judge(seen, policy)
        known = _heard(before, sighting)
        refuted = known.unheard_since <= known.refuted and sighting.at - known.refuted < _REFUTED
        # After a silence the agent's replay is on its way, and knows better than pulses that have only just come back.
        may_be_down = not refuted and known.state is not State.SILENT
        if verdict.state is State.LEAKING or (verdict.state is State.DOWN and may_be_down):
            # Whoever calls them unheard has waited before; a leak is as old as its packet.
            began = sighting.at - policy.grace_down if verdict.state is State.DOWN else None
            memory, events = advance(known, verdict, sighting.at, policy, began=began)
        elif known is not before:
            memory, events = known, list[Event]()
        else:
            return
        writes.saw(row.id, "pulse", int(1000 * sighting.at), sighting.at, now, verdict, seen)
        self._follow(row, before, memory, events, now, writes, caught_up=True)

    def _same_again(self, row: TunnelRow, arrival: Arrival, writes: Writes) -> bool:
        """Take a keepalive that says what the last one said, if that one moved nothing; else leave it to be judged.

        Most keepalives are of this kind, and judging them anew costs several times as much.
        """
        item, steady = arrival.observations[0], self._steady.get(row.name)
        if steady is None or _extras(arrival) or steady[0] != _mark(row, arrival, item.observation):
            return False
        row.seq = max(row.seq + 1, int(1000 * item.at))
        row.seen_at = max(row.seen_at, item.at)
        row.last_seen = arrival.received_at
        row.deadline = arrival.received_at + arrival.silent_after
        body = encode_observation(item.observation).decode()
        writes.observations.append((row.id, row.spool, row.seq, item.at, arrival.received_at, steady[1], body))
        writes.touched[row.id] = row
        return True

    def _policy_for(self, arrival: Arrival) -> Policy:
        """What it is judged by. A keepalive declares nothing: its home is the server's, unless one is set."""
        own = self._default
        if arrival.policy is not None:
            return self._scales.rules(arrival.policy)
        policy = own if own.home_networks else own.with_home(self._own_address())
        if policy != self._keepalive_policy:
            self._keepalive_policy = policy
            self._steady.clear()
        return self._keepalive_policy

    def _follow(
        self,
        row: TunnelRow,
        before: Memory,
        memory: Memory,
        events: Sequence[Event],
        now: float,
        writes: Writes,
        *,
        caught_up: bool,
    ) -> None:
        """Write what a step leads to: transitions, incidents, what is owed to people, and the row itself."""
        memory, told = notices(before, memory, events, caught_up=caught_up)
        for event in events:
            record(row.id, event, now, writes)
            if isinstance(event, Moved | Revised):
                writes.moves.append((row.name, event))
        for notice in told:
            writes.deliveries += owed(complete(notice, row), self._channels, now)
        row.seen_at = memory.seen_at
        if memory is not before or not row.memory:
            row.memory = encode(replace(memory, seen_at=0.0)).decode()
            if memory.findings != before.findings:
                row.findings = encode(memory.findings).decode()
        row.state, row.since = memory.state.value, memory.since or row.created_at
        writes.tunnels[row.id] = row

    def _keep_port_check(self, row: TunnelRow, tried: PortTried, writes: Writes) -> None:
        """Since when an answer has been the same is kept: its trouble began then."""
        memory = self._load(row, tried.at)
        since = memory.port_checked_at if memory.port_check == tried.check else tried.at
        row.memory = encode(replace(memory, port_check=tried.check, port_checked_at=since, seen_at=0.0)).decode()
        check = tried.check
        shown = {"address": str(check.address), "port": check.port, "answer": check.answer.value, "at": tried.at}
        row.port_check = encode(shown).decode()
        writes.tunnels[row.id] = row

    def _load(self, row: TunnelRow, now: float) -> Memory:
        if not row.memory:
            return Memory(moved=self._moved())
        memory = _memory(row.memory)
        # The row's own times have been moved with the clock.
        return timeshift.not_after(
            replace(timeshift.moved(memory, self._moved() - memory.moved), seen_at=row.seen_at), now
        )


def _say(name: str, event: Moved | Revised) -> None:
    """Log a transition. Not that a tunnel is there and well: of a fleet that would be thousands of lines at a start."""
    at = datetime.fromtimestamp(event.at, UTC).isoformat(timespec="seconds")
    if isinstance(event, Revised):
        log.info("the silence is void: the agent watched all along", extra={"tunnel": name, "at": at})
    elif (event.old, event.new) != (State.PENDING, State.PROTECTED):
        level = logging.INFO if event.new is State.PROTECTED else logging.WARNING
        codes = ",".join(f.code for f in event.findings)
        facts = {"tunnel": name, "state": event.new, "was": event.old, "at": at, "codes": codes}
        log.log(level, "tunnel changed", extra=facts)


def _introduce(row: TunnelRow, arrival: Arrival) -> None:
    """Take over what a sender says of itself."""
    row.source = "keepalive" if arrival.spool is None else "agent"
    row.role, row.site = arrival.role, arrival.site
    row.version, row.interval = arrival.version, arrival.interval
    row.policy = _policy_text(arrival.policy) if arrival.policy is not None else ""
    if arrival.spool is None:
        row.dns_loc, row.dns_colo = arrival.dns_loc, arrival.dns_colo


@lru_cache(maxsize=1024)
def _policy_text(policy: Policy) -> str:
    return encode(policy).decode()


def _heard(memory: Memory, sighting: Sighting) -> Memory:
    """Note since when pulses are unheard, or that they are heard again."""
    if sighting.unheard is (memory.unheard_since > 0):
        return memory
    return replace(memory, unheard_since=sighting.at if sighting.unheard else 0.0, refuted=0.0)


def _mark(row: TunnelRow, arrival: Arrival, seen: Observation) -> int:
    """Tells one keepalive, and the memory that it met, from another; costs less memory than keeping them."""
    said = (seen.exit(4), seen.exit(6), seen.reported_from, seen.places)
    return hash((row.spool, row.memory, said, arrival.version, arrival.dns_loc, arrival.dns_colo))


def _extras(arrival: Arrival) -> bool:
    """Whether the arrival itself tells of a wrong clock, or of rounds that never came."""
    return bool(arrival.thinned) or (arrival.skew is not None and abs(arrival.skew) > CLOCK_SKEW)
