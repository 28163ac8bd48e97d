"""The state machine: its table walked pair by pair, then what Hypothesis makes of it."""

from dataclasses import dataclass, replace
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpn_sentinel.domain.machine import (
    TRANSITIONS,
    Candidate,
    Event,
    ExitChanged,
    Memory,
    PortChanged,
    Revised,
    StateChanged,
    Wait,
    advance,
    overdue,
    silence_finding,
)
from vpn_sentinel.domain.notice import Kind, Notice, notices
from vpn_sentinel.domain.policy import IPAddress, Policy
from vpn_sentinel.domain.verdict import Code, Finding, State, Verdict

POLICY = Policy(grace_down=4.0, grace_degraded=15.0, grace_recovery=6.0)
TABLE = [(old, new) for old in TRANSITIONS for new in State if new is not State.UNKNOWN]  # it counts as unverified
VERDICTS = (State.LEAKING, State.DOWN, State.DEGRADED, State.UNKNOWN, State.PROTECTED)
CODE = {
    State.LEAKING: Code.IP_LEAK,
    State.DOWN: Code.NO_TRAFFIC,
    State.DEGRADED: Code.DNS_DOWN,
    State.UNKNOWN: Code.NOTHING_SEEN,
}
OLD_EXIT, NEW_EXIT, EXIT6 = ip_address("146.70.1.2"), ip_address("146.70.9.9"), ip_address("2a0d:5600::2")


def verdict(state: State) -> Verdict:
    if state is State.UNVERIFIED:
        state = State.UNKNOWN
    return Verdict(state, (Finding(CODE[state], f"It is {state}."),) if state in CODE else ())


def standing(state: State, since: float = 100.0) -> Memory:
    """A tunnel that has been in `state` since `since`, and that people know to be."""
    was = Finding(CODE.get(state, Code.NO_REPORTS), "It was so before.")
    trouble = None if state in (State.PROTECTED, State.PENDING) else since
    return Memory(state=state, since=since, seen_at=since, findings=(was,), told=state, trouble_since=trouble)


def walk(memory: Memory, *steps: tuple[float, State]) -> tuple[Memory, list[Event]]:
    """Advance by verdicts at times."""
    events: list[Event] = []
    for at, state in steps:
        memory, more = advance(memory, verdict(state), at, POLICY)
        events += more
    return memory, events


def turns(events: list[Event]) -> list[tuple[float, State]]:
    return [(e.at, e.new) for e in events if isinstance(e, StateChanged)]


@pytest.mark.parametrize(("old", "new"), TABLE, ids=[f"{o}-{n}" for o, n in TABLE])
def test_every_pair_moves_after_its_grace_and_not_before(old: State, new: State) -> None:
    wait = TRANSITIONS[old].get(new)
    memory = standing(old)
    if new is State.SILENT:
        memory, events = overdue(memory, 200.0, silence_finding(100.0, 200.0))
        assert turns(events) == ([(200.0, State.SILENT)] if wait is Wait.NONE else [])
    elif wait is None:
        memory, events = walk(memory, *((200.0 + i, new) for i in range(100)))
        assert turns(events) == []
        assert memory.state is old
    else:
        grace = wait.seconds(POLICY)
        memory, early = walk(memory, (200.0, new), (200.0 + grace - 0.1, new)) if grace else (memory, [])
        assert turns(early) == []
        memory, events = walk(memory, (200.0 + grace, new))
        assert turns(events) == [(200.0, new)]
        assert (memory.state, memory.since, memory.candidate) == (new, 200.0, None)
        assert memory.findings == verdict(new).findings


def test_the_table_knows_every_state_of_a_tunnel() -> None:
    assert set(TRANSITIONS) == set(State) - {State.UNKNOWN}
    for moves in TRANSITIONS.values():
        assert State.UNKNOWN not in moves
        assert moves.get(State.LEAKING, Wait.NONE) is Wait.NONE


def test_a_tunnel_that_goes_silent_needs_no_grace() -> None:
    assert all(moves.get(State.SILENT, Wait.NONE) is Wait.NONE for moves in TRANSITIONS.values())


