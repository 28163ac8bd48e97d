"""What the look at a log says, held against what SQLite then replays and what its writer had been told."""

import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from vpn_sentinel.runtime.wal import Damage, examine

FRAME = 24 + 4096
COMMITS = 12
# Each line is printed after its commit; one row a commit. `checkpoint` copies all of it into the file.
WRITER = """
import sqlite3, sys, time
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA journal_mode = WAL"), db.execute("PRAGMA synchronous = FULL")
db.execute("PRAGMA wal_autocheckpoint = 0")
db.execute("CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, x)")
for step in sys.argv[2].split():
    if step == "checkpoint":
        db.execute("PRAGMA wal_checkpoint(PASSIVE)")
    elif step == "rollback":
        db.execute("PRAGMA cache_size = 10"), db.execute("BEGIN")
        db.executemany("INSERT INTO t VALUES (?, zeroblob(5000))", [(n,) for n in range(10**6, 10**6 + 100)])
        db.execute("ROLLBACK")
    else:
        db.execute("INSERT INTO t VALUES (?, zeroblob(1500))", (int(step),))
    print(step, flush=True)
time.sleep(60)
"""


def written(path: Path, *steps: object) -> Path:
    """A database whose writer did `steps`, heard that they were done, and was killed."""
    words = [sys.executable, "-c", WRITER, str(path), " ".join(map(str, steps))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for step in steps:
            assert writer.stdout.readline().strip() == str(step)
        writer.kill()
    return path


def copied(path: Path, to: Path) -> Path:
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        shutil.copy(file, to)
    return to / path.name


def log_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def index_of(path: Path) -> Path:
    return path.with_name(path.name + "-shm")


def spoil(path: Path, at: int) -> None:
    content = bytearray(log_of(path).read_bytes())
    content[at : at + 8] = bytes(255 - b for b in content[at : at + 8])
    log_of(path).write_bytes(content)


def rows(path: Path) -> list[int]:
    with closing(sqlite3.connect(path)) as connection:
        return [n for (n,) in connection.execute("SELECT n FROM t ORDER BY n")]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("killed") / "t.db", *range(COMMITS))


def places(path: Path) -> list[int]:
    """In the header, and in each frame's header and page."""
    frames = range(32, log_of(path).stat().st_size, FRAME)
    return [0, 17, 28, *(f + within for f in frames for within in (2, 9, 18, 30, 4000))]


def test_with_an_index_every_loss_is_counted(killed: Path, tmp_path: Path) -> None:
    assert examine(killed) is None
    for place in places(killed):
        path = copied(killed, tmp_path / "spoilt")
        spoil(path, place)
        found = examine(path)
        index_of(path).unlink()  # as SQLite does
        try:
            left = rows(path)
        except sqlite3.OperationalError:  # the table itself is in what is lost
            assert found is not None
            continue
        assert left == list(range(len(left)))
        lost = COMMITS - len(left)
        assert found in (Damage(lost), Damage(lost - 1 or None)), place  # "at least": the spoilt one may not be known


def test_without_one_all_but_the_last_commit(killed: Path, tmp_path: Path) -> None:
    """One that is cut off is no loss: it was never acknowledged. The last one cannot be told from that."""
    for place in places(killed):
        path = copied(killed, tmp_path / "spoilt")
        index_of(path).unlink()
        spoil(path, place)
        found = examine(path)
        try:
            lost = COMMITS - len(rows(path))
        except sqlite3.OperationalError:
            assert found is not None
            continue
        told = 0 if found is None else found.lost or 0
        assert told in ((lost, lost - 1) if lost > 2 else (0, lost)), place
        assert told or lost <= 2


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [*range(5), "checkpoint"],
        [*range(40), "checkpoint", *range(100, 103)],
        [*range(5), "rollback", 7],
        [*range(5), "checkpoint", "rollback"],
        [*range(9), "checkpoint", *range(50, 55), "checkpoint", 77, "rollback", 78],
    ],
    ids=[
        "nothing",
        "copied",
        "another cycle over the last one",
        "leftovers of a rollback",
        "and in a new cycle",
        "all",
    ],
)
@pytest.mark.parametrize("index", [True, False], ids=["killed", "without power"])
def test_a_log_that_is_whole_says_nothing(steps: list[object], index: bool, tmp_path: Path) -> None:
    path = written(tmp_path / "t.db", "rollback", *steps)
    if not index:
        index_of(path).unlink()
    assert examine(path) is None
    assert rows(path) == sorted(s for s in steps if isinstance(s, int))


def test_a_write_that_was_cut_off_is_no_loss(killed: Path, tmp_path: Path) -> None:
    whole = log_of(killed).read_bytes()
    rng = random.Random(1)
    cuts = {0, 1, 31, 32, 33, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(60))}
    for cut in cuts:
        path = copied(killed, tmp_path / "cut")
        log_of(path).write_bytes(whole[:cut])
        assert examine(path) is not None, "the index knows better"
        index_of(path).unlink()
        assert examine(path) is None


GONE: dict[str, Callable[[Path], object]] = {
    "deleted": lambda path: log_of(path).unlink(),
    "empty": lambda path: log_of(path).write_bytes(b""),
}


@pytest.mark.parametrize("go", GONE.values(), ids=GONE.keys())
def test_a_log_that_is_gone_is_a_loss_of_nobody_knows_how_much(
    killed: Path, tmp_path: Path, go: Callable[[Path], object]
) -> None:
    path = copied(killed, tmp_path / "gone")
    go(path)
    assert examine(path) == Damage(None)
    done = written(tmp_path / "done.db", 1, 2, "checkpoint")
    go(done)
    assert examine(done) is None, "all of it was in the file"
    assert rows(done) == [1, 2]


def test_a_log_that_would_undo_what_is_in_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "t.db", *range(10), "checkpoint")
    assert examine(path) is None
    spoil(path, 32 + 3 * FRAME + 100)
    assert examine(path) == Damage(0, behind=True)
    log_of(path).unlink()
    assert rows(path) == list(range(10))


def test_what_is_in_the_file_is_not_lost(tmp_path: Path) -> None:
    """Writes after a copy go on in the same log where somebody still reads what was there before."""
    path = tmp_path / "t.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as db, closing(sqlite3.connect(path)) as reader:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("CREATE TABLE t (n)")
        for n in range(6):
            db.execute("INSERT INTO t VALUES (?)", (n,))
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM t").fetchall()
        db.execute("PRAGMA wal_checkpoint(PASSIVE)")
        for n in range(6, 10):
            db.execute("INSERT INTO t VALUES (?)", (n,))
        other = copied(path, tmp_path / "copy")
    assert examine(other) is None
    spoil(other, log_of(other).stat().st_size - 3 * FRAME + 100)
    assert examine(other) == Damage(3)
    spoil(other, 32 + 100)
    assert examine(other) == Damage(4, behind=True)


def test_no_log_at_all(tmp_path: Path) -> None:
    assert examine(tmp_path / "t.db") is None
