"""Check of the offline geolocation databases."""

from collections.abc import Sequence

from vpn_sentinel.agent.doctor.check import Check, gap, ok
from vpn_sentinel.agent.doctor.context import DoctorContext
from vpn_sentinel.agent.geo.databases import Databases, days_old, how_old
from vpn_sentinel.domain.counted import counted


async def geo(context: DoctorContext) -> list[Check]:
    probes = context.settings.agent.probes
    try:
        databases = Databases(context.clock, files=probes.databases, folder=probes.geo_folder)
    except ValueError as e:
        return [gap("places", str(e), "the agent does not start.", "see VPN_SENTINEL_GEO_DB")]
    try:
        opened = [(o.name, o.built) for o in databases.opened]
        return about_places(opened, databases.failures, context.clock.wall())
    finally:
        databases.close()


def about_places(opened: Sequence[tuple[str, int]], failures: Sequence[str], now: float) -> list[Check]:
    fix = "vpn-sentinel geo update, and see that this user may read it"
    broken = [gap("places", why, "this database is not used.", fix) for why in failures]
    if not opened and not broken:
        means = "where an exit is comes from web services alone, which often refuse VPN exits."
        return [gap("places", "no offline database", means, "vpn-sentinel geo update")]
    return [*broken, *(_one(name, built, now) for name, built in opened)]


def _one(name: str, built: int, now: float) -> Check:
    days = f"{name}, {counted(round(days_old(built, now)), 'day')} old"
    if (words := how_old(built, now)) is None:
        return ok("places", days)
    return gap(
        "places", f"{days}: {words}", "addresses move; places may be wrong.", "vpn-sentinel geo update, every month"
    )
