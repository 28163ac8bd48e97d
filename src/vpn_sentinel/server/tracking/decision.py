"""Decides what follows from a batch of inputs: the pure core of the server's one transaction.

`decide` and `decide_silences` do no I/O, read no clock, and change nothing but their result and the rows that they are
given, which are the transaction's own copies. So a transaction may run twice, and one that fails leaves no trace:
`Effects` take place only after the changes are committed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import Row

from vpn_sentinel.domain import timeshift
from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.machine import Event, Memory, Revised, StateChanged, advance, overdue, silence_finding
from vpn_sentinel.domain.notice import notices
from vpn_sentinel.domain.observation import Observation, Trigger
from vpn_sentinel.domain.policy import IPAddress, Policy, is_public
from vpn_sentinel.domain.verdict import Code, Finding, State
from vpn_sentinel.server.store.outbox_rows import delivery_values
from vpn_sentinel.server.store.store import Changes, TunnelRow
from vpn_sentinel.server.tracking.enrichment import (
    MAX_UNREPORTED_SKEW_S,
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

# A tunnel whose row raises an exception is tried again after this time.
_RETRY_BROKEN_ROW_S: Final = 300.0
# Pulses that showed trouble count as a sign of life for this time, so that missing reports are no silence.
_PULSE_IS_LIFE_S: Final = 15.0
# For this time the agent's own probes, which show that its tunnel is alive, overrule "its pulses are unheard".
_REFUTED_FOR_S: Final = 600.0
# Lower ports belong to a system's own services: no VPN forwards them, and no agent may make this server connect there.
_MIN_FORWARDED_PORT: Final = 1024
# What an agent saw at most this time before it connected still counts as the present state.
_STILL_CURRENT_S: Final = 2.0
# When a tunnel dies, its reference agent gets this time, three of its pulses, to find out that home is down.
_WAIT_FOR_HOME_S: Final = 6.0
_MAYBE_HOME: Final = frozenset({Code.NO_TRAFFIC, Code.UPLINK_DOWN})

_memory_of: Final = decoder(Memory)
_policy_of: Final = decoder(Policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What a decision depends on besides its inputs and what is known.

    `now` is the server's time in seconds since the epoch, `clock_moved` by how much it has been set (see
    `domain.machine.Memory`). `policy` is the server's own, `keepalive_policy` that for old clients, which declare
    nothing. Every notice gets a delivery for each of `channels`.
    """

    now: float
    clock_moved: float
    policy: Policy
    keepalive_policy: Policy
    channels: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effects:
    """What takes place outside the database once a decision is committed.

    `draft` is what this process knows from then on. `tunnels` are the names of the written ones, `state_changes` how
    their states changed, by name. `shared` are names that several agents report under, `has_deliveries` says whether a
    message was put into the outbox, `failures` which rows could not be judged, and why.
    """

    draft: Draft
    tunnels: frozenset[str]
    state_changes: tuple[tuple[str, StateChanged | Revised], ...]
    shared: tuple[str, ...]
    has_deliveries: bool
    failures: tuple[tuple[str, Exception], ...]


@dataclass(slots=True, kw_only=True)
class Decision(Changes):
    effects: Effects


def decide(batch: Iterable[Input], rows: Mapping[str, TunnelRow], known: Knowledge, context: Context) -> Decision:
    """Decide what follows from a batch, input by input. `rows` are by name; input of a tunnel without one is skipped.

    Raises what a row or a report that cannot be judged raises; nothing of the batch may be stored then.
    """
    builder = _DecisionBuilder(known, context)
    for item in batch:
        row = rows.get(item.tunnel)
        if row is None:
            continue
        match item:
            case ReportBatch():
                builder.add_reports(row, item)
            case PulseObservation():
                builder.add_pulses(row, item)
            case PortCheckResult():
                builder.add_port_check(row, item)
    return builder.decision()


def decide_silences(
    rows: Iterable[TunnelRow], known: Knowledge, context: Context, grace: float, site_members: Sequence[Row[Any]]
) -> Decision:
    """Decide which of `rows` are silent: those whose deadline passed `grace` seconds ago or earlier.

    `site_members` are the tunnels of their sites: see `sites.silent_too`. A row that cannot be judged is tried again
    later, and does not keep others from being watched.
    """
    builder = _DecisionBuilder(known, context)
    for row in rows:
        if row.deadline is not None and row.deadline <= context.now - grace:
            builder.add_silence(row, row.deadline, silent_too(row, site_members, context.now))
    return builder.decision()


