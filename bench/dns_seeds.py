"""Genuine queries to the DNS canary, as resolvers send them: what a fuzzer begins from."""

import struct
from collections.abc import Iterator

from vpn_sentinel.wire import canary
from vpn_sentinel.wire.echo import ident_for, key_for

A, NS, SOA, TXT, AAAA, ANY, AXFR = 1, 2, 6, 16, 28, 255, 252
_OPT = 41
_COOKIE, _PADDING, _SUBNET = 10, 12, 8


def question(name: str, kind: int, *, ident: int = 0x2B67, klass: int = 1, opt: bytes = b"") -> bytes:
    """One query without recursion, as a resolver sends it to an authoritative server."""
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split(".") if part)
    return struct.pack("!6H", ident, 0, 1, 0, 0, bool(opt)) + labels + b"\0" + struct.pack("!HH", kind, klass) + opt


def edns(*options: tuple[int, bytes], version: int = 0, payload: int = 1232, dnssec_ok: bool = True) -> bytes:
    data = b"".join(struct.pack("!HH", code, len(value)) + value for code, value in options)
    flags = version << 16 | (0x8000 if dnssec_ok else 0)
    return b"\0" + struct.pack("!HHIH", _OPT, payload, flags, len(data)) + data


def own_name(secret: bytes, zone: str, nonce: bytes = b"\1\2\3\4\5\6\7\x08", tunnel: str = "fuzz") -> str:
    """A name that an agent of the installation with this secret asks for."""
    ident = ident_for(secret, tunnel)
    return f"{canary.label(ident, nonce, key_for(secret, ident))}.{zone}"


def seeds(secret: bytes = bytes(range(32)), zone: str = "canary.example.org") -> Iterator[bytes]:
    """Every kind of query that the canary tells apart: with and without EDNS, its options, the zone's own names."""
    own = own_name(secret, zone)
    subnet = (_SUBNET, struct.pack("!HBB", 1, 24, 0) + b"\xcb\x00\x71")
    yield question(own, TXT)
    yield question(own, TXT, opt=edns())
    yield question(own.upper(), TXT, opt=edns((_COOKIE, b"12345678"), payload=4096))
    yield question(own, TXT, opt=edns((_PADDING, bytes(200)), subnet, dnssec_ok=False))
    yield question(own, A, opt=edns())
    yield question(own, ANY)
    for kind in (SOA, NS, A, ANY, AXFR):
        yield question(zone, kind, opt=edns())
    for kind in (A, AAAA, TXT):
        yield question(f"ns.{zone}", kind)
    yield question(f"nx-0123456789abcdef.{zone}", A, opt=edns())
    yield question(f"a.b.c.{own}", TXT)
    yield question("www.example.com", A, opt=edns())
    yield question(own, TXT, opt=edns(version=7))
    yield question("whoami.cloudflare", TXT, klass=3)
