"""Copies of a SQLite database: whole, verified, kept by number, put back in one step."""

import asyncio
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from tests.conftest import small_disk
from vpn_sentinel.server.store import backup
from vpn_sentinel.server.store.backup import BackupError, backups
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.schema import meta
from vpn_sentinel.server.store.sqlite import SqliteStore
from vpn_sentinel.server.store.sqlitefile import lock_file

NOW = 1_800_000_000.0
DAY = 86400.0


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "data" / "sentinel.db"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "backups"


def write(database: Path, value: str) -> None:
    async def run() -> None:
        store = await open_store(f"sqlite:///{database}")
        await store.write(insert(meta).values(key=value, value=value))
        await store.close()

    asyncio.run(run())


def values(database: Path) -> set[str]:
    async def run() -> set[str]:
        store = await open_store(f"sqlite:///{database}")
        try:
            return {row.key for row in await store.read(select(meta.c.key))}
        finally:
            await store.close()

    return asyncio.run(run())


def copy(database: Path, folder: Path, now: float = NOW) -> Path:
    async def run() -> Path:
        store = await open_store(f"sqlite:///{database}")
        assert isinstance(store, SqliteStore)
        try:
            return (await store.run_long(lambda connection: backup.make_backup(connection, folder, now))).path
        finally:
            await store.close()

    return asyncio.run(run())


