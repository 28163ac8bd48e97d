"""The state machine: gives verdicts a memory.

Theory of operation
-------------------
A tunnel is always in one `State`. Two things move it: the verdict of an observation (`advance`) and a deadline that
passed without one (`overdue`). Nothing else assigns a state.

1. `TRANSITIONS[state][stimulus]` says how long a stimulus must last before it becomes the state. A pair that is missing
   moves nothing: what is no transition cannot happen by an oversight.
2. A stimulus that must last becomes the `Candidate`, with the time since which it has been seen without a break. A
   further verdict of the same kind keeps that time; another kind replaces the candidate; a verdict equal to the present
   state drops it. Once the candidate has lasted long enough, the state moves, dated from the candidate's beginning, not
   from the decision.
3. Trouble that becomes milder meanwhile (down, then degraded) keeps its beginning; worse trouble must last by itself. A
   known beginning (`began`) dates the candidate, but never before the last observation with another verdict.
4. *Unknown* is no state. It is the stimulus *unverified*: good states become it after a while; a leak and a dead tunnel
   stay, with what cannot be seen now added to their findings.
5. A tunnel that left *protected* three times in five minutes is flapping: `FLAPPING` makes its recovery wait for a
   minute of calm. The same holds when verification comes and goes (`blinks`); else each success would reset the wait.
6. When a deadline passes, `Before` keeps what was known. Observations from before that deadline prove that the agent
   watched all along: `Revised` voids the silence, the machine goes back to `Before`, and the replayed observations move
   it with their true times.

Time is the observation's own and never runs backwards, so a replayed stretch moves exactly as it would have moved
live. The functions are pure: a new `Memory` and the events that led to it come out, and nothing is changed in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from vpn_sentinel.domain.counted import counted
from vpn_sentinel.domain.observation import PortCheck
from vpn_sentinel.domain.policy import MAX_FLAP_COUNT, IPAddress, IPNetwork, Policy
from vpn_sentinel.domain.remembered import Working
from vpn_sentinel.domain.verdict import HARM, MEANING, Code, Finding, State, Verdict


class Wait(StrEnum):
    """How long a stimulus must last before its transition counts."""

    NONE = "none"
    DOWN = "grace_down"
    DEGRADED = "grace_degraded"
    RECOVERY = "grace_recovery"
    UNVERIFIED = "grace_unverified"
    CALM = "flap_calm"

    def seconds(self, policy: Policy) -> float:
        """The wait under `policy`, in seconds."""
        return 0.0 if self is Wait.NONE else float(getattr(policy, self.value))


_L, _D, _G, _S, _N, _P = State.LEAKING, State.DOWN, State.DEGRADED, State.SILENT, State.PENDING, State.PROTECTED
_U = State.UNVERIFIED
# state -> stimulus -> how long it must last. A missing pair changes nothing. `silent` is a deadline that passed without
# a report, `unverified` the verdict `unknown`: good states become unverified, while a leak and a dead tunnel stay until
# something else is seen.
TRANSITIONS: Final[dict[State, dict[State, Wait]]] = {
    _N: {_L: Wait.NONE, _D: Wait.DOWN, _G: Wait.DEGRADED, _P: Wait.NONE, _U: Wait.UNVERIFIED, _S: Wait.NONE},
    _P: {_L: Wait.NONE, _D: Wait.DOWN, _G: Wait.DEGRADED, _U: Wait.UNVERIFIED, _S: Wait.NONE},
    _G: {_L: Wait.NONE, _D: Wait.DOWN, _P: Wait.RECOVERY, _U: Wait.UNVERIFIED, _S: Wait.NONE},
    _D: {_L: Wait.NONE, _G: Wait.RECOVERY, _P: Wait.RECOVERY, _S: Wait.NONE},
    _L: {_D: Wait.DOWN, _G: Wait.RECOVERY, _P: Wait.RECOVERY, _S: Wait.NONE},
    _S: {_L: Wait.NONE, _D: Wait.NONE, _G: Wait.NONE, _P: Wait.NONE, _U: Wait.UNVERIFIED},
    _U: {_L: Wait.NONE, _D: Wait.DOWN, _G: Wait.RECOVERY, _P: Wait.RECOVERY, _S: Wait.NONE},
}
# The waits that are longer while a tunnel is flapping.
FLAPPING: Final[dict[Wait, Wait]] = {Wait.RECOVERY: Wait.CALM}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A verdict that may become the state, and since when it has been seen without a break."""

    state: State
    since: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Before:
    """What the machine knew when the silence began; it returns to this when the agent replays that time."""

    state: State
    since: float
    findings: tuple[Finding, ...]
    candidate: Candidate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outage:
    """Trouble whose end was not notified yet: when it began, and its worst state."""

    began: float
    worst: State


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """A network in which a reference agent came out, and when it was last seen there."""

    network: IPNetwork
    seen_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """All that matters of a tunnel's past, as it is stored. Times are seconds since the epoch, by the server's clock.

    `told` is the state that was last notified, `told_exit` the last notified exit address, `told_port` the port;
    `was_protected` is whether it was ever protected, `outage` the trouble whose end a recovery will notify;
    `trouble_since` is when the tunnel was last protected, None while it is. `home` are home networks learned from
    canaries sent outside the tunnel. `turns` are the times at which it lately left *protected*. `port` is the last
    forwarded port, `port_check` the last attempt to reach it, with this result since `port_checked_at`. Since
    `unheard_since` its pulses come in and their replies do not arrive, 0 while they do; `refuted` is when the agent
    itself then showed a working tunnel. `homes` are where a reference agent came out. `blinks` are the times at which
    it lately stopped being verifiable. `working` is the tunnel as it was when it worked. `moved` is by how many seconds
    the server's clock had been set in all when this was written: see timeshift.
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
    was_protected: bool = False
    trouble_since: float | None = None
    outage: Outage | None = None
    turns: tuple[float, ...] = ()
    port: int | None = None
    told_port: int | None = None
    port_check: PortCheck | None = None
    port_checked_at: float = 0.0
    unheard_since: float = 0.0
    refuted: float = 0.0
    homes: tuple[Home, ...] = ()
    blinks: tuple[float, ...] = ()
    working: Working | None = None
    moved: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged:
    """The state changed; `at` is when its cause began, which a grace may put some seconds back."""

    at: float
    old: State
    new: State
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Revised:
    """The silence recorded at `at` is void: the agent was watching, and now replays what it saw."""

    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitChanged:
    at: float
    old: IPAddress
    new: IPAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class PortChanged:
    """The VPN forwards another port than before."""

    at: float
    old: int
    new: int


Event = StateChanged | Revised | ExitChanged | PortChanged


@dataclass(slots=True)
class _Step:
    memory: Memory
    events: list[Event] = field(default_factory=list)

    def change_state(self, state: State, at: float, findings: tuple[Finding, ...]) -> None:
        was = self.memory
        self.events.append(StateChanged(at=at, old=was.state, new=state, findings=findings))
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
    *,
    began: float | None = None,
    measured: bool = False,
    lasted: float = 0.0,
    port: int | None = None,
) -> tuple[Memory, list[Event]]:
    """Take one observation's verdict into account; `exits` are the IPv4 and IPv6 addresses of the exit.

    Observations come in their order. `at` never runs backwards: an earlier one counts as simultaneous with the last.
    `began` is when the trouble of this verdict began, where that is known; it counts from the last observation with
    another verdict at the earliest, unless the trouble was `measured` over a time of which a part is not enough.
    `lasted` is for how many seconds from `at` on the trouble was seen to last: as long as a round waited in vain for an
    answer. `port` is the forwarded port, None when none is known.
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
    earliest = 0.0 if measured else memory.seen_at or at
    start = at if began is None else min(at, max(began, earliest, step.memory.since))
    step.memory = replace(step.memory, seen_at=at)
    _settle(step, verdict, at, start, at + lasted, policy)
    if verdict.state in (State.PROTECTED, State.DEGRADED):
        _note_exits(step, at, exits)
    if port is not None and port != memory.port:
        if memory.port is not None:
            step.events.append(PortChanged(at=at, old=memory.port, new=port))
        step.memory = replace(step.memory, port=port)
    return step.memory, step.events


