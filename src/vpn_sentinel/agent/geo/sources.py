"""Sources of databases: DB-IP Lite, MaxMind's GeoLite2, or files. Each can fetch its parts.

DB-IP: one gzip file a part and month, free, CC BY 4.0 (db-ip.com/db/lite.php). MaxMind: a tar.gz by its permalink,
with account and licence key, next to a file with its SHA-256 (dev.maxmind.com/geoip/updating-databases).
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol

from vpn_sentinel.agent.geo.fetch import DownloadLogin, NotThereError, Web, shown
from vpn_sentinel.agent.geo.store import GeoError, named, part
from vpn_sentinel.agent.geo.unpack import copy_of, gunzip, only_database

DBIP_CREDIT: Final = "IP geolocation by DB-IP, https://db-ip.com"
MAXMIND_CREDIT: Final = "This product includes GeoLite2 data created by MaxMind, available from https://www.maxmind.com"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """A database file in the folder, not yet verified. `archive` is the SHA-256 of the downloaded archive."""

    path: Path
    origin: str
    archive: str = ""


# Whether the installed file came from this origin (and this archive, when it is not empty), and is intact.
Installed = Callable[[str, str], bool]


class Database(Protocol):
    """One part of a source. `holds` is what its records must contain: "places" or "networks"."""

    @property
    def holds(self) -> str: ...

    def fetch(self, web: Web, folder: Path, now: float, installed: Installed) -> Fetched | None:
        """None when the newest is installed already. Raises GeoError."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Vendor:
    """A source: its name, the licence of its data, whom to credit, and its parts.

    The first three are empty when they depend on the files.
    """

    name: str
    licence: str
    credit: str
    parts: tuple[Database, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DbipPart:
    base: str
    edition: str  # city-lite, asn-lite
    holds: str

    def fetch(self, web: Web, folder: Path, now: float, installed: Installed) -> Fetched | None:
        tried = []
        for month in _months(now):
            url = f"{self.base}/free/dbip-{self.edition}-{month}.mmdb.gz"
            if installed(url, ""):
                return None
            packed, found = part(folder), part(folder)
            try:
                archive = web.save(url, packed)
            except NotThereError:
                tried.append(month)
                continue
            with named(shown(url)):
                gunzip(packed, found, web.bounds.unpacked)
            packed.unlink()
            return Fetched(path=found, origin=url, archive=archive)
        raise GeoError(
            f"{self.base}/free: has no dbip-{self.edition} of {' or '.join(tried)}; is this machine's clock right?"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MaxmindPart:
    base: str
    edition: str  # GeoLite2-City, GeoLite2-ASN
    holds: str
    login: DownloadLogin

    def fetch(self, web: Web, folder: Path, now: float, installed: Installed) -> Fetched | None:
        del now
        url = f"{self.base}/geoip/databases/{self.edition}/download?suffix=tar.gz"
        checksum = web.text(url + ".sha256", self.login).split()
        wanted = checksum[0].lower() if checksum else ""
        if len(wanted) != 64 or not set(wanted) <= set("0123456789abcdef"):
            raise GeoError(f"{shown(url)}: the answer holds no SHA-256")
        if installed(shown(url), wanted):
            return None
        packed, tar, found = part(folder), part(folder), part(folder)
        archive = web.save(url, packed, self.login)
        if archive != wanted:
            raise GeoError(f"{shown(url)}: its SHA-256 is not the one that MaxMind publishes")
        with named(shown(url)):
            gunzip(packed, tar, web.bounds.unpacked)
            packed.unlink()
            only_database(tar, found, web.bounds.unpacked)
        tar.unlink()
        return Fetched(path=found, origin=shown(url), archive=archive)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePart:
    """A local file: `.mmdb`, `.mmdb.gz` or a `.tar.gz` with one."""

    file: Path
    holds: str = ""

    def fetch(self, web: Web, folder: Path, now: float, installed: Installed) -> Fetched | None:
        del now, installed
        tar, found = part(folder), part(folder)
        max_bytes = web.bounds.unpacked
        try:
            with named(str(self.file)):
                if self.file.name.endswith((".tar.gz", ".tgz")):
                    gunzip(self.file, tar, max_bytes)
                    only_database(tar, found, max_bytes)
                    tar.unlink()
                elif self.file.name.endswith(".gz"):
                    gunzip(self.file, found, max_bytes)
                else:
                    copy_of(self.file, found, max_bytes)
        except OSError as e:
            if e.filename is None:  # an error of our folder, which the caller names
                raise
            raise GeoError(f"{e.filename}: {e.strerror}") from e
        return Fetched(path=found, origin=str(self.file.absolute()))


def dbip(base: str) -> Vendor:
    parts = (
        DbipPart(base=base, edition="city-lite", holds="places"),
        DbipPart(base=base, edition="asn-lite", holds="networks"),
    )
    return Vendor(name="dbip", licence="CC BY 4.0", credit=DBIP_CREDIT, parts=parts)


def maxmind(base: str, login: DownloadLogin) -> Vendor:
    parts = (
        MaxmindPart(base=base, edition="GeoLite2-City", holds="places", login=login),
        MaxmindPart(base=base, edition="GeoLite2-ASN", holds="networks", login=login),
    )
    return Vendor(name="maxmind", licence="GeoLite2 End User License Agreement", credit=MAXMIND_CREDIT, parts=parts)


def from_files(files: tuple[Path, ...]) -> Vendor:
    return Vendor(name="", licence="", credit="", parts=tuple(FilePart(file=file) for file in files))


def _months(now: float) -> tuple[str, str]:
    """This month and the one before, as YYYY-MM: a new file is published at some time on the first."""
    today = datetime.fromtimestamp(now, UTC)
    year, month = (today.year, today.month - 1) if today.month > 1 else (today.year - 1, 12)
    return f"{today.year:04}-{today.month:02}", f"{year:04}-{month:02}"
