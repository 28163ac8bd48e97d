"""Query parameters that types alone cannot check."""

import math
from datetime import UTC, datetime
from typing import Annotated, Final

from litestar.exceptions import ValidationException
from litestar.params import QueryParameter

from vpn_sentinel.domain.tunnel import MAX_NAME_LENGTH

# The year 2286; no valid time is later, and every engine accepts the number.
_MAX_TIME: Final = 1e10
# The largest row number that SQLite and PostgreSQL both hold.
_MAX_ID: Final = 2**63 - 1

Limit = Annotated[int, QueryParameter(ge=1, le=500, description="How many entries at most.")]
Before = Annotated[int | None, QueryParameter(ge=1, le=_MAX_ID, description="Only entries older than this id.")]
TunnelName = Annotated[
    str | None,
    QueryParameter(
        max_length=MAX_NAME_LENGTH, pattern=r"^[A-Za-z0-9._-]+$", description="Only of the tunnel with this name."
    ),
]
Open = Annotated[bool | None, QueryParameter(name="open", description="Only open ones, or only closed ones.")]
Time = Annotated[str | None, QueryParameter(max_length=64, description="ISO 8601, or seconds since the epoch.")]


def seconds(name: str, text: str | None) -> float | None:
    """Seconds since the epoch from ISO 8601 or a number. Raises ValidationException that names the parameter."""
    if text is None:
        return None
    try:
        found = _iso(text) if "-" in text[1:] and "T" in text.upper() else float(text)
    except (ValueError, OverflowError):
        found = math.nan
    if not 0 <= found <= _MAX_TIME:
        takes = "an ISO 8601 time such as 2030-01-02T03:04:05Z, or seconds since 1970"
        raise ValidationException(detail=f"{name}: takes {takes}.")
    return found


def _iso(text: str) -> float:
    if not text.isprintable():  # a NUL ends the text for fromisoformat
        raise ValueError
    # A plus sign that was not escaped arrives as a space.
    when = datetime.fromisoformat(text.replace(" ", "+"))
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
