import logging
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ManualClock
from vpn_sentinel.agent.spool.file import open_file
from vpn_sentinel.agent.spool.spool import Spool, SpoolInUseError, os_boot
from vpn_sentinel.agent.spool.thinning import Row, thin


class Disk:
    """A disk that a test can fill up: SQLite then takes no further page. The rows must be larger than a page."""

    def __init__(self) -> None:
        self._db: sqlite3.Connection | None = None

    def connect(self, path: Path) -> sqlite3.Connection:
        self._db = open_file(path)
        return self._db

    def fill(self) -> None:
        assert self._db is not None
        self._db.execute("PRAGMA max_page_count = 1")

    def clear(self) -> None:
        assert self._db is not None
        self._db.execute("PRAGMA max_page_count = 1000000")


LARGE = b"x" * 20_000


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "agent.sqlite"


@pytest.fixture
def spool(path: Path, clock: ManualClock, disk: Disk) -> Iterator[Spool]:
    made = Spool(path, clock, boot="boot-1", connect=disk.connect)
    yield made
    made.close()


def seqs(spool: Spool, after: int = 0) -> list[int]:
    return [row.seq for row in spool.take(after, 1000, 10**9)]


def test_what_is_appended_is_taken_in_order(spool: Spool) -> None:
    assert [spool.append(body, routine=False) for body in (b"a", b"b", b"c")] == [1, 2, 3]
    assert [row.body for row in spool.take(0, 2, 100)] == [b"a", b"b"]
    assert [row.body for row in spool.take(2, 2, 100)] == [b"c"]
    assert spool.pending == 3


def test_a_message_holds_what_fits_and_at_least_one(spool: Spool) -> None:
    for body in (b"x" * 60, b"y" * 60):
        spool.append(body, routine=False)
    assert len(spool.take(0, 10, 100)) == 1
    assert len(spool.take(0, 10, 10)) == 1


def test_what_is_forgotten_is_gone(spool: Spool) -> None:
    for _ in range(3):
        spool.append(b"x", routine=False)
    spool.forget(2)
    spool.forget(1)
    assert (seqs(spool), spool.pending) == ([3], 1)


def test_a_restart_keeps_everything_and_reuses_no_number(path: Path, clock: ManualClock) -> None:
    first = Spool(path, clock)
    for _ in range(2):
        first.append(b"x", routine=False)
    first.forget(2)
    first.keep("tunnel", "wg0")
    identity = first.identity
    first.close()
    second = Spool(path, clock)
    assert (second.identity, second.fact("tunnel"), second.pending) == (identity, "wg0", 0)
    assert second.append(b"y", routine=False) == 3
    second.close()


def test_age_within_a_boot_ignores_a_wall_clock_that_jumps(spool: Spool, clock: ManualClock) -> None:
    spool.append(b"x", routine=False)
    clock.now += 7
    assert spool.age(spool.take(0, 1, 10)[0]) == 7.0


def test_age_over_a_boot_is_the_wall_clocks_and_never_negative(path: Path, clock: ManualClock) -> None:
    first = Spool(path, clock, boot="boot-1")
    first.append(b"x", routine=False)
    first.close()
    clock.now += 100
    second = Spool(path, clock, boot="boot-2")
    row = second.take(0, 1, 10)[0]
    assert second.age(row) == 100.0
    clock.now -= 5000
    assert second.age(row) == 0.0
    second.close()


def test_two_agents_do_not_share_a_spool(path: Path, clock: ManualClock, spool: Spool) -> None:
    spool.append(b"x", routine=False)
    with pytest.raises(SpoolInUseError, match=r"agent\.sqlite"):
        Spool(path, clock)


def test_a_trouble_whose_text_says_locked_is_not_another_agent(path: Path, clock: ManualClock) -> None:
    def connect(_: Path) -> sqlite3.Connection:
        raise sqlite3.OperationalError("cannot open locked.sqlite")

    made = Spool(path, clock, connect=connect)
    made.append(b"x", routine=False)
    assert seqs(made) == [1]


