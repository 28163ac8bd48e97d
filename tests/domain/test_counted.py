"""How many of something, as people say it."""

import pytest

from vpn_sentinel.domain.counted import counted


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 gaps"), (1, "1 gap"), (2, "2 gaps"), (1.5, "1.5 gaps"), (20_000_000, "20000000 gaps")]
)
def test_one_is_singular_and_all_else_plural(number: float, said: str) -> None:
    assert counted(number, "gap") == said


def test_a_noun_may_have_a_plural_of_its_own() -> None:
    assert [counted(n, "entry", "entries") for n in (1, 2)] == ["1 entry", "2 entries"]
