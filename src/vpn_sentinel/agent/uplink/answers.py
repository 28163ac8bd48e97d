"""Whose answer is it? Between agent and server may be a proxy, a login page, a firewall: only the server speaks for it.

The server's own errors are problem details (RFC 9457) with a mark (`problem.MARK`), for gateways write such too, that
repeat the status they came with. Anything else, of whatever status, is somebody's on the way: it says nothing of the
key, and acknowledges nothing.
"""

import zlib
from collections.abc import Mapping
from typing import Final

import msgspec

from vpn_sentinel.agent.net.http import MAX_BODY_BYTES
from vpn_sentinel.wire.problem import CONTENT_TYPE, MARK, Problem

_MAX_REASON_CHARS: Final = 160  # characters of a reason
_GZIP: Final = 16 + zlib.MAX_WBITS  # zlib's word for a gzip header
_decode = msgspec.json.Decoder(Problem).decode


def own_refusal(status: int, headers: Mapping[str, str], body: bytes) -> str | None:
    """Why the server itself refuses, None when this is not its answer. `headers` are by name in lower case."""
    if headers.get(MARK[0]) != MARK[1]:
        return None
    if headers.get("content-type", "").partition(";")[0].strip().lower() != CONTENT_TYPE:
        return None
    try:
        said = _decode(plain(headers, body))
    except (ValueError, RecursionError):
        return None
    return said.detail[:_MAX_REASON_CHARS] if said.status == status and said.detail else None


def plain(headers: Mapping[str, str], body: bytes) -> bytes:
    """The body without a compression that nobody asked for. Raises ValueError when it is damaged or too large."""
    if headers.get("content-encoding", "").strip().lower() not in ("gzip", "x-gzip"):
        return body
    unpacker = zlib.decompressobj(_GZIP)
    try:
        found = unpacker.decompress(body, MAX_BODY_BYTES)
    except zlib.error as e:
        msg = "a compressed answer is damaged"
        raise ValueError(msg) from e
    if not unpacker.eof:
        msg = "a compressed answer is cut off or too large"
        raise ValueError(msg)
    return found


def strangers(status: int) -> str:
    return f"something on the way answers in the server's place (HTTP {status})"
