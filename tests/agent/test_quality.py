"""Loss, order, round trips and jitter from simulated pulses; time is a number."""

import random
from itertools import pairwise

import pytest

from vpn_sentinel.agent.sensors.pulse_timing import PulseTiming
from vpn_sentinel.agent.sensors.quality import Rates, Samples
from vpn_sentinel.domain.judge import judge
from vpn_sentinel.domain.observation import Answer, Canary, Link, Observation, Probe, Trigger
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import Code

ANSWERED = Canary(probe=Probe.DEFAULT, target="echo", family=4, answer=Answer.ANSWERED)


class Pulses:
    """A line that loses a share of its pulses; a round trip takes 50 ms. One that is lost is asked again, as ever.

    It is dead for the first `dead` seconds of `every` so many.
    """

    def __init__(self, loss: float, seed: int = 1, *, dead: float = 0.0, every: float = 60.0) -> None:
        self.dead, self.every, self.dead_from = dead, every, 0.0
        self.samples, self.dice, self.loss = Samples(), random.Random(seed), loss
        self.now, self.number, self.close = 0.0, 0, 0
        self.timing = PulseTiming(1.0, random.Random(seed))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.step(end)

    def step(self, end: float) -> None:
        """Do what is due now, and go to when something is due again."""
        timing = self.timing
        if timing.dead(self.now):
            self.samples.discard_since(timing.unanswered_since or 0.0)
        if timing.due(self.now):
            self.number += 1
            self.samples.sent(self.number, self.now, counts=not timing.silent)
            timing.sent(self.now)
            if self.dice.random() >= self.loss and (self.now - self.dead_from) % self.every >= self.dead:
                self.samples.received(self.number, self.now + 0.05)
                timing.received(0.05)
        pace = self.samples.pace(self.now)
        if pace is not None and not timing.silent:
            self.close += 1
            timing.hurry(self.now, pace)
        self.now += min(max(0.001, timing.wait(self.now)), end - self.now)

    @property
    def looking(self) -> bool:
        return self.samples.looking

    @property
    def high_loss(self) -> bool:
        seen = Observation(trigger=Trigger.TIMER, canaries=(ANSWERED,), quality=self.samples.quality(self.now))
        return Code.HIGH_LOSS in {f.code for f in judge(seen, Policy()).findings}


def test_a_good_line() -> None:
    line = Pulses(0.0)
    line.run(200)
    found = line.samples.quality(line.now)
    assert (found.sent, found.lost, found.reordered, found.rtt_ms) == (60, 0, 0, 50.0)
    assert found.jitter_ms == pytest.approx(0.0, abs=0.01)
    assert line.close == 0


def test_a_third_lost_is_found_within_twenty_seconds() -> None:
    took = []
    for seed in range(200):
        line = Pulses(0.0, seed)
        line.run(120)
        began, line.loss = line.now, 0.3
        while not line.high_loss and line.now < began + 120:
            line.run(0.1)
        took.append(line.now - began)
    took.sort()
    assert took[100] < 20, took[100]
    assert took[180] < 20, took[180]


def test_what_a_close_look_finds_is_told_by_the_next_round() -> None:
    """A round comes as soon as a look finds too many lost: what it is told then must say so."""
    for seed in range(300):
        line = Pulses(0.0, seed)
        line.run(60)
        line.loss, found = 0.25, False
        end = line.now + 60
        while not found and line.now < end:
            line.step(end)
            found = line.samples.high
        assert line.high_loss or not found, seed


def test_a_lucky_stretch_is_no_recovery() -> None:
    calm = 0
    for seed in range(100):
        line = Pulses(0.0, seed)
        line.run(120)
        line.loss = 0.3
        while not line.high_loss:
            line.run(0.5)
        for _ in range(30):  # a round every 15 s, for some minutes
            line.run(15)
            calm += not line.high_loss
    assert calm < 0.03 * 3000, calm


def test_a_loss_just_above_the_limit_does_not_come_and_go() -> None:
    """People would hear of a recovery, and of trouble again, over a line that is the same all the time."""
    came_back = 0
    for seed in range(100):
        line = Pulses(0.0, seed)
        line.run(120)
        line.loss = 0.27
        while not line.high_loss:
            line.run(0.5)
        calm = [not line.high_loss for _ in range(20) if line.run(2) is None]
        came_back += any(one and other for one, other in pairwise(calm))  # over the grace of 4 s
    assert came_back <= 5, came_back


def test_the_end_of_loss_is_found_too() -> None:
    for seed in range(20):
        line = Pulses(0.3, seed)
        line.run(120)
        began, line.loss = line.now, 0.0
        while line.high_loss:
            line.run(1)
        assert line.now - began <= 20


def test_five_percent_lost_never_alarms() -> None:
    """Twelve tunnels for half an hour, looked at every four seconds."""
    for seed in range(12):
        line = Pulses(0.05, seed)
        for _ in range(450):
            line.run(4)
            assert not line.high_loss


