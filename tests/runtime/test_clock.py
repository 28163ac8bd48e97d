"""The machine's clocks."""

import time

from vpn_sentinel.runtime.clock import SystemClock


def test_the_wall_clock_is_the_epochs() -> None:
    before = time.time()
    assert before <= SystemClock().wall() <= time.time()


def test_the_boot_clock_does_not_run_backwards() -> None:
    clock = SystemClock()
    assert 0 < clock.boottime() <= clock.boottime()
