"""Observations that wait for the server, kept on disk until the server has them, so that no outage loses one.

One SQLite file, one process. A row is (seq, time, observation). What cannot be written (disk full, read-only) waits in
memory and is written once the disk works again. A damaged file is set aside and a new one is made. When the spool is
full, rounds that only repeat their neighbours are thinned out before any change is dropped.
"""

import logging
import secrets
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from vpn_sentinel.agent.spool.file import open_checked, open_file
from vpn_sentinel.agent.spool.thinning import Row, thin
from vpn_sentinel.runtime.backoff import backoff
from vpn_sentinel.runtime.clock import Clock

log = logging.getLogger(__name__)

MAX_ROWS: Final = 20_000
MAX_BYTES: Final = 32 * 1024 * 1024
MAX_ROWS_IN_MEMORY: Final = 2_000  # while the disk cannot be written
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_INSERT: Final = (
    "INSERT OR REPLACE INTO observation (seq, boot, boottime, wall, routine, body) VALUES (?, ?, ?, ?, ?, ?)"
)
_SELECT: Final = "SELECT seq, boot, boottime, wall, routine, body FROM observation WHERE seq > ? ORDER BY seq LIMIT ?"
_SELECT_WITHOUT_BODY: Final = (
    "SELECT seq, boot, boottime, wall, routine, x'' FROM observation WHERE seq > ? ORDER BY seq"
)
_UPSERT_FACT: Final = "INSERT OR REPLACE INTO fact (name, value) VALUES (?, ?)"


class SpoolInUseError(Exception):
    """Another process holds this spool."""


def os_boot(source: Path = _BOOT_ID) -> str:
    """The random identity of this boot of the operating system (random(4))."""
    try:
        return source.read_text(encoding="ascii").strip()
    except OSError:
        return secrets.token_hex(8)