def test_a_grace_that_is_interrupted_starts_again() -> None:
    _, events = walk(
        standing(State.PROTECTED),
        (200.0, State.DOWN), (203.0, State.PROTECTED), (204.0, State.DOWN), (207.0, State.DOWN), (208.0, State.DOWN),
    )  # fmt: skip
    assert turns(events) == [(204.0, State.DOWN)]


def test_trouble_that_grows_worse_must_last_by_itself() -> None:
    _, events = walk(
        standing(State.PROTECTED),
        (200.0, State.DEGRADED),
        (210.0, State.DOWN),
        (213.0, State.DOWN),
        (214.0, State.DOWN),
    )
    assert turns(events) == [(210.0, State.DOWN)]


def test_trouble_that_eases_began_when_it_began() -> None:
    _, events = walk(standing(State.PROTECTED), (200.0, State.DOWN), (203.0, State.DEGRADED), (216.0, State.DEGRADED))
    assert turns(events) == [(200.0, State.DEGRADED)]


def test_a_leak_began_when_it_was_seen() -> None:
    _, events = walk(standing(State.PROTECTED), (200.0, State.DOWN), (202.0, State.LEAKING))
    assert turns(events) == [(202.0, State.LEAKING)]


def test_a_recovery_is_not_dated_by_the_trouble_before_it() -> None:
    memory, events = walk(
        standing(State.DOWN), (200.0, State.DEGRADED), (203.0, State.PROTECTED), (208.0, State.PROTECTED)
    )
    assert turns(events) == []
    _, events = walk(memory, (209.0, State.PROTECTED))
    assert turns(events) == [(203.0, State.PROTECTED)]


def test_a_short_unknown_holds_what_was_known_and_starts_a_grace_again() -> None:
    memory, events = walk(standing(State.PROTECTED), (200.0, State.DOWN), (203.0, State.UNKNOWN), (204.0, State.DOWN))
    assert turns(events) == []
    assert memory.findings == standing(State.PROTECTED).findings
    assert memory.candidate == Candidate(state=State.DOWN, since=204.0)


def test_a_tunnel_that_was_never_judged_shows_why() -> None:
    memory, _ = walk(Memory(), (200.0, State.UNKNOWN))
    assert (memory.state, memory.findings) == (State.PENDING, verdict(State.UNKNOWN).findings)


def test_what_was_good_is_not_good_for_ever() -> None:
    memory, events = walk(standing(State.PROTECTED), (200.0, State.UNKNOWN), (230.0, State.UNKNOWN))
    assert turns(events) == [(200.0, State.UNVERIFIED)]
    assert memory.findings == verdict(State.UNKNOWN).findings


@pytest.mark.parametrize("state", [State.LEAKING, State.DOWN])
def test_blindness_ends_no_trouble_and_is_shown_beside_it(state: State) -> None:
    memory, events = walk(standing(state), (200.0, State.UNKNOWN), (900.0, State.UNKNOWN))
    assert events == []
    assert memory.state is state
    assert memory.findings == (*standing(state).findings, *verdict(State.UNKNOWN).findings)


def test_sight_that_comes_and_goes_is_lost() -> None:
    life = [(200.0 + 30 * i, State.PROTECTED if i % 2 else State.UNKNOWN) for i in range(20)]
    memory, events = walk(standing(State.PROTECTED), *life)
    assert turns(events) == [(320.0, State.UNVERIFIED)]
    _, events = walk(memory, (800.0, State.PROTECTED), (830.0, State.PROTECTED), (861.0, State.PROTECTED))
    assert turns(events)[-1][1] is State.PROTECTED


def test_two_short_looks_that_failed_alarm_nobody() -> None:
    _, events = walk(
        standing(State.PROTECTED),
        (200.0, State.UNKNOWN), (201.0, State.PROTECTED), (260.0, State.UNKNOWN), (262.0, State.PROTECTED),
    )  # fmt: skip
    assert events == []


def test_a_tunnel_that_was_never_judged_becomes_unverified_or_silent() -> None:
    _, events = walk(Memory(), (200.0, State.UNKNOWN), (216.0, State.UNKNOWN))
    assert turns(events) == [(200.0, State.UNVERIFIED)]
    memory, events = overdue(Memory(), 300.0, silence_finding(200.0, 300.0))
    assert turns(events) == [(300.0, State.SILENT)]
    _, told = notices(Memory(), memory, events, caught_up=True)
    assert [n.kind for n in told] == [Kind.SILENT]


