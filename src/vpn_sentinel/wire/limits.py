"""Limits that both sides keep. What exceeds one is refused, never truncated."""

from typing import Final

MAX_BODY_BYTES: Final = 256 * 1024  # one request or WebSocket message
MAX_REPORTS: Final = 200  # observations in one message
MAX_PER_OBSERVATION: Final = 64  # canaries, sightings or places in one observation
MAX_TEXT_LENGTH: Final = 200  # characters of one free text: a city, a company
MAX_REPORT_AGE_S: Final = 366 * 86400.0  # older reports count as this old
MAX_CLOCK_SKEW_S: Final = 366 * 86400.0  # a timestamp that is off by more is invalid
