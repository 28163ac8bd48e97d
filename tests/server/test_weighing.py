"""When trouble began that takes a stretch of time to be measured, and for how long a round watched it."""

from dataclasses import replace

import pytest

from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.machine import Memory, advance
from vpn_sentinel.domain.observation import Answer, Canary, Link, Observation, Path, Probe, Quality, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import State
from vpn_sentinel.server.tracking.evaluation import Evaluator, is_measured, trouble_began, watched_for
from vpn_sentinel.server.tracking.sites import Sites

POLICY = Policy()
THROUGH = Canary(probe=Probe.DEFAULT, target="echo", family=4, answer=Answer.ANSWERED, path=Path.TUNNEL)
LOSSY = Quality(seconds=9.0, sent=60, lost=20, lossy_for=14.0)
VANISHED = Quality(seconds=60.0, sent=60, lost=0, mtu=1280, vanished=1420, vanished_for=14.0)


def round_of(quality: Quality, took: float) -> Observation:
    up = Link(name="wg0", present=True, up=True)
    return Observation(trigger=Trigger.TIMER, link=up, canaries=(THROUGH,), quality=quality, took_ms=1000 * took)


@pytest.mark.parametrize("quality", [LOSSY, VANISHED])
def test_pulses_are_asked_at_a_rounds_end_and_its_time_is_its_start(quality: Quality) -> None:
    seen = round_of(quality, took=4.0)
    assert trouble_began(seen, judge(seen, POLICY), 100.0, Memory()) == 90.0


def test_an_agent_that_does_not_tell_since_when_tells_of_how_many_seconds() -> None:
    seen = round_of(Quality(seconds=9.0, sent=60, lost=20), took=4.0)
    assert trouble_began(seen, judge(seen, POLICY), 100.0, Memory()) == 95.0


@pytest.mark.parametrize("quality", [LOSSY, VANISHED])
def test_what_a_second_round_still_sees_at_its_end_has_lasted_so_long(quality: Quality) -> None:
    memory = Memory(state=State.PROTECTED)
    for at, took, state in ((100.0, 0.5, State.PROTECTED), (101.0, 0.4, State.PROTECTED), (101.0, 0.6, State.DEGRADED)):
        seen = round_of(quality if at == 100.0 else replace(quality, vanished_for=14.0 + at - 100.0), took)
        verdict = judge(seen, POLICY)
        since = trouble_began(seen, verdict, at, memory)
        memory, _ = advance(
            memory, verdict, at, POLICY, began=since, measured=is_measured(verdict), lasted=watched_for(seen, verdict)
        )
        assert memory.state is state, at + took


@pytest.mark.parametrize(
    ("agent", "server", "limit"), [(0.05, 0.4, 0.05), (Policy.max_loss, 0.4, 0.4), (0.4, Policy.max_loss, 0.4)]
)
def test_the_agents_limit_counts_unless_it_is_the_default(agent: float, server: float, limit: float) -> None:
    # `5000 *` makes of the default of one the default of the other.
    rules = Evaluator(Policy(max_loss=server, max_rtt_ms=5000 * server), Sites().view()).effective_policy(
        Policy(max_loss=agent, max_rtt_ms=5000 * agent)
    )
    assert (rules.max_loss, rules.max_rtt_ms) == (limit, 5000 * limit)