def test_people_hear_once_that_nothing_can_be_verified_and_that_it_can_again() -> None:
    memory, told = standing(State.PROTECTED), []
    for at, state in [(200.0 + i, State.UNKNOWN) for i in range(60)] + [
        (260.0, State.PROTECTED),
        (266.0, State.PROTECTED),
    ]:
        after, events = advance(memory, verdict(state), at, POLICY)
        memory, out = notices(memory, after, events, caught_up=True)
        told += out
    assert [n.kind for n in told] == [Kind.UNVERIFIED, Kind.RECOVERED]
    assert told[0].findings == verdict(State.UNKNOWN).findings
    assert (told[1].was, told[1].outage) == (State.UNVERIFIED, 60.0)


def test_the_same_state_brings_its_newest_findings() -> None:
    told = Finding(Code.KILLSWITCH_OPEN, "A packet came out.")
    memory, events = advance(standing(State.PROTECTED), Verdict(State.PROTECTED, (told,)), 200.0, POLICY)
    assert (memory.findings, events) == ((told,), [])
    again, _ = advance(memory, Verdict(State.PROTECTED, (told,)), 201.0, POLICY)
    assert again == replace(memory, seen_at=201.0)


def test_time_never_runs_backwards() -> None:
    memory, events = walk(standing(State.PROTECTED), (200.0, State.PROTECTED), (150.0, State.LEAKING))
    assert turns(events) == [(200.0, State.LEAKING)]
    assert memory.seen_at == 200.0


# -- silence, and what a replay makes of it


def silent(before: Memory, at: float = 200.0) -> Memory:
    memory, events = overdue(before, at, silence_finding(100.0, at))
    assert turns(events) == [(at, State.SILENT)]
    return memory


def test_a_silence_says_how_long_nothing_came() -> None:
    finding = silence_finding(100.0, 191.4)
    assert finding.code is Code.NO_REPORTS
    assert finding.message.startswith("No report for 91 s;")
    assert finding.evidence == {"silent_for_seconds": "91"}
    assert silent(standing(State.PROTECTED)).findings[0].code is Code.NO_REPORTS


def test_a_silence_in_which_pulses_come_blames_neither_agent_nor_tunnel() -> None:
    finding = silence_finding(100.0, 113.0, "attic", ["ch"], pulses=True)
    assert finding.message == "No report for 13 s, but pulses: the agent runs, and its reports do not get through."
    assert finding.evidence == {"silent_for_seconds": "13", "heard": "pulses"}
    assert "TCP" in finding.advice


def test_who_is_silent_does_not_become_silent() -> None:
    before = standing(State.SILENT)
    assert overdue(before, 200.0, silence_finding(100.0, 200.0)) == (before, [])


def test_a_report_after_the_deadline_ends_the_silence_and_leaves_it_true() -> None:
    memory, events = walk(silent(standing(State.PROTECTED)), (230.0, State.PROTECTED))
    assert events == [StateChanged(at=230.0, old=State.SILENT, new=State.PROTECTED)]
    assert memory.trouble_since is None


def test_a_replay_from_before_the_deadline_makes_the_silence_void() -> None:
    before = standing(State.PROTECTED)
    memory, events = walk(silent(before), (110.0, State.PROTECTED))
    assert events == [Revised(at=200.0)]
    assert (memory.state, memory.since, memory.trouble_since) == (State.PROTECTED, 100.0, None)


def test_a_replay_moves_as_the_truth_moved() -> None:
    memory, events = walk(
        silent(standing(State.PROTECTED)),
        (110.0, State.PROTECTED), (120.0, State.DOWN), (124.0, State.DOWN), (150.0, State.LEAKING),
        (160.0, State.PROTECTED), (166.0, State.PROTECTED), (230.0, State.PROTECTED),
    )  # fmt: skip
    assert events[0] == Revised(at=200.0)
    assert turns(events) == [(120.0, State.DOWN), (150.0, State.LEAKING), (160.0, State.PROTECTED)]
    assert (memory.state, memory.since) == (State.PROTECTED, 160.0)


def test_a_replay_goes_on_with_the_grace_that_silence_interrupted() -> None:
    started, _ = walk(standing(State.PROTECTED), (190.0, State.DOWN))
    _, events = walk(silent(started), (194.0, State.DOWN))
    assert turns(events) == [(190.0, State.DOWN)]


