"""The folder of installed databases: DATA_DIR/geo, described by `geo.json` in it.

Files are named after their contents and never modified, so a reader is not disturbed. Replacing `geo.json` is the
single step that changes what is in use: before it the old files, after it the new ones, never a mixture. Without a
`geo.json` every `*.mmdb` in the folder counts.
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
_LOCK_NAME: Final = ".lock"


class GeoError(UserError):
    """A database that cannot be fetched, used or stored. The message is one line."""


@contextmanager
def named(name: str) -> Iterator[None]:
    """Prefix a GeoError that is raised in the block with `name`."""
    try:
        yield
    except GeoError as e:
        raise GeoError(f"{name}: {e}") from e


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One file. `origin` is where it came from; `built` seconds since 1970; `archive` the SHA-256 of what was fetched.

    `holds` is what its records contain: "places", "networks" or both.
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
    """The files of one source: "dbip", "maxmind" or "mmdb". `fetched` is in seconds since 1970."""

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
        raise GeoError(f"{path}: is damaged; `vpn-sentinel geo update` writes it again") from e


def loose_files(folder: Path) -> tuple[Path, ...]:
    """Files that somebody put into the folder by hand. Never raises: empty without a folder."""
    with suppress(OSError):
        return tuple(sorted(p for p in folder.glob("*.mmdb") if p.is_file()))
    return ()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder for one update; make it if it is missing. Raises GeoError when another update has the lock."""
    try:
        files.folder(folder.parent)
        files.folder(folder, mode=0o755)
        handle = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as e:
        raise GeoError(f"{folder}: {e.strerror}") from e
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise GeoError(f"{folder}: another update is running") from e
        _remove_parts(folder)  # after an update that was killed
        try:
            yield
        finally:
            _remove_parts(folder)
    finally:
        os.close(handle)


def part(folder: Path) -> Path:
    """A random name for a file that is being fetched or unpacked: nobody can have put a link there before."""
    return folder / f"{secrets.token_hex(8)}{files.PARTIAL_SUFFIX}"


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """A new file, readable only by its owner until it is complete. Raises FileExistsError if the name exists, also as a
    link.

    Root may run this in a folder where others can write and replace a name with a link at any time: so the mode is set
    by the file descriptor.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as file:
        yield file
        os.fchmod(handle, 0o644)  # public data, and the agent may be another user


def path_of(folder: Path, entry: Entry) -> Path:
    """The path of an installed file: always in the folder, whatever path the manifest has."""
    return folder / Path(entry.name).name


def install(folder: Path, collection: Collection, fetched: tuple[Path, ...]) -> None:
    """Replace the source's old files with `fetched`, the files of `collection` in its order. Raises OSError."""
    try:
        old = read_manifest(folder) or Manifest()
    except GeoError:
        old = Manifest()
    for path, entry in zip(fetched, collection.files, strict=True):
        files.sync(path)
        path.replace(path_of(folder, entry))  # replaces a link, not its target
    files.sync(folder)
    others = tuple(c for c in old.collections if c.source != collection.source)
    new = Manifest(collections=(*others, collection))
    write_manifest(folder, new)
    kept = {entry.name for c in new.collections for entry in c.files}
    for entry in (e for c in old.collections for e in c.files if e.name not in kept):
        path_of(folder, entry).unlink(missing_ok=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Raises OSError."""
    content = msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"
    files.write_whole(folder / MANIFEST, content, mode=0o644)  # public, as the files


def _remove_parts(folder: Path) -> None:
    for path in folder.glob(f"*{files.PARTIAL_SUFFIX}"):
        with suppress(OSError):  # a folder of that name, perhaps: harmless
            path.unlink()
