"""The machine's clocks, and one that goes on when they are set."""

import time

import pytest

from tests.conftest import ManualClock
from vpn_sentinel.runtime.clock import SteadyClock, SystemClock


def test_the_wall_clock_is_the_epochs() -> None:
    before = time.time()
    assert before <= SystemClock().wall() <= time.time()


def test_the_boot_clock_does_not_run_backwards() -> None:
    clock = SystemClock()
    assert 0 < clock.boottime() <= clock.boottime()


def test_a_steady_clock_goes_on_when_the_system_s_is_set() -> None:
    system = ManualClock(1000.0)
    clock = SteadyClock(system)
    system.set_by, system.now = -3600.0, 1005.0
    assert (clock.wall(), clock.boottime()) == (1005.0, 1005.0)
    clock.move(-3600.0)
    assert clock.wall() == system.wall()


@pytest.mark.parametrize(
    ("said", "behind"), [(1000.0, 0.0), (1004.0, 0.0), (1005.0, 1.0), (999.0, -1.0), (-2600.0, -3600.0)]
)
def test_another_clock_s_answer_was_on_its_way(said: float, behind: float) -> None:
    system = ManualClock(1000.0)
    clock = SteadyClock(system)
    system.now = 1004.0  # asked at 1000
    assert clock.behind(said, asked=1000.0) == behind
