"""Judges an observation with what the server knows in addition, and advances the tunnel's memory by it."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from vpn_sentinel.domain.judge import home_of, judge, judge_reference, with_learned_home
from vpn_sentinel.domain.machine import Event, Memory, advance, overdue, silence_finding
from vpn_sentinel.domain.observation import Answer, Observation, Probe
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, Policy
from vpn_sentinel.domain.remembered import learned_working, with_memory
from vpn_sentinel.domain.verdict import Code, Finding, State, Verdict
from vpn_sentinel.server.store.store import TunnelRow
from vpn_sentinel.server.tracking.enrichment import add_transport_findings
from vpn_sentinel.server.tracking.sites import REFERENCE, SiteView, newest

_MEASURED = frozenset({Code.HIGH_LOSS, Code.MTU_BLACKHOLE})
# Home networks learned outside the tunnel; the newest are kept.
_MAX_LEARNED_HOMES = 8


class Evaluation(NamedTuple):
    """The result of one observation: the memory after it, its verdict, the machine's events, and when trouble began.

    `trouble_began` is None where nothing dates the trouble earlier than the observation itself.
    """

    memory: Memory
    verdict: Verdict
    events: list[Event]
    trouble_began: float | None


class Evaluator:
    """`own` is the server's policy, `sites` what is known of the home connections. Changes neither."""

    def __init__(self, own: Policy, sites: SiteView) -> None:
        self._own = own
        self._sites = sites

    def effective_policy(self, declared: Policy | None) -> Policy:
        """The server's policy and what the agent declared, together: networks add up, the agent's countries win."""
        own = self._own
        if declared is None:
            return own
        return replace(
            own.with_home(declared.home_networks),
            expected_countries=declared.expected_countries or own.expected_countries,
            allowed_resolvers=(*own.allowed_resolvers, *declared.allowed_resolvers),
            allowed_outside=(*own.allowed_outside, *declared.allowed_outside),
            max_loss=declared.max_loss if declared.max_loss != Policy.max_loss else own.max_loss,
            max_rtt_ms=declared.max_rtt_ms if declared.max_rtt_ms != Policy.max_rtt_ms else own.max_rtt_ms,
        )

    def home(self, site: str, learned: Sequence[IPNetwork] = ()) -> tuple[IPNetwork, ...]:
        """Home networks that no setting declares: those of the site's reference agents, and those learned."""
        return (*self._sites.homes(site), *learned)

    def evaluate(
        self,
        row: TunnelRow,
        memory: Memory,
        seen: Observation,
        at: float,
        policy: Policy,
        extra: tuple[Finding, ...],
    ) -> Evaluation:
        """Judge `seen`, observed at `at`, and advance `memory` by it. `extra` are the receiver's own findings."""
        reference = row.role == REFERENCE
        if reference:
            judged_by, verdict = policy, judge_reference(seen)
        else:
            policy = policy.with_home(self._sites.homes(row.site))
            judged_by = with_learned_home(seen, policy.with_home(memory.home))
            verdict = judge(seen, judged_by)
        verdict = add_transport_findings(verdict, extra)
        began = trouble_began(seen, verdict, at, memory)
        if reference:
            memory = replace(memory, homes=newest(memory.homes, home_of(seen), at))
        elif _is_refuted(memory, seen, at):
            memory = replace(memory, refuted=at)
        exits = (seen.exit(4), seen.exit(6))
        port, lasted = seen.forwarded_port, watched_for(seen, verdict)
        memory, events = advance(
            memory, verdict, at, judged_by, exits, began=began, measured=is_measured(verdict), lasted=lasted, port=port
        )
        learned = tuple(n for n in judged_by.home_networks if n not in policy.home_networks)
        if learned != memory.home:
            memory = replace(memory, home=learned[-_MAX_LEARNED_HOMES:])
        if not reference and verdict.state in (State.PROTECTED, State.DEGRADED):
            working = learned_working(memory.working, seen)
            memory = memory if working == memory.working else replace(memory, working=working)
        return Evaluation(memory, verdict, events, began)

    def enrich(
        self, row: TunnelRow, memory: Memory, seen: Observation, at: float, came_from: tuple[IPAddress, ...] = ()
    ) -> Observation:
        """Add what the server knows: the tunnel while it worked, the site's internet, the forwarded port from outside.

        `came_from` are the addresses that the agent's own packets came from.
        """
        if row.role != REFERENCE:
            seen = with_memory(seen, memory.working, came_from)
        check = memory.port_check
        if check is not None and check.port == seen.forwarded_port and check.address in (seen.exit(4), seen.exit(6)):
            seen = replace(seen, port_check=check)
        if row.site:
            well = _well_until(memory)
            rtt = (seen.quality.rtt_ms or 0.0) / 1000 if seen.quality else 0.0
            up = self._sites.up(row.site, at, well, max(at - seen.silent_for, well), rtt)
            if up is not None:
                seen = replace(seen, reference_up=up)
        return seen


