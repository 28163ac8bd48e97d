"""Is a file a usable database of places or networks? Checked before it replaces another one."""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from itertools import islice
from pathlib import Path
from typing import Final

from vpn_sentinel.agent.geo.databases import day
from vpn_sentinel.agent.geo.store import GeoError
from vpn_sentinel.agent.probes.mmdb import DAMAGED, Reader, get, open_file, read
from vpn_sentinel.domain.policy import IPAddress

_MAX_RECORDS_READ: Final = 500  # records read from the start of the file
_MIN_BUILD_EPOCH: Final = 1_262_304_000  # 2010: the format did not exist before
_MAX_CLOCK_SKEW_S: Final = 2 * 86400.0  # of the build time ahead of our clock
# Spread over the whole tree, so that a damaged part is likely to be read.
_SAMPLE_IPV4: Final = [IPv4Address((n << 24) + (n * 37 % 256 << 16) + (n * 101 % 256 << 8) + 9) for n in range(1, 224)]
_SAMPLE_IPV6: Final = [IPv6Address((0x2001 + n * 16 << 112) + (n * 977 % 65536 << 96) + 1) for n in range(256)]


@dataclass(frozen=True, slots=True)
class DatabaseFacts:
    """`holds`: "places", "networks", or both. `built` is seconds since 1970."""

    type: str
    built: int
    holds: tuple[str, ...]


def examine(path: Path, now: float, wanted: str) -> DatabaseFacts:
    """Open a file and look up some addresses. `now` is the wall clock; `wanted` is what it must hold, "" for anything.

    Raises GeoError, without the file's name.
    """
    try:
        reader = open_file(path)
    except ValueError as e:
        raise GeoError("is not a MaxMind database file") from e
    try:
        metadata = reader.metadata()
        built = metadata.build_epoch
        if not _MIN_BUILD_EPOCH <= built <= now + _MAX_CLOCK_SKEW_S:
            raise GeoError(f"was built at an impossible time ({built}), or this machine's clock is wrong")
        holds = _holds(reader)
        if not holds or (wanted and wanted not in holds):
            missing = wanted or "places or networks"
            raise GeoError(f"has no {missing} ({metadata.database_type[:60]!r})")
        return DatabaseFacts(metadata.database_type[:120], built, holds)
    except DAMAGED as e:
        raise GeoError("is damaged") from e
    finally:
        reader.close()


def _holds(reader: Reader) -> tuple[str, ...]:
    found: set[str] = set()
    sample: list[IPAddress] = [*_SAMPLE_IPV4, *_SAMPLE_IPV6]
    records = [record for _, record in islice(reader, _MAX_RECORDS_READ)]
    for record in (*records, *(get(reader, address) for address in sample)):
        place = read("", sample[0], record)
        if place is not None:
            found |= {"places"} if place.country else set()
            found |= {"networks"} if place.asn else set()
    return tuple(sorted(found))


def not_older(new: DatabaseFacts, built: int | None) -> None:
    """Raises GeoError when the installed file, built at `built`, is newer than `new`."""
    if built is not None and new.built < built:
        raise GeoError(f"is of {day(new.built)}, older than the installed one of {day(built)}")
