"""The folder of installed databases: DATA_DIR/geo, described by `geo.json` in it.

Files are named after their contents and never written again, so a reader is not disturbed. Replacing
`geo.json` is the one step that changes what is in use: before it the old files count, after it the new ones, never a
mixture. Without a `geo.json` every `*.mmdb` in the folder counts.
"""

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

import msgspec

from vpn_sentinel.runtime import files
from vpn_sentinel.runtime.user_error import UserError

MANIFEST: Final = "geo.json"
_LOCK: Final = ".lock"


class GeoError(UserError):
    """A database that cannot be fetched, used or kept. The message is one line."""


@contextmanager
def named(name: str) -> Iterator[None]:
    """Put `name` in front of a GeoError that comes out of the block."""
    try:
        yield
    except GeoError as e:
        raise GeoError(f"{name}: {e}") from e


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One file. `origin` is where it came from; `built` seconds since 1970; `archive` the SHA-256 of what was fetched.

    `holds` names what its records tell: "places", "networks" or both.
    """

    name: str
    type: str
    holds: tuple[str, ...]
    built: int
    size: int
    sha256: str
    origin: str
    archive: str = ""


class Collection(msgspec.Struct, frozen=True, kw_only=True):
    """The files of one source: "dbip", "maxmind" or "mmdb". Together they make one opinion. `fetched` as `built`."""

    source: str
    fetched: float
    licence: str
    credit: str
    files: tuple[Entry, ...]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    collections: tuple[Collection, ...] = ()

    def of(self, source: str) -> Collection | None:
        return next((c for c in self.collections if c.source == source), None)


def read_manifest(folder: Path) -> Manifest | None:
    """What is installed, None without a manifest. Raises GeoError for one that cannot be read."""
    path = folder / MANIFEST
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        return None
    except OSError as e:
        raise GeoError(f"{path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:  # msgspec.DecodeError is a ValueError
        raise GeoError(f"{path}: is damaged; `vpn-sentinel geo update` writes it anew") from e


def loose_files(folder: Path) -> tuple[Path, ...]:
    """What somebody put into the folder by hand. Raises nothing: no folder has no files."""
    with suppress(OSError):
        return tuple(sorted(p for p in folder.glob("*.mmdb") if p.is_file()))
    return ()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for one update; it is made when it is missing. Raises GeoError when another one holds it."""
    try:
        files.folder(folder.parent)
        files.folder(folder, mode=0o755)
        handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as e:
        raise GeoError(f"{folder}: {e.strerror}") from e
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise GeoError(f"{folder}: another update is running") from e
        _sweep(folder)  # of one that was killed
        try:
            yield
        finally:
            _sweep(folder)
    finally:
        os.close(handle)


def part(folder: Path) -> Path:
    """A new name for what is being fetched or unpacked: nobody can have put a link there before."""
    return folder / f"{secrets.token_hex(8)}{files.PART}"


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A new file, its writer's alone until it is whole. Raises FileExistsError for whatever bears its name, a link too.

    Root may run this in a folder where others write, who can put a link in the place of a name at any time: so the
    mode is set by the handle.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        yield file
        os.fchmod(handle, 0o644)  # public data, and the agent may be another user


def path_of(folder: Path, entry: Entry) -> Path:
    """Where an installed file is: in the folder, whatever its manifest says."""
    return folder / Path(entry.name).name


def install(folder: Path, collection: Collection, fetched: tuple[Path, ...]) -> None:
    """Put `fetched`, the files of `collection` in its order, in the place of the source's old ones. Raises OSError."""
    try:
        old = read_manifest(folder) or Manifest()
    except GeoError:
        old = Manifest()
    for path, entry in zip(fetched, collection.files, strict=True):
        files.to_disk(path)
        path.replace(path_of(folder, entry))  # of a link there the link itself
    files.to_disk(folder)
    others = tuple(c for c in old.collections if c.source != collection.source)
    new = Manifest(collections=(*others, collection))
    write_manifest(folder, new)
    kept = {entry.name for c in new.collections for entry in c.files}
    for entry in (e for c in old.collections for e in c.files if e.name not in kept):
        path_of(folder, entry).unlink(missing_ok=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Raises OSError."""
    content = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
    files.put(folder / MANIFEST, content, mode=0o644)  # public, as what it lists


def _sweep(folder: Path) -> None:
    for path in folder.glob(f"*{files.PART}"):
        with suppress(OSError):  # a folder of that name, perhaps: it is in nobody's way
            path.unlink()
