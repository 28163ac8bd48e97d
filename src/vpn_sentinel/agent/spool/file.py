"""The spool's SQLite file: open it for one process alone, and set it aside when it is damaged."""

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Final

from vpn_sentinel.runtime import files, wal

log = logging.getLogger(__name__)

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS observation (
    seq INTEGER PRIMARY KEY,
    boot TEXT NOT NULL,
    boottime REAL NOT NULL,
    wall REAL NOT NULL,
    routine INTEGER NOT NULL,
    body BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS fact (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


def open_file(path: Path) -> sqlite3.Connection:
    """Open for one process alone: no shared memory, and a second agent on the same file is refused.

    Raises sqlite3.Error.
    """
    db = sqlite3.connect(path, timeout=1.0)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA wal_autocheckpoint = 200")
        db.execute("PRAGMA journal_size_limit = 1048576")
        db.execute("PRAGMA cache_size = -256")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.executescript(_SCHEMA)
    except BaseException:
        db.close()
        raise
    return db


def open_checked(
    path: Path, now: float, connect: Callable[[Path], sqlite3.Connection]
) -> tuple[sqlite3.Connection, int]:
    """Open or create, and check every page; a damaged file is set aside. Returns about how many writes are lost, too.

    Raises sqlite3.Error or OSError.
    """
    files.folder(path.parent)
    path.touch(mode=0o600)
    try:
        db = connect(path)
        if lost := _lost(path):
            # Empty the log: frames that are not replayed now would follow those that are written from now on.
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if db.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok":
            return db, lost
        db.close()
    except sqlite3.OperationalError:
        raise  # locked, full, not permitted: the file itself may be undamaged
    except sqlite3.DatabaseError as e:
        log.debug("the spool cannot be read", extra={"reason": e})
    aside = path.with_name(f"{path.name}.damaged-{int(now)}")
    # Before the file, so that a kill in between leaves no old log next to a new file.
    for tail in ("-wal", "-shm"):
        path.with_name(path.name + tail).unlink(missing_ok=True)
    path.replace(aside)
    files.sync(path.parent)
    log.error("the spool is damaged and was set aside; a new one begins", extra={"kept_as": aside})
    return connect(path), 1


def _lost(path: Path) -> int:
    """How many writes the log has lost at least; logged. This process holds the file, and SQLite has not replayed
    yet.
    """
    try:
        damage = wal.examine(path)
    except OSError as e:
        log.warning("the spool's log could not be checked", extra={"reason": e})
        return 0
    if damage is None:
        return 0
    lost = damage.lost or 1
    log.error("the spool's log is damaged: observations that the server may not have are lost", extra={"writes": lost})
    return lost
