"""Which address a request really came from, and which addresses count as one client, or one network.

Whatever is counted or limited by where it comes from asks here. One customer of IPv6 has a /64, which so counts as one
IPv4 address does.
"""

import logging
import socket
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv6Network, ip_network
from typing import Any, Final

from vpn_sentinel.domain.policy import IPAddress, IPNetwork, is_public
from vpn_sentinel.wire.codec import address, written_address

log = logging.getLogger(__name__)

# Proxies of which it was said that their header is not understood, or names nobody.
_TOLD_OF: Final[set[tuple[str, IPAddress]]] = set()
_MAX_TOLD_OF: Final = 100
_NAT64: Final = IPv6Network("64:ff9b::/96")


def client_of(ip: IPAddress) -> str:
    """One client, as it is written in the log: an IPv4 address, or a /64."""
    return str(ip) if ip.version == 4 else str(ip_network((ip, 64), strict=False))


def client_prefix(host: str) -> bytes:
    """The same of a socket's address, which may have a zone or be a mapped IPv4 address, to compare alone."""
    packed = _packed(host)
    return packed if len(packed) == 4 else packed[:8]


def network_prefix(host: str) -> bytes:
    """The network around a client: a /24, or the /48 that a site has."""
    packed = _packed(host)
    return packed[:3] if len(packed) == 4 else packed[:6]


def resolver_prefix(host: str) -> bytes:
    """The network that a provider's resolvers share: a /24, or a /56, as BIND's response rate limiting takes them."""
    packed = _packed(host)
    return packed[:3] if len(packed) == 4 else packed[:7]


def _packed(host: str) -> bytes:
    if "." in host:
        return socket.inet_pton(socket.AF_INET, host.rpartition(":")[2])
    return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])


def client_address(remote: str, forwarded_for: str | None, trusted: Iterable[IPNetwork]) -> IPAddress | None:
    """The address that a request really came from, None where a proxy of ours does not say it, or not understandably.

    `X-Forwarded-For` is believed only from a trusted proxy, and read from its end: the first address there that is not
    itself a trusted proxy. A proxy's own address is nobody's: taken for a tunnel's exit, it would hide a leak. Only one
    of a private network may also be a client's, where another proxy names it. Raises ValueError when `remote` is no
    address.
    """
    trusted = tuple(trusted)
    found = _translated(address(remote.partition("%")[0]))
    named = False
    for hop in reversed((forwarded_for or "").split(",")):
        if not inside(found, trusted):
            return found
        if not hop.strip():
            continue  # an empty element of a list says nothing (RFC 9110, section 5.6.1.2)
        try:
            found, named = _hop(hop), True
        except ValueError:
            _say_once("a proxy's X-Forwarded-For is not understood", found, says=hop.strip()[:60])
            return None
    if inside(found, trusted) and (not named or is_public(found)):
        remedy = "let it set X-Forwarded-For (nothing else is read), or take it off VPN_SENTINEL_TRUSTED_PROXIES"
        _say_once("a trusted proxy names nobody in X-Forwarded-For", found, remedy=remedy)
        return None
    return found


def _hop(text: str) -> IPAddress:
    """One element of `X-Forwarded-For`. Raises ValueError for what is no address: `unknown`, `_hidden`, a name."""
    return _translated(written_address(text))


def _translated(found: IPAddress) -> IPAddress:
    """The IPv4 address that a NAT64 in front of us writes into IPv6's form, by the well-known prefix (RFC 6052)."""
    return IPv4Address(found.packed[12:]) if found.version == 6 and found in _NAT64 else found


def _say_once(what: str, proxy: IPAddress, **more: str) -> None:
    """Once for a proxy, and not for more of them than anybody sets up."""
    if (what, proxy) in _TOLD_OF or len(_TOLD_OF) >= _MAX_TOLD_OF:
        return
    _TOLD_OF.add((what, proxy))
    log.warning("%s: where such requests come from is unknown", what, extra={"proxy": str(proxy), **more})


def headers_of(scope: Mapping[str, Any]) -> dict[str, str]:
    """The headers of an ASGI scope, names in lower case. Proxies add lines of `X-Forwarded-For`: they are one list."""
    raw = scope["headers"]
    found: dict[str, str] = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in raw}
    if "x-forwarded-for" in found:
        lines = (v.decode("latin-1") for k, v in raw if k.lower() == b"x-forwarded-for")
        found["x-forwarded-for"] = ",".join(lines)
    return found


def inside(ip: IPAddress, networks: Iterable[IPNetwork]) -> bool:
    return any(ip.version == n.version and ip in n for n in networks)
