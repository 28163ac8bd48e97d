"""Where the tunnel's own packets go: the VPN server's address, port and protocol."""

from dataclasses import dataclass
from typing import Final

from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.wire import codec

TCP: Final = 6
UDP: Final = 17
PROTOCOLS: Final = {"udp": UDP, "tcp": TCP}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A VPN server that carries the tunnel. `protocol` is 6 (TCP) or 17 (UDP).

    `near` is the local port that this is known for, None when it applies to all packets to that endpoint.
    """

    address: IPAddress
    port: int
    protocol: int = UDP
    near: int | None = None

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port}/{'tcp' if self.protocol == TCP else 'udp'}"


def parse_endpoint(text: str) -> Endpoint:
    """`ADDRESS:PORT`, `[IPV6]:PORT`, each followed by `/udp` (the default) or `/tcp`. Raises ValueError."""
    where, _, word = text.strip().partition("/")
    host, colon, port = where.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    protocol = PROTOCOLS.get(word.lower() or "udp")
    if not colon or protocol is None or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        msg = f"{text!r} is not an endpoint such as 198.51.100.7:51820/udp or [2001:db8::7]:1194/tcp"
        raise ValueError(msg)
    address = codec.address(host[1:-1] if bracketed else host)
    if (":" in host) is not bracketed:
        msg = f"{text!r}: an IPv6 address takes brackets, an IPv4 address none"
        raise ValueError(msg)
    return Endpoint(address, int(port), protocol)
