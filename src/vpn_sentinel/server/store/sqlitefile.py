"""The file of a SQLite database: locked by one process, private to its user, and no other program's.

Everything that is done to the file before a `SqliteStore` opens it is here; only the process with the lock does it.
"""

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import sqlite3
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vpn_sentinel.runtime import files, wal
from vpn_sentinel.server.store.store import StoreDamaged, StoreUnusable

log = logging.getLogger(__name__)

# Network filesystems, on which SQLite's locks and WAL are not safe.
_NETWORK_FILESYSTEMS: Final = {"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "glusterfs", "ceph"}
_VERSION_TABLE: Final = "alembic_version"  # a database with tables but without this one is another program's
_OCTAL_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")
# How long a server waits for its predecessor to end, or for a command that has the file open: both end soon.
LOCK_TIMEOUT_S: Final = 5.0
_LOCK_RETRY_S: Final = 0.05
# Result codes for a file that is not a database, or is damaged (https://www.sqlite.org/rescode.html).
DAMAGE_ERRORS: Final = ("SQLITE_CORRUPT", "SQLITE_NOTADB")


@dataclass(frozen=True, slots=True)
class FileLock:
    """An exclusive lock on a database's file, until `release` or the end of the process, however it ends.

    It is a flock(2) lock on the file itself: it needs no other file, is the same for every path to the file, and does
    not interfere with SQLite's own locks, which are fcntl(2)'s.
    """

    descriptor: int

    def release(self) -> None:
        os.close(self.descriptor)


def lock_file(path: Path, *, timeout_s: float = 0.0) -> FileLock | None:
    """Lock the file, which is created when it is missing; None when another process keeps the lock for `timeout_s`.

    Raises StoreUnusable for a path that cannot be this server's database.
    """
    _ensure_file(path)
    if kind := _network_filesystem(path):
        msg = f"data folder {path.parent} is on a network filesystem ({kind}), where SQLite loses data; use PostgreSQL"
        raise StoreUnusable(msg)
    try:
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                locked = _locked(descriptor, timeout_s)
                if locked and os.path.samestat(os.fstat(descriptor), path.stat()):
                    return FileLock(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)
            if not locked:
                return None
            # `db restore` has replaced the file meanwhile: try again with the new one.
    except OSError as e:
        msg = f"database {path} cannot be locked: {e.strerror}"
        raise StoreUnusable(msg) from e


def lock_for_server(path: Path) -> FileLock:
    """Lock the file for as long as a server runs. Raises StoreUnusable when another process has the lock."""
    held = lock_file(path, timeout_s=LOCK_TIMEOUT_S)
    if held is None:
        msg = f"database {path} is in use by another server: two cannot share a file (several may share a PostgreSQL)"
        raise StoreUnusable(msg)
    return held


def _locked(descriptor: int, timeout_s: float) -> bool:
    """Whether the lock was acquired in time. Raises OSError where the filesystem has no locks."""
    for _ in range(int(timeout_s / _LOCK_RETRY_S) + 1):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if timeout_s:
            time.sleep(_LOCK_RETRY_S)  # flock(2) itself waits for ever or not at all
    return False


def prepare(path: Path, *, alone: bool) -> str:
    """Make sure that `path` is this program's database, or empty. Returns what its WAL lost, "" for nothing known.

    `alone`: this process has the lock. Raises StoreUnusable, whose text names the file and the problem.
    """
    mode = path.stat().st_mode
    if alone:
        _remove_leftovers(path.resolve())
    try:
        lost = _examine_log(path) if alone else ""
        with contextlib.closing(sqlite3.connect(path)) as connection:
            if owner := foreign_owner(connection):
                msg = f"database {path} is {owner}"
                raise StoreUnusable(msg)
            if not alone:
                return ""  # the process with the lock prepares it
            # Not earlier: until here the file could have been another program's.
            if mode & 0o077:
                path.chmod(0o600)
            # The mode is stored in the file; set while there is one connection, as two could race for it.
            connection.execute("PRAGMA journal_mode = WAL")
        # When the last connection closes, SQLite deletes the WAL, with everything in it that it did not replay.
    except sqlite3.DatabaseError as e:
        raise unusable(path, e) from e
    except OSError as e:
        msg = f"database {path} is open to others, and cannot be closed to them: {e.strerror}"
        raise StoreUnusable(msg) from e
    return lost


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of a killed restore or start: each is as large as the database or its WAL."""
    try:
        files.remove_partial(path.parent, path.name)
    except OSError as e:
        log.warning("a killed process's temporary files cannot be removed", extra={"reason": e.strerror})


def unusable(path: Path, error: sqlite3.Error) -> StoreUnusable:
    """The exception for an error of SQLite, in one line."""
    kind = StoreDamaged if getattr(error, "sqlite_errorname", "").startswith(DAMAGE_ERRORS) else StoreUnusable
    return kind(f"database {path}: {' '.join(str(error).split())}")


def _examine_log(path: Path) -> str:
    """Examine the WAL before SQLite replays it. Returns what it lost, in a sentence, "" for nothing.

    A damaged WAL is kept for later analysis. Where the file already has newer pages than the rest of the WAL, the WAL
    is moved away, since a replay would undo some of them.
    """
    path = path.resolve()  # SQLite keeps the WAL of a symbolic link beside the link's target
    wal_file = path.with_name(path.name + "-wal")
    try:
        damage = wal.examine(path)
        if damage is None:
            return ""
        was = "damaged" if wal_file.exists() else "missing"
        kept = _set_aside(wal_file, whole=damage.behind)
    except OSError as e:
        log.warning("the database's log could not be read", extra={"reason": e.strerror})
        return ""
    where = f"; it is kept as {kept}" if kept else ""
    if damage.lost == 0:
        return f"the database's log was damaged, and nothing is lost: all of it had been copied{where}"
    amount = "an unknown number of writes" if damage.lost is None else f"the newest writes ({damage.lost} at least)"
    return f"the database's log was {was}: {amount} that were acknowledged are lost{where}"


def _set_aside(wal_file: Path, *, whole: bool) -> str:
    """Keep a damaged WAL beside the database: a copy, or with `whole` the file itself. Returns its new name, or "".

    Raises OSError.
    """
    if not wal_file.exists():
        return ""
    kept = wal_file.with_name(f"{wal_file.name}.damaged-{int(wal_file.stat().st_mtime)}")
    if whole:
        wal_file.replace(kept)
        files.sync(wal_file.parent)
        return kept.name
    copied = files.temporary_path(kept)
    try:
        copied.touch(mode=0o600)
        shutil.copyfile(wal_file, copied)
        files.move_into_place(copied, kept)
    except OSError as e:  # on a full disk the server still watches
        copied.unlink(missing_ok=True)
        log.warning("the damaged log could not be kept", extra={"reason": e.strerror})
        return ""
    return kept.name


def _ensure_file(path: Path) -> None:
    """Create the file where it is missing. Raises StoreUnusable for a path that is not a regular file, without opening
    it: opening a pipe would block, and opening a device may have effects.
    """
    try:
        files.folder(path.parent)
        path.touch(mode=0o600)
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            path.open("ab").close()
            return
    except OSError as e:
        msg = f"data folder {path.parent}: {e.strerror}"
        raise StoreUnusable(msg) from e
    msg = f"database {path} is {'a folder' if stat.S_ISDIR(mode) else 'no file'}: name a file"
    raise StoreUnusable(msg) from OSError(errno.EISDIR, msg)  # shows the caller that the file, so its setting, is wrong


def foreign_owner(connection: sqlite3.Connection) -> str:
    """Whose database it is, in words; "" for this program's and for an empty one. Raises sqlite3.Error."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    return f"another program's: it holds the table {min(tables)}" if tables and _VERSION_TABLE not in tables else ""


def _network_filesystem(path: Path) -> str | None:
    """The type of the network filesystem that `path` is on, by the longest mount point above it (proc(5), mountinfo).

    None for others, and where that cannot be read. Names in it are bytes, some of them escaped as `\\040`.
    """
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return None
    inside, best, kind = path.resolve(), -1, ""
    for line in lines:
        before_dash, _, after_dash = line.partition(b" - ")
        fields = before_dash.split(b" ")
        if len(fields) < 5:
            continue
        mount = Path(os.fsdecode(_OCTAL_ESCAPE.sub(lambda m: bytes([int(m[1], 8) & 0xFF]), fields[4])))
        if len(mount.parts) >= best and inside.is_relative_to(mount):
            best, kind = len(mount.parts), after_dash.split(b" ")[0].decode("ascii", "replace")
    return kind if kind in _NETWORK_FILESYSTEMS else None
