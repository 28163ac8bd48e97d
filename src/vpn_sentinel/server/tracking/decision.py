"""What follows from what entered: the pure core of the server's one transaction.

`decide` and `decide_silences` do no I/O, ask no clock, and change nothing but what they return and the rows that they
were given, which are the transaction's own copies. So a transaction may run twice, and one that fails leaves no trace:
`Effects` count once the changes are committed, and not before.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import Row

from vpn_sentinel.domain import timeshift
from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.machine import Event, Memory, Moved, Revised, advance, overdue, silence_finding
from vpn_sentinel.domain.notice import notices
from vpn_sentinel.domain.observation import Observation, Trigger
from vpn_sentinel.domain.policy import IPAddress, Policy, is_public
from vpn_sentinel.domain.verdict import Code, Finding, State
from vpn_sentinel.server.store.outbox_rows import delivery_values
from vpn_sentinel.server.store.store import Changes, TunnelRow
from vpn_sentinel.server.tracking.enrichment import (
    MAX_CLOCK_SKEW_S,
    transport_findings,
    update_snapshot,
    with_context,
)
from vpn_sentinel.server.tracking.evaluation import Evaluator, silence_between
from vpn_sentinel.server.tracking.inputs import Input, PortCheckResult, PulseObservation, ReportBatch
from vpn_sentinel.server.tracking.knowledge import Draft, ForwardedAddress, Knowledge, Repeat
from vpn_sentinel.server.tracking.report_sources import ReportSources
from vpn_sentinel.server.tracking.sites import REFERENCE, silent_too
from vpn_sentinel.server.tracking.writes import Writes, record
from vpn_sentinel.wire.codec import decoder, encode, encode_observation

# A tunnel whose row trips the program is looked at again after so many seconds.
_RETRY_BROKEN_ROW_S: Final = 300.0
# Pulses that were seen in trouble so many seconds ago are a sign of life: no silence, though reports stay away.
_PULSE_IS_LIFE_S: Final = 15.0
# So many seconds the agent's own word, that its tunnel is alive, stands against "your pulses are unheard".
_REFUTED_FOR_S: Final = 600.0
# Ports below belong to a system's own services: no VPN forwards them, and nobody should be made to knock there.
_MIN_FORWARDED_PORT: Final = 1024
# Seconds before an agent could speak that what it saw still stands for now.
_STILL_CURRENT_S: Final = 2.0
# Seconds that a reference agent gets to find out that home is down, when a tunnel there died: three of its pulses.
_WAIT_FOR_HOME_S: Final = 6.0
_MAYBE_HOME: Final = frozenset({Code.NO_TRAFFIC, Code.UPLINK_DOWN})

_memory_of: Final = decoder(Memory)
_policy_of: Final = decoder(Policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a decision goes by beside what entered and what is known.

    `now` is the server's time in seconds since the epoch, `clock_moved` by how much it has been set (see
    `domain.machine.Memory`). `policy` are the server's rules, `keepalive_policy` those for old clients, which declare
    nothing. Every notice is owed to each of `channels`.
    """

    now: float
    clock_moved: float
    policy: Policy
    keepalive_policy: Policy
    channels: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """What happens outside the database once a decision is committed.

    `draft` is what this process knows from then on. `tunnels` are the names of those that were written, `moves` their
    changes of state. `shared` are names that several agents report under, `owes` says whether people are to be told
    something, `failures` which rows could not be judged, and why.
    """

    draft: Draft
    tunnels: frozenset[str]
    moves: tuple[tuple[str, Moved | Revised], ...]
    shared: tuple[str, ...]
    owes: bool
    failures: tuple[tuple[str, Exception], ...]


@dataclass(slots=True, kw_only=True)
class Decision(Changes):
    effects: Effects


