"""What SQLite does not say of its log: that it is damaged, and what is lost by that.

SQLite replays a log (`-wal`) up to the last commit before the first frame whose checksum is wrong, and takes the rest
for the remains of a write that was cut off: commits that were acknowledged are gone without a word. So the log is read
here before SQLite does. Two things prove a loss. The index beside the log (`-shm`), which a process that is killed
leaves behind, counts the frames whose commits were on the disk. And behind a frame that is wrong there are several
commits that follow from one another: a write that was cut off is one commit, since the next begins when it is on the
disk (`PRAGMA synchronous = FULL`).

Without an index, or with an old one (the machine lost its power), a log that was cut short and the last commit or two
cannot be told from one that was cut off.

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
_MAGIC: Final = {0x377F0682: "<", 0x377F0683: ">"}  # the order of bytes in which checksums are counted
_INDEX: Final = struct.Struct(
    "=12xBB2xII8s8s8s"
)  # is whole, big-endian, frames, pages, last checksum, salt, own checksum
_SAVED: Final = struct.Struct("=96xI")  # behind two copies of it: the frames that are in the database's file already
_SUM: Final = struct.Struct(">II")


@dataclass(frozen=True, slots=True)
class Damage:
    """`lost`: commits that were acknowledged and are not replayed, at least; None when they cannot be counted.

    `behind`: the file holds more already than what would be replayed into it, which would undo a part of that.
    """

    lost: int | None
    behind: bool = False


@dataclass(slots=True)
class _Log:
    """Frames are counted from 1. `whole`: the last commit that is replayed; `commits`: each frame that ends one, whole
    or not, and its salt; `following`: the longest row of commits that follow from one another behind a wrong frame.
    """

    salt: bytes = b""
    whole: int = 0
    commits: list[tuple[int, bytes]] = field(default_factory=list)
    following: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Index:
    frames: int
    saved: int
    salt: bytes


def examine(database: Path) -> Damage | None:
    """What the log of `database` has lost; None when nothing is known to be. Nobody may have the database open.

    Reads both files and changes nothing. Raises OSError.
    """
    index = _index(database.with_name(database.name + "-shm"))
    log = _log(database.with_name(database.name + "-wal"))
    if index is None or log.salt not in (index.salt, b""):
        index = _Index(frames=0, saved=0, salt=b"")  # none, or of an earlier cycle
    kept, behind = max(log.whole, index.saved), log.whole < index.saved
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
        magic, _, page, _, salt, told = _HEADER.unpack(head)
        order = _MAGIC.get(magic, "<")
        last: bytes | None = _sum(order, bytes(8), head[:24])
        whole = magic in _MAGIC and last == told
        found.salt = salt if whole else b""
        if not (512 <= page <= 65536 and page & (page - 1) == 0):
            page = 4096
        run: list[int] = []
        number = 0
        while len(frame := file.read(_FRAME.size + page)) == _FRAME.size + page:
            number += 1
            _, commit, mark, told = _FRAME.unpack_from(frame)
            if commit:
                found.commits.append((number, mark))
            if found.salt and mark != salt:
                whole, last, run = False, None, []  # of an earlier cycle
                continue
            follows = last is not None and _sum(order, last, frame[:8] + frame[_FRAME.size :]) == told
            last = told
            whole = whole and follows
            if whole:
                found.whole = number if commit else found.whole
                continue
            run = [*(run if follows else ()), *((number,) if commit else ())]
            found.following = max(found.following, run, key=len)
    return found


def _index(path: Path) -> _Index | None:
    """The index that a process left behind; None without one that is whole."""
    try:
        with path.open("rb") as file:
            content = file.read(136)
    except FileNotFoundError:
        return None
    for copy in (content[:48], content[48:96]):  # one is being written while the other is whole
        if len(content) < 136:
            return None
        is_whole, _, frames, _, _, salt, told = _INDEX.unpack(copy)
        own = struct.pack("=II", *_SUM.unpack(_sum("<" if sys.byteorder == "little" else ">", bytes(8), copy[:40])))
        if is_whole and own == told:
            return _Index(frames, min(frames, _SAVED.unpack_from(content)[0]), salt)
    return None


def _sum(order: str, start: bytes, content: bytes) -> bytes:
    """The checksum of `content` that follows from `start`, as it stands in a log (two numbers of 32 bits)."""
    first, second = _SUM.unpack(start)
    words: Sequence[int] = struct.unpack(f"{order}{len(content) // 4}I", content)
    for a, b in zip(words[::2], words[1::2], strict=True):
        first = (first + a + second) & 0xFFFFFFFF
        second = (second + b + first) & 0xFFFFFFFF
    return _SUM.pack(first, second)
