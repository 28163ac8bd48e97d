"""The replaced system's report: `POST /api/v1/keepalive`, in its nested and its flat form, and the response."""

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import msgspec

from vpn_sentinel.domain.observation import Answer, Canary, Observation, Path, Place, Probe, Trigger
from vpn_sentinel.domain.policy import IPAddress, is_public
from vpn_sentinel.domain.tunnel import tunnel_name
from vpn_sentinel.wire import limits
from vpn_sentinel.wire.codec import checked_text, written_address

A = TypeVar("A")
B = TypeVar("B")

# What its clients write for an unknown value.
_EMPTY_VALUES = frozenset({"", "unknown", "none", "null", "n/a"})


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
    """The body as clients should send it, for the schema; `read` accepts more."""

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
    """The response; `server_time` is ISO 8601 in UTC."""

    status: str = "ok"
    message: str = "Keepalive received"
    server_time: str


class ParsedKeepalive(msgspec.Struct, frozen=True, kw_only=True):
    """A keepalive after all checks, as domain values. `skew` is the client's clock minus the server's, in seconds.

    `odd` are the names of fields that were not understood, with the beginning of their values; they count as missing.
    """

    client_id: str
    observation: Observation
    version: str
    dns_loc: str
    dns_colo: str
    skew: float | None
    odd: tuple[tuple[str, str], ...] = ()


class _Named(msgspec.Struct, frozen=True):
    """The one field that a report needs."""

    client_id: str | int


_MAX_EXCERPT_CHARS: Final = 60
_MAX_DIGITS: Final = 40  # the time to parse grows with the square of the number of digits
_decode_name = msgspec.json.Decoder(_Named).decode
_decode_all = msgspec.json.Decoder(dict[str, Any]).decode


def read(body: bytes, now: float, came_from: IPAddress | None = None) -> ParsedKeepalive:
    """Parse and check a keepalive received at `now`; `came_from` is its sender's address if that is global.

    Only the name is needed. A field that is not understood is listed in `odd` and counts as missing: the replaced
    server accepted such reports, and their source address is known without it. Raises `msgspec.DecodeError` for what is
    not JSON (a 400) and `msgspec.ValidationError` or ValueError for a report without a valid name (a 422).
    """
    named, fields = _parsed(body)
    name = _field("client_id", tunnel_name, str(named.client_id))
    values = _Fields(fields)
    location, dns_test = values.inner("location"), values.inner("dns_test")
    texts = {
        "country": location.text("country") or values.text("country"),
        "city": location.text("city") or values.text("city"),
        "region": location.text("region") or values.text("region"),
        "org": location.text("org") or values.text("provider"),
        "timezone": location.text("timezone") or values.text("timezone"),
        "client_version": values.text("client_version"),
        "status": values.text("status"),
        "dns_loc": dns_test.text("location") or values.text("dns_loc"),
        "dns_colo": dns_test.text("colo") or values.text("dns_colo"),
    }
    ip = values.parsed("public_ip", _address) or values.parsed("ip", _address)
    when = values.parsed("timestamp", lambda value: _near(_seconds(value), now))
    return ParsedKeepalive(
        client_id=name,
        observation=_observation(ip, texts, came_from),
        version=texts["client_version"] or "",
        dns_loc=texts["dns_loc"] or "",
        dns_colo=texts["dns_colo"] or "",
        skew=None if when is None else when - now,
        odd=tuple(values.odd),
    )


def _parsed(body: bytes) -> tuple[_Named, dict[str, Any]]:
    """Raises `msgspec.DecodeError`, or its ValidationError where the name is missing."""
    try:
        # Decoded first: the parser skips unknown fields, and would skip bytes in them that are not UTF-8.
        text = body.decode()
        return _decode_name(text), _decode_all(text)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as e:
        error = e if isinstance(e, msgspec.DecodeError) else msgspec.DecodeError(str(e))
    try:
        found = _as_python_writes(body)
    except (ValueError, RecursionError):
        raise error from None
    if not isinstance(found, dict):
        raise error
    return msgspec.convert({k: v for k, v in found.items() if k == "client_id"}, _Named), found


def _as_python_writes(body: bytes) -> Any:
    """JSON as the replaced server accepted it, and its clients wrote it: NaN, lone surrogates, UTF-16, a BOM.

    In addition, bytes that are not text become characters that no field accepts. Raises ValueError and RecursionError.
    """
    encoding = json.detect_encoding(body)
    text = body.decode(encoding, "surrogateescape" if encoding.startswith("utf-8") else "surrogatepass")
    return json.loads(text, strict=False, parse_int=lambda n: int(n) if len(n) <= _MAX_DIGITS else float(n))


class _Fields:
    """An object of a keepalive, read field by field; fields that cannot be used go to `odd`."""

    def __init__(self, values: dict[str, Any], odd: list[tuple[str, str]] | None = None, prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix
        self.odd: list[tuple[str, str]] = [] if odd is None else odd

    def inner(self, name: str) -> "_Fields":
        found = self._values.get(name)
        if found is not None and not isinstance(found, dict) and not (isinstance(found, str) and _known(found) is None):
            self._note(name, found)
        return _Fields(found if isinstance(found, dict) else {}, self.odd, f"{name}.")

    def text(self, name: str) -> str | None:
        """The checked text of a field; a number counts as its digits."""
        return self.parsed(name, lambda value: checked_text(name, _as_text(value)))

    def parsed(self, name: str, parse: Callable[[Any], A]) -> A | None:
        value = self._values.get(name)
        if isinstance(value, str) and _known(value) is None:
            return None
        try:
            return None if value is None else parse(value.strip() if isinstance(value, str) else value)
        except (ValueError, TypeError, OverflowError):
            self._note(name, value)
            return None

    def _note(self, name: str, value: object) -> None:
        shown = str(value)[:_MAX_EXCERPT_CHARS] if isinstance(value, str | int | float) else type(value).__name__
        self.odd.append((self._prefix + name, shown.encode("unicode_escape").decode()))


def _as_text(value: object) -> str:
    """Raises TypeError for a value that is neither a string nor a number."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and math.isfinite(value):
        return str(value)[: limits.MAX_TEXT_LENGTH + 1]
    raise TypeError


def _address(value: object) -> IPAddress:
    """Raises TypeError and ValueError, also for a private address, which tells nothing about an exit."""
    if not isinstance(value, str):
        raise TypeError
    found = written_address(value)
    if not is_public(found):
        msg = "cannot be on the internet"
        raise ValueError(msg)
    return found


def _near(at: float, now: float) -> float:
    """Raises ValueError for a time that is too far off to be a clock's."""
    if not abs(at - now) <= limits.MAX_CLOCK_SKEW_S:
        msg = "is no time of these days"
        raise ValueError(msg)
    return at


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
    return None if value is None or value.strip().lower() in _EMPTY_VALUES else value.strip()


def _field(name: str, parse: Callable[[A], B], value: A) -> B:
    try:
        return parse(value)
    except (ValueError, OverflowError) as e:
        msg = f"{name}: {e}"
        raise ValueError(msg) from None


def _seconds(value: str | float) -> float:
    """Epoch seconds, or ISO 8601; without an offset it counts as UTC, as in the replaced server."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError
    if isinstance(value, int | float):
        return float(value)
    if len(value) > 64:
        msg = "is not an ISO 8601 time"
        raise ValueError(msg)
    try:
        when = datetime.fromisoformat(value)
    except ValueError:
        msg = "is not an ISO 8601 time"
        raise ValueError(msg) from None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
