"""Exponential back-off."""

import random
from collections.abc import Iterator


def backoff(first: float = 1.0, most: float = 60.0, *, rng: random.Random | None = None) -> Iterator[float]:
    """Yield waits in seconds that double from `first` to `most`, each with a jitter of up to half its length.

    The jitter keeps many agents that lost the same server from coming back at the same moment.
    """
    rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
    wait = first
    while True:
        yield wait * rng.uniform(0.5, 1.5)
        wait = min(wait * 2, most)
