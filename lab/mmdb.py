"""An offline database (MMDB) of the lab's address plan, in the field layout of GeoLite2 and DB-IP Lite."""

from __future__ import annotations

from pathlib import Path

from mmdb_writer import MMDBWriter
from netaddr import IPSet

from lab.plan import networks


def write_mmdb(path: Path) -> None:
    """Country, city and network operator of each of the plan's networks, in one file."""
    writer = MMDBWriter(ip_version=6, ipv4_compatible=True, database_type="DBIP-City-Lite", description="The lab")
    # The most specific first in networks(), but here the last one written wins.
    for network, _, place in reversed(networks()):
        writer.insert_network(
            IPSet([str(network)]),
            {
                "continent": {"code": "NA" if place.country in {"US", "CA"} else "EU"},
                "country": {"iso_code": place.country, "names": {"en": place.country_name}},
                "city": {"names": {"en": place.city}},
                "subdivisions": [{"iso_code": place.region_code, "names": {"en": place.region}}],
                "location": {
                    "latitude": place.latitude,
                    "longitude": place.longitude,
                    "time_zone": place.timezone,
                },
                "autonomous_system_number": place.asn,
                "autonomous_system_organization": place.org,
            },
        )
    writer.to_db_file(str(path))
