"""Backups of a SQLite database: made while the server runs, pruned to a number, verified and restored."""

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
from vpn_sentinel.server.store.sqlitefile import DAMAGE_ERRORS, foreign_owner, lock_file

_BACKUP_NAME: Final = re.compile(r"sentinel-([0-9]{8}T[0-9]{6}Z)\.db", re.ASCII)
_TIME_FORMAT: Final = "%Y%m%dT%H%M%SZ"


class BackupError(UserError):
    """A backup cannot be made or restored. One line."""


@dataclass(frozen=True, slots=True)
class Backup:
    """One backup file; `at` is when it was made, in seconds since the epoch."""

    path: Path
    at: float

    def __str__(self) -> str:
        return f"{self.path} of {datetime.fromtimestamp(self.at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def backups(folder: Path) -> list[Backup]:
    """The backups in `folder`, newest first; none without a folder. Raises BackupError."""
    found = []
    try:
        for path in folder.iterdir():
            if match := _BACKUP_NAME.fullmatch(path.name):
                with contextlib.suppress(ValueError):  # no backup of ours is dated the 32nd of a month
                    at = datetime.strptime(match[1], _TIME_FORMAT).replace(tzinfo=UTC)
                    found.append(Backup(path, at.timestamp()))
    except FileNotFoundError:
        return []
    except OSError as e:
        raise BackupError(f"{folder}: {e.strerror}") from e
    return sorted(found, key=lambda b: b.at, reverse=True)


def remedy(folder: Path) -> str:
    """What to do about a damaged database whose backups are in `folder`, in a sentence."""
    return restore_hint(folder) or "there is no backup to put back: move the file and its -wal away, and start anew"


def restore_hint(folder: Path) -> str:
    """How to restore the newest backup, in a sentence; "" where there is none."""
    with contextlib.suppress(BackupError):  # `db restore` reports a folder that cannot be read
        if kept := backups(folder):
            return f"stop the server, then `vpn-sentinel db restore` puts back {kept[0]}"
    return ""


def integrity_problem(connection: sqlite3.Connection) -> str:
    """The first thing that is wrong with a database, "" when it is intact. Reads every page of it.

    Raises sqlite3.Error when it could not be checked.
    """
    try:
        found = str(connection.execute("PRAGMA integrity_check(1)").fetchone()[0])
    except sqlite3.DatabaseError as e:
        if not getattr(e, "sqlite_errorname", "").startswith(DAMAGE_ERRORS):
            raise
        found = str(e)
    words = " ".join(found.split())
    return "" if words == "ok" else words.removeprefix("*** in database main *** ")


def make_backup(connection: sqlite3.Connection, folder: Path, now: float) -> Backup:
    """Copy the database of `connection` into `folder`. Raises BackupError, and leaves no file then.

    VACUUM INTO writes it from the rows, so a table that cannot be read to its end makes no backup.
    """
    made = Backup(folder / f"sentinel-{datetime.fromtimestamp(now, UTC).strftime(_TIME_FORMAT)}.db", float(int(now)))
    try:
        files.folder(folder)
        files.remove_partial(folder, "sentinel-")
        pages, size = (connection.execute(f"PRAGMA {what}").fetchone()[0] for what in ("page_count", "page_size"))
        if shutil.disk_usage(folder).free < 2 * pages * size:
            # A copy that fills the disk would keep the server itself from storing reports.
            msg = f"{folder} has no room: twice the database's {pages * size // 1_000_000 + 1} MB must be free"
            raise BackupError(msg)
        written = files.temporary_path(made.path)
        try:
            written.touch(mode=0o600)
            # As bytes: a path may hold some that are not valid text.
            connection.execute("VACUUM INTO CAST(? AS TEXT)", (os.fsencode(written),))
            files.move_into_place(written, made.path)
        finally:
            written.unlink(missing_ok=True)
    except OSError as e:
        raise BackupError(f"{folder}: {e.strerror}") from e
    except sqlite3.Error as e:
        raise BackupError(f"{folder}: {' '.join(str(e).split())}") from e
    return made


def prune(folder: Path, keep: int, now: float) -> None:
    """Delete all but the newest `keep`; backups dated after `now`, by a clock that was wrong, go first.

    Raises BackupError.
    """
    order = sorted(backups(folder), key=lambda b: (b.at <= now, b.at), reverse=True)
    try:
        for old in order[keep:]:
            old.path.unlink(missing_ok=True)
    except OSError as e:
        raise BackupError(f"{folder}: {e.strerror}") from e


def restore(database: Path, backup: Path) -> Path | None:
    """Replace `database` by a copy of `backup`; returns where the old one is kept, None when there was none.

    When killed at any moment, `database` is the old one or the new one, and the old one's WAL is never applied to the
    new one. Raises BackupError, also when a server uses the database or the backup is damaged.
    """
    database = database.resolve()  # the file that a symbolic link names
    written = files.temporary_path(database)
    try:
        files.folder(database.parent)
        written.touch(mode=0o600)
        shutil.copyfile(backup, written)
        _verify(written, backup)
        if not database.exists():
            files.move_into_place(written, database)
            return None
        held = lock_file(database)
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
    os.chown(written, owner.st_uid, owner.st_gid)  # root may restore for a server that runs as another user
    log, index = (database.with_name(database.name + tail) for tail in ("-wal", "-shm"))
    with contextlib.suppress(FileNotFoundError):
        log.replace(f"{aside}-wal")  # where SQLite finds it if the old database is opened again
    files.sync(written)  # before the link, so that the old file has two names only for a moment
    os.link(database, aside)
    files.move_into_place(written, database)
    index.unlink(missing_ok=True)  # not earlier: it shows that a WAL is missing
    return aside


def _free_name(database: Path) -> Path:
    """A free name for the old database, under which there is no WAL of another one either."""
    number = 1
    while True:
        aside = database.with_name(f"{database.name}.replaced-{number}")
        if aside.exists() and aside.samefile(database):
            aside.unlink()  # left by a restore that was killed: a second name of the same file
        if not aside.exists() and not Path(f"{aside}-wal").exists():
            return aside
        number += 1


def _verify(copy: Path, backup: Path) -> None:
    """Raises BackupError for a damaged database, or another program's."""
    try:
        with contextlib.closing(sqlite3.connect(copy)) as connection:
            wrong = integrity_problem(connection) or foreign_owner(connection)
    except sqlite3.Error as e:
        wrong = " ".join(str(e).split())
    if wrong:
        raise BackupError(f"{backup} cannot be put back: {wrong}")
