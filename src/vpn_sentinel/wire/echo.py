"""The UDP echo: the agent asks "where do you see me come from?", the server answers with an address.

Request, 64 bytes: `VSE1`, 1 byte type (1), 3 bytes zero, 8 bytes id, 8 bytes nonce, 24 bytes zero, 16 bytes MAC.
Reply, 64 bytes: `VSE1`, 1 byte type (2), 1 byte family (4 or 6), 2 bytes port, 8 bytes id, 8 bytes nonce,
16 bytes address (IPv4 left-aligned), 8 bytes zero, 16 bytes MAC.
The MAC is keyed BLAKE2s (RFC 7693) over all before it. A reply is never larger than its request, and a request whose
MAC is wrong has no reply, so the port amplifies nothing and tells strangers nothing.
"""

import hmac
import struct
from hashlib import blake2s
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from vpn_sentinel.domain.policy import IPAddress

SIZE: Final = 64
_MAGIC: Final = b"VSE1"
_MAC: Final = 16
_REQUEST: Final = struct.Struct("!4sBxxx8s8s24x")
_REPLY: Final = struct.Struct("!4sBBH8s8s16s8x")


def key_for(secret: bytes, ident: bytes) -> bytes:
    """The 32-byte key of the agent `ident` (8 bytes), derived from the server's own secret."""
    return blake2s(ident, key=secret[:32], person=b"vs-echo1").digest()


def ident_for(secret: bytes, name: str) -> bytes:
    """The 8 bytes by which the tunnel `name` is known on the wire: stable, and no name for a listener to read."""
    return blake2s(name.encode(), key=secret[:32], digest_size=8, person=b"vs-ident").digest()


def request(ident: bytes, nonce: bytes, key: bytes) -> bytes:
    body = _REQUEST.pack(_MAGIC, 1, ident, nonce)
    return body + _mac(body, key)


def reply(datagram: bytes, host: str, port: int, secret: bytes) -> bytes | None:
    """Answer a request that came from `host` and `port`, or return None when it is not one of our agents'."""
    if len(datagram) != SIZE or datagram[:5] != _MAGIC + b"\x01":
        return None
    ident = datagram[8:16]
    key = key_for(secret, ident)
    if not hmac.compare_digest(_mac(datagram[:-_MAC], key), datagram[-_MAC:]):
        return None
    seen = ip_address(host.partition("%")[0])
    if isinstance(seen, IPv6Address) and seen.ipv4_mapped:
        seen = seen.ipv4_mapped
    body = _REPLY.pack(_MAGIC, 2, seen.version, port, ident, datagram[16:24], seen.packed)
    return body + _mac(body, key)


def read_reply(datagram: bytes, ident: bytes, nonce: bytes, key: bytes) -> IPAddress | None:
    """The address in a genuine reply to the request with this `nonce`; None for anything else."""
    if len(datagram) != SIZE or not hmac.compare_digest(_mac(datagram[:-_MAC], key), datagram[-_MAC:]):
        return None
    magic, kind, family, _port, got_ident, got_nonce, packed = _REPLY.unpack(datagram[:-_MAC])
    if magic != _MAGIC or kind != 2 or got_ident != ident or got_nonce != nonce:
        return None
    if family == 4:
        return IPv4Address(packed[:4])
    return IPv6Address(packed) if family == 6 else None


def _mac(body: bytes, key: bytes) -> bytes:
    return blake2s(body, key=key, digest_size=_MAC).digest()
