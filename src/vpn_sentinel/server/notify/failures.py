"""HTTP failures in a word. The word is a metric's label and a log's value: never a URL, never a body."""

import logging
import math
import ssl
import zlib
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

import httpx

from vpn_sentinel.server.notify.channel import DeliveryError, SetupError, TransientError

# Nobody is to compress an answer for us; a proxy on the way may do it all the same.
PLAIN: Final = {"Accept-Encoding": "identity"}
_GZIP: Final = 16 + zlib.MAX_WBITS  # zlib's word for a gzip header


async def whole(answer: httpx.Response, most: int) -> bytes:
    """A streamed answer's body, of at most `most` bytes as it came and unpacked: few bytes must not become many.

    Raises httpx.DecodingError for more, and for a gzip body that is damaged; another encoding is left as it is.
    """
    body = bytearray()
    async for part in answer.aiter_raw():
        body += part
        if len(body) > most:
            msg = f"more than {most} bytes"
            raise httpx.DecodingError(msg)
    if answer.headers.get("Content-Encoding", "").strip().lower() not in ("gzip", "x-gzip"):
        return bytes(body)
    unpacker = zlib.decompressobj(_GZIP)
    try:
        found = unpacker.decompress(body, most)
    except zlib.error as e:
        msg = "damaged"
        raise httpx.DecodingError(msg) from e
    if not unpacker.eof:
        msg = f"cut off, or more than {most} bytes"
        raise httpx.DecodingError(msg)
    return found


def keep_urls_out_of_the_log() -> None:
    """Stop httpx from printing each request's URL, however logging is set up. Called where URLs hold credentials."""
    logging.getLogger("httpx").addFilter(_is_no_request_line)


def _is_no_request_line(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING


def reason_of(error: Exception) -> str:
    """Name what went wrong before there was an answer."""
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


def before_an_answer(error: Exception) -> DeliveryError:
    """What failed before there was an answer: somebody must mend a certificate or an address, the rest passes."""
    reason = reason_of(error)
    return SetupError(reason) if reason in ("tls", "bad_url") else TransientError(reason)


def retry_after(value: str | None, now: float) -> float | None:
    """Seconds that a `Retry-After` header asks for (RFC 9110, 10.2.3: a number or a date); None when it is neither."""
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
