"""Plain tables and times for people."""

from collections.abc import Sequence
from datetime import datetime


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as they need to be, with control characters escaped."""
    lines = [tuple(heads), *(tuple(map(printable, row)) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def printable(text: str) -> str:
    """`text` with control characters shown as escapes, since a terminal would obey them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def local_time(seconds: float | None) -> str:
    """ISO 8601 in the machine's own zone, `-` for None."""
    return "-" if seconds is None else datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
