"""Parsers for answers of geolocation services, which are not trusted: texts become printable and short, the rest is
checked."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vpn_sentinel.agent.net.urls import address_in
from vpn_sentinel.agent.probes.trace import TRACE_PATH, parse_trace
from vpn_sentinel.domain.observation import Place
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.wire import limits

_ASN_PATTERN: Final = re.compile(r"AS(\d{1,10})\b\s*(.*)", re.ASCII | re.IGNORECASE | re.DOTALL)


class BadAnswerError(ValueError):
    """An answer without an address: an error page, a captive portal, a service that changed."""


@dataclass(frozen=True, slots=True)
class Service:
    """One service. `name` is its name in settings. Added to the base URL, `path` asks about the own address, and
    `about` about another one; "" when the service cannot do that.
    """

    name: str
    base: str
    path: str
    read: Callable[[bytes], Place]
    about: str = ""


def read_ipinfo(body: bytes) -> Place:
    answer = _json(body)
    org = clean(answer.get("org"))
    return Place(
        ip=_address(answer.get("ip")),
        source="ipinfo.io",
        country=country_code(answer.get("country")),
        region=clean(answer.get("region")),
        city=clean(answer.get("city")),
        timezone=clean(answer.get("timezone")),
        asn=asn_of(org) if org and _ASN_PATTERN.match(org) else None,  # a company may be called by a number
        org=without_asn(org),
    )


def read_ipapi(body: bytes) -> Place:
    answer = _json(body)
    if answer.get("status") != "success":
        raise BadAnswerError("the service reports a failure")
    return Place(
        ip=_address(answer.get("query")),
        source="ip-api.com",
        country=country_code(answer.get("countryCode")),
        region=clean(answer.get("regionName")),
        city=clean(answer.get("city")),
        timezone=clean(answer.get("timezone")),
        asn=asn_of(answer.get("as")),
        org=clean(answer.get("org")) or clean(answer.get("isp")),
    )


def read_ipwhois(body: bytes) -> Place:
    answer = _json(body)
    if answer.get("success") is not True:
        raise BadAnswerError("the service reports a failure")
    connection, timezone = _map(answer.get("connection")), answer.get("timezone")
    return Place(
        ip=_address(answer.get("ip")),
        source="ipwho.is",
        country=country_code(answer.get("country_code")),
        region=clean(answer.get("region")),
        city=clean(answer.get("city")),
        timezone=clean(_map(timezone).get("id")),
        asn=asn_of(connection.get("asn")),
        org=clean(connection.get("org")) or clean(connection.get("isp")),
    )


def read_trace(body: bytes) -> Place:
    answer = parse_trace(body)
    return Place(ip=_address(answer.get("ip")), source="cloudflare", country=country_code(answer.get("loc")))


def services(ipinfo: str, ipapi: str, ipwhois: str, trace: str) -> tuple[Service, ...]:
    """All sources under their base URLs, in the order in which they are tried."""
    return (
        Service("ipinfo.io", ipinfo, "/json", read_ipinfo, "/{}/json"),
        Service("ipwho.is", ipwhois, "/", read_ipwhois, "/{}"),
        Service("ip-api.com", ipapi, "/json", read_ipapi, "/json/{}"),
        Service("cloudflare", trace, TRACE_PATH, read_trace),
    )


def clean(value: object) -> str | None:
    """A text that is safe to store and show, None for anything else."""
    if not isinstance(value, str):
        return None
    text = "".join(c for c in value if c.isprintable()).strip()[: limits.MAX_TEXT_LENGTH]
    return text or None


def country_code(value: object) -> str | None:
    """ISO 3166-1 alpha-2. XX (Cloudflare, unknown), T1 (Cloudflare, Tor) and ZZ (DB-IP) are no countries."""
    text = value.strip().upper() if isinstance(value, str) else ""
    return text if len(text) == 2 and text.isascii() and text.isalpha() and text not in ("XX", "ZZ") else None


def asn_of(value: object) -> int | None:
    """The number from 64500, "64500", "AS64500" or "AS64500 Example Ltd"."""
    match value:
        case bool():
            return None
        case int():
            number = value
        case str():
            found = _ASN_PATTERN.match(value.strip())
            digits = found[1] if found else value.strip()
            number = int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= 10 else 0
        case _:
            return None
    return number if 0 < number < 2**32 else None


def without_asn(org: str | None) -> str | None:
    found = _ASN_PATTERN.match(org) if org else None
    return (found[2].strip() or None) if found else org


def _json(body: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as e:
        raise BadAnswerError("the answer is not JSON") from e
    if not isinstance(answer, dict):
        raise BadAnswerError("the answer is not a JSON object")
    return answer


def _map(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _address(value: object) -> IPAddress:
    address = address_in(value) if isinstance(value, str) else None
    if address is None:
        raise BadAnswerError("the answer names no address")
    return address
