"""The databases in use: which files, opened once, and opened again when they change.

Files are checked once a minute, when an address is looked up; a new file replaces the old one without a restart. The
files of one vendor count as one source: the city from one, the network from the other.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from vpn_sentinel.agent.geo.store import MANIFEST, GeoError, loose_files, read_manifest
from vpn_sentinel.agent.probes.mmdb import Reader, get, open_file, read
from vpn_sentinel.domain.observation import Place
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.clock import Clock

log = logging.getLogger(__name__)

CHECK_FILES_EVERY_S: Final = 60.0  # at most, while addresses are looked up
OLD_DAYS, TOO_OLD_DAYS = 45.0, 90.0  # since the data was built; DB-IP publishes every month, MaxMind twice a week
_DAY_S: Final = 86400.0
_MAX_ANSWERS: Final = 64  # cached


@dataclass(frozen=True, slots=True)
class Opened:
    """The files of one source. `built` is that of the oldest, in seconds since 1970."""

    source: str
    built: int
    paths: tuple[Path, ...]
    readers: tuple[Reader, ...]

    @property
    def name(self) -> str:
        """The source of its places: with the date of the data."""
        return f"{self.source[:48]}:{day(self.built)}"

    def close(self) -> None:
        for reader in self.readers:
            reader.close()


def vendor(database_type: str) -> str | None:
    """The vendor of a file, by its database type; None when unknown."""
    if database_type.startswith("DBIP"):
        return "dbip"
    return "maxmind" if database_type.startswith(("GeoLite2", "GeoIP2")) else None


def day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


def days_old(built: float, now: float) -> float:
    return max(0.0, now - built) / _DAY_S


def how_old(built: float, now: float) -> str | None:
    """In words, None while the data is recent enough."""
    days = days_old(built, now)
    return "much too old" if days >= TOO_OLD_DAYS else "old" if days >= OLD_DAYS else None


def open_together(source: str, paths: Sequence[Path]) -> Opened:
    """Open files as one source. Raises ValueError with the name of the one that cannot be used."""
    readers = tuple(open_file(path) for path in paths)
    return Opened(source, min(r.metadata().build_epoch for r in readers), tuple(paths), readers)


def open_by_vendor(paths: Sequence[Path]) -> tuple[Opened, ...]:
    """Open files without a manifest: those of one vendor together, others separately. Raises ValueError."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        reader = open_file(path)
        groups.setdefault(vendor(reader.metadata().database_type) or f"mmdb:{path.stem}", []).append(path)
        reader.close()
    return tuple(open_together(source, members) for source, members in groups.items())


class Databases:
    """Looks up addresses in `files`, or, if that is empty, in what is installed in `folder`."""

    def __init__(self, clock: Clock, *, files: Sequence[str] = (), folder: Path | None = None) -> None:
        """Raises ValueError with the name of a file that cannot be used. `folder` may be missing or empty."""
        self._clock = clock
        self._files = tuple(Path(f) for f in files)
        self._folder = folder
        self._checked_at = clock.boottime()
        self._logged: set[tuple[str, str]] = set()
        self._answers: dict[IPAddress, tuple[Place, ...]] = {}  # each round asks for the same few
        self.failures: tuple[str, ...] = ()  # why current files cannot be used, one line each
        self.opened: tuple[Opened, ...] = open_by_vendor(self._files)
        self._loaded_states: object = self._file_states() if self._files else None
        self._refresh()

    def look_up(self, address: IPAddress) -> tuple[Place, ...]:
        """The place of an address by each source that knows it."""
        now = self._clock.boottime()
        if now - self._checked_at >= CHECK_FILES_EVERY_S:
            self._checked_at = now
            self._refresh()
        if address not in self._answers:
            if len(self._answers) >= _MAX_ANSWERS:
                self._answers.clear()
            found = (self._ask(source, address) for source in self.opened)
            self._answers[address] = tuple(place for place in found if place is not None)
        return self._answers[address]

    def close(self) -> None:
        for source in self.opened:
            source.close()
        self.opened = ()

    def _ask(self, source: Opened, address: IPAddress) -> Place | None:
        found: Place | None = None
        for path, reader in zip(source.paths, source.readers, strict=True):
            try:
                place = read(source.name, address, get(reader, address))
            except ValueError as e:
                self._log_once(str(path), str(e))
                continue
            found = place if found is None or place is None else _filled(found, place)
        return found

    def _refresh(self) -> None:
        """Open the files again if they changed. If one cannot be opened, log it and keep the old one."""
        states = self._file_states()
        if states != self._loaded_states:
            self._loaded_states, self.failures = states, ()
            self._answers.clear()
            new = self._load()
            for source in self.opened:
                if source not in new:
                    source.close()
            self.opened, old = new, self.opened
            if new or old:
                log.info("databases of places in use", extra={"names": ", ".join(o.name for o in new) or "none"})
        self._log_age()

    def _load(self) -> tuple[Opened, ...]:
        try:
            if self._files or self._folder is None:
                return open_by_vendor(self._files)
            manifest = read_manifest(self._folder)
            if manifest is None:
                return open_by_vendor(loose_files(self._folder))
        except (ValueError, GeoError) as e:
            self._failed(str(e))
            return self.opened
        found = []
        for collection in manifest.collections:
            paths = [self._folder / Path(entry.name).name for entry in collection.files]
            try:
                found.append(open_together(collection.source, paths))
            except ValueError as e:
                self._failed(str(e))
                found += [o for o in self.opened if o.source == collection.source]
        return tuple(found)

    def _failed(self, why: str) -> None:
        self._loaded_states = None  # tried again at the next check
        self.failures = (*self.failures, why)
        self._log_once("databases of places", why)

    def _file_states(self) -> tuple[object, ...]:
        """A value that differs after every change of the files in use."""
        if self._files or self._folder is None:
            return tuple(_file_state(path) for path in self._files)
        return (_file_state(self._folder / MANIFEST), *(_file_state(path) for path in loose_files(self._folder)))

    def _log_age(self) -> None:
        now = self._clock.wall()
        for source in self.opened:
            words = how_old(source.built, now)
            if words is not None and (source.name, words) not in self._logged:
                self._logged.add((source.name, words))
                level = logging.WARNING if days_old(source.built, now) >= TOO_OLD_DAYS else logging.INFO
                facts = {"database": source.name, "days": int(days_old(source.built, now))}
                log.log(level, "a database of places is %s; `vpn-sentinel geo update` renews it", words, extra=facts)

    def _log_once(self, which: str, why: str) -> None:
        if (which, why) not in self._logged:
            self._logged.add((which, why))
            log.warning("a database of places cannot be used", extra={"which": which, "reason": why})


def _filled(first: Place, second: Place) -> Place:
    """`first`, with the missing fields from `second`."""
    names = [f.name for f in fields(Place)]
    return replace(first, **{n: getattr(second, n) for n in names if getattr(first, n) is None})


def _file_state(path: Path) -> tuple[str, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (path.name, found.st_ino, found.st_size, found.st_mtime_ns)
