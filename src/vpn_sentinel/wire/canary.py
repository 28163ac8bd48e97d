"""The DNS canary: a name that only this project's agents can make, and an answer that only their server can give.

Name: one label of 48 hex digits below the zone: 8 bytes id, 8 bytes nonce, 8 bytes MAC over both. One label, so that a
resolver that minimises names (RFC 9156) asks for nothing in between; hex, so that upper or lower case does not matter.
Answer: a TXT record of two strings: the address that the query came from, and 16 hex digits, the MAC over nonce and
address. Both MACs are keyed BLAKE2s (RFC 7693) with the key of the UDP echo, each with its own personalisation.
An A or AAAA record, by the family of the querying address, holds the same for getaddrinfo(3), without a MAC.
"""

import hmac
from hashlib import blake2s
from ipaddress import ip_address
from typing import Final

from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.wire.echo import key_for

ID_BYTES: Final = 8
NONCE_BYTES: Final = 8
_MAC_BYTES: Final = 8
LABEL_LENGTH: Final = 2 * (ID_BYTES + NONCE_BYTES + _MAC_BYTES)  # characters


def label(ident: bytes, nonce: bytes, key: bytes) -> str:
    """The label that the agent `ident` asks for; `nonce` is 8 random bytes, new for each query."""
    body = ident + nonce
    return (body + _mac(body, key, b"vs-dnsq1")).hex()


def read_label(text: bytes, secret: bytes) -> tuple[bytes, bytes] | None:
    """The nonce and the agent's key for a genuine label in lower case; None for any other."""
    if len(text) != LABEL_LENGTH:
        return None
    try:
        raw = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        return None
    if len(raw) != LABEL_LENGTH // 2:  # fromhex skips spaces
        return None
    body, key = raw[:-_MAC_BYTES], key_for(secret, raw[:ID_BYTES])
    if not hmac.compare_digest(_mac(body, key, b"vs-dnsq1"), raw[-_MAC_BYTES:]):
        return None
    return body[ID_BYTES:], key


def answer(seen: IPAddress, nonce: bytes, key: bytes) -> tuple[str, str]:
    """The two strings of the answer, with the address that the query came from."""
    return str(seen), _mac(nonce + seen.packed, key, b"vs-dnsa1").hex()


def read_answer(strings: tuple[str, ...], nonce: bytes, key: bytes) -> IPAddress | None:
    """The address in a genuine answer to the query with this `nonce`; None for anything else."""
    if len(strings) != 2 or not strings[1].isascii():
        return None
    try:
        seen = ip_address(strings[0])
    except ValueError:
        return None
    return seen if hmac.compare_digest(answer(seen, nonce, key)[1], strings[1]) else None


def _mac(body: bytes, key: bytes, person: bytes) -> bytes:
    return blake2s(body, key=key, digest_size=_MAC_BYTES, person=person).digest()
