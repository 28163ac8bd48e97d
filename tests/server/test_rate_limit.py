"""How often one key may ask."""

import pytest

from vpn_sentinel.server.rate_limit import RateLimit


def test_a_minutes_worth_may_come_at_once_and_then_one_by_one() -> None:
    rate = RateLimit(30)
    assert [rate.wait("a", 100.0) for _ in range(30)] == [0.0] * 30
    assert rate.wait("a", 100.0) == pytest.approx(2.0)
    assert rate.wait("a", 101.0) == pytest.approx(1.0)
    assert rate.wait("a", 102.1) == 0.0
    assert rate.wait("a", 102.1) > 0


def test_a_refusal_costs_nothing() -> None:
    rate = RateLimit(60)
    for _ in range(60):
        rate.wait("a", 0.0)
    assert all(rate.wait("a", 0.5) > 0 for _ in range(100))
    assert rate.wait("a", 1.0) == 0.0


def test_a_pause_saves_up_no_more_than_a_minute() -> None:
    rate = RateLimit(2)
    assert [rate.wait("a", 1e6) == 0.0 for _ in range(3)] == [True, True, False]


def test_bytes_cost_what_they_are() -> None:
    rate = RateLimit(60, burst=100)
    assert rate.wait("a", 0.0, 70) == 0.0
    assert rate.wait("a", 0.0, 70) == pytest.approx(40.0)
    assert rate.wait("a", 40.0, 70) == 0.0
    assert rate.wait("a", 1e6, 100) == 0.0


def test_who_waits_pays_what_it_owes() -> None:
    rate = RateLimit(60, burst=2)
    assert [rate.charge("a", 0.0) for _ in range(4)] == [0.0, 0.0, 1.0, 2.0]
    assert rate.charge("a", 2.0) == 1.0


def test_each_key_has_its_own() -> None:
    rate = RateLimit(1)
    assert rate.wait("a", 0.0) == 0.0
    assert rate.wait("a", 0.0) == 60.0
    assert rate.wait("b", 0.0) == 0.0


def test_the_map_does_not_grow_without_end() -> None:
    rate = RateLimit(1)
    for n in range(100_001):
        rate.wait(str(n), 0.0)
    assert len(rate._buckets) == 100_000
    assert rate.wait("0", 0.0) == 0.0  # forgotten: unused for longest
    assert rate.wait("100000", 0.0) > 0
