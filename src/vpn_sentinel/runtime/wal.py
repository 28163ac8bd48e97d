"""Find damage in SQLite's write-ahead log, which SQLite does not report, and what is lost by it.

SQLite replays a log (`-wal`) up to the last commit before the first frame with a wrong checksum, and takes the rest
for an incomplete write: acknowledged commits are lost without an error. So the log is read here before SQLite does.
Two things prove a loss. The index next to the log (`-shm`), which a killed process leaves behind, counts the frames
whose commits were on the disk. And after a wrong frame there are several commits with consistent checksums: an
incomplete write is one commit, since the next begins when it is on the disk (`PRAGMA synchronous = FULL`).

Without an index, or with an old one (after a power failure), a log that lost its end, and damage in the last commit or
two, cannot be distinguished from an incomplete write.

Layouts: https://www.sqlite.org/fileformat2.html#the_write_ahead_log and https://www.sqlite.org/walformat.html
"""

import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_HEADER: Final = struct.Struct(">IIII8s8s")  # magic, version, page size, cycle, salt, checksum
_FRAME: Final = struct.Struct(">II8s8s")  # page, pages of the database after a commit (else 0), salt, checksum
_MAGIC: Final = {0x377F0682: "<", 0x377F0683: ">"}  # the byte order of checksums
_INDEX: Final = struct.Struct(
    "=12xBB2xII8s8s8s"
)  # is complete, big-endian, frames, pages, last checksum, salt, own checksum
_SAVED: Final = struct.Struct("=96xI")  # after two copies of it: the frames that are already in the database's file
_CHECKSUM: Final = struct.Struct(">II")


@dataclass(frozen=True, slots=True)
class Damage:
    """`lost`: the least number of acknowledged commits that are not replayed; None when they cannot be counted.

    `behind`: the database's file already holds more than the replay would write, which would undo a part of it.
    """

    lost: int | None
    behind: bool = False


@dataclass(slots=True)
class _Log:
    """Frames are numbered from 1. `last_whole_commit`: the last commit that is replayed; `commits`: each frame that
    ends a commit, complete or not, and its salt; `following`: the longest series of consistent commits after a wrong
    frame.
    """

    salt: bytes = b""
    last_whole_commit: int = 0
    commits: list[tuple[int, bytes]] = field(default_factory=list)
    following: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Index:
    frames: int
    saved: int
    salt: bytes


def examine(database: Path) -> Damage | None:
    """What the log of `database` has lost; None without a known loss. No process may have the database open.

    Reads both files and changes nothing. Raises OSError.
    """
    index = _index(database.with_name(database.name + "-shm"))
    log = _log(database.with_name(database.name + "-wal"))
    if index is None or log.salt not in (index.salt, b""):
        index = _Index(frames=0, saved=0, salt=b"")  # none, or of an earlier cycle
    kept, behind = max(log.last_whole_commit, index.saved), log.last_whole_commit < index.saved
    counted = [n for n, salt in log.commits if kept < n <= index.frames and salt == index.salt]
    following = [n for n in log.following if n > kept] if len(log.following) > 1 else []
    if kept < index.frames or following:
        return Damage(max(len(counted), len(following)) or None, behind)
    return Damage(0, behind) if behind and log.commits else None


def _log(path: Path) -> _Log:
    found = _Log()
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return found
    with file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return found
        magic, _, page, _, salt, checksum = _HEADER.unpack(head)
        order = _MAGIC.get(magic, "<")
        last: bytes | None = _checksum(order, bytes(8), head[:24])
        is_valid = magic in _MAGIC and last == checksum
        found.salt = salt if is_valid else b""
        if not (512 <= page <= 65536 and page & (page - 1) == 0):
            page = 4096
        sequence: list[int] = []
        number = 0
        while len(frame := file.read(_FRAME.size + page)) == _FRAME.size + page:
            number += 1
            _, commit, frame_salt, checksum = _FRAME.unpack_from(frame)
            if commit:
                found.commits.append((number, frame_salt))
            if found.salt and frame_salt != salt:
                is_valid, last, sequence = False, None, []  # of an earlier cycle
                continue
            follows = last is not None and _checksum(order, last, frame[:8] + frame[_FRAME.size :]) == checksum
            last = checksum
            is_valid = is_valid and follows
            if is_valid:
                found.last_whole_commit = number if commit else found.last_whole_commit
                continue
            sequence = [*(sequence if follows else ()), *((number,) if commit else ())]
            found.following = max(found.following, sequence, key=len)
    return found


def _index(path: Path) -> _Index | None:
    """The index that a process left behind; None without a complete one."""
    try:
        with path.open("rb") as file:
            content = file.read(136)
    except FileNotFoundError:
        return None
    for copy in (content[:48], content[48:96]):  # while one is being written, the other is complete
        if len(content) < 136:
            return None
        is_whole, _, frames, _, _, salt, checksum = _INDEX.unpack(copy)
        own_checksum = struct.pack(
            "=II", *_CHECKSUM.unpack(_checksum("<" if sys.byteorder == "little" else ">", bytes(8), copy[:40]))
        )
        if is_whole and own_checksum == checksum:
            return _Index(frames, min(frames, _SAVED.unpack_from(content)[0]), salt)
    return None


def _checksum(order: str, start: bytes, content: bytes) -> bytes:
    """The checksum of `content`, continued from `start`, as in a log (two 32-bit numbers)."""
    first, second = _CHECKSUM.unpack(start)
    words: Sequence[int] = struct.unpack(f"{order}{len(content) // 4}I", content)
    for a, b in zip(words[::2], words[1::2], strict=True):
        first = (first + a + second) & 0xFFFFFFFF
        second = (second + b + first) & 0xFFFFFFFF
    return _CHECKSUM.pack(first, second)
