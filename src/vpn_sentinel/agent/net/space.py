"""The address space of an IP version as integers, and its parts as closed intervals."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Final

ADDRESS_BITS: Final = {4: 32, 6: 128}  # by IP version

Interval = tuple[int, int]
last_address: Final = itemgetter(1)  # of an interval, or of a segment of `net.segments`


def whole_space(version: int) -> Interval:
    return 0, (1 << ADDRESS_BITS[version]) - 1


def intersect(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """What is in both; each is a list of disjoint intervals in order."""
    out, i = [], 0
    j = bisect_left(other, one[0][0], key=last_address) if one else 0
    while i < len(one) and j < len(other):
        first, last = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if first <= last:
            out.append((first, last))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return out


def subtract(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """What is in `one` and not in `other`; each is a list of disjoint intervals in order."""
    out, j = [], 0
    for first, last in one:
        at = first
        while j < len(other) and other[j][1] < at:
            j += 1
        k = j
        while k < len(other) and other[k][0] <= last:
            if other[k][0] > at:
                out.append((at, other[k][0] - 1))
            at = max(at, other[k][1] + 1)
            k += 1
        if at <= last:
            out.append((at, last))
    return out


def joined(parts: Iterable[Interval]) -> list[Interval]:
    """The same addresses in as few intervals as possible, in order."""
    out: list[Interval] = []
    for first, last in sorted(parts):
        if out and first <= out[-1][1] + 1:
            out[-1] = out[-1][0], max(out[-1][1], last)
        else:
            out.append((first, last))
    return out
