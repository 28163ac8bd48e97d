"""The databases in use: which files, opened once, and opened anew when they change.

Files are looked at once a minute, when somebody asks for an address; a new one takes the place of the old without a
restart. Those of one vendor make one opinion together: the city from the one, the network from the other.
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

LOOK_AGAIN: Final = 60.0  # seconds between two looks at the files
OLD, TOO_OLD = 45.0, 90.0  # days since the data was built; DB-IP's is new every month, MaxMind's twice a week
_DAY: Final = 86400.0
_MAX_ANSWERS: Final = 64  # answers kept


@dataclass(frozen=True, slots=True)
class Opened:
    """The files of one source. `built` is that of the oldest, in seconds since 1970."""

    source: str
    built: int
    paths: tuple[Path, ...]
    readers: tuple[Reader, ...]

    @property
    def name(self) -> str:
        """As a place's source: with the day that its data is of."""
        return f"{self.source[:48]}:{day(self.built)}"

    def close(self) -> None:
        for reader in self.readers:
            reader.close()


def vendor(database_type: str) -> str | None:
    """Whose a file is, by the type that it gives itself; None for one that is not known."""
    if database_type.startswith("DBIP"):
        return "dbip"
    return "maxmind" if database_type.startswith(("GeoLite2", "GeoIP2")) else None


def day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).date().isoformat()


def days_old(built: float, now: float) -> float:
    return max(0.0, now - built) / _DAY


def how_old(built: float, now: float) -> str | None:
    """In words, None while the data is young enough."""
    days = days_old(built, now)
    return "much too old" if days >= TOO_OLD else "old" if days >= OLD else None


def open_together(source: str, paths: Sequence[Path]) -> Opened:
    """Open files as one source. Raises ValueError that names the one that cannot be used."""
    readers = tuple(open_file(path) for path in paths)
    return Opened(source, min(r.metadata().build_epoch for r in readers), tuple(paths), readers)


def open_by_vendor(paths: Sequence[Path]) -> tuple[Opened, ...]:
    """Open files that nobody described: those of one vendor together, others each alone. Raises ValueError."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        reader = open_file(path)
        groups.setdefault(vendor(reader.metadata().database_type) or f"mmdb:{path.stem}", []).append(path)
        reader.close()
    return tuple(open_together(source, members) for source, members in groups.items())


class Databases:
    """Looks addresses up in `files`, or, when none are named, in what is installed in `folder`."""

    def __init__(self, clock: Clock, *, files: Sequence[str] = (), folder: Path | None = None) -> None:
        """Raises ValueError that names the one of `files` that cannot be used. `folder` may be missing or empty."""
        self._clock = clock
        self._files = tuple(Path(f) for f in files)
        self._folder = folder
        self._looked = clock.boottime()
        self._told: set[tuple[str, str]] = set()
        self._answers: dict[IPAddress, tuple[Place, ...]] = {}  # each round asks for the same few
        self.failures: tuple[str, ...] = ()  # why what is there now cannot be used, one line each
        self.opened: tuple[Opened, ...] = open_by_vendor(self._files)
        self._mark: object = self._marks() if self._files else None
        self._refresh()

    def look_up(self, address: IPAddress) -> tuple[Place, ...]:
        """What each source says of an address; one that does not know it says nothing."""
        now = self._clock.boottime()
        if now - self._looked >= LOOK_AGAIN:
            self._looked = now
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
                self._say_once(str(path), str(e))
                continue
            found = place if found is None or place is None else _filled(found, place)
        return found

    def _refresh(self) -> None:
        """Take what is there now when it changed. What cannot be opened is told, and what it was to replace stays."""
        mark = self._marks()
        if mark != self._mark:
            self._mark, self.failures = mark, ()
            self._answers.clear()
            new = self._load()
            for source in self.opened:
                if source not in new:
                    source.close()
            self.opened, old = new, self.opened
            if new or old:
                log.info("databases of places in use", extra={"names": ", ".join(o.name for o in new) or "none"})
        self._tell_age()

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
        self._mark = None  # tried again at the next look
        self.failures = (*self.failures, why)
        self._say_once("databases of places", why)

    def _marks(self) -> tuple[object, ...]:
        """Changes with every change of the files that matter."""
        if self._files or self._folder is None:
            return tuple(_mark(path) for path in self._files)
        return (_mark(self._folder / MANIFEST), *(_mark(path) for path in loose_files(self._folder)))

    def _tell_age(self) -> None:
        now = self._clock.wall()
        for source in self.opened:
            words = how_old(source.built, now)
            if words is not None and (source.name, words) not in self._told:
                self._told.add((source.name, words))
                level = logging.WARNING if days_old(source.built, now) >= TOO_OLD else logging.INFO
                facts = {"database": source.name, "days": int(days_old(source.built, now))}
                log.log(level, "a database of places is %s; `vpn-sentinel geo update` renews it", words, extra=facts)

    def _say_once(self, which: str, why: str) -> None:
        if (which, why) not in self._told:
            self._told.add((which, why))
            log.warning("a database of places cannot be used", extra={"which": which, "reason": why})


def _filled(first: Place, second: Place) -> Place:
    """`first`, with what only `second` knows."""
    names = [f.name for f in fields(Place)]
    return replace(first, **{n: getattr(second, n) for n in names if getattr(first, n) is None})


def _mark(path: Path) -> tuple[str, int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return (path.name, found.st_ino, found.st_size, found.st_mtime_ns)
