"""Copies of a SQLite database: each whole and verified, made beside a running server, kept by number, put back."""

import contextlib
import os
import re
import shutil
import sqlite3
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from vpn_sentinel.runtime import files
from vpn_sentinel.runtime.user_error import UserError
from vpn_sentinel.server.store.sqlitefile import DAMAGED, hold, whose

_NAME: Final = re.compile(r"sentinel-([0-9]{8}T[0-9]{6}Z)\.db", re.ASCII)
_STAMP: Final = "%Y%m%dT%H%M%SZ"


class BackupError(UserError):
    """A copy that cannot be made or put back. One line."""


@dataclass(frozen=True, slots=True)
class Backup:
    """`at` is when it was made, in seconds since the epoch."""

    path: Path
    at: float

    def __str__(self) -> str:
        return f"{self.path} of {datetime.fromtimestamp(self.at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def backups(folder: Path) -> list[Backup]:
    """What is kept in `folder`, the newest first; nothing without a folder. Raises BackupError."""
    found = []
    try:
        for path in folder.iterdir():
            if told := _NAME.fullmatch(path.name):
                with contextlib.suppress(ValueError):  # the 32nd of a month is nobody's of ours
                    at = datetime.strptime(told[1], _STAMP).replace(tzinfo=UTC)
                    found.append(Backup(path, at.timestamp()))
    except FileNotFoundError:
        return []
    except OSError as e:
        raise BackupError(f"{folder}: {e.strerror}") from e
    return sorted(found, key=lambda b: b.at, reverse=True)


def remedy(folder: Path) -> str:
    """What to do about a damaged database whose copies are in `folder`, in a sentence."""
    return putting_back(folder) or "there is no backup to put back: move the file and its -wal away, and start anew"


def putting_back(folder: Path) -> str:
    """How the newest copy is put back, "" where there is none."""
    with contextlib.suppress(BackupError):  # who cannot read them is told so by `db restore`
        if kept := backups(folder):
            return f"stop the server, then `vpn-sentinel db restore` puts back {kept[0]}"
    return ""


def problem(connection: sqlite3.Connection) -> str:
    """The first thing that is wrong with a database, "" when all of it is whole. Reads every page of it.

    Raises sqlite3.Error when it could not be looked at.
    """
    try:
        found = str(connection.execute("PRAGMA integrity_check(1)").fetchone()[0])
    except sqlite3.DatabaseError as e:
        if not getattr(e, "sqlite_errorname", "").startswith(DAMAGED):
            raise
        found = str(e)
    words = " ".join(found.split())
    return "" if words == "ok" else words.removeprefix("*** in database main *** ")


def make(connection: sqlite3.Connection, folder: Path, now: float) -> Backup:
    """Copy the database of `connection` into `folder`. Raises BackupError; nothing is left then.

    It is written anew from its rows (VACUUM INTO), so a table that cannot be read to its end makes no backup.
    """
    made = Backup(folder / f"sentinel-{datetime.fromtimestamp(now, UTC).strftime(_STAMP)}.db", float(int(now)))
    try:
        files.folder(folder)
        files.sweep(folder, "sentinel-")
        pages, size = (connection.execute(f"PRAGMA {what}").fetchone()[0] for what in ("page_count", "page_size"))
        if shutil.disk_usage(folder).free < 2 * pages * size:
            # A copy that fills the disk would keep the server itself from remembering.
            msg = f"{folder} has no room: twice the database's {pages * size // 1_000_000 + 1} MB must be free"
            raise BackupError(msg)
        written = files.beside(made.path)
        try:
            written.touch(mode=0o600)
            # As bytes: a path may hold some that are no text.
            connection.execute("VACUUM INTO CAST(? AS TEXT)", (os.fsencode(written),))
            files.settle(written, made.path)
        finally:
            written.unlink(missing_ok=True)
    except OSError as e:
        raise BackupError(f"{folder}: {e.strerror}") from e
    except sqlite3.Error as e:
        raise BackupError(f"{folder}: {' '.join(str(e).split())}") from e
    return made


def thin_out(folder: Path, keep: int, now: float) -> None:
    """Delete all but the newest `keep`; what a clock that went wrong made later than `now` goes first.

    Raises BackupError.
    """
    order = sorted(backups(folder), key=lambda b: (b.at <= now, b.at), reverse=True)
    try:
        for old in order[keep:]:
            old.path.unlink(missing_ok=True)
    except OSError as e:
        raise BackupError(f"{folder}: {e.strerror}") from e


def restore(database: Path, backup: Path) -> Path | None:
    """Put a copy of `backup` in the place of `database`; where that is kept now, None when there was none.

    Killed at any moment, `database` is the old one or the new one, and no log of the old one meets the new one. Raises
    BackupError, also when a server runs on it or the backup is not whole.
    """
    database = database.resolve()  # of a link the file itself
    written = files.beside(database)
    try:
        files.folder(database.parent)
        written.touch(mode=0o600)
        shutil.copyfile(backup, written)
        _verify(written, backup)
        if not database.exists():
            files.settle(written, database)
            return None
        held = hold(database)
        if held is None:
            raise BackupError(f"database {database} is in use: stop the server first")
        try:
            return _exchange(database, written)
        finally:
            held.release()
    except OSError as e:
        raise BackupError(f"{e.filename or database}: {e.strerror}") from e
    finally:
        written.unlink(missing_ok=True)


def _exchange(database: Path, written: Path) -> Path:
    owner, aside = database.stat(), _free_name(database)
    os.chown(written, owner.st_uid, owner.st_gid)  # root may do this for a server that is another user
    log, index = (database.with_name(database.name + tail) for tail in ("-wal", "-shm"))
    with contextlib.suppress(FileNotFoundError):
        log.replace(f"{aside}-wal")  # where SQLite finds it, should the old one be opened once more
    files.to_disk(written)  # now, so that the file has two names for a moment only
    os.link(database, aside)
    files.settle(written, database)
    index.unlink(missing_ok=True)  # until now it told that a log was missing
    return aside


def _free_name(database: Path) -> Path:
    """A name for the old one, under which there is no log either that might be another's."""
    number = 1
    while True:
        aside = database.with_name(f"{database.name}.replaced-{number}")
        if aside.exists() and aside.samefile(database):
            aside.unlink()  # killed as it was to be exchanged: the same file by another name
        if not aside.exists() and not Path(f"{aside}-wal").exists():
            return aside
        number += 1


def _verify(copy: Path, backup: Path) -> None:
    """Raises BackupError for what is no whole database of ours."""
    try:
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            wrong = problem(connection) or whose(connection)
    except sqlite3.Error as e:
        wrong = " ".join(str(e).split())
    if wrong:
        raise BackupError(f"{backup} cannot be put back: {wrong}")