def silence_between(memory: Memory, at: float, silent_after: float) -> tuple[Memory, list[Event]]:
    """The memory and events of the silence between the agent's last observation and the one at `at`.

    A replay voids a silence in which the agent watched but could not report. This function adds back the part in which
    the agent did not run. Only for observations with consecutive numbers: a gap in the numbers means that rounds were
    thinned, so the agent ran.
    """
    deadline = memory.seen_at + silent_after
    if memory.state is State.SILENT or not memory.seen_at or at <= deadline:
        return memory, []
    return overdue(memory, deadline, silence_finding(memory.seen_at, deadline))


def _well_until(memory: Memory) -> float:
    """When the tunnel was last known to be well."""
    if memory.before is not None:
        return memory.seen_at  # a replay may show that the agent watched since then, and that there was no silence
    candidate = memory.candidate
    if memory.trouble_since is not None:
        return memory.trouble_since
    return candidate.since if candidate is not None else memory.seen_at


def trouble_began(seen: Observation, verdict: Verdict, at: float, memory: Memory) -> float | None:
    """When the verdict's trouble began, where that is known better than by the time of the observation; else None."""
    if verdict.state is State.DOWN and seen.silent_for > 0:
        return at - seen.silent_for
    if verdict.state is State.DEGRADED and any(f.code is Code.PORT_CLOSED for f in verdict.findings):
        return memory.port_checked_at
    if seen.quality is None or not is_measured(verdict):
        return None
    codes = {f.code for f in verdict.findings}
    lossy = max(seen.quality.lossy_for, seen.quality.seconds) if Code.HIGH_LOSS in codes else 0.0
    lasted = max(lossy, seen.quality.vanished_for if Code.MTU_BLACKHOLE in codes else 0.0)
    return at + _took(seen) - lasted if lasted else None


def is_measured(verdict: Verdict) -> bool:
    """Whether the trouble takes a stretch of time to measure: earlier rounds in it could not detect it yet."""
    return verdict.state is State.DEGRADED and any(f.code in _MEASURED for f in verdict.findings)


def watched_for(seen: Observation, verdict: Verdict) -> float:
    """Seconds for which the round itself watched the trouble: no target answered, or pulses measured it. 0: not so."""
    asked = seen.asked(Probe.DEFAULT)
    dead = verdict.state is State.DOWN and asked and all(c.answer is not Answer.ANSWERED for c in asked)
    return _took(seen) if dead or is_measured(verdict) else 0.0


def _took(seen: Observation) -> float:
    """Seconds from a round's start, which is its time, to its end, when the pulse statistics are read."""
    return seen.took_ms / 1000


def _is_refuted(memory: Memory, seen: Observation, at: float) -> bool:
    """Whether the agent's probes show a live tunnel that the server took for dead because its pulses were unheard."""
    alive = any(c.answer is Answer.ANSWERED for c in seen.asked(Probe.DEFAULT))
    return 0 < memory.unheard_since < at and alive