class _DecisionBuilder:
    """Gathers one decision, input by input."""

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
            state_changes=tuple(writes.state_changes),
            shared=tuple(self._shared),
            has_deliveries=bool(writes.deliveries),
            failures=tuple(self._failures),
        )
        return Decision(batches=writes.batches(), effects=effects)

    def add_reports(self, row: TunnelRow, batch: ReportBatch) -> None:
        """Judge each new observation, and write what they lead to together."""
        policy = self._policy_for(batch)
        if batch.spool is None and self._add_repeat(row, batch):
            return
        _update_sender(row, batch)
        stored_memory, before = row.memory, self._memory(row)
        memory, events, home_known, well = before, list[Event](), False, False
        spool = batch.name_of_spool(row.spool, row.seq)
        last = row.seq if row.spool == spool else 0
        pulsed_from = (self._draft.pulse_addresses.get(row.name) or {}).values()
        came_from = tuple(a for a in (batch.peer, *pulsed_from) if a is not None and batch.spool is not None)
        extra = self._transport_findings(row, batch, spool, memory)
        for item in batch.observations:
            # A keepalive's number is its time in milliseconds, so that numbers go on rising when an agent replaces it.
            seq = item.seq if batch.spool is not None else max(last + 1, int(1000 * item.at))
            if seq <= last:
                continue  # a replay of what the database holds changes nothing
            if batch.spool is not None and seq == last + 1:
                memory, gap = silence_between(memory, item.at, batch.silent_after)
                events += gap
            last = seq
            seen = self._evaluator.enrich(row, memory, item.observation, item.at, came_from)
            home_known = seen.reference_up is not None
            memory, verdict, more, trouble_began = self._evaluator.evaluate(row, memory, seen, item.at, policy, extra)
            events += more
            well = verdict.state in (State.PROTECTED, State.DEGRADED)
            if row.role == REFERENCE:
                since = item.at if trouble_began is None else trouble_began
                self._draft.sites.add_observation(row.name, row.site, memory.homes, since, item.at, verdict.state)
            self._writes.add_observation(row.id, spool, seq, item.at, batch.received_at, verdict, seen)
            update_snapshot(row, seen)
        row.spool, row.seq = spool, last
        if well and batch.caught_up:
            self._note_beside_tunnel(row, batch, policy.with_home(self._evaluator.home(row.site, memory.home)))
        self._note_sender(row, batch)
        # After a silence the first reports are of the time before the agent could connect; the present state follows.
        # "Protected" may be a little older: an agent that was just started makes a round before it connects.
        max_age = _STILL_CURRENT_S if memory.state is State.PROTECTED else 0.0
        stale = before.told is State.SILENT and memory.seen_at < min(batch.connected_at, self._context.now) - max_age
        waits = not home_known and self._waits_for_home(row, memory)
        self._write_step(row, before, memory, events, caught_up=batch.caught_up and not stale and not waits)
        if batch.spool is None:
            # An equal keepalive would change nothing either; what depends on time (a grace, a wrong clock) is excluded.
            moved_nothing = row.memory == stored_memory and memory.candidate is None and not extra
            repeat = Repeat(_mark(row, batch, seen), verdict.state.value) if moved_nothing else None
            self._draft.repeats.put(row.name, repeat)

    def _waits_for_home(self, row: TunnelRow, memory: Memory) -> bool:
        """Whether the notice of a dead tunnel waits, because its reference agent may soon report that home is down.

        A reference agent sends pulses too, so while home is well this server knows it at once, and nothing waits;
        unless the pulses go to another replica, come over a LAN, or do not come at all. A missing interface never
        waits: it does not depend on home.
        """
        fresh = memory.state is State.DOWN and memory.seen_at - memory.since < _WAIT_FOR_HOME_S
        maybe_home = fresh and any(f.code in _MAYBE_HOME for f in memory.findings)
        return maybe_home and self._draft.sites.has_working_reference(row.site, self._context.now)

    def _transport_findings(
        self, row: TunnelRow, batch: ReportBatch, spool: str, memory: Memory
    ) -> tuple[Finding, ...]:
        """This server's own findings about the sender and the transport."""
        was_shared = any(f.code is Code.NAME_SHARED for f in memory.findings)
        before = self._draft.sources.get(row.name) or ReportSources()
        sources = before.with_report(spool, row.spool, batch.received_at, batch.interval, was_shared=was_shared)
        if sources is not before:
            self._draft.sources.put(row.name, sources)
        if shared := sources.are_several(batch.received_at):
            self._shared.append(row.name)
        # A reference agent has no verdict on a tunnel that could be mixed up with another's.
        return transport_findings(batch.skew, batch.thinned, shared=shared and row.role != REFERENCE)

    def _note_sender(self, row: TunnelRow, batch: ReportBatch) -> None:
        """Note that the sender reported, and what that means for its site and its forwarded port."""
        row.last_seen = batch.received_at
        row.deadline = batch.received_at + batch.silent_after
        if row.role == REFERENCE:
            self._draft.sites.set_deadline(row.name, row.deadline, batch.silent_after)
            return
        self._draft.sites.forget(row.name)
        if batch.spool is not None and batch.caught_up and batch.observations:
            self._note_port(row, batch.observations[-1].observation, batch.peer)

    def _note_beside_tunnel(self, row: TunnelRow, batch: ReportBatch, policy: Policy) -> None:
        """Note whether an agent whose tunnel is well reports from home, and declares traffic that may leave there."""
        declared = batch.policy is not None and batch.policy.allowed_outside
        beside = bool(declared) and batch.peer is not None and policy.is_home(batch.peer)
        self._draft.beside_tunnel.put(row.name, beside or None)

    def _note_port(self, row: TunnelRow, seen: Observation, peer: IPAddress | None) -> None:
        """Note whether the forwarded port may be tried: only at an address that this tunnel's packets came from."""
        came_from = {peer, *(self._draft.pulse_addresses.get(row.name) or {}).values()}
        where = next((e for e in (seen.exit(4), seen.exit(6)) if e and e in came_from and is_public(e)), None)
        forwarded = None
        if where is not None and seen.forwarded_port is not None and seen.forwarded_port >= _MIN_FORWARDED_PORT:
            forwarded = ForwardedAddress(where, seen.forwarded_port)
        self._draft.forwarded.put(row.name, forwarded)

    def add_pulses(self, row: TunnelRow, pulses: PulseObservation) -> None:
        """Judge what the server itself sees of a tunnel's pulses; only trouble is stored."""
        if row.role == REFERENCE or row.source != "agent":
            return
        public = is_public(pulses.address)
        if public:
            known_addresses = self._draft.pulse_addresses.get(row.name) or {}
            self._draft.pulse_addresses.put(row.name, {**known_addresses, pulses.address.version: pulses.address})
        # An address in a LAN is no exit.
        address = pulses.address if public and not self._draft.beside_tunnel.get(row.name) else None
        seen = Observation(trigger=Trigger.PULSE, reported_from=address, unheard=pulses.unheard)
        before = self._memory(row)
        declared = _policy_of(row.policy) if row.policy else None
        policy = self._evaluator.effective_policy(declared).with_home(self._evaluator.home(row.site, before.home))
        verdict = judge(seen, policy)
        start = _with_pulses(before, pulses)
        refuted = start.unheard_since <= start.refuted and pulses.at - start.refuted < _REFUTED_FOR_S
        # After a silence the agent's replay follows soon, and is better evidence than pulses that only just came back.
        may_be_down = not refuted and start.state is not State.SILENT
        if verdict.state is State.LEAKING or (verdict.state is State.DOWN and may_be_down):
            # Pulses are called unheard only after a wait as long as the grace; a leak dates from its packet.
            began = pulses.at - policy.grace_down if verdict.state is State.DOWN else None
            memory, events = advance(start, verdict, pulses.at, policy, began=began)
        elif start is not before:
            memory, events = start, list[Event]()
        else:
            return
        self._writes.add_observation(
            row.id, "pulse", int(1000 * pulses.at), pulses.at, self._context.now, verdict, seen
        )
        self._write_step(row, before, memory, events, caught_up=True)

    def _add_repeat(self, row: TunnelRow, batch: ReportBatch) -> bool:
        """Store a keepalive that equals the last one without judging it, if that one changed nothing; else False.

        Most keepalives are of this kind, and judging each again costs several times as much.
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
        """The policy that the batch is judged by. A keepalive declares none."""
        if batch.policy is None:
            return self._context.keepalive_policy
        return self._evaluator.effective_policy(batch.policy)

    def _write_step(
        self, row: TunnelRow, before: Memory, memory: Memory, events: Sequence[Event], *, caught_up: bool
    ) -> None:
        """Write what the step from `before` to `memory` leads to: transitions, incidents, deliveries, the row."""
        writes, now = self._writes, self._context.now
        memory, new_notices = notices(before, memory, events, caught_up=caught_up)
        # What can fail on a broken row comes first: a step is written whole, or not at all.
        deliveries: list[tuple[object, ...]] = []
        for notice in new_notices:
            deliveries += delivery_values(with_context(notice, row), self._context.channels, now)
        if memory is not before or not row.memory:
            row.memory = encode(replace(memory, seen_at=0.0)).decode()
            if memory.findings != before.findings:
                row.findings = encode(memory.findings).decode()
        for event in events:
            record(row.id, event, now, writes)
            if isinstance(event, StateChanged | Revised):
                writes.state_changes.append((row.name, event))
        writes.deliveries += deliveries
        row.seen_at = memory.seen_at
        row.state, row.since = memory.state.value, memory.since or row.created_at
        writes.tunnels[row.id] = row

    def add_port_check(self, row: TunnelRow, result: PortCheckResult) -> None:
        """Keep the result, and the time of the first of equal results: its trouble began then."""
        memory = self._memory(row, result.at)
        since = memory.port_checked_at if memory.port_check == result.check else result.at
        row.memory = encode(replace(memory, port_check=result.check, port_checked_at=since, seen_at=0.0)).decode()
        check = result.check
        shown = {"address": str(check.address), "port": check.port, "answer": check.answer.value, "at": result.at}
        row.port_check = encode(shown).decode()
        self._writes.tunnels[row.id] = row

    def _memory(self, row: TunnelRow, now: float | None = None) -> Memory:
        """The row's memory, with its times by the clock as it is now, and none later than `now`."""
        clock_moved = self._context.clock_moved
        if not row.memory:
            return Memory(moved=clock_moved)
        memory = _memory_of(row.memory)
        # The columns, unlike the memory in the row, were already moved with the clock.
        memory = replace(timeshift.moved(memory, clock_moved - memory.moved), seen_at=row.seen_at)
        return timeshift.not_after(memory, self._context.now if now is None else now)

    def add_silence(self, row: TunnelRow, deadline: float, others: Sequence[str]) -> None:
        """Make the tunnel silent, unless its pulses show that it is alive. `others` of its site are silent too."""
        now = self._context.now
        # Only pulses move `seen_at` beyond the last report, and only where they showed trouble: the agent is alive.
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
            self._write_step(row, before, memory, events, caught_up=True)
        except Exception as e:  # noqa: BLE001 - one bad row, say of a newer version, must not keep the others unwatched
            self._failures.append((row.name, e))
            row.deadline = now + _RETRY_BROKEN_ROW_S
            self._writes.tunnels[row.id] = row
            return
        if row.role == REFERENCE:
            self._draft.sites.add_silence(row.name, deadline - row.last_seen)


