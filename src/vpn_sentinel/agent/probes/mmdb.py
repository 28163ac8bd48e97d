"""Places from database files in MaxMind's format: GeoLite2, DB-IP Lite, IPinfo Lite."""

import errno
import struct
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Protocol

from vpn_sentinel.agent.probes.placing import asn_of, clean, country_code
from vpn_sentinel.domain.observation import Place
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.runtime.imports import stand_ins

# Exceptions when a truncated or damaged file is read: the library's own InvalidDatabaseError is a RuntimeError.
DAMAGED: Final = (OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, struct.error)


class Metadata(Protocol):
    """The metadata of a file. `build_epoch` is seconds since 1970; `ip_version` is 4 or 6; 6 has both."""

    @property
    def database_type(self) -> str: ...
    @property
    def build_epoch(self) -> int: ...
    @property
    def ip_version(self) -> int: ...


class Reader(Protocol):
    def get(self, ip_address: IPAddress) -> object: ...
    def metadata(self) -> Metadata: ...
    def close(self) -> None: ...
    def __iter__(self) -> Iterator[tuple[object, object]]: ...


def open_file(path: str | Path) -> Reader:
    """Open one file. Raises ValueError with its name and the reason why it cannot be used."""
    maxminddb = _library()  # imported only when there is a file
    try:
        # With read(2), not mapped: a mapping costs 1 to 2 MB for the first few addresses (the kernel reads ahead), and
        # the process gets SIGBUS when the file is truncated. A lookup takes 0.04 ms this way.
        reader: Reader = maxminddb.open_database(str(path), maxminddb.MODE_FILE)
    except DAMAGED as e:
        # Some of the library's messages contain the path, which would be repeated. For an empty file it raises EINVAL.
        why = e.strerror if isinstance(e, OSError) and e.errno != errno.EINVAL else None
        msg = f"{path}: {why or 'is not a MaxMind database file'}"
        raise ValueError(msg) from e
    metadata = reader.metadata()
    if (
        metadata.ip_version not in (4, 6)
        or type(metadata.build_epoch) is not int
        or type(metadata.database_type) is not str
    ):
        reader.close()
        msg = f"{path}: is not a MaxMind database file"
        raise ValueError(msg)
    return reader


@cache
def _library() -> Any:
    """The package `maxminddb` without two imports of it, 2 MB in an agent of 24.

    These are `multiprocessing`, without which it uses a lock for threads (enough for a process that never forks), and
    `importlib.metadata`, which it only needs for its own version.
    """
    own_version = ModuleType("importlib.metadata")
    own_version.version = lambda _name: ""  # type: ignore[attr-defined]
    with stand_ins({"multiprocessing": None, "importlib.metadata": own_version}):
        import maxminddb
    return maxminddb


def get(reader: Reader, address: IPAddress) -> object:
    """The record of an address, None without one. Raises ValueError when that part of the file is damaged."""
    if address.version > reader.metadata().ip_version:
        return None
    try:
        return reader.get(address)
    except DAMAGED as e:
        msg = "it is damaged"
        raise ValueError(msg) from e


def read(source: str, address: IPAddress, record: object) -> Place | None:
    if not isinstance(record, Mapping):
        return None
    regions = record.get("subdivisions")
    place = Place(
        ip=address,
        source=source,
        country=country_code(_at(record, "country", "iso_code") or record.get("country_code") or record.get("country")),
        region=clean(_name(regions[0]) if isinstance(regions, Sequence) and regions else record.get("region")),
        city=clean(_name(record.get("city"))),
        timezone=clean(_at(record, "location", "time_zone") or record.get("timezone")),
        asn=asn_of(record.get("autonomous_system_number") or record.get("asn")),
        org=clean(record.get("autonomous_system_organization") or record.get("as_name")),
    )
    known = (place.country, place.region, place.city, place.timezone, place.asn, place.org)
    return place if any(v is not None for v in known) else None


def _at(record: Mapping[str, Any], *keys: str) -> Any:
    value: Any = record
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _name(value: Any) -> Any:
    return _at(value, "names", "en") if isinstance(value, Mapping) else value
