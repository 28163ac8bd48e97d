"""`python -m bench.situations.skewed SECONDS agent …`: the program with a wall clock that is wrong by so much.

Only what people read is shifted. libfaketime would shift the clock that durations are counted by as well.
"""

import sys
import time

from vpn_sentinel.cli.main import main
from vpn_sentinel.runtime.clock import SystemClock


def shift(seconds: float) -> None:
    def wall(_: SystemClock) -> float:
        return time.time() + seconds

    SystemClock.wall = wall  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    shift(float(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
