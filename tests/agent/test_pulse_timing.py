"""The timing of pulses as a simulated line: what arrives is what the line lets through, time is a number."""

import random
from collections.abc import Callable

from vpn_sentinel.agent.sensors.pulse_timing import PulseTiming


class Line:
    """Answers what passes after `delay` seconds."""

    def __init__(self, passes: Callable[[float], bool], delay: Callable[[float], float] = lambda _: 0.03) -> None:
        self.timing = PulseTiming(2.0, random.Random(7))
        self.passes, self.delay = passes, delay
        self.now = 0.0
        self.sent: list[float] = []
        self.rang: list[float] = []
        self.back: list[tuple[float, float]] = []

    def run(self, until: float) -> None:
        while self.now < until:
            if self.timing.dead(self.now):
                self.rang.append(self.now)
            if self.timing.due(self.now):
                self.timing.sent(self.now)
                self.sent.append(self.now)
                if self.passes(self.now):
                    self.back.append((self.now + self.delay(self.now), self.now))
                    self.back.sort()
            step = self.now + max(1e-6, self.timing.wait(self.now))
            if self.back and self.back[0][0] <= step:
                self.now, asked = self.back.pop(0)
                if self.timing.received(self.now - asked):
                    self.rang.append(self.now)
            else:
                self.now = step


def test_a_healthy_line_has_a_pulse_every_two_seconds_and_no_alarm() -> None:
    line = Line(lambda _: True)
    line.run(600)
    assert 290 <= len(line.sent) <= 310
    assert not line.rang
    gaps = [b - a for a, b in zip(line.sent, line.sent[1:], strict=False)]
    assert 1.79 < min(gaps) < 1.95 < 2.05 < max(gaps) < 2.21


def test_a_black_hole_is_noticed_within_three_seconds() -> None:
    for tenth in range(100):
        fault = 20 + tenth / 10
        line = Line(lambda t, fault=fault: t < fault)
        line.run(fault + 4)
        assert len(line.rang) == 1
        assert 0.85 < line.rang[0] - fault <= 2.2 + 0.95
        # What the round then says: nothing has answered since the first of them.
        since = line.timing.unanswered_since
        assert since is not None
        assert fault <= since <= fault + 2.2


def test_a_silence_rings_once_and_its_end_once() -> None:
    line = Line(lambda t: not 20 < t < 60)
    line.run(100)
    assert len(line.rang) == 2
    assert 20 < line.rang[0] < 24
    assert 60 < line.rang[1] < 63


def test_one_loss_is_asked_again_and_forgotten() -> None:
    lost: list[float] = []

    def passes(t: float) -> bool:
        if t > 20 and not lost:
            lost.append(t)
            return False
        return True

    line = Line(passes)
    line.run(40)
    assert not line.rang
    again = next(t for t in line.sent if t > lost[0])
    assert 0.25 < again - lost[0] < 0.35


def test_while_nothing_answers_the_server_gets_enough_pulses_to_see_it() -> None:
    line = Line(lambda t: t < 20)
    line.run(26)
    first = next(t for t in line.sent if t >= 20)
    assert len([t for t in line.sent if first < t <= first + 2.6]) >= 8
    assert len([t for t in line.sent if first + 6 < t]) <= 1


def test_a_line_with_a_deep_queue_lives() -> None:
    """Replies that come seconds late are replies: a round may be started, and not again and again."""
    line = Line(lambda _: True, delay=lambda t: 0.03 if t < 20 else min(5.0, 0.03 + (t - 20)))
    line.run(120)
    assert len(line.rang) <= 4


def test_a_third_lost_seldom_rings() -> None:
    dice = random.Random(3)
    line = Line(lambda _: dice.random() >= 0.3)
    line.run(1800)
    assert len(line.rang) <= 40  # 0.8 % of 900 pulses, each with its end


def test_a_refusal_rings_at_the_second() -> None:
    timing = PulseTiming(2.0)
    assert not timing.refused(10.0)
    assert timing.wait(10.0) < 0.2
    assert timing.refused(10.2)
    assert not timing.refused(10.4)
    assert timing.received(0.01)
