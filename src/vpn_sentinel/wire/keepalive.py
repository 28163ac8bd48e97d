"""The replaced system's report: `POST /api/v1/keepalive`, in its nested and its flat form, and its answer."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TypeVar

import msgspec

from vpn_sentinel.domain.observation import Answer, Canary, Observation, Path, Place, Probe, Trigger
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.domain.tunnel import tunnel_name
from vpn_sentinel.wire import limits
from vpn_sentinel.wire.codec import address, checked_text

A = TypeVar("A")
B = TypeVar("B")

# What its clients write where they know nothing; none of it is a value.
_NOTHING = frozenset({"", "unknown", "none", "null", "n/a"})


class Location(msgspec.Struct, frozen=True):
    country: str | None = None
    city: str | None = None
    region: str | None = None
    org: str | None = None
    timezone: str | None = None


class DnsTest(msgspec.Struct, frozen=True):
    location: str | None = None
    colo: str | None = None


class Keepalive(msgspec.Struct, frozen=True, kw_only=True):
    client_id: str
    timestamp: str | float | None = None
    public_ip: str | None = None
    ip: str | None = None
    status: str | None = None
    client_version: str | None = None
    location: Location | None = None
    dns_test: DnsTest | None = None
    country: str | None = None
    city: str | None = None
    region: str | None = None
    provider: str | None = None
    timezone: str | None = None
    dns_loc: str | None = None
    dns_colo: str | None = None


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """The answer; `server_time` is ISO 8601 in UTC."""

    status: str = "ok"
    message: str = "Keepalive received"
    server_time: str


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """A keepalive after every check: what it says, in the domain's words. `skew` is the client's clock minus ours."""

    client_id: str
    observation: Observation
    version: str
    dns_loc: str
    dns_colo: str
    skew: float | None


_decode = msgspec.json.Decoder(Keepalive).decode


def read(body: bytes, now: float, came_from: IPAddress | None = None) -> Reading:
    """Parse and check a keepalive received at `now`; `came_from` is its sender's address where that is global.

    Raises `msgspec.DecodeError` for what is not JSON (a 400) and `msgspec.ValidationError` or ValueError for JSON that
    says something impossible (a 422). Each names the field.
    """
    try:
        # Decoded first: the parser skips what it does not know, and would skip bytes there that are no text.
        said = _decode(body.decode())
    except (RecursionError, UnicodeDecodeError) as e:
        raise msgspec.DecodeError(str(e)) from e
    name = _field("client_id", tunnel_name, said.client_id)
    location = said.location or Location()
    values = {
        "country": location.country or said.country,
        "city": location.city or said.city,
        "region": location.region or said.region,
        "org": location.org or said.provider,
        "timezone": location.timezone or said.timezone,
        "client_version": said.client_version,
        "status": said.status,
        "dns_loc": (said.dns_test.location if said.dns_test else None) or said.dns_loc,
        "dns_colo": (said.dns_test.colo if said.dns_test else None) or said.dns_colo,
    }
    texts = {key: _known(checked_text(key, value)) if value else None for key, value in values.items()}
    key, ip_text = ("public_ip", _known(said.public_ip)) if _known(said.public_ip) else ("ip", _known(said.ip))
    ip = _field(key, address, ip_text) if ip_text else None
    skew = None if said.timestamp is None else _field("timestamp", _seconds, said.timestamp) - now
    if skew is not None and abs(skew) > limits.CLOCK_SKEW_REFUSED:
        msg = f"timestamp: is {abs(skew) / 86400:.0f} days from this server's clock"
        raise ValueError(msg)
    return Reading(
        client_id=name,
        observation=_observation(ip, texts, came_from),
        version=texts["client_version"] or "",
        dns_loc=texts["dns_loc"] or "",
        dns_colo=texts["dns_colo"] or "",
        skew=skew,
    )


def _observation(ip: IPAddress | None, texts: dict[str, str | None], came_from: IPAddress | None) -> Observation:
    if ip is None:
        return Observation(trigger=Trigger.KEEPALIVE, reported_from=came_from)
    country = texts["country"]
    place = Place(
        ip=ip,
        source="client",
        country=country.upper() if country and len(country) == 2 and country.isascii() and country.isalpha() else None,
        region=texts["region"],
        city=texts["city"],
        timezone=texts["timezone"],
        org=texts["org"],
    )
    seen = Canary(
        probe=Probe.DEFAULT, target="client", family=ip.version, answer=Answer.ANSWERED, path=Path.UNKNOWN, address=ip
    )
    return Observation(trigger=Trigger.KEEPALIVE, canaries=(seen,), places=(place,), reported_from=came_from)


def _known(value: str | None) -> str | None:
    return None if value is None or value.strip().lower() in _NOTHING else value.strip()


def _field(name: str, parse: Callable[[A], B], value: A) -> B:
    try:
        return parse(value)
    except (ValueError, OverflowError) as e:
        msg = f"{name}: {e}"
        raise ValueError(msg) from None


def _seconds(value: str | float) -> float:
    """Epoch seconds, or ISO 8601; without an offset it is taken as UTC, as the replaced server did."""
    if isinstance(value, int | float):
        return float(value)  # finite: the decoder refuses what is out of range
    if len(value) > 64:
        msg = "is not an ISO 8601 time"
        raise ValueError(msg)
    try:
        when = datetime.fromisoformat(value)
    except ValueError:
        msg = "is not an ISO 8601 time"
        raise ValueError(msg) from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