def test_trouble_from_before_a_void_silence_goes_on() -> None:
    memory, _ = walk(silent(standing(State.LEAKING)), (150.0, State.LEAKING))
    assert (memory.state, memory.since, memory.trouble_since) == (State.LEAKING, 100.0, 100.0)


def test_a_replay_that_could_see_nothing_brings_back_what_was_known() -> None:
    memory, events = walk(silent(standing(State.DEGRADED)), (150.0, State.UNKNOWN))
    assert events == [Revised(at=200.0)]
    assert memory.state is State.DEGRADED


# -- exits


def exits(memory: Memory, state: State, *found: IPAddress) -> tuple[Memory, list[Event]]:
    v4, v6 = (next((f for f in found if f.version == v), None) for v in (4, 6))
    return advance(memory, verdict(state), memory.seen_at + 1, POLICY, (v4, v6))


def test_an_exit_that_hops_is_an_event() -> None:
    memory, events = exits(standing(State.PROTECTED), State.PROTECTED, OLD_EXIT)
    assert (memory.exit4, events) == (OLD_EXIT, [])
    memory, events = exits(memory, State.PROTECTED, NEW_EXIT, EXIT6)
    assert events == [ExitChanged(at=102.0, old=OLD_EXIT, new=NEW_EXIT)]
    assert (memory.exit4, memory.exit6) == (NEW_EXIT, EXIT6)


def test_an_exit_that_was_not_seen_stays_the_last_one() -> None:
    memory, _ = exits(standing(State.PROTECTED), State.PROTECTED, OLD_EXIT)
    memory, events = exits(memory, State.PROTECTED)
    assert (memory.exit4, events) == (OLD_EXIT, [])


def test_where_a_leak_comes_out_is_no_exit() -> None:
    memory, _ = exits(standing(State.PROTECTED), State.PROTECTED, OLD_EXIT)
    memory, events = exits(memory, State.LEAKING, NEW_EXIT)
    assert memory.exit4 == OLD_EXIT
    assert not any(isinstance(e, ExitChanged) for e in events)


def test_an_exit_in_the_wrong_country_is_one() -> None:
    memory, _ = exits(standing(State.PROTECTED), State.DEGRADED, OLD_EXIT)
    assert memory.exit4 == OLD_EXIT


# -- invariants, over whatever may happen to a tunnel


@dataclass(frozen=True)
class Report:
    state: State
    after: float
    caught_up: bool = True
    exit: object = None


@dataclass(frozen=True)
class Deadline:
    """Nothing came for `after` seconds; then the agent comes back, and its next report is `replayed` seconds old."""

    after: float
    replayed: float = 0.0


reports = st.builds(
    Report,
    state=st.sampled_from(VERDICTS),
    after=st.sampled_from([0.0, 0.5, 2.0, 5.0, 20.0]),
    caught_up=st.sampled_from([True, True, True, False]),
    exit=st.sampled_from([None, OLD_EXIT, NEW_EXIT, EXIT6]),
)
deadlines = st.builds(Deadline, after=st.sampled_from([90.0, 400.0]), replayed=st.sampled_from([0.0, 30.0, 500.0]))
lives = st.lists(st.one_of(reports, reports, reports, deadlines), max_size=40)


@dataclass
class Life:
    """A tunnel's life under a list of stimuli, with all that was ever told of it."""

    memory: Memory
    now: float = 1000.0  # by the server's clock
    seen: float = 1000.0  # of the last report, which may be a replay
    told: tuple[Notice, ...] = ()

    def step(self, stimulus: Report | Deadline) -> list[Event]:
        before = self.memory
        if isinstance(stimulus, Deadline):
            self.now += stimulus.after
            memory, events = overdue(before, self.now, silence_finding(0.0, self.now))
            caught_up = True
            self.seen = self.now - stimulus.replayed
        else:
            self.seen += stimulus.after
            self.now = max(self.now, self.seen)
            address = stimulus.exit
            pair = (address, None) if address is not EXIT6 else (None, address)
            memory, events = advance(before, verdict(stimulus.state), self.seen, POLICY, pair)  # type: ignore[arg-type]
            caught_up = stimulus.caught_up
        memory, out = notices(before, memory, events, caught_up=caught_up)
        self.memory, self.told = memory, (*self.told, *out)
        return events


