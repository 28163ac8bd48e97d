"""The real address of a request, and which addresses count as one client, or one network.

Every limit by source address uses these functions. One customer has a /64 of IPv6, which therefore counts as much as
one IPv4 address.
"""

import logging
import socket
from collections.abc import Iterable, Mapping
from ipaddress import ip_network
from typing import Any, Final

from vpn_sentinel.domain.policy import IPAddress, IPNetwork, is_public
from vpn_sentinel.runtime.addresses import behind_nat64
from vpn_sentinel.wire.codec import address, written_address

log = logging.getLogger(__name__)

# Proxies for which a warning about their X-Forwarded-For was logged.
_LOGGED_PROXIES: Final[set[tuple[str, IPAddress]]] = set()
_MAX_LOGGED_PROXIES: Final = 100


def client_of(ip: IPAddress) -> str:
    """One client, as the log shows it: an IPv4 address, or a /64."""
    return str(ip) if ip.version == 4 else str(ip_network((ip, 64), strict=False))


def client_prefix(host: str) -> bytes:
    """The same, packed, only to compare; `host` is a socket's address, with a zone or IPv4-mapped perhaps."""
    packed = _packed(host)
    return packed if len(packed) == 4 else packed[:8]


def network_prefix(host: str) -> bytes:
    """The network around a client: a /24, or the /48 that a site has."""
    packed = _packed(host)
    return packed[:3] if len(packed) == 4 else packed[:6]


def resolver_prefix(host: str) -> bytes:
    """The network that a provider's resolvers share: a /24, or a /56, as in BIND's response rate limiting."""
    packed = _packed(host)
    return packed[:3] if len(packed) == 4 else packed[:7]


def _packed(host: str) -> bytes:
    if "." in host:
        return socket.inet_pton(socket.AF_INET, host.rpartition(":")[2])
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])


def client_address(remote: str, forwarded_for: str | None, trusted: Iterable[IPNetwork]) -> IPAddress | None:
    """The real address of a request; None where a trusted proxy does not give it in a form that can be read.

    `X-Forwarded-For` is used only from a trusted proxy, and read from its end: the result is the first address there
    that is not a trusted proxy itself. A proxy's own address is never the result: taken for a tunnel's exit, it would
    hide a leak. But a private address inside the trusted networks may be a client's, where another proxy names it.
    Raises ValueError when `remote` is no address.
    """
    trusted = tuple(trusted)
    found = _without_nat64(address(remote.partition("%")[0]))
    named = False
    for hop in reversed((forwarded_for or "").split(",")):
        if not inside(found, trusted):
            return found
        if not hop.strip():
            continue  # empty elements of a list are ignored (RFC 9110, section 5.6.1.2)
        try:
            found, named = _hop(hop), True
        except ValueError:
            _log_once("a proxy's X-Forwarded-For cannot be read", found, value=hop.strip()[:60])
            return None
    if inside(found, trusted) and (not named or is_public(found)):
        remedy = "let it set X-Forwarded-For (nothing else is read), or take it off VPN_SENTINEL_TRUSTED_PROXIES"
        _log_once("a trusted proxy names no client in X-Forwarded-For", found, remedy=remedy)
        return None
    return found


def _hop(text: str) -> IPAddress:
    """One element of `X-Forwarded-For`. Raises ValueError for one that is no address: `unknown`, `_hidden`, a name."""
    return _without_nat64(written_address(text))


def _without_nat64(found: IPAddress) -> IPAddress:
    """The IPv4 address in one that a NAT64 in front of us made; others as they are."""
    return behind_nat64(found) or found


def _log_once(what: str, proxy: IPAddress, **more: str) -> None:
    """Log a warning once for each proxy, and for a limited number of them."""
    if (what, proxy) in _LOGGED_PROXIES or len(_LOGGED_PROXIES) >= _MAX_LOGGED_PROXIES:
        return
    _LOGGED_PROXIES.add((what, proxy))
    log.warning("%s: the source of such requests is unknown", what, extra={"proxy": str(proxy), **more})


def headers_of(scope: Mapping[str, Any]) -> dict[str, str]:
    """The headers of an ASGI scope, names in lower case. Several lines of `X-Forwarded-For` are joined to one list."""
    raw = scope["headers"]
    found: dict[str, str] = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in raw}
    if "x-forwarded-for" in found:
        lines = (v.decode("latin-1") for k, v in raw if k.lower() == b"x-forwarded-for")
        found["x-forwarded-for"] = ",".join(lines)
    return found


def inside(ip: IPAddress, networks: Iterable[IPNetwork]) -> bool:
    return any(ip.version == n.version and ip in n for n in networks)
