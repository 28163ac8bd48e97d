"""The file of a SQLite database: exactly the one that was named, closed to others, nobody else's, one server's alone.

What is done to it before a `SqliteStore` opens it is done here, by whoever holds it: one process at a time.
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
_NETWORK: Final = {"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "glusterfs", "ceph"}
_OURS: Final = "alembic_version"  # the table without which a database's tables are not ours
_ESCAPED: Final = re.compile(rb"\\([0-7]{3})")
# How long a server waits for the one before it to end, and for a command that opens the file: both let go soon.
LOCK_TIMEOUT_S: Final = 5.0
_LOCK_RETRY_S: Final = 0.05
# A file that is no database, or not one any more (https://www.sqlite.org/rescode.html).
DAMAGED: Final = ("SQLITE_CORRUPT", "SQLITE_NOTADB")


@dataclass(frozen=True, slots=True)
class Held:
    """A database's file, ours alone until `release`, or the process's end, however it ends.

    The lock is flock(2)'s on the file itself: it needs no other file, is the same by whatever path one comes, and does
    not meet SQLite's own locks, which are fcntl(2)'s.
    """

    handle: int

    def release(self) -> None:
        os.close(self.handle)


def hold(path: Path, *, patience: float = 0.0) -> Held | None:
    """Take the file, which is made when it is missing; None when another process holds it for longer than `patience`.

    Raises StoreUnusable for what is no file of ours to take.
    """
    _made(path)
    if kind := _network_filesystem(path):
        msg = f"data folder {path.parent} is on a network filesystem ({kind}), where SQLite loses data; use PostgreSQL"
        raise StoreUnusable(msg)
    try:
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                locked = _locked(handle, patience)
                if locked and os.path.samestat(os.fstat(handle), path.stat()):
                    return Held(handle)
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)
            if not locked:
                return None
            # `db restore` has put another file in its place meanwhile.
    except OSError as e:
        msg = f"database {path} cannot be locked: {e.strerror}"
        raise StoreUnusable(msg) from e


def hold_for_a_server(path: Path) -> Held:
    """Take the file for as long as a server runs. Raises StoreUnusable when another one has it."""
    held = hold(path, patience=LOCK_TIMEOUT_S)
    if held is None:
        msg = f"database {path} is in use by another server: two cannot share a file (several may share a PostgreSQL)"
        raise StoreUnusable(msg)
    return held


def _locked(handle: int, patience: float) -> bool:
    """Whether the lock was had in time. Raises OSError where there are no locks."""
    for _ in range(int(patience / _LOCK_RETRY_S) + 1):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if patience:
            time.sleep(_LOCK_RETRY_S)  # flock(2) itself waits for ever or not at all
    return False


def prepare(path: Path, *, alone: bool) -> str:
    """Make sure that `path` holds a database of ours, or nothing yet; what its log has lost, "" for nothing known.

    `alone`: nobody else has it open. Raises StoreUnusable that says what and where.
    """
    mode = path.stat().st_mode
    if alone:
        _sweep(path.resolve())
    try:
        lost = _looked_at(path) if alone else ""
        with contextlib.closing(sqlite3.connect(path)) as connection:
            if owner := whose(connection):
                msg = f"database {path} is {owner}"
                raise StoreUnusable(msg)
            if not alone:
                return ""  # as its holder made it, or is making it
            # Here and not before: until now it may have been anybody's.
            if mode & 0o077:
                path.chmod(0o600)
            # Kept in the file, and set before there are two connections that could race for it.
            connection.execute("PRAGMA journal_mode = WAL")
        # Closed by the last one, SQLite deletes the log, and with it what it did not replay.
    except sqlite3.DatabaseError as e:
        raise unusable(path, e) from e
    except OSError as e:
        msg = f"database {path} is open to others, and cannot be closed to them: {e.strerror}"
        raise StoreUnusable(msg) from e
    return lost


def _sweep(path: Path) -> None:
    """Of a restore, or of a start that was keeping a damaged log: each as large as the database, or its log."""
    try:
        files.sweep(path.parent, path.name)
    except OSError as e:
        log.warning("what a killed process left beside the database stays", extra={"reason": e.strerror})


def unusable(path: Path, error: sqlite3.Error) -> StoreUnusable:
    """What SQLite says of the file, in a line."""
    kind = StoreDamaged if getattr(error, "sqlite_errorname", "").startswith(DAMAGED) else StoreUnusable
    return kind(f"database {path}: {' '.join(str(error).split())}")


def _looked_at(path: Path) -> str:
    """Look at the log before SQLite replays it; what it lost, in a sentence. A damaged one is kept, for who can use it.

    Where more is in the file already than what is left of the log, that is not replayed: it would undo it in part.
    """
    path = path.resolve()  # of a link SQLite keeps the log beside the file itself
    written = path.with_name(path.name + "-wal")
    try:
        damage = wal.examine(path)
        if damage is None:
            return ""
        was = "damaged" if written.exists() else "missing"
        kept = _set_aside(written, whole=damage.behind)
    except OSError as e:
        log.warning("the database's log could not be looked at", extra={"reason": e.strerror})
        return ""
    where = f"; it is kept as {kept}" if kept else ""
    if damage.lost == 0:
        return f"the database's log was damaged, and nothing is lost: all of it had been copied{where}"
    amount = "an unknown number of writes" if damage.lost is None else f"the newest writes ({damage.lost} at least)"
    return f"the database's log was {was}: {amount} that were acknowledged are lost{where}"


def _set_aside(written: Path, *, whole: bool) -> str:
    """Keep a damaged log beside the database: a copy of it, or itself; its new name, "" where that cannot be.

    Raises OSError.
    """
    if not written.exists():
        return ""
    kept = written.with_name(f"{written.name}.damaged-{int(written.stat().st_mtime)}")
    if whole:
        written.replace(kept)
        files.to_disk(written.parent)
        return kept.name
    copied = files.beside(kept)
    try:
        copied.touch(mode=0o600)
        shutil.copyfile(written, copied)
        files.settle(copied, kept)
    except OSError as e:  # a full disk is no reason not to watch
        copied.unlink(missing_ok=True)
        log.warning("the damaged log could not be kept", extra={"reason": e.strerror})
        return ""
    return kept.name


def _made(path: Path) -> None:
    """Make the file where there is none. Raises StoreUnusable for what is no file, and opens no such thing:
    a pipe would wait, and a device is not ours.
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
    raise StoreUnusable(msg) from OSError(errno.EISDIR, msg)  # of the file, so of the setting that names it


def whose(connection: sqlite3.Connection) -> str:
    """Whose database it is, in words, "" for one of ours and an empty one. Raises sqlite3.Error for what is none."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    return f"another program's: it holds the table {min(tables)}" if tables and _OURS not in tables else ""


def _network_filesystem(path: Path) -> str | None:
    """The filesystem's type when it is a network's, by the longest mount point above `path` (proc(5), mountinfo).

    None also where that cannot be read. Names are bytes, with some of them as `\\040`.
    """
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return None
    inside, best, kind = path.resolve(), -1, ""
    for line in lines:
        left, _, right = line.partition(b" - ")
        fields = left.split(b" ")
        if len(fields) < 5:
            continue
        mount = Path(os.fsdecode(_ESCAPED.sub(lambda m: bytes([int(m[1], 8) & 0xFF]), fields[4])))
        if len(mount.parts) >= best and inside.is_relative_to(mount):
            best, kind = len(mount.parts), right.split(b" ")[0].decode("ascii", "replace")
    return kind if kind in _NETWORK else None
