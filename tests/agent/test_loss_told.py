"""When people hear of loss, and of its end: pulses that a simulated line loses, judged and remembered as ever."""

import random
from statistics import quantiles

import pytest

from tests.agent.test_quality import Pulses
from vpn_sentinel.agent.cycle import Schedule
from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.machine import Memory, advance
from vpn_sentinel.domain.observation import Answer, Canary, Link, Observation, Path, Probe, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import State
from vpn_sentinel.server.weighing import began, is_measured

DAY = 86400.0
THROUGH = Canary(probe=Probe.DEFAULT, target="echo", family=4, answer=Answer.ANSWERED, path=Path.TUNNEL)
UP = Link(name="wg0", present=True, up=True)


class Told:
    """A line with an agent's rounds, every minute, at changes and after them, and the server's memory of the tunnel."""

    def __init__(self, loss: float, seed: int, interval: float = 60.0) -> None:
        self.line, self.memory, self.policy = Pulses(loss, seed), Memory(state=State.PROTECTED), Policy()
        self.schedule = Schedule(interval, random.Random(seed))
        self.next = 0.0
        self.moves: list[tuple[float, State]] = []

    def run(self, seconds: float) -> None:
        end = self.line.now + seconds
        while self.line.now < end:
            high = self.line.samples.high
            self.line.step(end)
            if self.line.now >= self.next or self.line.samples.high != high:
                self.round()

    def round(self) -> None:
        now = self.line.now
        seen = Observation(trigger=Trigger.TIMER, link=UP, canaries=(THROUGH,), quality=self.line.samples.quality(now))
        verdict = judge(seen, self.policy)
        since = began(seen, verdict, now, self.memory)
        self.memory, events = advance(
            self.memory, verdict, now, self.policy, began=since, measured=is_measured(verdict)
        )
        self.moves += [(now, self.memory.state)] if events else []
        self.next = now + self.schedule.after(verdict.state)[0]

    def first(self, state: State, since: float) -> float:
        return next((at - since for at, new in self.moves if new is state and at >= since), 1e9)


@pytest.mark.parametrize("interval", [4.0, 60.0])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_loss_and_its_end_are_told_within_twenty_seconds(share: float, interval: float) -> None:
    """Four of five times at least; the rest is a line that happens to lose none of its first pulses."""
    told, over = [], []
    for seed in range(100):
        made = Told(0.0, seed, interval)
        made.run(110 + seed / 2)
        start, made.line.loss = made.line.now, share
        made.run(30)
        told.append(made.first(State.DEGRADED, start))
        end, made.line.loss = made.line.now, 0.0
        if made.memory.state is State.DEGRADED:
            made.run(60)
            over.append(made.first(State.PROTECTED, end))
        assert State.DOWN not in {state for _, state in made.moves}
    told_by, over_by = quantiles(told, n=20), quantiles(over, n=20)
    assert told_by[15] < 20
    assert over_by[18] < 20


@pytest.mark.parametrize(("share", "seed"), [(0.01, 1), (0.02, 2), (0.05, 3)])
def test_a_day_of_usual_loss_alarms_nobody(share: float, seed: int) -> None:
    made = Told(share, seed)
    made.run(DAY)
    assert made.moves == []


def test_a_single_burst_that_is_lost_alarms_nobody() -> None:
    for seed in range(50):
        made = Told(0.0, seed)
        made.run(100 + seed / 25)
        made.line.loss = 1.0
        made.run(0.2 + seed / 25)
        made.line.loss = 0.0
        made.run(120)
        assert State.DEGRADED not in {state for _, state in made.moves}
