"""HTTP to other people's servers: each failure as one word for a metric's label and the log, bodies of bounded size.

No URL and no body is ever logged: both may hold secrets.
"""

import logging
import math
import ssl
import zlib
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

import httpx

from vpn_sentinel.server.notify.channel import DeliveryError, SetupError, TransientError

# Asks for an uncompressed answer; a proxy may compress it all the same.
UNCOMPRESSED: Final = {"Accept-Encoding": "identity"}
_GZIP_WBITS: Final = 16 + zlib.MAX_WBITS  # tells zlib to expect a gzip header


async def read_body(answer: httpx.Response, max_bytes: int) -> bytes:
    """A streamed answer's body, at most `max_bytes` both compressed and decompressed: few bytes must not become many.

    Raises httpx.DecodingError for more, and for damaged gzip; another encoding is left as it is.
    """
    body = bytearray()
    async for part in answer.aiter_raw():
        body += part
        if len(body) > max_bytes:
            msg = f"more than {max_bytes} bytes"
            raise httpx.DecodingError(msg)
    if answer.headers.get("Content-Encoding", "").strip().lower() not in ("gzip", "x-gzip"):
        return bytes(body)
    unpacker = zlib.decompressobj(_GZIP_WBITS)
    try:
        found = unpacker.decompress(body, max_bytes)
    except zlib.error as e:
        msg = "damaged"
        raise httpx.DecodingError(msg) from e
    if not unpacker.eof:
        msg = f"cut off, or more than {max_bytes} bytes"
        raise httpx.DecodingError(msg)
    return found


def keep_urls_out_of_the_log() -> None:
    """Keep httpx from logging each request's URL, with any logging set-up. Call it where URLs hold credentials."""
    logging.getLogger("httpx").addFilter(_is_not_a_request_line)


def _is_not_a_request_line(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def reason_of(error: Exception) -> str:
    """One word for a failure before there was an answer."""
    match error:
        case httpx.TimeoutException() | TimeoutError():
            return "timeout"
        case httpx.ConnectError():
            return "tls" if _is_tls(error) else "unreachable"
        case httpx.RemoteProtocolError() | httpx.DecodingError():
            return "garbage"
        case httpx.UnsupportedProtocol() | httpx.InvalidURL() | UnicodeError():
            return "bad_url"
        case _:
            return "broken_off"


def connection_error(error: Exception) -> DeliveryError:
    """The error for a failure before an answer: a certificate or address needs a repair, the rest is temporary."""
    reason = reason_of(error)
    return SetupError(reason) if reason in ("tls", "bad_url") else TransientError(reason)


def retry_after(value: str | None, now: float) -> float | None:
    """The seconds of a `Retry-After` header (RFC 9110, 10.2.3: a number or a date); None when it is neither."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            then = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return None
        seconds = (then if then.tzinfo else then.replace(tzinfo=UTC)).timestamp() - now
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _is_tls(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False