class Spool:
    """Not thread-safe. A write takes about a millisecond on a disk, so the event loop does it itself."""

    def __init__(
        self,
        path: Path,
        clock: Clock,
        *,
        boot: str | None = None,
        max_rows: int = MAX_ROWS,
        max_bytes: int = MAX_BYTES,
        max_in_memory: int = MAX_ROWS_IN_MEMORY,
        connect: Callable[[Path], sqlite3.Connection] = open_file,
    ) -> None:
        """Open or create. Raises SpoolInUseError; a disk that cannot be used is logged, and memory takes its place."""
        self._path = path
        self._clock = clock
        self._boot = boot or os_boot()
        self._most_rows = max_rows
        self._most_bytes = max_bytes
        self._most_in_memory = max_in_memory
        self._connect = connect
        self._db: sqlite3.Connection | None = None
        self._memory: list[Row] = []
        self._facts: dict[str, str] = {}
        self._retry_waits = backoff(1.0, 60.0)
        self._retry_at = 0.0
        self._is_failing = False
        self._logged_reasons: set[str] = set()
        self._rows = 0
        self._bytes = 0
        self._forgotten = 0
        self._last = 0
        self.identity = ""
        self.thinned = 0
        self._open()

    # -- for the agent -------------------------------------------------------------------------------------------------

    def append(self, body: bytes, *, routine: bool) -> int:
        """Keep an observation and return its sequence number. Never fails: at worst it waits in memory."""
        self._last += 1
        row = Row(self._last, self._boot, self._clock.boottime(), self._clock.wall(), routine, body)
        self._memory.append(row)
        self._rows += 1
        self._bytes += len(body)
        self.flush()
        if len(self._memory) > self._most_in_memory:
            self._memory, given_up = thin(self._memory, self._most_in_memory * 9 // 10)
            self._note_dropped(given_up, "memory is full and the disk cannot be written")
        if self._rows > self._most_rows or self._bytes > self._most_bytes:
            self._make_room()
        return row.seq

    def take(self, after: int, limit: int, max_bytes: int) -> list[Row]:
        """The oldest rows after `after`, in order: at most `limit` rows and `max_bytes`, but at least one if there
        is one.
        """
        after = max(after, self._forgotten)
        rows: list[Row] = []
        if self._db is not None:
            try:
                rows = _rows(self._db.execute(_SELECT, (after, limit)))
            except sqlite3.Error as e:
                self._on_disk_error(e)
        rows += [r for r in self._memory if r.seq > after]
        size = 0
        chosen: list[Row] = []
        for row in rows[:limit]:
            size += len(row.body)
            if chosen and size > max_bytes:
                break
            chosen.append(row)
        return chosen

    def forget(self, up_to: int) -> None:
        """Delete every row up to and including `up_to`: the server has them."""
        if up_to <= self._forgotten:
            return
        self._forgotten = up_to
        self._memory = [r for r in self._memory if r.seq > up_to]
        if self._db is not None:
            try:
                with self._db:
                    self._db.execute("DELETE FROM observation WHERE seq <= ?", (up_to,))
            except sqlite3.Error as e:
                self._on_disk_error(e)
        self._count()

    def give_up(self, seq: int) -> None:
        """Drop one row that the server will never take."""
        self._memory = [r for r in self._memory if r.seq != seq]
        self._delete([seq])
        self._note_dropped(1, "the server will never take them")
        self._count()

    def age(self, row: Row) -> float:
        """Seconds since a row was made: by a monotonic clock for rows of this boot, else by the wall clock."""
        if row.boot == self._boot:
            return max(0.0, self._clock.boottime() - row.boottime)
        return max(0.0, self._clock.wall() - row.wall)

    @property
    def pending(self) -> int:
        return self._rows

    @property
    def last(self) -> int:
        """The highest sequence number given out, 0 for none."""
        return self._last

    def settled(self, thinned: int) -> None:
        """The server has acknowledged a count of `thinned` dropped rows."""
        self.thinned -= thinned
        self.keep("thinned", str(self.thinned))

    def renew(self) -> None:
        """Take a new identity; rows that wait keep their numbers.

        Needed when the server has higher numbers of this spool than the spool itself (a file restored from a copy, a
        write that the disk lost): under the old identity new rows would be taken for replays and dropped.
        """
        self.identity = secrets.token_hex(16)
        self.keep("identity", self.identity)

    def fact(self, name: str) -> str | None:
        """The value kept under `name`, over restarts if the disk allowed it."""
        return self._facts.get(name)

    def keep(self, name: str, value: str) -> None:
        if self._facts.get(name) == value:
            return
        self._facts[name] = value
        if self._db is not None:
            try:
                with self._db:
                    self._db.execute(_UPSERT_FACT, (name, value))
            except sqlite3.Error as e:
                self._on_disk_error(e)

    def flush(self) -> None:
        """Write the rows in memory, unless the disk failed a moment ago."""
        if not self._memory or self._clock.boottime() < self._retry_at:
            return
        try:
            if self._db is None:
                self._db = self._connect(self._path)
            with self._db:
                if self._is_failing:
                    self._db.execute("DELETE FROM observation WHERE seq <= ?", (self._forgotten,))
                    self._db.executemany(_UPSERT_FACT, self._facts.items())
                self._db.executemany(
                    _INSERT, [(r.seq, r.boot, r.boottime, r.wall, r.routine, r.body) for r in self._memory]
                )
                self._db.execute(_UPSERT_FACT, ("last", str(self._last)))
        except (sqlite3.Error, OSError) as e:
            self._on_disk_error(e)
            return
        self._memory.clear()
        if self._is_failing:
            self._is_failing = False
            self._retry_waits = backoff(1.0, 60.0)
            log.info("the spool is on disk again", extra={"path": self._path})

    def close(self) -> None:
        self._retry_at = 0.0
        self.flush()
        if self._db is not None:
            self._db.close()
            self._db = None

    # -- opening and errors --------------------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            self._db, lost = open_checked(self._path, self._clock.wall(), self._connect)
            self._facts = dict(self._db.execute("SELECT name, value FROM fact"))
            highest = self._db.execute("SELECT max(seq) FROM observation").fetchone()[0] or 0
            self._last = max(highest, _integer(self._facts.get("last")))
            self.thinned = _integer(self._facts.get("thinned")) + lost
            self.keep("thinned", str(self.thinned))
        except (sqlite3.Error, OSError) as e:
            if _in_use(e):
                raise SpoolInUseError(f"another agent uses {self._path}") from e
            self._on_disk_error(e)
        self.identity = self._facts.get("identity", "") or secrets.token_hex(16)
        self.keep("identity", self.identity)
        self._count()

    def _on_disk_error(self, error: Exception) -> None:
        """Log a disk error once, and retry with a growing delay."""
        self._retry_at = self._clock.boottime() + next(self._retry_waits)
        if not self._is_failing:
            self._is_failing = True
            log.warning("the spool cannot be written; observations wait in memory", extra={"reason": error})

    def _count(self) -> None:
        rows = size = 0
        if self._db is not None:
            try:
                rows, size = self._db.execute(
                    "SELECT count(*), coalesce(sum(length(body)), 0) FROM observation WHERE seq > ?", (self._forgotten,)
                ).fetchone()
            except sqlite3.Error as e:
                self._on_disk_error(e)
        self._rows = rows + len(self._memory)
        self._bytes = size + sum(len(r.body) for r in self._memory)

    def _delete(self, seqs: Sequence[int]) -> None:
        if self._db is not None:
            try:
                with self._db:
                    self._db.executemany("DELETE FROM observation WHERE seq = ?", [(seq,) for seq in seqs])
            except sqlite3.Error as e:
                self._on_disk_error(e)

    def _make_room(self) -> None:
        rows = self._rows_without_body()
        size = max(1, self._bytes // max(1, len(rows)))
        room = min(self._most_rows, self._most_bytes // size) * 9 // 10
        kept, given_up = thin(rows, room)
        kept_seqs = {r.seq for r in kept}
        self._memory = [r for r in self._memory if r.seq in kept_seqs]
        self._delete([r.seq for r in rows if r.seq not in kept_seqs])
        self._note_dropped(given_up, "the spool is full")
        self._count()

    def _rows_without_body(self) -> list[Row]:
        """All rows, those on disk without their bodies: a full spool would take too much memory."""
        rows: list[Row] = []
        if self._db is not None:
            try:
                rows = _rows(self._db.execute(_SELECT_WITHOUT_BODY, (self._forgotten,)))
            except sqlite3.Error as e:
                self._on_disk_error(e)
        return rows + self._memory

    def _note_dropped(self, rows: int, why: str) -> None:
        self.thinned += rows
        self.keep("thinned", str(self.thinned))
        if rows and why not in self._logged_reasons:
            self._logged_reasons.add(why)
            log.warning("observations were dropped", extra={"rows": rows, "reason": why})


def _in_use(error: Exception) -> bool:
    """Whether another process holds the file. Errors that are not SQLite's own have no name."""
    return getattr(error, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


def _rows(cursor: sqlite3.Cursor) -> list[Row]:
    return [Row(seq, boot, up, wall, bool(routine), body) for seq, boot, up, wall, routine, body in cursor]


def _integer(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() else 0
