"""Rows of `outbox` for a notice, written in the same transaction as what it reports."""

from collections.abc import Iterable
from typing import Any, Final

from vpn_sentinel.domain.notice import Notice
from vpn_sentinel.wire.codec import encode

_COLUMNS: Final = ("channel", "tunnel", "kind", "body", "created_at", "due_at", "leased_until", "attempt")
ADD_DELIVERY: Final = f"INSERT INTO outbox ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608


def delivery_values(notice: Notice, channels: Iterable[str], now: float) -> list[tuple[object, ...]]:
    """Values of ADD_DELIVERY, one row a channel, due at once."""
    body = encode(notice).decode()
    return [(channel, notice.tunnel, notice.kind.value, body, now, now, 0.0, 0) for channel in channels]


def delivery_rows(notice: Notice, channels: Iterable[str], now: float) -> list[dict[str, Any]]:
    """The same rows by column, for SQLAlchemy's INSERT."""
    return [dict(zip(_COLUMNS, values, strict=True)) for values in delivery_values(notice, channels, now)]
