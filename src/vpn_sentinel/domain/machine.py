"""The state machine: gives verdicts a memory.

`TRANSITIONS` says where each stimulus leads and how long it must last; `advance` is the only code that moves a state.
Time is the observation's own, so a replayed stretch moves exactly as it would have moved live.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from vpn_sentinel.domain.policy import IPAddress, IPNetwork, Policy
from vpn_sentinel.domain.verdict import HARM, Code, Finding, State, Verdict


class Wait(StrEnum):
    """How long a stimulus must last before its transition counts."""

    NONE = "none"
    DOWN = "grace_down"
    DEGRADED = "grace_degraded"
    RECOVERY = "grace_recovery"

    def seconds(self, policy: Policy) -> float:
        return 0.0 if self is Wait.NONE else float(getattr(policy, self.value))


_L, _D, _G, _S, _N, _P = State.LEAKING, State.DOWN, State.DEGRADED, State.SILENT, State.PENDING, State.PROTECTED
# state -> verdict -> how long it must last. A missing pair changes nothing: what stays, and `unknown`, which holds.
# The column `silent` is the deadline that passed without a report.
TRANSITIONS: Final[dict[State, dict[State, Wait]]] = {
    _N: {_L: Wait.NONE, _D: Wait.DOWN, _G: Wait.DEGRADED, _P: Wait.NONE},
    _P: {_L: Wait.NONE, _D: Wait.DOWN, _G: Wait.DEGRADED, _S: Wait.NONE},
    _G: {_L: Wait.NONE, _D: Wait.DOWN, _P: Wait.RECOVERY, _S: Wait.NONE},
    _D: {_L: Wait.NONE, _G: Wait.RECOVERY, _P: Wait.RECOVERY, _S: Wait.NONE},
    _L: {_D: Wait.DOWN, _G: Wait.RECOVERY, _P: Wait.RECOVERY, _S: Wait.NONE},
    _S: {_L: Wait.NONE, _D: Wait.NONE, _G: Wait.NONE, _P: Wait.NONE},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A verdict on its way to become the state: since when it has been seen, without a break."""

    state: State
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """What the machine knew when silence fell, to go back to when the agent replays that stretch."""

    state: State
    since: float
    findings: tuple[Finding, ...]
    candidate: Candidate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """Trouble that people have not yet heard the end of: when it began, and the worst that it was."""

    began: float
    worst: State


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """All that a tunnel's past weighs. Times are seconds since the epoch, by the server's clock.

    `told` is the state people last heard of, `told_exit` the exit address, `outage` what a recovery will tell the end
    of; `trouble_since` is when the tunnel was last protected, None while it is. `home` are home networks learned from
    canaries sent beside the tunnel.
    """

    state: State = State.PENDING
    since: float = 0.0
    findings: tuple[Finding, ...] = ()
    candidate: Candidate | None = None
    before: Before | None = None
    seen_at: float = 0.0
    exit4: IPAddress | None = None
    exit6: IPAddress | None = None
    home: tuple[IPNetwork, ...] = ()
    told: State = State.PENDING
    told_exit: IPAddress | None = None
    trouble_since: float | None = None
    outage: Outage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """The state changed; `at` is when its cause began, which a grace may put some seconds back."""

    at: float
    old: State
    new: State
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Revised:
    """The silence that was recorded at `at` is void: the agent watched all along and now tells what it saw."""

    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitChanged:
    at: float
    old: IPAddress
    new: IPAddress


Event = Moved | Revised | ExitChanged


@dataclass(slots=True)
class _Step:
    memory: Memory
    events: list[Event] = field(default_factory=list)

    def move(self, state: State, at: float, findings: tuple[Finding, ...]) -> None:
        was = self.memory
        self.events.append(Moved(at=at, old=was.state, new=state, findings=findings))
        trouble = None if state is State.PROTECTED else was.trouble_since
        if state is not State.PROTECTED and trouble is None:
            trouble = at
        self.memory = replace(
            was, state=state, since=at, findings=findings, candidate=None, before=None, trouble_since=trouble
        )


