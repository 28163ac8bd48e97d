"""Parse addresses and networks, as people and programs write them, to one normal form.

An IPv4-mapped IPv6 address (`::ffff:192.0.2.1`, RFC 4291, section 2.5.5.2) becomes the IPv4 address: all addresses are
kept so, and a network in the mapped form would contain none of them.
"""

import re
from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_interface, ip_network
from typing import Final

# Behind a NAT64, addresses that hold an IPv4 address in their last 32 bits (RFC 6052, the well-known prefix), and the
# block for translators of a network of one's own, which put it elsewhere (RFC 8215).
NAT64: Final = IPv6Network("64:ff9b::/96")
LOCAL_NAT64: Final = IPv6Network("64:ff9b:1::/48")
_MAPPED_PREFIX_BITS: Final = 96  # bits before the IPv4 address

# A `Host` header in lower case: an IPv6 address in brackets, or a name or IPv4 address, and an optional port.
_HOST: Final = re.compile(r"(?:\[(?P<six>[0-9a-f:.]+)\]|(?P<name>[a-z0-9._-]+))(?::[0-9]{1,5})?")


def is_host_of(header: str, names: Collection[str]) -> bool:
    """Whether a `Host` header is one of `names` or an address, with or without a port.

    Against DNS rebinding: when a site points its own name to this server, its visitors' browsers send that name. An
    address cannot be rebound.
    """
    found = _HOST.fullmatch(header.lower())
    if found is None:
        return False
    six, name = found["six"], found["name"]
    if (six or name) in names:
        return True
    try:
        IPv6Address(six) if six is not None else IPv4Address(name)
    except ValueError:
        return False
    return True


def behind_nat64(address: IPv4Address | IPv6Address) -> IPv4Address | None:
    """The IPv4 address in one with NAT64's well-known prefix; None for any other."""
    return IPv4Address(address.packed[12:]) if address.version == 6 and address in NAT64 else None


def parse_address(text: str) -> IPv4Address | IPv6Address:
    """Raises ValueError for what is no address, and for one with a zone, which has a meaning on one host only."""
    _need_no_zone(text)
    try:
        found = ip_address(text)
    except ValueError:
        msg = f"{text!r} is no address such as 192.0.2.1 or 2001:db8::1"
        raise ValueError(msg) from None
    return (found.ipv4_mapped or found) if isinstance(found, IPv6Address) else found


def parse_network(text: str, *, strict: bool = False) -> IPv4Network | IPv6Network:
    """A single address is a network of one. Raises ValueError; with `strict` also where host bits are set."""
    _need_no_zone(text)
    try:
        found = ip_interface(text)
    except ValueError:
        msg = f"{text!r} is no address or network such as 10.0.0.0/8"
        raise ValueError(msg) from None
    if not isinstance(found.ip, IPv6Address) or found.ip.ipv4_mapped is None:
        return ip_network(text, strict=strict)
    prefix = found.network.prefixlen - _MAPPED_PREFIX_BITS
    if prefix < 0:
        msg = f"{text!r}: an IPv4 address in IPv6's form takes a prefix of {_MAPPED_PREFIX_BITS} to 128"
        raise ValueError(msg)
    return IPv4Network((int(found.ip.ipv4_mapped), prefix), strict=strict)


def _need_no_zone(text: str) -> None:
    if "%" in text:
        msg = f"{text!r}: an address takes no zone here"
        raise ValueError(msg)
