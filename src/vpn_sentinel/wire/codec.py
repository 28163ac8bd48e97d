"""Domain values to JSON and back, with checks of what comes from outside.

msgspec encodes and decodes the domain's dataclasses; this module adds addresses, which JSON lacks, and limits. A
decoder raises `msgspec.ValidationError` or `msgspec.DecodeError`; both name the wrong field.
"""

from collections.abc import Callable
from dataclasses import fields
from functools import cache, lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Final, TypeVar

import msgspec

from vpn_sentinel.domain import observation as o
from vpn_sentinel.domain.observation import Observation, Place
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, Policy
from vpn_sentinel.runtime.addresses import parse_address, parse_network
from vpn_sentinel.wire import limits

T = TypeVar("T")
# `0000:0000:0000:0000:0000:ffff:255.255.255.255/128`; the reason of a refusal repeats the text.
_MAX_ADDRESS_LENGTH: Final = 49


_ADDRESS_TYPES: Final = (IPv4Address, IPv6Address, IPv4Network, IPv6Network)


def _encode(value: object) -> object:
    """msgspec's hook for types it does not know; NotImplementedError means that this hook does not know it either."""
    if isinstance(value, _ADDRESS_TYPES):
        return str(value)
    msg = f"{type(value).__name__} has no JSON form"
    raise NotImplementedError(msg)


def _decode(kind: Any, value: Any) -> Any:
    """The reverse hook; msgspec makes a ValidationError with the field's path of a ValueError or TypeError."""
    if not isinstance(value, str):
        msg = f"Expected `str`, got `{type(value).__name__}`"
        raise TypeError(msg)
    if kind in (IPAddress, IPv4Address, IPv6Address):
        return address(value)
    if kind in (IPNetwork, IPv4Network, IPv6Network):
        return _network(value)
    msg = f"{kind} has no JSON form"
    raise NotImplementedError(msg)


@cache
def decoder(kind: type[T]) -> Callable[[bytes | str], T]:
    """A decoder of JSON into `kind`, addresses included."""
    return msgspec.json.Decoder(kind, dec_hook=_decode).decode


ENCODER: Final = msgspec.json.Encoder(enc_hook=_encode)
encode: Final = ENCODER.encode


_OBSERVATION: Final = tuple((f.name, f.default) for f in fields(Observation))


def encode_observation(seen: Observation) -> bytes:
    """The JSON that the database keeps: fields with their default value, as most have, are left out."""
    return encode({name: value for name, default in _OBSERVATION if (value := getattr(seen, name)) != default})


@lru_cache(maxsize=16384)
def address(text: str) -> IPAddress:
    """Parse an address, see `parse_address`. Raises ValueError."""
    return parse_address(_bare(text))


def written_address(text: str) -> IPAddress:
    """Parse an address as proxies write it: with a port (Azure, IIS), brackets, quotes (RFC 7239, section 6), a zone.

    Raises ValueError.
    """
    bare = text.strip().strip('"').strip()
    if bare.startswith("["):
        bare, closed, port = bare[1:].partition("]")
        if not closed or (port and not _is_port(port)):
            msg = "brackets that do not close"
            raise ValueError(msg)
    elif bare.count(":") == 1 and _is_port(":" + bare.partition(":")[2]):
        bare = bare.partition(":")[0]
    return address(bare.partition("%")[0])


def _is_port(text: str) -> bool:
    return len(text) <= 6 and text[0] == ":" and text[1:].isascii() and text[1:].isdigit()


def _network(text: str) -> IPNetwork:
    return parse_network(_bare(text), strict=True)


def _bare(text: str) -> str:
    if len(text) > _MAX_ADDRESS_LENGTH:
        msg = f"an address takes at most {_MAX_ADDRESS_LENGTH} characters, this one has {len(text)}"
        raise ValueError(msg)
    return text


def checked_text(name: str, value: str | None, max_length: int = limits.MAX_TEXT_LENGTH) -> str | None:
    """Return `value` when it is short enough and printable. Raises ValueError that names the field."""
    if value is None:
        return None
    if len(value) > max_length:
        msg = f"{name} takes at most {max_length} characters, this one has {len(value)}"
        raise ValueError(msg)
    if not value.isprintable():
        msg = f"{name} holds a control character"
        raise ValueError(msg)
    return value


