"""The state machine: gives verdicts a memory.

Theory of operation
-------------------
A tunnel is always in one `State`. Two things move it: the verdict of an observation (`advance`) and a deadline that
passed without one (`overdue`). Nothing else assigns a state.

1. `TRANSITIONS[state][stimulus]` says how long a stimulus must last before it becomes the state. A pair that is missing
   moves nothing: what is no transition cannot happen by an oversight.
2. A stimulus that must last becomes the `Candidate`, with the time since when it has been seen without a break. Each
   further verdict of the same kind leaves that time as it is; another kind replaces the candidate; a verdict that is
   the state already drops it. Once the candidate has lasted, the state moves, dated from the candidate's beginning,
   not from when it was decided.
3. Trouble that eases on the way (down, then degraded) keeps its beginning; what is worse must last by itself. What is
   known of the beginning beforehand (`began`) dates the candidate, but never before the last observation that said
   otherwise.
4. *Unknown* is no state. It is the stimulus *unverified*: what was good ages into it, while a leak and a dead tunnel
   stay what they were, with what cannot be seen now added to their findings.
5. A tunnel that left *protected* three times in five minutes is flapping: `FLAPPING` makes its recovery wait for a
   minute of calm. Sight that comes and goes (`blinks`) is treated alike, or each look would forgive the one before.
6. When a deadline passes, `Before` keeps what was known. Observations from before that deadline prove that the agent
   watched all along: `Revised` voids the silence, the machine goes back to `Before`, and the replayed observations
   move it with their true times.

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
        """How long that is under `policy`."""
        return 0.0 if self is Wait.NONE else float(getattr(policy, self.value))


_L, _D, _G, _S, _N, _P = State.LEAKING, State.DOWN, State.DEGRADED, State.SILENT, State.PENDING, State.PROTECTED
_U = State.UNVERIFIED
# state -> stimulus -> how long it must last. A missing pair changes nothing. The column `silent` is the deadline that
# passed without a report, `unverified` the verdict `unknown`: what was good ages, while a leak and a dead tunnel stay
# what they were until something else is seen.
TRANSITIONS: Final[dict[State, dict[State, Wait]]] = {
    _N: {_L: Wait.NONE, _D: Wait.DOWN, _G: Wait.DEGRADED, _P: Wait.NONE, _U: Wait.UNVERIFIED, _S: Wait.NONE},
    _P: {_L: Wait.NONE, _D: Wait.DOWN, _G: Wait.DEGRADED, _U: Wait.UNVERIFIED, _S: Wait.NONE},
    _G: {_L: Wait.NONE, _D: Wait.DOWN, _P: Wait.RECOVERY, _U: Wait.UNVERIFIED, _S: Wait.NONE},
    _D: {_L: Wait.NONE, _G: Wait.RECOVERY, _P: Wait.RECOVERY, _S: Wait.NONE},
    _L: {_D: Wait.DOWN, _G: Wait.RECOVERY, _P: Wait.RECOVERY, _S: Wait.NONE},
    _S: {_L: Wait.NONE, _D: Wait.NONE, _G: Wait.NONE, _P: Wait.NONE, _U: Wait.UNVERIFIED},
    _U: {_L: Wait.NONE, _D: Wait.DOWN, _G: Wait.RECOVERY, _P: Wait.RECOVERY, _S: Wait.NONE},
}
# For a tunnel that comes and goes: what must last longer then.
FLAPPING: Final[dict[Wait, Wait]] = {Wait.RECOVERY: Wait.CALM}


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
class Home:
    """A network that a reference agent came out of, and when it was last seen there."""

    network: IPNetwork
    seen_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """All that a tunnel's past weighs. Times are seconds since the epoch, by the server's clock.

    `told` is the state people last heard of, `told_exit` the exit address, `was_protected` whether it was ever
    known to be protected, `outage` what a recovery will tell the end of; `trouble_since` is when the tunnel was last
    protected, None while it is. `home` are home networks learned from
    canaries sent beside the tunnel. `turns` are the times at which it lately left *protected*. `port` is the forwarded
    port it named last, `port_check` the last attempt to reach that, with this result since `port_checked_at`. Since
    `unheard_since` its pulses come in and their replies do not arrive, 0 while they do; `refuted` is when the agent
    itself then showed a live tunnel. `homes` are where a reference agent came out. `blinks` are the times at which it
    lately could no more be verified, though it could just before. `working` is the tunnel as it was when it worked.
    `moved` is by how much the server's clock had been set, all in all, when this was written: see timeshift.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PortChanged:
    """The VPN forwards another port than before."""

    at: float
    old: int
    new: int


