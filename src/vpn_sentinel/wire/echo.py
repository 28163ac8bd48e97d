"""The UDP echo: the agent asks which source address the server sees, and the server answers with it.

Request, 64 bytes: `VSE1`, 1 byte type (1), 3 bytes zero, 8 bytes id, 8 bytes nonce, 12 bytes zero, 8 bytes tag,
4 bytes zero, 16 bytes MAC. The server ignores the tag: it is zero, or lets a leak watch recognize the probe.
Reply, 64 bytes: `VSE1`, 1 byte type (2), 1 byte family (4 or 6), 2 bytes port, 8 bytes id, 8 bytes nonce,
16 bytes address (IPv4 left-aligned), 8 bytes zero, 16 bytes MAC.
The MAC is keyed BLAKE2s (RFC 7693) over all bytes before it. A reply is never larger than its request, and a request
with a wrong MAC gets no reply, so the port cannot be used for amplification and reveals nothing. The server answers
with `wire.pulse`, which reads this request and a pulse.
"""

import hmac
import struct
from hashlib import blake2s
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from vpn_sentinel.domain.policy import IPAddress

SIZE_BYTES: Final = 64
MAGIC: Final = b"VSE1"
MAC_BYTES: Final = 16
NONCE_OFFSET, TAG_OFFSET, TAG_BYTES = 16, 36, 8
_REQUEST: Final = struct.Struct("!4sBxxx8s8s12x8s4x")
REPLY: Final = struct.Struct("!4sBBH8s8s16s8x")


def key_for(secret: bytes, ident: bytes) -> bytes:
    """The 32-byte key of the agent `ident` (8 bytes), derived from the server's own secret."""
    return blake2s(ident, key=secret[:32], person=b"vs-echo1").digest()


def ident_for(secret: bytes, name: str) -> bytes:
    """The 8 bytes that identify the tunnel `name` on the wire: stable, and the name cannot be read from them."""
    return blake2s(name.encode(), key=secret[:32], digest_size=8, person=b"vs-ident").digest()


def request(ident: bytes, nonce: bytes, key: bytes, tag: bytes = b"") -> bytes:
    body = _REQUEST.pack(MAGIC, 1, ident, nonce, tag)
    return body + mac(body, key)


def is_genuine(datagram: bytes, key: bytes) -> bool:
    """Whether the MAC is right, in constant time."""
    return hmac.compare_digest(mac(datagram[:-MAC_BYTES], key), datagram[-MAC_BYTES:])


def read_reply(datagram: bytes, ident: bytes, nonce: bytes, key: bytes) -> IPAddress | None:
    """The address in a genuine reply to the request with this `nonce`; None for anything else."""
    if len(datagram) != SIZE_BYTES or not is_genuine(datagram, key):
        return None
    magic, kind, family, _port, got_ident, got_nonce, packed = REPLY.unpack(datagram[:-MAC_BYTES])
    if magic != MAGIC or kind != 2 or got_ident != ident or got_nonce != nonce:
        return None
    if family == 4:
        return IPv4Address(packed[:4])
    return IPv6Address(packed) if family == 6 else None


def mac(body: bytes, key: bytes) -> bytes:
    return blake2s(body, key=key, digest_size=MAC_BYTES).digest()
