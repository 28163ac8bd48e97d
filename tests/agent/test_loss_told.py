"""When people hear of loss, and of its end: pulses that a simulated line loses, judged and remembered as ever."""

import random
from math import inf

import pytest

from tests.agent.test_quality import Pulses
from vpn_sentinel.agent.rounds.scheduler import BURST_GAP_S, Schedule
from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.machine import Memory, advance
from vpn_sentinel.domain.observation import Answer, Canary, Link, Observation, Path, Probe, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import State
from vpn_sentinel.server.tracking.evaluation import is_measured, trouble_began, watched_for

DAY = 86400.0
THROUGH = Canary(probe=Probe.DEFAULT, target="echo", family=4, answer=Answer.ANSWERED, path=Path.TUNNEL)
UP = Link(name="wg0", present=True, up=True)


WELL_TAKES, LOSSY_TAKES, HURRIED_TAKES = 0.3, 2.4, 0.4  # seconds of a round, as in the lab


class Told:
    """A line with an agent's rounds, every minute, at changes and after them, and the server's memory of the tunnel.

    A round takes its time, and one that is running when the pulses ring is begun anew, once.
    """

    def __init__(self, loss: float, seed: int, interval: float = 60.0) -> None:
        self.line, self.memory, self.policy = Pulses(loss, seed), Memory(state=State.PROTECTED), Policy()
        self.schedule = Schedule(interval, random.Random(seed))
        self.state, self.next, self.rang, self.may_cut = State.PROTECTED, 0.0, False, True
        self.began, self.ends = -BURST_GAP_S, inf
        self.moves: list[tuple[float, State]] = []

    def run(self, seconds: float) -> None:
        end = self.line.now + seconds
        while self.line.now < end:
            looking, high = self.line.looking, self.line.samples.high
            due = self.next if self.next > self.line.now and self.ends == inf else end
            self.line.step(min(end, self.ends, due))
            if looking and not self.line.looking:
                self.line.samples.quality(self.line.now)
            self.rang = self.rang or self.line.samples.high is not high
            self.look()

    def look(self) -> None:
        now = self.line.now
        if self.ends < inf and self.rang and self.may_cut:
            self.may_cut = False
            self.begin()
        elif now >= self.ends:
            self.may_cut = True
            self.end()
        if self.ends == inf and (now >= self.next or (self.rang and now >= self.began + BURST_GAP_S)):
            self.begin()

    def begin(self) -> None:
        hurry = self.line.samples.high and self.state is State.PROTECTED
        takes = HURRIED_TAKES if hurry else LOSSY_TAKES if self.line.loss else WELL_TAKES
        self.rang, self.began, self.ends = False, self.line.now, self.line.now + takes

    def end(self) -> None:
        quality, took = self.line.samples.quality(self.line.now), 1000 * (self.line.now - self.began)
        seen = Observation(trigger=Trigger.TIMER, link=UP, canaries=(THROUGH,), quality=quality, took_ms=took)
        verdict = judge(seen, self.policy)
        self.state = verdict.state
        since, lasted = trouble_began(seen, verdict, self.began, self.memory), watched_for(seen, verdict)
        self.memory, events = advance(
            self.memory,
            verdict,
            self.began,
            self.policy,
            began=since,
            measured=is_measured(verdict),
            lasted=lasted,
        )
        self.moves += [(self.line.now, self.memory.state)] if events else []
        self.next, self.ends = self.began + self.schedule.after(verdict.state)[0], inf

    def first(self, state: State, since: float) -> float:
        return next((at - since for at, new in self.moves if new is state and at >= since), 1e9)


@pytest.mark.parametrize("interval", [4.0, 60.0])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_loss_and_its_end_are_told_within_twenty_seconds(share: float, interval: float) -> None:
    """98 of 100 times at least; the rest is a line that happens to lose none of its first pulses, or few later."""
    told, over = [], []
    for seed in range(200):
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
    assert sum(t <= 20 for t in told) >= 0.98 * len(told)
    assert sum(t <= 20 for t in over) >= 0.99 * len(over)


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
