"""Unpack gzip and tar to new files, up to a maximum size."""

import gzip
import hashlib
import tarfile
import zlib
from pathlib import Path
from typing import IO, Final, Protocol

from vpn_sentinel.agent.geo.store import GeoError, writing

_CHUNK_BYTES: Final = 256 * 1024
_GZIP_MAGIC: Final = b"\x1f\x8b"


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def gunzip(packed: Path, to: Path, max_bytes: int) -> None:
    """Raises GeoError when it is not a gzip file, is truncated or damaged, or unpacks to more than `max_bytes`."""
    with packed.open("rb") as file:
        if file.read(2) != _GZIP_MAGIC:
            raise GeoError("is not a gzip file; perhaps a web page was sent instead")
    try:
        with gzip.open(packed) as source, writing(to) as target:
            _copy(source, target, max_bytes)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise GeoError("is cut off or damaged (gzip)") from e


def only_database(archive: Path, to: Path, max_bytes: int) -> str:
    """Extract the only `.mmdb` of a tar file; returns its name. Raises GeoError."""
    try:
        with archive.open("rb") as tar:
            # Header by header: tarfile reads extended headers as a whole, and takes many minutes for one of 300 MB.
            # Paths and links in the archive are never used as paths here.
            while (head := tar.read(tarfile.BLOCKSIZE)).strip(b"\0"):
                member = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
                if member.size < 0:
                    raise GeoError("is damaged (tar)")
                if member.isreg() and member.name.endswith(".mmdb"):
                    _extract(tar, member.size, to, max_bytes)
                    return Path(member.name).name
                tar.seek(-member.size % tarfile.BLOCKSIZE + member.size, 1)
    except (tarfile.TarError, EOFError) as e:
        raise GeoError("is damaged (tar)") from e
    raise GeoError("holds no .mmdb file")


def _extract(tar: IO[bytes], size: int, to: Path, max_bytes: int) -> None:
    if size > max_bytes:
        raise GeoError(f"unpacks to more than {max_bytes} bytes")
    with writing(to) as target:
        while size and (chunk := tar.read(min(size, _CHUNK_BYTES))):
            target.write(chunk)
            size -= len(chunk)
    if size:
        raise GeoError("is cut off (tar)")


def digest(path: Path) -> str:
    """SHA-256 in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def copy_of(path: Path, to: Path, max_bytes: int) -> None:
    with path.open("rb") as source, writing(to) as target:
        _copy(source, target, max_bytes)


def _copy(source: _Readable, target: IO[bytes], max_bytes: int) -> int:
    got = 0
    while chunk := source.read(_CHUNK_BYTES):
        got += len(chunk)
        if got > max_bytes:
            raise GeoError(f"unpacks to more than {max_bytes} bytes")
        target.write(chunk)
    return got
