"""One update: fetch next to the old files, verify, then swap. A failure before the swap changes nothing."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vpn_sentinel.agent.geo.databases import open_together, vendor
from vpn_sentinel.agent.geo.fetch import Web
from vpn_sentinel.agent.geo.sources import DBIP_CREDIT, MAXMIND_CREDIT, Database, Vendor
from vpn_sentinel.agent.geo.store import (
    Collection,
    Entry,
    GeoError,
    Manifest,
    install,
    locked,
    named,
    path_of,
    read_manifest,
)
from vpn_sentinel.agent.geo.unpack import digest
from vpn_sentinel.agent.geo.verify import examine, not_older
from vpn_sentinel.runtime.clock import Clock

UNKNOWN_VENDOR: Final = "mmdb"  # source name of files


@dataclass(frozen=True, slots=True)
class Updated:
    """What is installed now; `changed` is False when it already was the newest."""

    collection: Collection
    changed: bool


def update(source: Vendor, folder: Path, web: Web, clock: Clock) -> Updated:
    """Bring `source` up to date in `folder`. Raises GeoError; then the old files stay in use."""
    try:
        with locked(folder):
            return _update(source, folder, web, clock)
    except OSError as e:
        raise GeoError(f"{folder}: {e.strerror or e}") from e


def _update(source: Vendor, folder: Path, web: Web, clock: Clock) -> Updated:
    try:
        manifest = read_manifest(folder) or Manifest()
    except GeoError:
        manifest = Manifest()  # damaged: everything is fetched again
    results = [_fetch_part(part, source.name, manifest, folder, web, clock) for part in source.parts]
    name = source.name or _vendor_of(entry for entry, _ in results)
    installed = manifest.of(name)
    # A local file may cover only a part (places or networks): the other part stays as it was.
    covered = {what for entry, _ in results for what in entry.holds}
    results += [(e, path_of(folder, e)) for e in (installed.files if installed else ()) if not covered & set(e.holds)]
    entries, paths = tuple(entry for entry, _ in results), tuple(path for _, path in results)
    collection = Collection(
        source=name,
        fetched=clock.wall(),
        licence=source.licence or _licence(entries),
        credit=source.credit or _credit(entries),
        files=entries,
    )
    open_together(name, paths).close()  # as the agent will
    install(folder, collection, paths)
    return Updated(collection, installed is None or installed.files != entries)


def _vendor_of(entries: Iterable[Entry]) -> str:
    """The vendor of all of them; "mmdb" for files of an unknown vendor, or of several."""
    found = {vendor(entry.type) or UNKNOWN_VENDOR for entry in entries}
    return found.pop() if len(found) == 1 else UNKNOWN_VENDOR


def _fetch_part(
    part: Database, source: str, manifest: Manifest, folder: Path, web: Web, clock: Clock
) -> tuple[Entry, Path]:
    """The entry to be installed for one part, and the current path of its file."""
    old = _entry_with(manifest.of(source), part.holds)

    def is_installed(origin: str, archive: str) -> bool:
        return old is not None and old.origin == origin and archive in ("", old.archive) and intact(folder, old)

    fetched = part.fetch(web, folder, clock.wall(), is_installed)
    if fetched is None and old is not None:
        return old, path_of(folder, old)
    if fetched is None:
        raise GeoError("nothing was fetched")  # a part returns None only when it is installed
    with named(fetched.origin):
        facts = examine(fetched.path, clock.wall(), part.holds)
        replaced = old or _entry_with(manifest.of(source or vendor(facts.type) or UNKNOWN_VENDOR), facts.holds[0])
        not_older(facts, replaced.built if replaced else None)
    sha256 = digest(fetched.path)
    entry = Entry(
        name=f"{'-'.join(facts.holds)}-{sha256[:16]}.mmdb",
        type=facts.type,
        holds=facts.holds,
        built=facts.built,
        size=fetched.path.stat().st_size,
        sha256=sha256,
        origin=fetched.origin,
        archive=fetched.archive,
    )
    return entry, fetched.path


def _entry_with(installed: Collection | None, what: str) -> Entry | None:
    return next((e for e in installed.files if what in e.holds), None) if installed else None


def intact(folder: Path, entry: Entry) -> bool:
    """Whether the installed file is unchanged since it was verified."""
    try:
        return digest(path_of(folder, entry)) == entry.sha256
    except OSError:
        return False


def _licence(entries: Iterable[Entry]) -> str:
    known = {"dbip": "CC BY 4.0", "maxmind": "GeoLite2 End User License Agreement"}
    return ", ".join(dict.fromkeys(known.get(vendor(e.type) or "", "see its vendor") for e in entries))


def _credit(entries: Iterable[Entry]) -> str:
    known = {"dbip": DBIP_CREDIT, "maxmind": MAXMIND_CREDIT}
    return "; ".join(dict.fromkeys(c for e in entries if (c := known.get(vendor(e.type) or ""))))