def overdue(memory: Memory, at: float, finding: Finding) -> tuple[Memory, list[Event]]:
    """Take into account that no report came by the deadline `at`."""
    if State.SILENT not in TRANSITIONS[memory.state]:
        return memory, []
    before = Before(state=memory.state, since=memory.since, findings=memory.findings, candidate=memory.candidate)
    step = _Step(memory)
    step.change_state(State.SILENT, at, (finding,))
    return replace(step.memory, before=before), step.events


def _settle(step: _Step, verdict: Verdict, at: float, began: float, until: float, policy: Policy) -> None:
    memory, state = step.memory, verdict.state
    if state is State.UNKNOWN:
        state = State.UNVERIFIED
        memory = step.memory = _blinked(memory, at, policy)
    if state is memory.state:
        findings = _with_flapping(verdict.findings, state, memory.turns, at, policy)
        if memory.candidate is not None or memory.findings != findings:
            step.memory = replace(memory, findings=findings, candidate=None)
        return
    wait = TRANSITIONS[memory.state].get(state)
    if wait is None:
        # A leak or a dead tunnel that cannot be seen any more: it is not known to have ended.
        step.memory = replace(memory, candidate=None, findings=_with_unknown(memory.findings, verdict.findings))
        return
    candidate = memory.candidate
    if candidate is None or candidate.state is not state:
        start = at if state is State.PROTECTED else began
        candidate = Candidate(state=state, since=_trouble_start(candidate, state, start))
    doubtful = memory.state is State.UNVERIFIED and _flaps(memory.blinks, candidate.since, policy)
    if doubtful or _flaps(memory.turns, candidate.since, policy):
        wait = FLAPPING.get(wait, wait)
    # Verification that comes and goes counts for nothing: else each success would reset the wait, for ever.
    blinking = state is State.UNVERIFIED and _flaps(memory.blinks, at, policy)
    if blinking or until - candidate.since >= wait.seconds(policy):
        turns = memory.turns
        if memory.state is State.PROTECTED:
            turns = (*_lately(turns, candidate.since, policy), candidate.since)[-MAX_FLAP_COUNT:]
            step.memory = replace(memory, turns=turns)
        step.change_state(
            state, candidate.since, _with_flapping(verdict.findings, state, turns, candidate.since, policy)
        )
    else:
        # A tunnel that was never judged shows at once why that is not possible.
        unjudged = memory.state is State.PENDING and state is State.UNVERIFIED
        step.memory = replace(memory, candidate=candidate, findings=verdict.findings if unjudged else memory.findings)


