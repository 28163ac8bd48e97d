"""Waits that grow, each a little different from the next agent's."""

import random
from itertools import islice

from vpn_sentinel.runtime.backoff import backoff


class Middle(random.Random):
    """Chance that always falls in the middle."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


def test_waits_double_up_to_the_most() -> None:
    assert list(islice(backoff(1.0, 10.0, rng=Middle()), 6)) == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_each_wait_is_off_by_half_its_length_at_most() -> None:
    for wait, base in zip(backoff(1.0, 30.0, rng=random.Random(1)), [1, 2, 4, 8, 16, *[30] * 500], strict=False):
        assert base / 2 <= wait <= base * 1.5


def test_a_fleet_does_not_come_back_as_one_wave() -> None:
    assert len({next(backoff()) for _ in range(100)}) > 90
