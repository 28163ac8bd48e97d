"""The file of a SQLite database: exactly the one that was named, closed to others, and nobody else's."""

import asyncio
import os
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.sqlitefile import lock_file
from vpn_sentinel.server.store.store import StoreUnusable


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def opens(path: Path) -> None:
    asyncio.run(_opens(path))


async def _opens(path: Path) -> None:
    store = await open_store(f"sqlite:///{path}")
    try:
        await store.ping()
    finally:
        await store.close()


@pytest.mark.parametrize(
    "name", ["plain", "per%20cent", "what?mode=ro", "a#b", "a b", "é", os.fsdecode(b"m\xe9xico"), "a&b=c"]
)
def test_a_path_is_taken_as_it_stands(name: str, tmp_path: Path) -> None:
    path = tmp_path / name / f"{name}.db"
    opens(path)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert mode_of(path) == 0o600
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT value FROM meta WHERE key = 'ping'").fetchone() == ("0",)


def test_a_database_of_ours_is_closed_to_others(tmp_path: Path) -> None:
    opens(tmp_path / "s.db")
    (tmp_path / "s.db").chmod(0o644)
    opens(tmp_path / "s.db")
    assert mode_of(tmp_path / "s.db") == 0o600


def _other_program(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE films (name TEXT)")


NOT_OURS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a text": (lambda path: path.write_text("nothing of ours\n" * 100), "file is not a database"),
    "another program's database": (_other_program, "is another program's: it holds the table films"),
    "a folder": (lambda path: path.mkdir(), "is a folder: name a file"),
    "a pipe, which would wait": (os.mkfifo, "is no file: name a file"),
}


@pytest.mark.parametrize(("make", "said"), NOT_OURS.values(), ids=NOT_OURS.keys())
def test_what_is_not_ours_is_refused_and_left_as_it_is(
    make: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "theirs"
    make(path)
    path.chmod(0o666)
    before = None if path.is_dir() or path.is_fifo() else path.read_bytes()
    with pytest.raises(StoreUnusable) as refused:
        opens(path)
    assert str(refused.value) == f"database {path}{': ' if 'not a database' in said else ' '}{said}"
    assert mode_of(path) == 0o666
    assert before is None or path.read_bytes() == before


def test_one_server_has_it_and_commands_work_beside(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    other_name = tmp_path / "the-same.db"
    other_name.symlink_to(path)

    async def run() -> None:
        server = await open_store(f"sqlite:///{path}", serving=True)
        try:
            assert lock_file(path) is None
            assert lock_file(other_name) is None
            command = await open_store(f"sqlite:///{path}")
            await command.ping()
            await command.close()
            assert lock_file(path) is None  # what a command closed is not the server's lock
            with pytest.raises(StoreUnusable, match="is in use by another server") as told:
                await open_store(f"sqlite:///{other_name}", serving=True)
            assert "\n" not in str(told.value)
            await server.ping()
        finally:
            await server.close()
        await (await open_store(f"sqlite:///{path}", serving=True)).close()

    asyncio.run(run())


def test_a_server_waits_for_the_one_before_it_to_end(tmp_path: Path) -> None:
    path = tmp_path / "s.db"

    async def run() -> None:
        before = await open_store(f"sqlite:///{path}", serving=True)
        after = asyncio.get_running_loop().create_task(open_store(f"sqlite:///{path}", serving=True))
        await asyncio.sleep(0.3)
        await before.close()
        await (await after).close()

    asyncio.run(run())


def test_a_command_beside_a_server_that_makes_it_waits(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    server = lock_file(path)
    assert server is not None

    async def run() -> None:
        command = asyncio.get_running_loop().create_task(open_store(f"sqlite:///{path}"))
        await asyncio.sleep(0.3)
        assert not command.done()
        server.release()
        made = await open_store(f"sqlite:///{path}", serving=True)
        beside = await command
        await beside.ping()
        await beside.close()
        await made.close()

    asyncio.run(run())


def test_a_command_changes_no_schema_under_a_server(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    opens(path)
    server = lock_file(path)
    assert server is not None
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
        connection.commit()
    with pytest.raises(StoreUnusable, match="a server runs on it: restart that first"):
        opens(path)
    server.release()
    opens(path)


def test_what_killed_processes_left_beside_it_goes_at_the_next_start(tmp_path: Path) -> None:
    """A restore's copy with SQLite's journal, a damaged log that was being kept; nothing that is not ours."""
    part = "0123456789abcdef.part"
    for name in (f"s.db.{part}", f"s.db.{part}-journal", f"s.db-wal.damaged-17.{part}"):
        (tmp_path / name).write_bytes(b"half")
    others = {"s.db.part", "s.db.replaced-1", f"other.db.{part}", "s.db.0123.part"}
    for name in others:
        (tmp_path / name).write_bytes(b"whole")
    opens(tmp_path / "s.db")
    assert {p.name for p in tmp_path.iterdir()} == {"s.db", *others}