def test_a_full_disk_loses_nothing(
    spool: Spool, path: Path, clock: ManualClock, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    spool.append(b"before", routine=False)
    disk.fill()
    spool.append(LARGE, routine=False)
    spool.append(LARGE, routine=False)
    spool.forget(1)
    spool.keep("tunnel", "wg0")
    assert seqs(spool) == [2, 3]
    disk.clear()
    clock.now += 3600
    spool.append(b"after", routine=False)
    assert seqs(spool) == [2, 3, 4]
    said = [r.getMessage() for r in caplog.records]
    assert [s for s in said if "cannot be written" in s] == ["the spool cannot be written; observations wait in memory"]
    assert said[-1] == "the spool is on disk again"
    spool.close()
    again = Spool(path, clock)
    assert (seqs(again), again.fact("tunnel")) == ([2, 3, 4], "wg0")
    again.close()


def test_a_disk_that_failed_is_not_tried_at_every_round(spool: Spool, clock: ManualClock, disk: Disk) -> None:
    disk.fill()
    spool.append(LARGE, routine=False)
    disk.clear()
    spool.append(b"y", routine=False)
    assert spool._memory
    clock.now += 3600
    spool.flush()
    assert not spool._memory


def test_memory_is_bounded_while_the_disk_takes_nothing(path: Path, clock: ManualClock, disk: Disk) -> None:
    spool = Spool(path, clock, max_in_memory=10, connect=disk.connect)
    disk.fill()
    for _ in range(30):
        spool.append(LARGE, routine=True)
    assert len(spool._memory) <= 10
    assert spool.thinned + len(spool._memory) == 30
    spool.close()


def test_a_folder_that_cannot_be_made_leaves_memory(tmp_path: Path, clock: ManualClock) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    made = Spool(blocked / "state" / "agent.sqlite", clock)
    made.append(b"x", routine=False)
    assert seqs(made) == [1]
    assert made.identity
    made.close()


def test_a_damaged_file_is_set_aside(path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_bytes(b"this is no database" * 1000)
    made = Spool(path, clock)
    assert made.append(b"x", routine=False) == 1
    assert made.thinned == 1, "the server is told that there were some"
    made.close()
    assert [p.name for p in path.parent.glob("*.damaged-*")]
    assert "set aside" in caplog.text


def test_a_page_that_rotted_is_noticed(path: Path, clock: ManualClock) -> None:
    made = Spool(path, clock)
    for _ in range(200):
        made.append(b"x" * 500, routine=False)
    made.close()
    data = bytearray(path.read_bytes())
    data[8192:20480] = b"\xff" * 12288
    path.write_bytes(bytes(data))
    again = Spool(path, clock)
    assert again.append(b"x", routine=False) > 0
    again.close()
    assert list(path.parent.glob("*.damaged-*"))


def test_a_log_that_rotted_after_a_kill_is_said(
    path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite replays what is before the damage and says nothing of the rest."""
    _kill_with(20, path)
    log = path.with_name(f"{path.name}-wal")
    whole = Spool(path, clock)
    assert whole.pending == 20
    assert caplog.text == ""
    whole.close()
    path.unlink()
    _kill_with(20, path)
    rotten = bytearray(log.read_bytes())
    rotten[len(rotten) // 2] ^= 0xFF
    log.write_bytes(rotten)
    again = Spool(path, clock)
    assert 0 < again.pending < 20
    assert "the spool's log is damaged" in caplog.text
    assert again.thinned >= 20 - again.pending, "the server is told"
    again.close()


def test_a_rotten_log_is_said_once(path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    """What is not replayed stands in the log behind what the next run writes."""
    _kill_with(20, path)
    log = path.with_name(f"{path.name}-wal")
    rotten = bytearray(log.read_bytes())
    rotten[len(rotten) // 2] ^= 0xFF
    log.write_bytes(rotten)
    assert "the spool's log is damaged" in _kill_with(1, path)
    again = Spool(path, clock)
    assert caplog.text == ""
    again.close()


def _kill_with(count: int, path: Path) -> str:
    """A spool with so many further observations whose agent was killed; what it said."""
    program = (
        "import sys, os; from pathlib import Path; from vpn_sentinel.agent.spool.spool import Spool\n"
        "from vpn_sentinel.runtime.clock import SystemClock\n"
        "made = Spool(Path(sys.argv[1]), SystemClock())\n"
        f"for _ in range({count}): made.append(b'x' * 5000, routine=False)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", program, path], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -9
    return done.stderr


def test_an_identity_can_be_renewed_and_keeps_what_waits(spool: Spool, path: Path, clock: ManualClock) -> None:
    spool.append(b"x", routine=False)
    old = spool.identity
    spool.renew()
    assert spool.identity != old
    assert seqs(spool) == [1]
    renewed = spool.identity
    spool.close()
    again = Spool(path, clock)
    assert again.identity == renewed
    again.close()


def test_a_row_that_is_given_up_is_counted(spool: Spool) -> None:
    spool.append(b"x", routine=False)
    spool.append(b"y", routine=False)
    spool.give_up(1)
    assert (seqs(spool), spool.thinned) == ([2], 1)
    spool.settled(1)
    assert spool.thinned == 0


def test_a_full_spool_thins_routine_before_it_gives_up_a_change(path: Path, clock: ManualClock) -> None:
    made = Spool(path, clock, max_rows=40)
    for n in range(1, 61):
        made.append(b"change" if n in (10, 30, 50) else b"same", routine=n not in (1, 10, 30, 50))
    kept = made.take(0, 100, 10**6)
    assert len(kept) <= 40
    assert {r.seq for r in kept} >= {1, 10, 30, 50}
    assert made.thinned == 60 - len(kept)
    made.close()
    again = Spool(path, clock)
    assert again.thinned == 60 - len(kept)
    again.close()


def test_bytes_are_bounded_too(path: Path, clock: ManualClock) -> None:
    made = Spool(path, clock, max_bytes=10_000)
    for _ in range(30):
        made.append(b"x" * 1000, routine=False)
    assert sum(len(r.body) for r in made.take(0, 100, 10**6)) <= 10_000
    assert seqs(made)[-1] == 30
    made.close()


def rows(*routine: bool) -> list[Row]:
    return [Row(i, "b", 0.0, 0.0, r, b"") for i, r in enumerate(routine, start=1)]


def test_thinning_takes_every_other_repetition_first() -> None:
    kept, given_up = thin(rows(False, True, True, True, True, False, True), 5)
    assert ([r.seq for r in kept], given_up) == ([1, 3, 5, 6, 7], 2)


def test_thinning_gives_up_the_oldest_changes_last() -> None:
    kept, given_up = thin(rows(False, False, False, False), 2)
    assert ([r.seq for r in kept], given_up) == ([3, 4], 2)


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 60))
def test_thinning_keeps_order_and_never_more_than_there_is_room(routine: list[bool], room: int) -> None:
    before = rows(*routine)
    kept, given_up = thin(before, room)
    assert len(kept) == min(len(before), room)
    assert given_up == len(before) - len(kept)
    assert kept == sorted(kept, key=lambda r: r.seq)
    changes = [r for r in before if not r.routine]
    if len(changes) * 3 <= room:
        assert all(c in kept for c in changes)


def test_the_boot_is_named() -> None:
    nowhere = Path("/nonexistent")
    assert len(os_boot()) == 36
    assert os_boot(nowhere) != os_boot(nowhere)


def test_a_broken_disk_at_every_step_raises_nothing(path: Path, clock: ManualClock) -> None:

    made = Spool(path, clock)
    made.append(b"x", routine=False)
    assert made._db is not None
    made._db.close()
    made.append(b"y", routine=False)
    made.forget(1)
    made.give_up(2)
    made.keep("a", "b")
    assert made.take(0, 10, 100) == []
    made._make_room()
    made._db = None
    made.close()