@settings(deadline=None)
@given(lives)
def test_a_leak_is_never_delayed(life: list[Report | Deadline]) -> None:
    tunnel = Life(Memory())
    for stimulus in life:
        known = tunnel.memory.told
        count = len(tunnel.told)
        events = tunnel.step(stimulus)
        if isinstance(stimulus, Report) and stimulus.state is State.LEAKING:
            assert tunnel.memory.state is State.LEAKING
            # A replay that only goes on with a leak that was told before the silence waits for its end.
            if turns(events) or stimulus.caught_up:
                assert known is State.LEAKING or Kind.LEAKING in [n.kind for n in tunnel.told[count:]]


@settings(deadline=None)
@given(lives, st.sampled_from(VERDICTS))
def test_a_replay_changes_nothing(life: list[Report | Deadline], state: State) -> None:
    tunnel = Life(Memory())
    for stimulus in life:
        tunnel.step(stimulus)
    tunnel.step(Report(state, 1.0))
    once = tunnel.memory
    assert tunnel.step(Report(state, 0.0)) == []
    assert tunnel.memory == once


@settings(deadline=None)
@given(lives)
def test_every_trouble_can_close(life: list[Report | Deadline]) -> None:
    tunnel = Life(Memory())
    for stimulus in life:
        tunnel.step(stimulus)
    # The last replay may lag by as much as the deadlines allow, and a grace must pass after it.
    tunnel.step(Report(State.PROTECTED, 1000.0))
    tunnel.step(Report(State.PROTECTED, POLICY.grace_recovery))
    assert (tunnel.memory.state, tunnel.memory.told) == (State.PROTECTED, State.PROTECTED)
    assert (tunnel.memory.trouble_since, tunnel.memory.outage, tunnel.memory.before) == (None, None, None)


@settings(deadline=None)
@given(lives)
def test_unknown_leads_to_unverified_alone(life: list[Report | Deadline]) -> None:
    tunnel = Life(Memory())
    for stimulus in life:
        events = tunnel.step(stimulus)
        if isinstance(stimulus, Report) and stimulus.state is State.UNKNOWN:
            assert {new for _, new in turns(events)} <= {State.UNVERIFIED}


@settings(deadline=None)
@given(lives)
def test_nothing_is_dated_in_the_future_or_before_the_state_it_ends(life: list[Report | Deadline]) -> None:
    tunnel = Life(Memory())
    for stimulus in life:
        was = tunnel.memory
        events = tunnel.step(stimulus)
        assert tunnel.memory.since <= tunnel.now
        assert tunnel.memory.candidate is None or tunnel.memory.since <= tunnel.memory.candidate.since <= tunnel.now
        for event in events:
            assert event.at <= tunnel.now
            if isinstance(event, StateChanged) and not any(isinstance(e, Revised) for e in events):
                assert event.at >= was.since
                assert event.old is not event.new
        if isinstance(stimulus, Report):
            assert all(e.at <= tunnel.memory.seen_at for e in events if not isinstance(e, Revised))


@settings(deadline=None, max_examples=300)
@given(lives)
def test_notices_alternate_between_trouble_and_its_end(life: list[Report | Deadline]) -> None:
    tunnel = Life(Memory())
    for stimulus in life:
        tunnel.step(stimulus)
    trouble: Kind | None = None
    connected = False
    for notice in tunnel.told:
        match notice.kind:
            case Kind.CONNECTED:
                assert not connected  # once: from then on it is protected *again*
                trouble, connected = None, True
            case Kind.RECOVERED:
                assert trouble is not None
                assert notice.outage is not None
                assert notice.outage >= 0
                assert notice.was not in (State.PROTECTED, State.PENDING, State.UNKNOWN)
                trouble, connected = None, True
            case Kind.ADDRESS_CHANGED:
                assert trouble is None
                assert notice.exit is not None
                assert notice.old_exit is not None
                assert notice.exit.version == notice.old_exit.version
            case kind:
                assert kind is not trouble  # told once
                trouble = kind


