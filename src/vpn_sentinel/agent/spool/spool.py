"""Observations on their way to the server: kept on disk until the server has them, so that none is lost to an outage.

One SQLite file, one process. A row is (seq, when, observation). What cannot be written (disk full, read-only) waits in
memory and is written once the disk takes it. A damaged file is set aside and a new one begun. When the spool is
full, rounds that only repeat their neighbours are thinned out before any change is given up.
"""

import logging
import secrets
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from vpn_sentinel.agent.spool.file import open_file, open_whole
from vpn_sentinel.agent.spool.thinning import Row, thin
from vpn_sentinel.runtime.backoff import backoff
from vpn_sentinel.runtime.clock import Clock

log = logging.getLogger(__name__)

MAX_ROWS: Final = 20_000
MAX_BYTES: Final = 32 * 1024 * 1024
MAX_ROWS_IN_MEMORY: Final = 2_000  # rows, while the disk takes none
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_KEEP: Final = "INSERT OR REPLACE INTO observation (seq, boot, boottime, wall, routine, body) VALUES (?, ?, ?, ?, ?, ?)"
_TAKE: Final = "SELECT seq, boot, boottime, wall, routine, body FROM observation WHERE seq > ? ORDER BY seq LIMIT ?"
_OUTLINES: Final = "SELECT seq, boot, boottime, wall, routine, x'' FROM observation WHERE seq > ? ORDER BY seq"
_KEEP_FACT: Final = "INSERT OR REPLACE INTO fact (name, value) VALUES (?, ?)"


class SpoolInUseError(Exception):
    """Another process holds this spool."""


def os_boot(source: Path = _BOOT_ID) -> str:
    """The random identity of this boot of the operating system (random(4))."""
    try:
        return source.read_text(encoding="ascii").strip()
    except OSError:
        return secrets.token_hex(8)


