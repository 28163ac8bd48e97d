"""A start that is killed, or whose disk is full, at any of its writes: the next one finds all or nothing of it."""

import itertools
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import select, text

from tests.conftest import small_disk
from tests.upgrade.test_migrations import differences_at, first_schema
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.schema import metadata, tunnels
from vpn_sentinel.server.store.store import StoreUnusable

STATEMENTS = 400  # more than any start runs
PAGE = 4096
ALL = {*metadata.tables, "alembic_version"}


class Killer:
    """The program of `tests.upgrade.killed`, which is loaded once and dies in a fork."""

    def __init__(self) -> None:
        words = [sys.executable, "-m", "tests.upgrade.killed"]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def open(self, url: str, *, until: int, how: str = "now") -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(how, until, url, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.communicate(timeout=10)


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    started = Killer()
    yield started
    started.end()


@pytest.fixture(params=["nothing", "the first schema"])
async def before(request: pytest.FixtureRequest, database_url: str) -> str:
    """What the start finds: no database, or one of the first schema with a tunnel in it."""
    if request.param == "the first schema":
        await first_schema(database_url)
    return str(request.param)


async def is_whole(url: str, before: str) -> None:
    """The next start works, and finds what there was."""
    store = await open_store(url)
    try:
        names = [row.name for row in await store.read(select(tunnels))]
        assert names == (["nl"] if before != "nothing" else [])
        await store.ping()
    finally:
        await store.close()
    assert await differences_at(url) == []


async def empty_again(url: str, before: str) -> None:
    if url.startswith("sqlite"):
        path = Path(url.removeprefix("sqlite:///"))
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
    else:
        store = await open_store(url)
        await store.write(text("DROP SCHEMA public CASCADE"), text("CREATE SCHEMA public"))
        await store.close()
    if before != "nothing":
        await first_schema(url)


@pytest.mark.slow
async def test_killed_before_any_statement(killer: Killer, database_url: str, before: str) -> None:
    for statement in range(1, STATEMENTS):
        ended = killer.open(database_url, until=statement)
        if ended == "opened":
            break
        assert ended == "killed"
        if database_url.startswith("sqlite"):
            all_or_nothing(Path(database_url.removeprefix("sqlite:///")), before)
        await is_whole(database_url, before)
        await empty_again(database_url, before)
    assert 15 < statement < STATEMENTS - 1


def all_or_nothing(path: Path, before: str) -> None:
    if not path.exists():
        assert before == "nothing"
        return
    with closing(sqlite3.connect(path)) as connection:
        there = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        columns = {row[1] for row in connection.execute("PRAGMA table_info(tunnels)")}
    if there == ALL:
        assert columns == set(tunnels.c.keys())
        return
    assert there == (ALL - {"actions"} if before != "nothing" else set())
    assert not columns & {"role", "site", "policy", "port", "port_check"}


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_what_an_earlier_build_left_half_done_is_done(killer: Killer, database_url: str, before: str) -> None:
    """Some tables without a version, or some columns of the next one: made whole, with what is in it."""
    half = 0
    for statement in range(1, STATEMENTS):
        ended = killer.open(database_url, until=statement, how="before")
        if ended == "opened":
            break
        assert ended == "killed"
        with closing(sqlite3.connect(database_url.removeprefix("sqlite:///"))) as connection:
            half += connection.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'").fetchone()[0] > 1
        await is_whole(database_url, before)
        await empty_again(database_url, before)
    assert half > 3


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    (folder := tmp_path / "disk").mkdir()
    with small_disk(folder, "2m"):
        yield folder


def fill(disk: Path, left: int) -> None:
    """Leave so many pages free."""
    (disk / "ballast").unlink(missing_ok=True)
    room = shutil.disk_usage(disk).free - left * PAGE
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room)


async def opens_or_says_why(url: str) -> bool:
    try:
        await (await open_store(url)).close()
    except StoreUnusable as e:
        said = str(e)
    else:
        return True
    assert re.fullmatch(r"(database|data folder) .*(disk|full|space|i/o).*", said, re.IGNORECASE), said
    return False


@pytest.mark.slow
@pytest.mark.parametrize("before", ["nothing", "the first schema"])
async def test_a_disk_that_is_full_at_any_write(disk: Path, before: str) -> None:
    url = f"sqlite:///{disk}/sentinel.db"
    if before != "nothing":
        await first_schema(url)
    for left in itertools.count():
        fill(disk, left)
        opened = await opens_or_says_why(url)
        (disk / "ballast").unlink()
        if opened:
            break
        await is_whole(url, before)
        await empty_again(url, before)
    assert left > 5
