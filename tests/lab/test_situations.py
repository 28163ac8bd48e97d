"""The rows of the runner against the table, without a lab: none is missing, and each has a site that can be made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.situations import field
from bench.situations.rows import PROFILES, ROWS
from bench.situations.trial import Row
from lab import plan
from vpn_sentinel.domain.verdict import Code, State

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "situations.md"


def test_every_row_of_the_table_is_tried() -> None:
    numbers = {int(n) for n in re.findall(r"^\| (\d+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)}
    assert {row.number for row in ROWS} == numbers


def test_no_two_rows_have_one_name() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_site_of_each_row_can_be_made_for_each_kind(row: Row) -> None:
    assert row.kinds
    for kind in row.kinds:
        assert kind in plan.KINDS
        assert PROFILES[row.post].of(row.post, kind).line(0).plan.number == 0


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_states_and_codes_are_words_of_the_verdict(row: Row) -> None:
    assert row.state in {*State, field.NOT_VERIFIED}
    assert row.codes | row.one_of | row.never <= set(Code)