def advance(
    memory: Memory,
    verdict: Verdict,
    at: float,
    policy: Policy,
    exits: tuple[IPAddress | None, IPAddress | None] = (None, None),
) -> tuple[Memory, list[Event]]:
    """Take one observation's verdict into account; `exits` are the IPv4 and IPv6 addresses it was seen at.

    Observations come in their order. `at` never runs backwards: an earlier one counts as simultaneous with the last.
    """
    at = max(at, memory.seen_at)
    step = _Step(memory)
    if memory.state is State.SILENT and memory.before is not None and at < memory.since:
        step.events.append(Revised(at=memory.since))
        before = memory.before
        trouble = None if before.state in (State.PROTECTED, State.PENDING) else memory.trouble_since
        step.memory = replace(
            memory,
            state=before.state,
            since=before.since,
            findings=before.findings,
            candidate=before.candidate,
            before=None,
            trouble_since=trouble,
        )
    step.memory = replace(step.memory, seen_at=at)
    _settle(step, verdict, at, policy)
    if verdict.state in (State.PROTECTED, State.DEGRADED):
        _note_exits(step, at, exits)
    return step.memory, step.events


def overdue(memory: Memory, at: float, finding: Finding) -> tuple[Memory, list[Event]]:
    """Take into account that no report came by the deadline `at`."""
    if State.SILENT not in TRANSITIONS[memory.state]:
        return memory, []
    before = Before(state=memory.state, since=memory.since, findings=memory.findings, candidate=memory.candidate)
    step = _Step(memory)
    step.move(State.SILENT, at, (finding,))
    return replace(step.memory, before=before), step.events


def _settle(step: _Step, verdict: Verdict, at: float, policy: Policy) -> None:
    memory, state = step.memory, verdict.state
    if state is memory.state:
        if memory.candidate is not None or memory.findings != verdict.findings:
            step.memory = replace(memory, findings=verdict.findings, candidate=None)
        return
    wait = TRANSITIONS[memory.state].get(state)
    if wait is None:
        # Nothing could be seen, so nothing is known to have changed; a verdict on its way starts again.
        step.memory = replace(memory, candidate=None, findings=_with_unknown(memory, verdict))
        return
    candidate = memory.candidate
    if candidate is None or candidate.state is not state:
        candidate = Candidate(state=state, since=_trouble_start(candidate, state, at))
    if at - candidate.since >= wait.seconds(policy):
        step.move(state, candidate.since, verdict.findings)
    else:
        step.memory = replace(memory, candidate=candidate)


def _trouble_start(candidate: Candidate | None, state: State, at: float) -> float:
    """Trouble that eases on the way (down, then degraded) began when it began; what is worse must last by itself."""
    if candidate is None or State.PROTECTED in (candidate.state, state):
        return at
    return candidate.since if HARM.index(candidate.state) < HARM.index(state) else at


def _with_unknown(memory: Memory, verdict: Verdict) -> tuple[Finding, ...]:
    """A tunnel that was never judged shows why it cannot be; any other keeps what it was judged by."""
    return verdict.findings if memory.state is State.PENDING else memory.findings


def _note_exits(step: _Step, at: float, exits: tuple[IPAddress | None, IPAddress | None]) -> None:
    memory = step.memory
    for old, new in ((memory.exit4, exits[0]), (memory.exit6, exits[1])):
        if old and new and old != new:
            step.events.append(ExitChanged(at=at, old=old, new=new))
    now = (exits[0] or memory.exit4, exits[1] or memory.exit6)
    if now != (memory.exit4, memory.exit6):
        step.memory = replace(memory, exit4=now[0], exit6=now[1])


def silence_finding(last_seen: float, deadline: float) -> Finding:
    """What an overdue tunnel shows: how long nothing has come."""
    return Finding(
        Code.NO_REPORTS,
        f"No report for {deadline - last_seen:.0f} s; from here, a dead tunnel and a dead agent look the same.",
        {"silent_for_seconds": f"{deadline - last_seen:.0f}"},
    )
