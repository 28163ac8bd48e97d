"""The bench that kills: at which steps, that each step is one, and what it tells."""

import platform
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bench.kills.run import Cell, Outcome, page, shares, spread
from bench.kills.steps import Stepped

# Four steps: a file is made and written, and that is put on the disk by another thread; then it gets its name. What
# goes to standard error is none.
PROGRAM = textwrap.dedent("""
    import os, sys, threading
    handle = os.open("new", os.O_WRONLY | os.O_CREAT)
    print("begun", file=sys.stderr, flush=True)
    os.write(handle, b"whole")
    other = threading.Thread(target=os.fsync, args=(handle,))
    other.start()
    other.join()
    os.rename("new", "named")
""")
STEPS = ["open", "write new", "fsync new", "rename"]
LEFT = {1: {}, 2: {"new": ""}, 3: {"new": "whole"}, 4: {"new": "whole"}, None: {"named": "whole"}}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="system calls are known by their numbers on x86-64")
@pytest.mark.parametrize(("at", "left"), LEFT.items())
def test_a_process_dies_just_before_a_step(
    at: int | None, left: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, log = tmp_path / "place", tmp_path / "log"
    place.mkdir()
    monkeypatch.chdir(place)
    run = Stepped([sys.executable, "-I", "-c", PROGRAM], {}, tmp_path / "out", log, kill_at=at)
    run.process.wait(10)
    run.end()
    assert {path.name: path.read_text() for path in place.iterdir()} == left
    assert (run.killed, run.steps) == (at is not None, STEPS[:at])
    assert log.read_text() == ("" if at == 1 else "begun\n")


def test_kills_go_to_every_step_or_evenly_over_them() -> None:
    assert spread(3, 3) == [1, 2, 3]
    assert spread(3, 7) == [1, 2, 3, 1, 2, 3, 1]
    assert spread(100, 4) == [1, 26, 51, 76]
    assert spread(3, 0) == []


def test_every_part_has_its_share() -> None:
    assert shares(1000, 3) == [334, 333, 333]
    assert shares(2, 3) == [1, 1, 0]


def test_the_page_counts_what_was_found() -> None:
    def killed(at: int, **found: object) -> Outcome:
        plain: dict[str, object] = {"lost": [], "wrong": [], "unstartable": "", "twice": 0, "times": [1.0]}
        return Outcome(at=at, how="at the step", last="rename", steps=[], **(plain | found))  # type: ignore[arg-type]

    cell = Cell(name="commit", engine="sqlite", work=lambda _: None, share=3, steps=STEPS)
    cell.outcomes = [killed(1), killed(2, twice=1), killed(2, lost=["a report", "a message"])]
    said = page([cell], datetime(2026, 1, 2, tzinfo=UTC))
    assert "| commit | sqlite | 4 | 3 | 2 | 1 | 0 | 0 | 1 | 1.0 / 1.0 |" in said
    assert "3 kills: 1 lost, 0 unstartable, 0 wrong. **Not as it must be.**" in said
    cell.outcomes.pop()
    assert "2 kills: 0 lost, 0 unstartable, 0 wrong. As it must be." in page([cell], datetime(2026, 1, 2, tzinfo=UTC))