class Spool:
    """Not safe to share between threads. Writes take about a millisecond on a disk, so they are done in the loop."""

    def __init__(
        self,
        path: Path,
        clock: Clock,
        *,
        boot: str | None = None,
        most_rows: int = MAX_ROWS,
        most_bytes: int = MAX_BYTES,
        most_in_memory: int = MAX_ROWS_IN_MEMORY,
        connect: Callable[[Path], sqlite3.Connection] = open_file,
    ) -> None:
        """Open or create. Raises SpoolInUseError; a disk that cannot be used is said, and memory takes its place."""
        self._path = path
        self._clock = clock
        self._boot = boot or os_boot()
        self._most_rows = most_rows
        self._most_bytes = most_bytes
        self._most_in_memory = most_in_memory
        self._connect = connect
        self._db: sqlite3.Connection | None = None
        self._memory: list[Row] = []
        self._facts: dict[str, str] = {}
        self._waits = backoff(1.0, 60.0)
        self._retry_at = 0.0
        self._troubled = False
        self._said: set[str] = set()
        self._rows = 0
        self._bytes = 0
        self._forgotten = 0
        self._last = 0
        self.identity = ""
        self.thinned = 0
        self._open()

    # -- what the agent does -------------------------------------------------------------------------------------------

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
            self._gave_up(given_up, "memory is full and the disk takes nothing")
        if self._rows > self._most_rows or self._bytes > self._most_bytes:
            self._make_room()
        return row.seq

    def take(self, after: int, limit: int, most_bytes: int) -> list[Row]:
        """The oldest rows behind `after`, in order; at least one if there is one."""
        after = max(after, self._forgotten)
        rows: list[Row] = []
        if self._db is not None:
            try:
                rows = _rows(self._db.execute(_TAKE, (after, limit)))
            except sqlite3.Error as e:
                self._trouble(e)
        rows += [r for r in self._memory if r.seq > after]
        size = 0
        chosen: list[Row] = []
        for row in rows[:limit]:
            size += len(row.body)
            if chosen and size > most_bytes:
                break
            chosen.append(row)
        return chosen

    def forget(self, upto: int) -> None:
        """Let go of every row up to and with `upto`: the server has them."""
        if upto <= self._forgotten:
            return
        self._forgotten = upto
        self._memory = [r for r in self._memory if r.seq > upto]
        if self._db is not None:
            try:
                with self._db:
                    self._db.execute("DELETE FROM observation WHERE seq <= ?", (upto,))
            except sqlite3.Error as e:
                self._trouble(e)
        self._count()

    def give_up(self, seq: int) -> None:
        """Drop one row that the server will never take."""
        self._memory = [r for r in self._memory if r.seq != seq]
        self._delete([seq])
        self._gave_up(1, "the server will never take them")
        self._count()

    def age(self, row: Row) -> float:
        """Seconds since a row was seen: by a clock that never jumps when it is of this boot, else by the wall clock."""
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
        """The server was told of `thinned` rows that were given up."""
        self.thinned -= thinned
        self.keep("thinned", str(self.thinned))

    def renew(self) -> None:
        """Take a new identity; what waits keeps its numbers.

        Needed when the server knows more of this spool than it does itself (a file restored from a copy, a write that
        the disk swallowed): under the old identity its numbers would be taken for replays and thrown away.
        """
        self.identity = secrets.token_hex(16)
        self.keep("identity", self.identity)

    def fact(self, name: str) -> str | None:
        """What was kept under `name`, over restarts if the disk allowed it."""
        return self._facts.get(name)

    def keep(self, name: str, value: str) -> None:
        if self._facts.get(name) == value:
            return
        self._facts[name] = value
        if self._db is not None:
            try:
                with self._db:
                    self._db.execute(_KEEP_FACT, (name, value))
            except sqlite3.Error as e:
                self._trouble(e)

    def flush(self) -> None:
        """Write what waits in memory, unless the disk failed a moment ago."""
        if not self._memory or self._clock.boottime() < self._retry_at:
            return
        try:
            if self._db is None:
                self._db = self._connect(self._path)
            with self._db:
                if self._troubled:
                    self._db.execute("DELETE FROM observation WHERE seq <= ?", (self._forgotten,))
                    self._db.executemany(_KEEP_FACT, self._facts.items())
                self._db.executemany(
                    _KEEP, [(r.seq, r.boot, r.boottime, r.wall, r.routine, r.body) for r in self._memory]
                )
                self._db.execute(_KEEP_FACT, ("last", str(self._last)))
        except (sqlite3.Error, OSError) as e:
            self._trouble(e)
            return
        self._memory.clear()
        if self._troubled:
            self._troubled = False
            self._waits = backoff(1.0, 60.0)
            log.info("the spool is on disk again", extra={"path": self._path})

    def close(self) -> None:
        self._retry_at = 0.0
        self.flush()
        if self._db is not None:
            self._db.close()
            self._db = None

    # -- opening and failing -------------------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            self._db, lost = open_whole(self._path, self._clock.wall(), self._connect)
            self._facts = dict(self._db.execute("SELECT name, value FROM fact"))
            highest = self._db.execute("SELECT max(seq) FROM observation").fetchone()[0] or 0
            self._last = max(highest, _whole(self._facts.get("last")))
            self.thinned = _whole(self._facts.get("thinned")) + lost
            self.keep("thinned", str(self.thinned))
        except (sqlite3.Error, OSError) as e:
            if _in_use(e):
                raise SpoolInUseError(f"another agent uses {self._path}") from e
            self._trouble(e)
        self.identity = self._facts.get("identity", "") or secrets.token_hex(16)
        self.keep("identity", self.identity)
        self._count()

    def _trouble(self, error: Exception) -> None:
        """The disk failed: say so once, and try again later and later."""
        self._retry_at = self._clock.boottime() + next(self._waits)
        if not self._troubled:
            self._troubled = True
            log.warning("the spool cannot be written; observations wait in memory", extra={"reason": error})

    def _count(self) -> None:
        rows = size = 0
        if self._db is not None:
            try:
                rows, size = self._db.execute(
                    "SELECT count(*), coalesce(sum(length(body)), 0) FROM observation WHERE seq > ?", (self._forgotten,)
                ).fetchone()
            except sqlite3.Error as e:
                self._trouble(e)
        self._rows = rows + len(self._memory)
        self._bytes = size + sum(len(r.body) for r in self._memory)

    def _delete(self, seqs: Sequence[int]) -> None:
        if self._db is not None:
            try:
                with self._db:
                    self._db.executemany("DELETE FROM observation WHERE seq = ?", [(seq,) for seq in seqs])
            except sqlite3.Error as e:
                self._trouble(e)

    def _make_room(self) -> None:
        rows = self._outlines()
        size = max(1, self._bytes // max(1, len(rows)))
        room = min(self._most_rows, self._most_bytes // size) * 9 // 10
        kept, given_up = thin(rows, room)
        stay = {r.seq for r in kept}
        self._memory = [r for r in self._memory if r.seq in stay]
        self._delete([r.seq for r in rows if r.seq not in stay])
        self._gave_up(given_up, "the spool is full")
        self._count()

    def _outlines(self) -> list[Row]:
        """All rows, those on disk without their bodies: a full spool would not fit into the memory we may use."""
        rows: list[Row] = []
        if self._db is not None:
            try:
                rows = _rows(self._db.execute(_OUTLINES, (self._forgotten,)))
            except sqlite3.Error as e:
                self._trouble(e)
        return rows + self._memory

    def _gave_up(self, rows: int, why: str) -> None:
        self.thinned += rows
        self.keep("thinned", str(self.thinned))
        if rows and why not in self._said:
            self._said.add(why)
            log.warning("observations were given up", extra={"rows": rows, "reason": why})


def _in_use(error: Exception) -> bool:
    """Whether another process holds the file. Errors that are not SQLite's own carry no name."""
    return getattr(error, "sqlite_errorname", "").startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


def _rows(cursor: sqlite3.Cursor) -> list[Row]:
    return [Row(seq, boot, up, wall, bool(routine), body) for seq, boot, up, wall, routine, body in cursor]


def _whole(text: str | None) -> int:
    return int(text) if text and text.isascii() and text.isdigit() else 0
