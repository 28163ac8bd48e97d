"""URLs and addresses in texts: the parts of a URL, and whether requests to it could be read on the way."""

from dataclasses import dataclass
from ipaddress import ip_network
from typing import Final
from urllib.parse import urlsplit

from vpn_sentinel.domain.policy import IPAddress, is_public
from vpn_sentinel.wire import codec

_LOCAL_NAMES: Final = (".localhost", ".local", ".lan", ".internal", ".home.arpa", ".localdomain")
_CGNAT: Final = ip_network("100.64.0.0/10")  # carrier-grade NAT: not public, but shared with others


@dataclass(frozen=True, slots=True)
class ParsedUrl:
    """The parts of a URL. `path` includes the query."""

    secure: bool
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def split(url: str) -> ParsedUrl:
    """Parse an http or https URL. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        msg = "is not an address that starts with http:// or https://"
        raise ValueError(msg)
    secure = parts.scheme == "https"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return ParsedUrl(secure, parts.hostname, parts.port or (443 if secure else 80), path)


def is_insecure(url: str) -> bool:
    """Whether a key sent there could be read on the way: plain HTTP to anything but this host or a private network."""
    where = split(url)
    if where.secure:
        return False
    address = address_in(where.host)
    if address is not None:
        return is_public(address) or address in _CGNAT
    # A name without a dot is this host's, the LAN's or the container network's.
    return "." in where.host and not where.host.lower().endswith(_LOCAL_NAMES)


def address_in(text: str) -> IPAddress | None:
    """The IP address that a text consists of, else None."""
    try:
        return codec.address(text.strip())
    except ValueError:
        return None
