"""Situations from the field, each once on WireGuard: the rows that `bench situations` tries on all kinds."""

import tempfile
from pathlib import Path

import pytest

from bench.situations import field
from bench.situations.posts import Post
from bench.situations.rows import PROFILES
from bench.situations.trial import Row
from lab import Lab

pytestmark = pytest.mark.acceptance

# When a share of lost packets is noticed takes luck: tests/agent/test_loss_told.py holds its odds instead.
LUCK = {67}


def _params() -> list[object]:
    """Each row has a lab of its own, so that any worker may take it."""
    found = (row for row in field.ROWS if "wireguard" in row.kinds and row.number not in LUCK)
    return [pytest.param(row, id=row.name, marks=pytest.mark.xdist_group(f"field-{row.name}")) for row in found]


@pytest.mark.parametrize("row", _params())
def test_the_row_is_right(row: Row) -> None:
    if why := row.lacks():
        pytest.skip(why)
    profile = PROFILES[row.post]
    with tempfile.TemporaryDirectory(prefix="vs-field-") as folder, Lab([profile.of(row.post, "wireguard")]) as lab:
        Path(folder).chmod(0o755)  # an agent may run as another user
        post = Post(lab, row.post, 0, Path(folder), profile, privileged=True)
        try:
            post.start()
            trial = row.way(row, post)
        finally:
            post.stop()
    assert trial.right, trial.complaints