def _blinked(memory: Memory, at: float, policy: Policy) -> Memory:
    """Note that nothing can be verified from `at` on, unless that is known."""
    latest = memory.state if memory.candidate is None else memory.candidate.state
    ages = memory.state is State.UNVERIFIED or State.UNVERIFIED in TRANSITIONS[memory.state]
    if not ages or latest in (State.UNVERIFIED, State.PENDING, State.SILENT):
        return memory
    return replace(memory, blinks=(*_lately(memory.blinks, at, policy), at)[-MAX_FLAP_COUNT:])


def _lately(turns: tuple[float, ...], at: float, policy: Policy) -> tuple[float, ...]:
    return tuple([t for t in turns if t > at - policy.flap_window])


def _flaps(turns: tuple[float, ...], at: float, policy: Policy) -> bool:
    return len(turns) >= policy.flap_count and len(_lately(turns, at, policy)) >= policy.flap_count


def _with_flapping(
    findings: tuple[Finding, ...], state: State, turns: tuple[float, ...], at: float, policy: Policy
) -> tuple[Finding, ...]:
    """Add that trouble comes and goes, and which it is, while the tunnel is in trouble again."""
    if state is State.PROTECTED or not _flaps(turns, at, policy):
        return findings
    times = len(_lately(turns, at, policy))
    minutes = counted(policy.flap_window / 60, "minute")
    calm = f"{policy.flap_calm:g} s of calm"
    said = f"Trouble came {times} times within {minutes}, now it is {state}: its end is reported after {calm}."
    return (*findings, Finding(Code.FLAPPING, said, {"times": str(times), "verdict": state.value}))


def _trouble_start(candidate: Candidate | None, state: State, at: float) -> float:
    """The beginning of trouble: kept where it becomes milder (down, then degraded), else `at`."""
    if candidate is None or State.PROTECTED in (candidate.state, state):
        return at
    return candidate.since if HARM.index(candidate.state) < HARM.index(state) else at


def _with_unknown(known: tuple[Finding, ...], unknown: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """The findings of the trouble, and those that say why it cannot be verified now."""
    kept = tuple(f for f in known if MEANING[f.code].state is not State.UNKNOWN)
    return (*kept, *(f for f in unknown if MEANING[f.code].state is State.UNKNOWN))


def _note_exits(step: _Step, at: float, exits: tuple[IPAddress | None, IPAddress | None]) -> None:
    memory = step.memory
    for old, new in ((memory.exit4, exits[0]), (memory.exit6, exits[1])):
        if old and new and old != new:
            step.events.append(ExitChanged(at=at, old=old, new=new))
    now = (exits[0] or memory.exit4, exits[1] or memory.exit6)
    if now != (memory.exit4, memory.exit6):
        step.memory = replace(memory, exit4=now[0], exit6=now[1])


def silence_finding(
    last_seen: float, deadline: float, site: str = "", others: Sequence[str] = (), *, pulses: bool = False
) -> Finding:
    """The finding of an overdue tunnel: for how long no report has come.

    `others` are all agents of the same `site`, when none of them reports any more. `pulses`: the agent's pulses still
    come.
    """
    silence = f"No report for {deadline - last_seen:.0f} s"
    facts = {"silent_for_seconds": f"{deadline - last_seen:.0f}"}
    if pulses:
        said = f"{silence}, but pulses: the agent runs, and its reports do not get through."
        return Finding(Code.NO_REPORTS, said, {**facts, "heard": "pulses"})
    if others:
        said = f"{silence}, and none from anybody else of the site {site}: probably its internet connection is down."
        return Finding(Code.NO_REPORTS, said, {**facts, "site": site, "silent_too": ", ".join(others)})
    return Finding(Code.NO_REPORTS, f"{silence}; from here, a dead tunnel and a dead agent look the same.", facts)
