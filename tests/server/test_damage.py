"""A log that is damaged after a kill: what was acknowledged and is lost is said, and the server starts."""

import asyncio
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import select

from vpn_sentinel.server.store.open import DAMAGE_KEY, open_store
from vpn_sentinel.server.store.schema import meta, tunnels
from vpn_sentinel.server.store.sqlite import SqliteStore

TUNNELS = 10
FRAME = 24 + 4096
# Ten tunnels, each acknowledged; `copied`: after so many of them, all is in the file as well.
WRITER = """
import asyncio, os, sys
from sqlalchemy import delete, insert
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.schema import meta
from vpn_sentinel.server.store.store import Changes

async def run():
    store = await open_store(f"sqlite:///{sys.argv[1]}", serving=True)
    await store.write(delete(meta).where(meta.c.key == "alive"), insert(meta).values(key="alive", value="1800000000.0"))
    for n in range(10):
        await store.transact([f"t{n}"], 0.0, lambda rows: Changes(), create=True)
        if n + 1 == int(sys.argv[2]):
            store._checkpoint()
    os.kill(os.getpid(), 9)

asyncio.run(run())
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sentinel.db"


def killed(path: Path, *, copied: int = 0) -> Path:
    """A database whose server was killed behind ten tunnels; its log."""
    assert subprocess.run([sys.executable, "-c", WRITER, path, str(copied)], check=False).returncode == -9
    return path.with_name("sentinel.db-wal")


def spoil(log: Path, at: int) -> bytes:
    content = bytearray(log.read_bytes())
    content[at] ^= 0xFF
    log.write_bytes(content)
    return bytes(content)


async def left(path: Path) -> tuple[int, str]:
    """How many tunnels a start finds, and what it notes for people."""
    store = await open_store(f"sqlite:///{path}", serving=True)
    try:
        noted = await store.read(select(meta.c.value).where(meta.c.key == DAMAGE_KEY))
        assert isinstance(store, SqliteStore)
        return len(await store.read(select(tunnels.c.id))), noted[0].value if noted else ""
    finally:
        await store.close()


def test_after_a_kill_alone_nothing_is_said(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    killed(path)
    assert asyncio.run(left(path)) == (TUNNELS, "")
    assert caplog.text == ""
    assert [p.name for p in path.parent.iterdir()] == ["sentinel.db"]


def test_what_a_damaged_log_lost_is_said_and_noted(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = killed(path)
    damaged = spoil(log, log.stat().st_size - 6 * FRAME)
    found, noted = asyncio.run(left(path))
    assert 0 < found < TUNNELS
    assert f"the newest writes ({TUNNELS - found} at least) that were acknowledged are lost" in noted
    assert noted.endswith("what is left ends at 2027-01-15 08:00:00 UTC")
    assert noted in caplog.text
    (kept,) = path.parent.glob("*.damaged-*")
    assert kept.read_bytes() == damaged
    assert kept.name in noted
    assert kept.stat().st_mode & 0o077 == 0
    assert asyncio.run(left(path)) == (found, noted), "once told it is not found again"


def test_it_is_found_by_whatever_name_the_file_is_opened(path: Path, tmp_path: Path) -> None:
    log = killed(path)
    spoil(log, log.stat().st_size - 6 * FRAME)
    link = tmp_path / "elsewhere" / "link.db"
    link.parent.mkdir()
    link.symlink_to(path)
    found, noted = asyncio.run(left(link))
    assert found < TUNNELS
    assert noted


def test_what_was_said_is_not_said_again_after_another_kill(path: Path) -> None:
    log = killed(path)
    spoil(log, log.stat().st_size - 6 * FRAME)
    assert asyncio.run(left(path))[1]
    killed(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DELETE FROM meta WHERE key = ?", (DAMAGE_KEY,))
        connection.commit()
    assert asyncio.run(left(path)) == (TUNNELS, "")


def test_a_command_that_comes_first_says_so_too(path: Path) -> None:
    log = killed(path)
    spoil(log, log.stat().st_size - 6 * FRAME)
    words = [sys.executable, "-m", "vpn_sentinel", "db", "check", "--data-dir", str(path.parent)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("the database's log was damaged: the newest writes (")
    assert done.stdout.splitlines()[-1] == f"lost: {done.stderr.rstrip()}"


def test_a_log_that_would_undo_what_was_copied_is_not_replayed(path: Path) -> None:
    """SQLite would put pages of the third tunnel over those of the tenth."""
    log = killed(path, copied=TUNNELS)
    spoil(log, log.stat().st_size - 6 * FRAME)
    found, noted = asyncio.run(left(path))
    assert found == TUNNELS
    assert "nothing is lost: all of it had been copied" in noted


def test_a_log_that_is_gone_is_said(path: Path) -> None:
    killed(path, copied=4).unlink()
    found, noted = asyncio.run(left(path))
    assert found == 4
    assert "the database's log was missing: an unknown number of writes that were acknowledged are lost" in noted
