"""Sizes that both sides keep to. A peer that sends more is refused, never truncated."""

from typing import Final

BODY_BYTES: Final = 256 * 1024  # one request or WebSocket message
REPORTS: Final = 200  # observations in one message
PER_OBSERVATION: Final = 64  # canaries, sightings or places in one observation
TEXT: Final = 200  # characters of one free text: a city, a company
OLDEST_REPORT: Final = 366 * 86400.0  # what is older counts as this old
CLOCK_SKEW_REFUSED: Final = 366 * 86400.0  # a time stamp further off than this is no clock but a mistake
