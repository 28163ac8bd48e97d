"""Which remedy is due: verdicts and times in, steps out."""

import pytest

from vpn_sentinel.agent.remedies.plan import Plan, RemedyMemory, RemedyRules, Step
from vpn_sentinel.domain.verdict import Code, Finding, State, Verdict

WALL = 1_800_000_000.0
LEAKING = Verdict(State.LEAKING, (Finding(Code.IP_LEAK, ""),))
WELL = Verdict(State.PROTECTED)
UNKNOWN = Verdict(State.UNKNOWN)


def down(code: Code) -> Verdict:
    return Verdict(State.DOWN, (Finding(code, ""),))


def names(steps: tuple[Step, ...]) -> list[str]:
    return [s.name for s in steps if s.held is None]


def run(plan: Plan, verdict: Verdict, at: float) -> list[str]:
    """One round at `at` seconds; what is due is done and goes well."""
    steps = plan.due(verdict, at, WALL + at)
    for step in steps:
        if step.held is None:
            plan.tried(step, WALL + at)
            plan.ended(step, well=True)
    return names(steps)


@pytest.mark.parametrize("code", [Code.TUNNEL_DOWN, Code.NO_TRAFFIC, Code.NO_FORWARDING])
def test_a_restart_waits_until_the_tunnel_has_been_down_for_30_seconds(code: Code) -> None:
    plan = Plan(RemedyRules(restart=True), RemedyMemory())
    assert run(plan, down(code), 0) == []
    assert run(plan, down(code), 29) == []
    assert run(plan, down(code), 30) == ["gluetun_restart"]


@pytest.mark.parametrize(
    "verdict",
    [
        down(Code.UPLINK_DOWN),
        down(Code.CAPTIVE_PORTAL),
        down(Code.ORPHANED_NAMESPACE),
        UNKNOWN,
        WELL,
        LEAKING,
        Verdict(State.DEGRADED, (Finding(Code.HIGH_LOSS, ""),)),
        Verdict(State.SILENT, (Finding(Code.NO_REPORTS, ""),)),
    ],
    ids=lambda v: v.findings[0].code if v.findings else v.state,
)
def test_what_no_restart_can_cure_restarts_nothing(verdict: Verdict) -> None:
    plan = Plan(RemedyRules(restart=True), RemedyMemory())
    assert [run(plan, verdict, float(at)) for at in range(0, 600, 10)] == [[]] * 60


def test_unknown_ends_the_wait() -> None:
    plan = Plan(RemedyRules(restart=True), RemedyMemory())
    run(plan, down(Code.NO_TRAFFIC), 0)
    run(plan, UNKNOWN, 20)
    assert run(plan, down(Code.NO_TRAFFIC), 35) == []
    assert run(plan, down(Code.NO_TRAFFIC), 65) == ["gluetun_restart"]


def test_unknown_alone_starts_nothing_ever() -> None:
    plan = Plan(
        RemedyRules(hook=True, restart=True, clients=("qbittorrent",), resume=True),
        RemedyMemory(paused=["qbittorrent"]),
    )
    assert [run(plan, UNKNOWN, float(at)) for at in range(0, 7200, 15)] == [[]] * 480


def test_restarts_come_later_and_later_and_never_more_than_the_cap() -> None:
    plan = Plan(RemedyRules(restart=True, cap=3), RemedyMemory())
    at = [t for t in range(24 * 3600) if run(plan, down(Code.NO_TRAFFIC), float(t))]
    assert at[:3] == [30, 90, 210], "after 60 s, then 120 s"
    assert all(sum(a <= b < a + 3600 for b in at) <= 3 for a in at)
    assert len(at) <= 30, "not 300 in a day"
    assert at[-1] - at[-2] >= 3600


def test_a_cap_survives_restarts_of_the_agent() -> None:
    wants, text, done = RemedyRules(restart=True, restart_after=0, cap=3), None, 0
    for start in range(0, 3600, 40):  # a crash every 40 s
        plan = Plan(wants, RemedyMemory.from_text(text))
        done += len(run(plan, down(Code.NO_TRAFFIC), float(start)))
        text = plan.memory.to_text()
    assert done == 3