def test_a_copy_holds_what_was_committed_and_is_its_owners_alone(database: Path, folder: Path) -> None:
    write(database, "one")
    made = copy(database, folder)
    assert made.name == "sentinel-20270115T080000Z.db"
    assert [p.name for p in folder.iterdir()] == [made.name]
    assert stat.S_IMODE(made.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert values(made) == {"one"}


@pytest.mark.parametrize("name", ["per%20cent", "what?mode=ro", "a#b", "é", os.fsdecode(b"m\xe9xico")])
def test_the_folder_may_have_any_name(name: str, database: Path, tmp_path: Path) -> None:
    write(database, "one")
    copy(database, tmp_path / name)
    assert [b.at for b in backups(tmp_path / name)] == [NOW]


def test_the_newest_are_kept_and_nothing_of_anybody_elses_goes(database: Path, folder: Path) -> None:
    write(database, "one")
    for day in range(5):
        copy(database, folder, NOW + day * DAY)
    (folder / "mine.db").touch()
    (folder / "sentinel-20271399T990000Z.db").touch()
    backup.prune(folder, 2, NOW + 9 * DAY)
    assert [b.at for b in backups(folder)] == [NOW + 4 * DAY, NOW + 3 * DAY]
    assert (folder / "mine.db").exists()
    assert (folder / "sentinel-20271399T990000Z.db").exists()


def test_without_a_folder_there_is_none(folder: Path) -> None:
    assert backups(folder) == []


def rot(database: Path) -> None:
    """Spoil every page but the first ones, which hold the schema."""
    content = bytearray(database.read_bytes())
    for page in range(4096 * 40, len(content), 4096):
        content[page : page + 400] = b"\xff" * 400
    database.write_bytes(content)


def full(database: Path) -> None:
    write(database, "one")
    with closing(sqlite3.connect(database)) as connection:
        rows = [(f"k{n}", "v" * 900) for n in range(500)]
        connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
        connection.commit()


def test_a_damaged_database_makes_no_copy(database: Path, folder: Path) -> None:
    full(database)
    rot(database)
    with pytest.raises(BackupError, match="malformed"):
        copy(database, folder)
    assert list(folder.iterdir()) == []


def test_damage_is_found(database: Path) -> None:
    full(database)
    with closing(sqlite3.connect(database)) as connection:
        assert backup.integrity_problem(connection) == ""
    rot(database)
    with closing(sqlite3.connect(database)) as connection:
        assert backup.integrity_problem(connection)


def test_an_index_that_misses_a_row_is_damage(database: Path) -> None:
    """As where old pages have met new ones: every page is well formed."""
    full(database)
    with closing(sqlite3.connect(database)) as connection:
        (root,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_meta_1'"
        ).fetchone()
    older = database.read_bytes()[(root - 1) * 4096 : root * 4096]
    with closing(sqlite3.connect(database)) as connection:
        connection.executemany("DELETE FROM meta WHERE key = ?", [(f"k{n}",) for n in range(0, 500, 2)])
        connection.commit()
    with database.open("r+b") as file:
        file.seek((root - 1) * 4096)
        file.write(older)
    with closing(sqlite3.connect(database)) as connection:
        assert backup.integrity_problem(connection)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_without_room_is_not_filled(database: Path, tmp_path: Path) -> None:
    full(database)
    (disk := tmp_path / "disk").mkdir()
    with small_disk(disk, "600k"):
        with pytest.raises(BackupError, match="has no room: twice the database's 1 MB must be free"):
            copy(database, disk / "backups")
        assert list((disk / "backups").iterdir()) == []


def test_what_was_killed_while_it_was_made_is_no_copy_and_goes(database: Path, folder: Path) -> None:
    write(database, "one")
    folder.mkdir()
    (folder / "sentinel-20270115T080000Z.db.0123456789abcdef.part").write_bytes(b"half")
    assert backups(folder) == []
    copy(database, folder)
    assert [p.name for p in folder.iterdir()] == ["sentinel-20270115T080000Z.db"]


def test_what_a_kill_left_of_a_copy_goes_with_its_journal(database: Path, folder: Path) -> None:
    """Killed as SQLite writes the copy, after so many of its instructions."""
    write(database, "one")
    program = (
        "import os, sqlite3, sys; from pathlib import Path; from vpn_sentinel.server.store import backup\n"
        "left = iter(range(int(sys.argv[3])))\n"
        "connection = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "connection.set_progress_handler(lambda: next(left, None) is None and os.kill(os.getpid(), 9), 1)\n"
        f"backup.make_backup(connection, Path(sys.argv[2]), {NOW - DAY})"
    )
    left: set[str] = set()
    for instructions in range(100, 5000, 300):
        done = subprocess.run([sys.executable, "-c", program, database, folder, str(instructions)], check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -9
        left |= {path.name.rpartition(".")[2] for path in folder.iterdir()}
        copy(database, folder)
        assert [path.name for path in folder.iterdir()] == ["sentinel-20270115T080000Z.db"]
    assert left >= {"part", "part-journal"}


def test_writers_do_not_wait_for_a_long_look(database: Path) -> None:
    async def run() -> None:
        store = await open_store(f"sqlite:///{database}")
        assert isinstance(store, SqliteStore)
        loop = asyncio.get_running_loop()

        def look(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN")
            connection.execute("SELECT * FROM meta").fetchall()
            asyncio.run_coroutine_threadsafe(store.ping(), loop).result(10)

        await store.run_long(look)
        await store.close()

    asyncio.run(run())


def test_a_long_look_ends_when_the_server_ends(database: Path) -> None:
    endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT count(*) FROM n"

    async def run() -> None:
        store = await open_store(f"sqlite:///{database}")
        assert isinstance(store, SqliteStore)
        looking = asyncio.get_running_loop().create_task(store.run_long(lambda c: c.execute(endless).fetchall()))
        await asyncio.sleep(0.1)
        looking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await looking
        await store.close()

    asyncio.run(run())


# --- putting back ---


def test_a_copy_takes_the_place_of_the_database_which_is_kept(database: Path, folder: Path) -> None:
    write(database, "before")
    made = copy(database, folder)
    write(database, "after")
    aside = backup.restore(database, made)
    assert aside is not None
    assert values(database) == {"before"}
    assert values(aside) == {"before", "after"}
    assert values(made) == {"before"}
    assert stat.S_IMODE(database.stat().st_mode) == 0o600
    assert backup.restore(database, made) != aside


def test_a_log_of_the_old_one_never_meets_the_new_one(database: Path, folder: Path) -> None:
    write(database, "before")
    made = copy(database, folder)
    killed(database)
    log = database.with_name("sentinel.db-wal")
    assert log.stat().st_size > 0
    aside = backup.restore(database, made)
    assert aside is not None
    assert not log.exists()
    assert values(database) == {"before"}
    assert values(aside) == {"before", "after"}


def killed(database: Path) -> None:
    """A writer whose last commit is in the log alone."""
    program = (
        "import os, sqlite3, sys; db = sqlite3.connect(sys.argv[1])\n"
        "db.execute(\"INSERT INTO meta VALUES ('after', 'x')\"); db.commit(); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, database], check=False).returncode == -9


def test_where_there_is_no_database_it_becomes_one(database: Path, folder: Path) -> None:
    write(database, "before")
    made = copy(database, folder)
    shutil.rmtree(database.parent)
    assert backup.restore(database, made) is None
    assert values(database) == {"before"}


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: None, "No such file or directory"),
    "a text": (lambda path: path.write_text("nothing of ours\n" * 100), "file is not a database"),
    "damaged": (lambda path: (full(path), rot(path)), "cannot be put back: "),
    "another program's": (
        lambda path: closing(sqlite3.connect(path)).__enter__().execute("CREATE TABLE films (x)").connection.close(),
        "another program's: it holds the table films",
    ),
}


@pytest.mark.parametrize(("spoil", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_copy_changes_nothing(
    spoil: Callable[[Path], object], said: str, database: Path, tmp_path: Path
) -> None:
    write(database, "before")
    copied = tmp_path / "copied.db"
    spoil(copied)
    with pytest.raises(BackupError, match=said):
        backup.restore(database, copied)
    assert values(database) == {"before"}
    assert [p.name for p in database.parent.iterdir()] == ["sentinel.db"]


def test_beside_a_server_it_is_refused(database: Path, folder: Path) -> None:
    write(database, "before")
    made = copy(database, folder)
    server = lock_file(database)
    assert server is not None
    with pytest.raises(BackupError, match="is in use: stop the server first"):
        backup.restore(database, made)
    server.release()
    assert [p.name for p in database.parent.iterdir()] == ["sentinel.db"]


@pytest.mark.slow
def test_killed_at_any_moment_it_is_the_old_or_the_new(database: Path, folder: Path) -> None:
    """At each call by which it changes a file, by an audit hook (PEP 578) of the process that dies."""
    write(database, "before")
    made = copy(database, folder)
    program = (
        "import os, sys; from pathlib import Path; from vpn_sentinel.server.store import backup\n"
        "left = [int(sys.argv[3])]\n"
        "def hook(event, args):\n"
        "    if event in ('os.rename', 'os.remove', 'os.link', 'os.chown') or (event == 'open' and args[2] & 3):\n"
        "        left[0] -= 1\n"
        "        if left[0] == 0: os.kill(os.getpid(), 9)\n"
        "sys.addaudithook(hook); backup.restore(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    seen = set()
    for step in range(1, 30):
        shutil.rmtree(database.parent)
        write(database, "before")
        killed(database)
        done = subprocess.run([sys.executable, "-c", program, database, made, str(step)], check=False)
        if done.returncode == 0:
            break
        assert done.returncode == -9
        assert database.exists()
        log = database.with_name("sentinel.db-wal")
        kept = values(database)
        assert kept in ({"before"}, {"before", "after"}, {"before", "damage"}), (step, log.exists())
        seen.add(frozenset(kept))
        backup.restore(database, made)
        assert values(database) == {"before"}
        assert all(p.stat().st_nlink == 1 for p in database.parent.iterdir())
    assert 5 < step < 29
    assert len(seen) >= 2