Event = Moved | Revised | ExitChanged | PortChanged


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
    *,
    began: float | None = None,
    measured: bool = False,
    lasted: float = 0.0,
    port: int | None = None,
) -> tuple[Memory, list[Event]]:
    """Take one observation's verdict into account; `exits` are the IPv4 and IPv6 addresses it was seen at.

    Observations come in their order. `at` never runs backwards: an earlier one counts as simultaneous with the last.
    `began` is when the trouble that this verdict names began, where that is known: at the last observation that said
    otherwise at the earliest, unless it is `measured` over a stretch, of which a part could not tell yet.
    `lasted` is for how many seconds from `at` on it was watched to last: as long as a round
    waited for an answer in vain. `port` is the forwarded port, None when none is known.
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
    step.move(State.SILENT, at, (finding,))
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
        # A leak or a dead tunnel that can no more be seen: it is not known to have ended.
        step.memory = replace(memory, candidate=None, findings=_with_unknown(memory.findings, verdict.findings))
        return
    candidate = memory.candidate
    if candidate is None or candidate.state is not state:
        start = at if state is State.PROTECTED else began
        candidate = Candidate(state=state, since=_trouble_start(candidate, state, start))
    doubtful = memory.state is State.UNVERIFIED and _flaps(memory.blinks, candidate.since, policy)
    if doubtful or _flaps(memory.turns, candidate.since, policy):
        wait = FLAPPING.get(wait, wait)
    # Sight that comes and goes verifies nothing: each look would forgive the blindness before it, for ever.
    blinking = state is State.UNVERIFIED and _flaps(memory.blinks, at, policy)
    if blinking or until - candidate.since >= wait.seconds(policy):
        turns = memory.turns
        if memory.state is State.PROTECTED:
            turns = (*_lately(turns, candidate.since, policy), candidate.since)[-MAX_FLAP_COUNT:]
            step.memory = replace(memory, turns=turns)
        step.move(state, candidate.since, _with_flapping(verdict.findings, state, turns, candidate.since, policy))
    else:
        # A tunnel that was never judged shows at once why it cannot be.
        unjudged = memory.state is State.PENDING and state is State.UNVERIFIED
        step.memory = replace(memory, candidate=candidate, findings=verdict.findings if unjudged else memory.findings)


def _blinked(memory: Memory, at: float, policy: Policy) -> Memory:
    """Note that nothing can be verified from `at` on, unless that is known already."""
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
    said = f"Trouble came {times} times within {minutes}, now it is {state}: its end is told after {calm}."
    return (*findings, Finding(Code.FLAPPING, said, {"times": str(times), "verdict": state.value}))


def _trouble_start(candidate: Candidate | None, state: State, at: float) -> float:
    """Trouble that eases on the way (down, then degraded) began when it began; what is worse must last by itself."""
    if candidate is None or State.PROTECTED in (candidate.state, state):
        return at
    return candidate.since if HARM.index(candidate.state) < HARM.index(state) else at


def _with_unknown(known: tuple[Finding, ...], unknown: tuple[Finding, ...]) -> tuple[Finding, ...]:
    """What the trouble was judged by, and why it cannot be verified now."""
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
    """What an overdue tunnel shows: how long nothing has come.

    `others` are all that report from the same `site`, when none of them is heard any more. `pulses` of its agent come
    all the same.
    """
    told = f"No report for {deadline - last_seen:.0f} s"
    facts = {"silent_for_seconds": f"{deadline - last_seen:.0f}"}
    if pulses:
        said = f"{told}, but pulses: the agent runs, and its reports do not get through."
        return Finding(Code.NO_REPORTS, said, {**facts, "heard": "pulses"})
    if others:
        said = f"{told}, and none from anybody else of the site {site}: probably its internet connection is down."
        return Finding(Code.NO_REPORTS, said, {**facts, "site": site, "silent_too": ", ".join(others)})
    return Finding(Code.NO_REPORTS, f"{told}; from here, a dead tunnel and a dead agent look the same.", facts)
