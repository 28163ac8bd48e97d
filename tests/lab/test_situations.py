"""The rows of the runner against the table, without a lab: none is missing, and each has a site that can be made."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest

from bench.folders import unused
from bench.situations import field, run, table
from bench.situations.rows import PROFILES, ROWS
from bench.situations.trial import Row
from lab import Lab, plan
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


def test_a_row_that_this_machine_cannot_try_is_said_and_is_not_right() -> None:
    row = next(r for r in ROWS if r.name == "1")
    rows = [dataclasses.replace(row, lacks=lambda: "no such kernel"), *(r for r in ROWS if r.number == 2)]
    assert [r.name for r in run.chosen("1,2", ["wireguard"], unprivileged=False, of=rows)["wireguard"]] == ["2"]
    assert run.impossible("2", of=rows) == {}
    page = table.section([], 0.0, 0.0, repeat=1, unprivileged=False, left_out=run.impossible("1,2", of=rows))
    assert "- 1: no such kernel" in page


WRONG = {
    "rows that this kind has not": (
        ["--kind", "openconnect", "--rows", "71,63,64"],
        r"nothing to try on openconnect so; 63 on [a-z, ]+;.* 64b? on [a-z, ]+; 71 on ",
    ),
    "a row that there is not": (["--rows", "1,4711,x"], "no row is called 4711, x"),
}


@pytest.mark.parametrize(("words", "said"), WRONG.values(), ids=WRONG.keys())
def test_a_choice_that_leaves_nothing_is_said_and_is_no_success(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    with pytest.raises(SystemExit) as ended:
        run.main(words)
    assert ended.value.code == 2
    assert re.search(said, capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == [], "what the last run found stays"


def test_logs_of_an_earlier_run_stay_as_they_are(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    assert unused(logs) == logs
    (logs / "wireguard").mkdir(parents=True)
    assert unused(logs) == tmp_path / "logs-2"
    (tmp_path / "logs-2").mkdir()
    assert unused(logs) == tmp_path / "logs-2", "it is empty"
    (tmp_path / "logs-2").rmdir()
    (tmp_path / "logs-2").touch()
    assert unused(logs) == tmp_path / "logs-3"


@pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root")
def test_a_lab_does_not_start_among_the_remains_of_another(tmp_path: Path) -> None:
    (tmp_path / "nodes").mkdir()
    with pytest.raises(FileExistsError, match="is not empty"):
        Lab(directory=tmp_path).up()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_states_and_codes_are_words_of_the_verdict(row: Row) -> None:
    assert row.state in {*State, field.NOT_VERIFIED}
    assert row.codes | row.one_of | row.never <= set(Code)