def stands_still(seconds: float, *, seed: int = 1) -> tuple[Pulses, float]:
    """A good line whose far end stands still for so long, and answers all that came meanwhile in a few ms after it."""
    line = Pulses(0.0, seed)
    line.run(200)
    line.loss = 1.0
    waiting, end = line.number + 1, line.now + seconds
    line.run(seconds)
    for n, number in enumerate(range(waiting, line.number + 1)):
        rtt = line.samples.received(number, end + 0.05 + n * 0.002)
        if rtt is not None:
            line.timing.received(rtt)
    line.loss = 0.0
    return line, end


@pytest.mark.parametrize("seconds", [5, 12, 30, 90, 300])
def test_answers_that_were_late_because_the_far_end_stood_still_say_nothing_of_the_line(seconds: int) -> None:
    for seed in range(20):
        line, _ = stands_still(seconds, seed=seed)
        for _ in range(60):
            line.run(2)
            found = line.samples.quality(line.now)
            assert found.rtt_ms in (50.0, None)
            assert found.lost == 0
        assert found.rtt_ms == 50.0
        assert found.jitter_ms is not None
        assert found.jitter_ms < 10


@pytest.mark.parametrize("every", [0.1, 0.4, 2.0])
def test_a_full_queue_is_told(every: float) -> None:
    """Its answers are two seconds late and come as far apart as their pulses went out, or somewhat bunched."""
    samples, dice = Samples(), random.Random(1)
    due: list[tuple[float, int]] = []
    for number in range(1, 200):
        now = number * every
        samples.sent(number, now)
        due.append((round(now + 2.0, 1) + dice.random() * 0.02, number))
    for at, number in sorted(due):
        samples.received(number, at)
    found = samples.quality(200 * every + 3)
    assert found.rtt_ms == pytest.approx(2010, abs=60)


def test_a_few_pulses_are_no_share() -> None:
    line = Pulses(0.5)
    line.samples.pace = lambda now: None  # type: ignore[method-assign]
    line.run(60)
    assert line.samples.quality(line.now).sent < 20
    assert not line.high_loss


def test_an_outage_is_no_loss() -> None:
    line = Pulses(0.0)
    line.run(200)
    began = line.now
    for number in range(1000, 1020):
        line.samples.sent(number, line.now, counts=number < 1004)
        line.now += 0.4
    line.samples.discard_since(began)
    line.run(60)
    assert line.samples.quality(line.now).lost == 0


def told_at(line: Pulses, until: float, *, high: bool = True) -> float | None:
    """When it is told first that too many are lost, or that no more are."""
    while line.now < until:
        line.run(0.2)
        if line.high_loss is high:
            return line.now
    return None


@pytest.mark.parametrize(("dead", "every"), [(1.5, 6.0), (1.2, 4.0), (2.0, 7.0), (3.0, 9.0), (0.7, 2.5), (2.0, 5.0)])
def test_short_interruptions_that_come_again_and_again_are_loss(dead: float, every: float) -> None:
    told, ended = [], []
    for seed in range(20):
        line = Pulses(0.0, seed, every=every)
        line.run(100 + seed / 20)
        began = line.dead_from = line.now
        line.dead = dead
        told.append((told_at(line, began + 60) or began + 60) - began)
        while line.now + 0.2 < began + 12 * every:
            line.run(0.2)
            assert line.high_loss or line.now < began + 20  # between two of them, too
        line.run(began + 12 * every - line.now)
        over = line.now - every + dead
        line.dead = 0.0
        ended.append((told_at(line, over + 60, high=False) or over + 60) - over)
    assert max(told) < 20
    assert max(ended) < 20


@pytest.mark.parametrize(("dead", "every"), [(1.5, 60.0), (3.0, 40.0), (1.0, 12.0), (0.3, 3.0), (8.0, 30.0)])
def test_interruptions_that_are_few_or_small_or_outages_are_no_loss(dead: float, every: float) -> None:
    for seed in range(10):
        line = Pulses(0.0, seed, dead=dead, every=every)
        assert told_at(line, 300) is None


def test_a_late_reply_is_none_lost_and_is_out_of_order() -> None:
    samples = Samples()
    for number in range(1, 12):
        samples.sent(number, float(number))
        if number != 5:
            samples.received(number, number + 0.1)
    assert samples.quality(20.0).lost == 1
    assert samples.received(5, 20.0) == 15.0
    assert samples.received(5, 20.1) is None
    found = samples.quality(20.0)
    assert (found.lost, found.reordered) == (0, 1)


def test_jitter_is_smoothed() -> None:
    samples = Samples()
    for number in range(1, 200):
        samples.sent(number, float(number))
        samples.received(number, number + (0.1 if number % 2 else 0.12))
    assert samples.quality(200.0).jitter_ms == pytest.approx(20.0, abs=0.1)


def test_rates_come_from_counters() -> None:
    rates = Rates()
    wg = Link(name="wg0", present=True, up=True, rx_bytes=1000, tx_bytes=500)
    assert rates.of(wg, 10.0) == (None, None)
    more = Link(name="wg0", present=True, up=True, rx_bytes=3000, tx_bytes=1500)
    assert rates.of(more, 12.0) == (1000.0, 500.0)
    assert rates.of(wg, 14.0) == (None, None)  # made anew
    assert rates.of(None, 16.0) == (None, None)
    assert rates.of(wg, 18.0) == (None, None)
