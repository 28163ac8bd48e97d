"""Tell the server's responses from those of a proxy, a login page or a firewall between agent and server.

The server's own errors are problem details (RFC 9457) that repeat the HTTP status and carry a header (`problem.MARK`),
since gateways write problem details as well. Any other response comes from something in between: it tells nothing about
the key, and acknowledges nothing.
"""

import zlib
from collections.abc import Mapping
from typing import Final

import msgspec

from vpn_sentinel.agent.net.http import MAX_BODY_BYTES
from vpn_sentinel.wire.problem import CONTENT_TYPE, MARK, Problem

_MAX_REASON_CHARS: Final = 160
_GZIP: Final = 16 + zlib.MAX_WBITS  # wbits for a gzip header
_decode = msgspec.json.Decoder(Problem).decode


def own_refusal(status: int, headers: Mapping[str, str], body: bytes) -> str | None:
    """The server's reason for a refusal, None when this is not its response. `headers` have names in lower case."""
    if headers.get(MARK[0]) != MARK[1]:
        return None
    if headers.get("content-type", "").partition(";")[0].strip().lower() != CONTENT_TYPE:
        return None
    try:
        problem = _decode(decompressed(headers, body))
    except (ValueError, RecursionError):
        return None
    return problem.detail[:_MAX_REASON_CHARS] if problem.status == status and problem.detail else None


def decompressed(headers: Mapping[str, str], body: bytes) -> bytes:
    """The body, decompressed where a proxy compressed it unasked. Raises ValueError when it is damaged or too large."""
    if headers.get("content-encoding", "").strip().lower() not in ("gzip", "x-gzip"):
        return body
    unpacker = zlib.decompressobj(_GZIP)
    try:
        found = unpacker.decompress(body, MAX_BODY_BYTES)
    except zlib.error as e:
        msg = "a compressed response is damaged"
        raise ValueError(msg) from e
    if not unpacker.eof:
        msg = "a compressed response is cut off or too large"
        raise ValueError(msg)
    return found


def foreign_answer(status: int) -> str:
    return f"something on the way answers in the server's place (HTTP {status})"
