"""What pages and messages show in addition to a verdict: places, resolvers, and what only the receiver knows."""

from dataclasses import replace
from typing import Final

from vpn_sentinel.domain.judge import agreed_country
from vpn_sentinel.domain.notice import Notice
from vpn_sentinel.domain.observation import Observation, Place, Trigger
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.domain.verdict import Code, Finding, State, Verdict, worst
from vpn_sentinel.server.store.store import TunnelRow
from vpn_sentinel.wire.codec import decoder, encode
from vpn_sentinel.wire.rest import place_of

# A clock that is off by more than this is a finding.
MAX_UNREPORTED_SKEW_S: Final = 60.0

_place_of: Final = decoder(dict[str, str | int | None])
_resolvers_of: Final = decoder(list[dict[str, str | None]])


def transport_findings(skew: float | None, thinned: int, *, shared: bool = False) -> tuple[Finding, ...]:
    """Findings that only the receiver can make: a wrong clock (`skew` seconds), lost rounds, a name used by several."""
    extra: list[Finding] = []
    if shared:
        message = "Several agents report as this tunnel: what is shown of it alternates between them."
        extra.append(Finding(Code.NAME_SHARED, message))
    if skew is not None and abs(skew) > MAX_UNREPORTED_SKEW_S:
        seconds, side = f"{abs(skew):.0f}", "ahead" if skew > 0 else "behind"
        message = f"The agent's clock is {seconds} s {'ahead of' if skew > 0 else side} the server's."
        extra.append(Finding(Code.CLOCK_SKEW, message, {"seconds": seconds, "clock": side}))
    if thinned:
        some = "One observation" if thinned == 1 else f"About {thinned} observations"
        message = f"{some} never came: the agent had no room to keep all, or its disk lost some."
        extra.append(Finding(Code.OBSERVATIONS_LOST, message, {"count": str(thinned)}))
    return tuple(extra)


def add_transport_findings(verdict: Verdict, extra: tuple[Finding, ...]) -> Verdict:
    """The verdict with the receiver's findings; its state is the worst of all."""
    if not extra:
        return verdict
    findings = (*verdict.findings, *extra)
    return Verdict(verdict.state if verdict.state is State.UNKNOWN else worst(findings), findings)


def update_snapshot(row: TunnelRow, seen: Observation) -> None:
    """Copy into the row what the pages show; unknown values stay as they were, but a place goes with its address."""
    exit4, exit6 = seen.exit(4), seen.exit(6)
    if seen.trigger is Trigger.KEEPALIVE and exit4 is None and exit6 is None and seen.reported_from is not None:
        exit4, exit6 = (seen.reported_from, None) if seen.reported_from.version == 4 else (None, seen.reported_from)
    if exit4 is not None or exit6 is not None:
        row.exit4 = str(exit4) if exit4 else None
        row.exit6 = str(exit6) if exit6 else None
        if (place := best_place(seen, exit4 or exit6)) is not None:
            row.place = encode(place).decode()
        elif place_of(row.place).ip != str(exit4 or exit6):
            row.place = "{}"  # it was of another address, such as the tunnel's exit, while this one is home
    if seen.forwarded_port is not None:
        row.port = seen.forwarded_port
    egresses = dict.fromkeys(r.egress for r in seen.resolvers if r.egress)
    if egresses:
        row.resolvers = encode([_resolver(seen, e) for e in egresses]).decode()


def best_place(seen: Observation, ip: IPAddress | None) -> Place | None:
    """The most complete place of `ip` among those in the country that most sources name; None without any."""
    places = seen.places_of(ip)
    if len(places) < 2:
        return places[0] if places else None
    country = agreed_country(places)
    agreeing = [p for p in places if country is None or p.country == country]
    return max(
        agreeing, key=lambda p: sum(v is not None for v in (p.city, p.region, p.timezone, p.asn, p.org)), default=None
    )


def _resolver(seen: Observation, ip: IPAddress) -> dict[str, object]:
    place = best_place(seen, ip)
    return {"ip": ip, "country": place.country if place else None, "org": place.org if place else None}


def with_context(notice: Notice, row: TunnelRow) -> Notice:
    """Add what a reader wants to know besides the event: where the exit is, and which resolvers are used."""
    place = _place_of(row.place)
    if place.get("ip") != str(notice.exit):
        place = {}  # it is of another address, such as the one that leaks
    where = [str(place[k]) for k in ("city", "region", "country") if place.get(k)]
    provider = " ".join(str(v) for v in (place.get("org"), f"AS{place['asn']}" if place.get("asn") else None) if v)
    listed = _resolvers_of(row.resolvers)
    resolvers = tuple(" ".join(str(r[k]) for k in ("ip", "country", "org") if r.get(k)) for r in listed)
    return replace(
        notice,
        tunnel=row.name,
        place=", ".join(dict.fromkeys(where)),
        provider=provider,
        timezone=str(place.get("timezone") or ""),
        resolvers=resolvers,
        role=row.role,
        site=row.site,
    )