def decide(batch: Iterable[Input], rows: Mapping[str, TunnelRow], known: Knowledge, context: Context) -> Decision:
    """What follows from a batch, in its order. `rows` by name; a report needs the row of its tunnel.

    Raises what a row or a report that cannot be judged trips over: nothing of the batch counts then.
    """
    deciding = _Deciding(known, context)
    for entering in batch:
        row = rows.get(entering.tunnel)
        if isinstance(entering, ReportBatch):
            deciding.take_reports(rows[entering.tunnel], entering)
        elif row is not None and isinstance(entering, PulseObservation):
            deciding.take_pulses(row, entering)
        elif row is not None and isinstance(entering, PortCheckResult):
            deciding.take_port_check(row, entering)
    return deciding.decision()


def decide_silences(
    rows: Iterable[TunnelRow], known: Knowledge, context: Context, grace: float, company: Sequence[Row[Any]]
) -> Decision:
    """Which of `rows` are silent, whose deadline passed `grace` seconds ago or earlier.

    `company` are the tunnels of their sites: see `sites.silent_too`. A row that cannot be judged is put off, and keeps
    no other from being watched.
    """
    deciding = _Deciding(known, context)
    for row in rows:
        if row.deadline is not None and row.deadline <= context.now - grace:
            deciding.take_silence(row, row.deadline, silent_too(row, company, context.now))
    return deciding.decision()