@settings(deadline=None)
@given(lives)
def test_a_tunnel_is_in_trouble_exactly_while_it_is_not_protected(life: list[Report | Deadline]) -> None:
    tunnel = Life(Memory())
    for stimulus in life:
        tunnel.step(stimulus)
        well = tunnel.memory.state in (State.PROTECTED, State.PENDING)
        assert (tunnel.memory.trouble_since is None) is well
        assert (tunnel.memory.before is not None) is (tunnel.memory.state is State.SILENT)


# -- when trouble began, and tunnels that come and go


@pytest.mark.parametrize(
    ("began", "expected"),
    {
        "known": (197.0, 197.0),
        "before the last word": (150.0, 195.0),
        "in the future": (900.0, 200.0),
        "unknown": (None, 200.0),
    }.values(),
)
def test_trouble_began_when_it_began_but_not_before_the_last_word(began: float | None, expected: float) -> None:
    memory, _ = walk(standing(State.PROTECTED), (195.0, State.PROTECTED))
    memory, events = advance(memory, verdict(State.DOWN), 200.0, POLICY, began=began)
    more = advance(memory, verdict(State.DOWN), 210.0, POLICY)[1]
    assert turns(events + more) == [(expected, State.DOWN)]


def test_a_round_that_waited_in_vain_lasted_until_its_end() -> None:
    """Silent for 3 s before it and for 1.4 s in it: longer than the grace of 4 s."""
    memory, _ = walk(standing(State.PROTECTED), (190.0, State.PROTECTED))
    events = advance(memory, verdict(State.DOWN), 200.0, POLICY, began=197.0, lasted=1.4)[1]
    assert turns(events) == [(197.0, State.DOWN)]
    assert turns(advance(memory, verdict(State.DOWN), 200.0, POLICY, began=197.0, lasted=0.9)[1]) == []


def test_another_port_is_an_event_and_the_first_is_none() -> None:
    memory, first = advance(standing(State.PROTECTED), verdict(State.PROTECTED), 200.0, POLICY, port=41000)
    memory, unknown = advance(memory, verdict(State.PROTECTED), 210.0, POLICY, port=None)
    memory, changed = advance(memory, verdict(State.PROTECTED), 220.0, POLICY, port=42000)
    assert (first, unknown, changed) == ([], [], [PortChanged(at=220.0, old=41000, new=42000)])
    assert memory.port == 42000


def comes_and_goes(memory: Memory, start: float, times: int) -> tuple[Memory, float]:
    """So many outages of five seconds, each with its recovery."""
    at = start
    for _ in range(times):
        memory, _ = walk(memory, (at, State.DOWN), (at + 5, State.DOWN), (at + 10, State.PROTECTED))
        memory, _ = walk(memory, (at + 20, State.PROTECTED))
        at += 30
    return memory, at


def test_the_third_outage_within_five_minutes_ends_only_after_calm() -> None:
    memory, at = comes_and_goes(standing(State.PROTECTED), 200.0, 2)
    assert memory.state is State.PROTECTED
    memory, _ = walk(memory, (at, State.DOWN), (at + 5, State.DOWN))
    assert [f.code for f in memory.findings] == [Code.NO_TRAFFIC, Code.FLAPPING]
    for _ in range(5):  # one incident, whatever it does
        memory, events = walk(memory, (at + 10, State.PROTECTED), (at + 30, State.PROTECTED), (at + 35, State.DOWN))
        assert (turns(events), memory.state) == ([], State.DOWN)
        at += 30
    memory, events = walk(memory, (at + 10, State.PROTECTED), (at + 69, State.PROTECTED), (at + 70, State.PROTECTED))
    assert turns(events) == [(at + 10, State.PROTECTED)]
    assert memory.findings == ()


def test_outages_far_apart_are_no_flapping() -> None:
    memory, at = comes_and_goes(standing(State.PROTECTED), 200.0, 2)
    memory, _ = comes_and_goes(memory, at + POLICY.flap_window, 1)
    assert memory.state is State.PROTECTED


def test_a_leak_of_a_flapping_tunnel_has_no_grace_either() -> None:
    memory, at = comes_and_goes(standing(State.PROTECTED), 200.0, 3)
    memory, events = walk(memory, (at, State.LEAKING))
    assert turns(events)[-1] == (at, State.LEAKING)
    assert [f.code for f in memory.findings] == [Code.IP_LEAK, Code.FLAPPING]