# What no genuine agent exceeds: characters of a text, or a number (exclusive).
_MAX_NUMBER: Final = 1e12
_MAX_PORT: Final = 2.0**16
_LIMITS: Final[dict[type, dict[str, float]]] = {
    o.Link: {"rx_bytes": 2.0**64, "tx_bytes": 2.0**64},
    o.Canary: {"target": 64, "interface": 64},
    o.Routed: {"interface": 64, "share": 1.000001, "more": _MAX_NUMBER, "only": 64},
    o.ResolverSighting: {"method": 64},
    o.SystemLookup: {"error": limits.MAX_TEXT_LENGTH},
    o.Escape: {
        "interface": 64, "protocol": 16, "name": 255, "source_port": _MAX_PORT, "destination_port": _MAX_PORT,
        "packets": 2.0**63, "size": 2.0**63, "first_age": _MAX_NUMBER, "last_age": _MAX_NUMBER, "user": 2.0**32,
    },
    o.Claim: {
        "source": 64, "status": limits.MAX_TEXT_LENGTH, "endpoint": limits.MAX_TEXT_LENGTH,
        "handshake_age": _MAX_NUMBER,
    },
    o.Quality: {
        "seconds": _MAX_NUMBER, "sent": _MAX_NUMBER, "lost": _MAX_NUMBER, "reordered": _MAX_NUMBER,
        "rtt_ms": _MAX_NUMBER, "jitter_ms": _MAX_NUMBER, "mtu": _MAX_NUMBER, "vanished": _MAX_NUMBER,
        "vanished_for": _MAX_NUMBER, "lossy_for": _MAX_NUMBER, "rx_rate": _MAX_NUMBER, "tx_rate": _MAX_NUMBER,
    },
    o.Action: {"name": 64, "detail": limits.MAX_TEXT_LENGTH, "age": _MAX_NUMBER},
    o.Observation: {
        "broken": limits.MAX_TEXT_LENGTH, "watch_refused": limits.MAX_TEXT_LENGTH, "refused_user": 2.0**32,
        "silent_for": _MAX_NUMBER, "forwarded_port": _MAX_PORT, "took_ms": 1e9,
    },
}  # fmt: skip
_LISTS: Final = ("canaries", "resolvers", "places", "escapes", "claims", "flaky", "actions")


def check_observation(seen: Observation) -> None:
    """Raise ValueError when an observation exceeds what any genuine agent makes."""
    for name in _LISTS:
        if len(getattr(seen, name)) > limits.MAX_PER_OBSERVATION:
            msg = f"{name} holds {len(getattr(seen, name))} entries, at most {limits.MAX_PER_OBSERVATION} are taken"
            raise ValueError(msg)
    if seen.interfaces is not None and len(seen.interfaces) > 4 * limits.MAX_PER_OBSERVATION:
        msg = "interfaces holds too many entries"
        raise ValueError(msg)
    for interface in (*(seen.interfaces or ()), *((seen.link.name,) if seen.link else ())):
        checked_text("interface", interface, 64)
    for uplink in seen.uplinks or ():
        checked_text("uplinks", uplink, 64)
    _check_routed(seen)
    for target in seen.flaky:
        checked_text("flaky", target, 64)
    _check_system_lookup(seen.system_lookup)
    for item in (seen, seen.link, seen.quality, *seen.canaries, *seen.resolvers, *seen.escapes, *seen.claims):
        _check_limits(item)
    for action in seen.actions:
        _check_limits(action)
    for place in seen.places:
        check_place(place)


def _check_routed(seen: Observation) -> None:
    for name in ("uplinks", "routed"):
        if len(getattr(seen, name) or ()) > limits.MAX_PER_OBSERVATION * 4:
            msg = f"{name} holds too many entries"
            raise ValueError(msg)
    for part in seen.routed or ():
        _check_limits(part)
        if len(part.networks) > limits.MAX_PER_OBSERVATION or part.family not in (4, 6):
            msg = "routed names networks of IPv4 or IPv6, at most 64 for a device"
            raise ValueError(msg)
        if part.ports is not None and not 0 < part.ports[0] <= part.ports[1] < _MAX_PORT:
            msg = "ports of routed are the lowest and the highest, from 1 to 65535"
            raise ValueError(msg)


def _check_system_lookup(found: o.SystemLookup | None) -> None:
    _check_limits(found)
    if found is not None and max(len(found.upstreams), len(found.egress)) > limits.MAX_PER_OBSERVATION:
        msg = "egress or upstreams hold too many entries"
        raise ValueError(msg)


def _check_limits(item: object) -> None:
    for name, limit in _LIMITS.get(type(item), {}).items():
        value = getattr(item, name)
        if isinstance(value, str):
            checked_text(name, value, int(limit))
        elif value is not None and not 0 <= value < limit:
            msg = f"{name} takes 0 to less than {limit:g}"
            raise ValueError(msg)


def check_place(place: Place) -> None:
    """Raise ValueError when a field of a place is too long, not printable or out of range."""
    for name in ("source", "region", "city", "timezone", "org"):
        checked_text(name, getattr(place, name))
    if place.asn is not None and not 0 <= place.asn < 2**32:
        msg = "asn takes 0 to 2^32 - 1"
        raise ValueError(msg)
    if place.country is not None and not (
        len(place.country) == 2 and place.country.isascii() and place.country.isalpha()
    ):
        msg = "country takes a code of two letters"
        raise ValueError(msg)


def check_policy(policy: Policy) -> None:
    """Raise ValueError when a declared policy exceeds what a person would write."""
    for name, items in (
        ("home_networks", policy.home_networks),
        ("expected_countries", policy.expected_countries),
        ("allowed_resolvers", policy.allowed_resolvers),
        ("allowed_outside", policy.allowed_outside),
    ):
        if len(items) > limits.MAX_PER_OBSERVATION:
            msg = f"{name} holds {len(items)} entries, at most {limits.MAX_PER_OBSERVATION} are taken"
            raise ValueError(msg)
    for country in policy.expected_countries:
        checked_text("expected_countries", country, 2)
    for grace in (policy.grace_down, policy.grace_degraded, policy.grace_recovery, policy.grace_unverified):
        if not 0 <= grace <= 86400:
            msg = "a grace takes 0 to 86400 seconds"
            raise ValueError(msg)
    if not 0 <= policy.max_loss <= 1 or not 0 < policy.max_rtt_ms <= 1e6:
        msg = "max_loss takes 0 to 1, max_rtt_ms up to 1000000"
        raise ValueError(msg)