class _Deciding:
    """One decision in the making."""

    def __init__(self, known: Knowledge, context: Context) -> None:
        self._context = context
        self._draft = Draft(known)
        self._evaluator = Evaluator(context.policy, self._draft.sites)
        self._writes = Writes()
        self._shared: list[str] = []
        self._failures: list[tuple[str, Exception]] = []

    def decision(self) -> Decision:
        writes = self._writes
        written = (*writes.tunnels.values(), *writes.touched.values())
        effects = Effects(
            draft=self._draft,
            tunnels=frozenset(row.name for row in written),
            moves=tuple(writes.moves),
            shared=tuple(self._shared),
            owes=bool(writes.deliveries),
            failures=tuple(self._failures),
        )
        return Decision(batches=writes.batches(), effects=effects)

    def take_reports(self, row: TunnelRow, batch: ReportBatch) -> None:
        """Judge each observation that is new, and follow what they came to together."""
        policy = self._policy_for(batch)
        if batch.spool is None and self._same_again(row, batch):
            return
        _introduce(row, batch)
        was, before = row.memory, self._memory(row)
        memory, events, home_known, well = before, list[Event](), False, False
        spool = batch.name_of_spool(row.spool, row.seq)
        last = row.seq if row.spool == spool else 0
        pulsed_from = (self._draft.pulse_addresses.get(row.name) or {}).values()
        came_from = tuple(a for a in (batch.peer, *pulsed_from) if a is not None and batch.spool is not None)
        extra = self._transport_findings(row, batch, spool, memory)
        for item in batch.observations:
            # Milliseconds, so that the numbers go on where they were when a tunnel's other kind of sender stops.
            seq = item.seq if batch.spool is not None else max(last + 1, int(1000 * item.at))
            if seq <= last:
                continue  # a replay of what the database holds changes nothing
            if batch.spool is not None and seq == last + 1:
                memory, gap = silence_between(memory, item.at, batch.silent_after)
                events += gap
            last = seq
            seen = self._evaluator.enrich(row, memory, item.observation, item.at, came_from)
            home_known = seen.reference_up is not None
            memory, verdict, more, began = self._evaluator.evaluate(row, memory, seen, item.at, policy, extra)
            events += more
            well = verdict.state in (State.PROTECTED, State.DEGRADED)
            if row.role == REFERENCE:
                since = item.at if began is None else began
                self._draft.sites.saw(row.name, row.site, memory.homes, since, item.at, verdict.state)
            self._writes.saw(row.id, spool, seq, item.at, batch.received_at, verdict, seen)
            update_snapshot(row, seen)
        row.spool, row.seq = spool, last
        if well and batch.caught_up:
            self._note_way(row, batch, policy.with_home(self._evaluator.home(row.site, memory.home)))
        self._note_sender(row, batch)
        # After a silence the first words are of the time before the agent could speak; how things stand now follows.
        # That all is well is as good as new: an agent that was started looks around before it connects.
        lately = _STILL_CURRENT_S if memory.state is State.PROTECTED else 0.0
        stale = before.told is State.SILENT and memory.seen_at < min(batch.connected_at, self._context.now) - lately
        waits = not home_known and self._waits_for_home(row, memory)
        self._follow(row, before, memory, events, caught_up=batch.caught_up and not stale and not waits)
        if batch.spool is None:
            # The same again would move as little: what depends on time (a grace, a wrong clock) is not of this kind.
            moved_nothing = row.memory == was and memory.candidate is None and not extra
            repeat = Repeat(_mark(row, batch, seen), verdict.state.value) if moved_nothing else None
            self._draft.repeats.put(row.name, repeat)

    def _waits_for_home(self, row: TunnelRow, memory: Memory) -> bool:
        """Whether a dead tunnel is not told yet, because its reference agent may be about to say that home is down.

        That one pulses too, so while home is well this server knows it at once, and nothing waits; unless the pulses go
        to another replica, or come over a LAN, or not at all. An interface that is gone waits never: home has no part
        in that.
        """
        fresh = memory.state is State.DOWN and memory.seen_at - memory.since < _WAIT_FOR_HOME_S
        maybe_home = fresh and any(f.code in _MAYBE_HOME for f in memory.findings)
        return maybe_home and self._draft.sites.may_tell(row.site, self._context.now)

    def _transport_findings(
        self, row: TunnelRow, batch: ReportBatch, spool: str, memory: Memory
    ) -> tuple[Finding, ...]:
        """What this server finds besides the agent's rounds."""
        known = any(f.code is Code.NAME_SHARED for f in memory.findings)
        was = self._draft.sources.get(row.name) or ReportSources()
        sources = was.heard(spool, row.spool, batch.received_at, batch.interval, known=known)
        if sources is not was:
            self._draft.sources.put(row.name, sources)
        if shared := sources.are_several(batch.received_at):
            self._shared.append(row.name)
        # A reference agent has no verdict of its own that could be the other's.
        return transport_findings(batch.skew, batch.thinned, shared=shared and row.role != REFERENCE)

    def _note_sender(self, row: TunnelRow, batch: ReportBatch) -> None:
        """That it was heard, and what that means for its site and its forwarded port."""
        row.last_seen = batch.received_at
        row.deadline = batch.received_at + batch.silent_after
        if row.role == REFERENCE:
            self._draft.sites.heard(row.name, row.deadline, batch.silent_after)
            return
        self._draft.sites.forget(row.name)
        if batch.spool is not None and batch.caught_up and batch.observations:
            self._note_port(row, batch.observations[-1].observation, batch.peer)

    def _note_way(self, row: TunnelRow, batch: ReportBatch, policy: Policy) -> None:
        """Whether an agent that sees its tunnel well reports from home, and declares that something may go there."""
        declared = batch.policy is not None and batch.policy.allowed_outside
        beside = bool(declared) and batch.peer is not None and policy.is_home(batch.peer)
        self._draft.beside_tunnel.put(row.name, beside or None)

    def _note_port(self, row: TunnelRow, seen: Observation, peer: IPAddress | None) -> None:
        """Whether the forwarded port may be tried: only at an address that this tunnel's packets came from."""
        came_from = {peer, *(self._draft.pulse_addresses.get(row.name) or {}).values()}
        where = next((e for e in (seen.exit(4), seen.exit(6)) if e and e in came_from and is_public(e)), None)
        forwarded = None
        if where is not None and seen.forwarded_port is not None and seen.forwarded_port >= _MIN_FORWARDED_PORT:
            forwarded = ForwardedAddress(where, seen.forwarded_port)
        self._draft.forwarded.put(row.name, forwarded)

    def take_pulses(self, row: TunnelRow, pulses: PulseObservation) -> None:
        """Judge what the server itself sees of a tunnel; only trouble is stored."""
        if row.role == REFERENCE or row.source != "agent":
            return
        public = is_public(pulses.address)
        if public:
            known_addresses = self._draft.pulse_addresses.get(row.name) or {}
            self._draft.pulse_addresses.put(row.name, {**known_addresses, pulses.address.version: pulses.address})
        # One of a LAN tells no exit.
        address = pulses.address if public and not self._draft.beside_tunnel.get(row.name) else None
        seen = Observation(trigger=Trigger.PULSE, reported_from=address, unheard=pulses.unheard)
        before = self._memory(row)
        declared = _policy_of(row.policy) if row.policy else None
        policy = self._evaluator.effective_policy(declared).with_home(self._evaluator.home(row.site, before.home))
        verdict = judge(seen, policy)
        known = _heard(before, pulses)
        refuted = known.unheard_since <= known.refuted and pulses.at - known.refuted < _REFUTED_FOR_S
        # After a silence the agent's replay is on its way, and knows better than pulses that have only just come back.
        may_be_down = not refuted and known.state is not State.SILENT
        if verdict.state is State.LEAKING or (verdict.state is State.DOWN and may_be_down):
            # Whoever calls them unheard has waited before; a leak is as old as its packet.
            began = pulses.at - policy.grace_down if verdict.state is State.DOWN else None
            memory, events = advance(known, verdict, pulses.at, policy, began=began)
        elif known is not before:
            memory, events = known, list[Event]()
        else:
            return
        self._writes.saw(row.id, "pulse", int(1000 * pulses.at), pulses.at, self._context.now, verdict, seen)
        self._follow(row, before, memory, events, caught_up=True)

    def _same_again(self, row: TunnelRow, batch: ReportBatch) -> bool:
        """Take a keepalive that says what the last one said, if that one moved nothing; else leave it to be judged.

        Most keepalives are of this kind, and judging them anew costs several times as much.
        """
        item, repeat = batch.observations[0], self._draft.repeats.get(row.name)
        if repeat is None or _has_transport_findings(batch) or repeat.mark != _mark(row, batch, item.observation):
            return False
        row.seq = max(row.seq + 1, int(1000 * item.at))
        row.seen_at = max(row.seen_at, item.at)
        row.last_seen = batch.received_at
        row.deadline = batch.received_at + batch.silent_after
        body = encode_observation(item.observation).decode()
        self._writes.observations.append((row.id, row.spool, row.seq, item.at, batch.received_at, repeat.state, body))
        self._writes.touched[row.id] = row
        return True

    def _policy_for(self, batch: ReportBatch) -> Policy:
        """What it is judged by. A keepalive declares nothing."""
        if batch.policy is None:
            return self._context.keepalive_policy
        return self._evaluator.effective_policy(batch.policy)

    def _follow(
        self, row: TunnelRow, before: Memory, memory: Memory, events: Sequence[Event], *, caught_up: bool
    ) -> None:
        """Write what a step leads to: transitions, incidents, what is owed to people, and the row itself."""
        writes, now = self._writes, self._context.now
        memory, told = notices(before, memory, events, caught_up=caught_up)
        # What a broken row trips over comes first: a step is written whole, or not at all.
        deliveries: list[tuple[object, ...]] = []
        for notice in told:
            deliveries += delivery_values(with_context(notice, row), self._context.channels, now)
        if memory is not before or not row.memory:
            row.memory = encode(replace(memory, seen_at=0.0)).decode()
            if memory.findings != before.findings:
                row.findings = encode(memory.findings).decode()
        for event in events:
            record(row.id, event, now, writes)
            if isinstance(event, Moved | Revised):
                writes.moves.append((row.name, event))
        writes.deliveries += deliveries
        row.seen_at = memory.seen_at
        row.state, row.since = memory.state.value, memory.since or row.created_at
        writes.tunnels[row.id] = row

    def take_port_check(self, row: TunnelRow, result: PortCheckResult) -> None:
        """Since when an answer has been the same is kept: its trouble began then."""
        memory = self._memory(row, result.at)
        since = memory.port_checked_at if memory.port_check == result.check else result.at
        row.memory = encode(replace(memory, port_check=result.check, port_checked_at=since, seen_at=0.0)).decode()
        check = result.check
        shown = {"address": str(check.address), "port": check.port, "answer": check.answer.value, "at": result.at}
        row.port_check = encode(shown).decode()
        self._writes.tunnels[row.id] = row

    def _memory(self, row: TunnelRow, now: float | None = None) -> Memory:
        """What the row remembers, by the clock as it is now; nothing in it is later than `now`."""
        moved = self._context.clock_moved
        if not row.memory:
            return Memory(moved=moved)
        memory = _memory_of(row.memory)
        # The row's own times have been moved with the clock.
        memory = replace(timeshift.moved(memory, moved - memory.moved), seen_at=row.seen_at)
        return timeshift.not_after(memory, self._context.now if now is None else now)

    def take_silence(self, row: TunnelRow, deadline: float, others: Sequence[str]) -> None:
        """Make the tunnel silent, unless its pulses show that it lives. `others` of its site are silent too."""
        now = self._context.now
        if row.seen_at > row.last_seen and abs(now - row.seen_at) < _PULSE_IS_LIFE_S:
            row.deadline = now + _PULSE_IS_LIFE_S
            self._writes.tunnels[row.id] = row
            return
        try:
            before = self._memory(row)
            pulses = self._draft.sites.pulses(row.name, now)
            finding = silence_finding(row.last_seen, deadline, row.site, others, pulses=pulses)
            memory, events = overdue(before, deadline, finding)
            row.deadline = None
            self._follow(row, before, memory, events, caught_up=True)
        except Exception as e:  # noqa: BLE001 - one bad row, say of a newer version, must not keep the others unwatched
            self._failures.append((row.name, e))
            row.deadline = now + _RETRY_BROKEN_ROW_S
            self._writes.tunnels[row.id] = row
            return
        if row.role == REFERENCE:
            self._draft.sites.silent(row.name, deadline - row.last_seen)


