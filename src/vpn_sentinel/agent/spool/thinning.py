"""A row of the spool, and which rows are dropped first when there is no room for all."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """`boottime` counts within the operating system's boot `boot`; `routine` repeats the verdict of the row before."""

    seq: int
    boot: str
    boottime: float
    wall: float
    routine: bool
    body: bytes


def thin(rows: Sequence[Row], room: int) -> tuple[list[Row], int]:
    """Reduce `rows` to `room`: first drop every other one of those that repeat both neighbours, oldest first,
    repeatedly; then the oldest of the rest. Return the rows that stay and how many were dropped.
    """
    kept = list(rows)
    while len(kept) > room:
        repeats = [i for i in range(len(kept) - 1) if kept[i].routine and kept[i + 1].routine]
        drop = set(repeats[::2][: len(kept) - room])
        if not drop:
            kept = kept[len(kept) - room :]
            break
        kept = [r for i, r in enumerate(kept) if i not in drop]
    return kept, len(rows) - len(kept)