def test_a_held_step_is_told_once() -> None:
    plan = Plan(RemedyRules(restart=True, restart_after=0), RemedyMemory())
    run(plan, down(Code.NO_TRAFFIC), 0)
    held = [s for t in range(1, 60) for s in plan.due(down(Code.NO_TRAFFIC), t, WALL + t)]
    assert [s.held for s in held] == ["not before 60 s after the last time"]


def test_a_clock_that_was_set_back_holds_nothing_for_ever() -> None:
    plan = Plan(RemedyRules(restart=True, restart_after=0), RemedyMemory(tries={"gluetun_restart": [WALL + 9e6] * 3}))
    assert run(plan, down(Code.NO_TRAFFIC), 0) == ["gluetun_restart"]


def test_a_pause_is_asked_for_once_at_a_leak_and_undone_when_it_is_settled() -> None:
    plan = Plan(RemedyRules(clients=("qbittorrent",), resume=True, settled={State.PROTECTED: 4.0}), RemedyMemory())
    assert run(plan, LEAKING, 0) == ["qbittorrent_pause"]
    assert run(plan, LEAKING, 100) == []
    assert plan.memory.paused == ["qbittorrent"]
    assert run(plan, down(Code.TUNNEL_DOWN), 101) == []
    assert run(plan, WELL, 110) == []
    assert run(plan, WELL, 114) == ["qbittorrent_resume"]
    assert run(plan, WELL, 500) == []
    assert plan.memory.paused == []


def test_what_we_did_not_pause_is_not_resumed() -> None:
    plan = Plan(RemedyRules(clients=("qbittorrent",), resume=True), RemedyMemory())
    assert run(plan, WELL, 100) == []


def test_a_pause_that_failed_is_tried_again_after_its_wait() -> None:
    plan = Plan(RemedyRules(clients=("transmission",)), RemedyMemory())
    (step,) = plan.due(LEAKING, 0, WALL)
    plan.tried(step, WALL)
    plan.ended(step, well=False)
    assert names(plan.due(LEAKING, 59, WALL + 59)) == []
    assert names(plan.due(LEAKING, 60, WALL + 60)) == ["transmission_pause"]
    assert plan.memory.paused == []


def test_a_dry_pause_is_nothing_to_resume() -> None:
    plan = Plan(RemedyRules(clients=("transmission",), resume=True), RemedyMemory())
    (step,) = plan.due(LEAKING, 0, WALL)
    plan.tried(step, WALL)
    plan.ended(step, well=True, dry=True)
    assert names(plan.due(LEAKING, 100, WALL + 100)) == []
    assert run(plan, WELL, 200) == []


def test_the_command_runs_on_each_change_and_on_no_repetition() -> None:
    plan = Plan(RemedyRules(hook=True, settled={State.DOWN: 2.0, State.PROTECTED: 4.0}), RemedyMemory())
    assert run(plan, WELL, 0) == []
    assert run(plan, WELL, 10) == [], "it was well when we first looked: no change"
    assert run(plan, LEAKING, 20) == ["hook"]
    assert run(plan, LEAKING, 300) == []
    assert run(plan, down(Code.TUNNEL_DOWN), 301) == []
    assert run(plan, down(Code.TUNNEL_DOWN), 303) == ["hook"]
    assert run(plan, WELL, 310) == []
    assert run(plan, WELL, 314) == ["hook"]


def test_the_command_hears_of_the_last_state_even_when_it_was_held() -> None:
    plan = Plan(RemedyRules(hook=True), RemedyMemory())
    assert run(plan, LEAKING, 0) == ["hook"]
    assert run(plan, WELL, 5) == ["hook"]
    assert run(plan, LEAKING, 10) == []
    assert run(plan, LEAKING, 60) == ["hook"]


@pytest.mark.parametrize("text", [None, "", "x", "[]", '{"tries": 1}', '{"told": "happy"}', '{"tries": {"a": ["b"]}}'])
def test_a_memory_that_cannot_be_read_is_empty(text: str | None) -> None:
    assert RemedyMemory.from_text(text) == RemedyMemory()


def test_a_memory_survives_being_kept() -> None:
    memory = RemedyMemory(tries={"hook.down": [WALL]}, last_notified=State.DOWN, paused=["qbittorrent"])
    assert RemedyMemory.from_text(memory.to_text()) == memory