def _introduce(row: TunnelRow, batch: ReportBatch) -> None:
    """Take over what a sender says of itself."""
    row.source = "keepalive" if batch.spool is None else "agent"
    row.role, row.site = batch.role, batch.site
    row.version, row.interval = batch.version, batch.interval
    row.policy = _policy_text(batch.policy) if batch.policy is not None else ""
    if batch.spool is None:
        row.dns_loc, row.dns_colo = batch.dns_loc, batch.dns_colo


@lru_cache(maxsize=1024)
def _policy_text(policy: Policy) -> str:
    return encode(policy).decode()


def _heard(memory: Memory, pulses: PulseObservation) -> Memory:
    """Note since when pulses are unheard, or that they are heard again."""
    if pulses.unheard is (memory.unheard_since > 0):
        return memory
    return replace(memory, unheard_since=pulses.at if pulses.unheard else 0.0, refuted=0.0)


def _mark(row: TunnelRow, batch: ReportBatch, seen: Observation) -> int:
    """Tells one keepalive, and the row that it leaves or meets, from another; costs less memory than keeping them.

    The row is in it because another replica may have changed it, or a commit of which nobody learned that it succeeded.
    """
    said = (seen.exit(4), seen.exit(6), seen.reported_from, seen.places, batch.version, batch.dns_loc, batch.dns_colo)
    return hash((said, row.spool, row.memory, row.version, row.dns_loc, row.dns_colo, row.place))


def _has_transport_findings(batch: ReportBatch) -> bool:
    """Whether the batch itself tells of a wrong clock, or of rounds that never came."""
    return bool(batch.thinned) or (batch.skew is not None and abs(batch.skew) > MAX_CLOCK_SKEW_S)