def _update_sender(row: TunnelRow, batch: ReportBatch) -> None:
    """Copy into the row what the sender says about itself."""
    row.source = "keepalive" if batch.spool is None else "agent"
    row.role, row.site = batch.role, batch.site
    row.version, row.interval = batch.version, batch.interval
    row.policy = _policy_text(batch.policy) if batch.policy is not None else ""
    if batch.spool is None:
        row.dns_loc, row.dns_colo = batch.dns_loc, batch.dns_colo


@lru_cache(maxsize=1024)
def _policy_text(policy: Policy) -> str:
    return encode(policy).decode()


def _with_pulses(memory: Memory, pulses: PulseObservation) -> Memory:
    """The memory with the time since which pulses are unheard, or 0 when replies reach the agent again."""
    if pulses.unheard is (memory.unheard_since > 0):
        return memory
    return replace(memory, unheard_since=pulses.at if pulses.unheard else 0.0, refuted=0.0)


def _mark(row: TunnelRow, batch: ReportBatch, seen: Observation) -> int:
    """A hash of a keepalive and of the row that it found or left, to compare with the next: smaller than keeping both.

    The row is in it because another replica may have changed it, or a commit that succeeded without being acknowledged.
    """
    sent = (seen.exit(4), seen.exit(6), seen.reported_from, seen.places, batch.version, batch.dns_loc, batch.dns_colo)
    return hash((sent, row.spool, row.memory, row.version, row.dns_loc, row.dns_colo, row.place))


def _has_transport_findings(batch: ReportBatch) -> bool:
    """Whether the batch itself shows a wrong clock, or rounds that never came."""
    return bool(batch.thinned) or (batch.skew is not None and abs(batch.skew) > MAX_UNREPORTED_SKEW_S)
