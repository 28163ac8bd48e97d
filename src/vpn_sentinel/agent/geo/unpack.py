"""Out of gzip and tar, to new files, and never more than a bound allows."""

import gzip
import hashlib
import tarfile
import zlib
from pathlib import Path
from typing import IO, Final, Protocol

from vpn_sentinel.agent.geo.store import GeoError, writing

_PIECE: Final = 256 * 1024
_GZIP: Final = b"\x1f\x8b"


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def gunzip(packed: Path, to: Path, most: int) -> None:
    """Raises GeoError for what is no gzip file, is cut off or damaged, or unpacks to more than `most` bytes."""
    with packed.open("rb") as file:
        if file.read(2) != _GZIP:
            raise GeoError("is not a gzip file; perhaps a web page came in its place")
    try:
        with gzip.open(packed) as source, writing(to) as target:
            _copy(source, target, most)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise GeoError("is cut off or damaged (gzip)") from e


def only_database(archive: Path, to: Path, most: int) -> str:
    """Take the one `.mmdb` out of a tar file; returns its name. Raises GeoError."""
    try:
        with archive.open("rb") as tar:
            # Header by header, for tarfile reads extended ones whole, and one of 300 MB for many minutes. What a path
            # or link in the archive says is never used as a path here.
            while (head := tar.read(tarfile.BLOCKSIZE)).strip(b"\0"):
                member = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
                if member.size < 0:
                    raise GeoError("is damaged (tar)")
                if member.isreg() and member.name.endswith(".mmdb"):
                    _take(tar, member.size, to, most)
                    return Path(member.name).name
                tar.seek(-member.size % tarfile.BLOCKSIZE + member.size, 1)
    except (tarfile.TarError, EOFError) as e:
        raise GeoError("is damaged (tar)") from e
    raise GeoError("holds no .mmdb file")


def _take(tar: IO[bytes], size: int, to: Path, most: int) -> None:
    if size > most:
        raise GeoError(f"unpacks to more than {most} bytes")
    with writing(to) as target:
        while size and (piece := tar.read(min(size, _PIECE))):
            target.write(piece)
            size -= len(piece)
    if size:
        raise GeoError("is cut off (tar)")


def digest(path: Path) -> str:
    """SHA-256 in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_of(path: Path, to: Path, most: int) -> None:
    with path.open("rb") as source, writing(to) as target:
        _copy(source, target, most)


def _copy(source: _Readable, target: IO[bytes], most: int) -> int:
    got = 0
    while piece := source.read(_PIECE):
        got += len(piece)
        if got > most:
            raise GeoError(f"unpacks to more than {most} bytes")
        target.write(piece)
    return got
