"""Places out of database files in MaxMind's format: GeoLite2, DB-IP Lite, IPinfo Lite."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from vpn_sentinel.agent.probes.placing import asn_of, clean, country_code
from vpn_sentinel.domain.observation import Place
from vpn_sentinel.domain.policy import IPAddress


class Reader(Protocol):
    def get(self, ip_address: IPAddress) -> object: ...


def open_databases(paths: Sequence[str]) -> tuple[tuple[str, Reader], ...]:
    """Open each file by its name. Raises ValueError that says which one cannot be used, and why."""
    if not paths:
        return ()
    import maxminddb  # only for those who have a file

    found = []
    for path in paths:
        try:
            # Mapped, so that only the pages that are looked at count, and all processes share them.
            reader = maxminddb.open_database(path, maxminddb.MODE_AUTO)
        except (OSError, maxminddb.InvalidDatabaseError) as e:
            msg = f"{path}: {e}"
            raise ValueError(msg) from e
        found.append((f"mmdb:{Path(path).stem}"[:60], reader))
    return tuple(found)


def look_up(databases: Sequence[tuple[str, Reader]], address: IPAddress) -> tuple[Place, ...]:
    """What each file says of an address; a file that does not know it says nothing."""
    places = (read(source, address, reader.get(address)) for source, reader in databases)
    return tuple(p for p in places if p is not None)


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
