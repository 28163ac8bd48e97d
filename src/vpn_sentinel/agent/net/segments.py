"""A routing table as disjoint parts of the address space, each with its route."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from vpn_sentinel.agent.net.routes import RTN_UNICAST, RouteEntry, Segment


def best(entries: Iterable[RouteEntry]) -> list[RouteEntry]:
    """The best route for each prefix: for the narrowest source, then for a type of service, then by the lowest metric.

    Only routes whose device exists count (fib_find_alias, fib_table_lookup, fib6_node_lookup). IPv6 has routes of one
    prefix and metric by several routers as separate entries and uses all of them.
    """
    chosen: dict[tuple[int, int], RouteEntry] = {}
    for entry in entries:
        if entry.type == RTN_UNICAST and not entry.hops:
            continue
        key = entry.first, entry.prefix
        known = chosen.get(key)
        if known is None or _rank(entry) < _rank(known):
            chosen[key] = entry
        elif entry.version == 6 and _rank(entry) == _rank(known) and entry.type == known.type == RTN_UNICAST:
            chosen[key] = replace(known, hops=tuple(dict.fromkeys((*known.hops, *entry.hops))))
    return sorted(chosen.values(), key=lambda e: (e.first, e.prefix))


def _rank(entry: RouteEntry) -> tuple[int, int, int]:
    return -entry.source.prefixlen if entry.source else 0, -entry.tos, entry.metric


def flattened(entries: Iterable[RouteEntry]) -> Iterator[Segment]:
    """Nested prefixes, in order, as disjoint parts, each with its most specific route."""
    open_: list[tuple[int, RouteEntry]] = []  # with the last address of each
    at = 0
    for entry in entries:
        first = entry.first
        while open_ and open_[-1][0] < first:
            last, inner = open_.pop()
            if at <= last:
                yield Segment(at, last, inner)
                at = last + 1
        if open_ and at < first:
            yield Segment(at, first - 1, open_[-1][1])
        at = first
        open_.append((entry.last, entry))
    while open_:
        last, inner = open_.pop()
        if at <= last:
            yield Segment(at, last, inner)
            at = last + 1


def merged(segments: Iterable[Segment], suppressed: int) -> Iterator[Segment]:
    """Adjacent parts with the same next hop as one; prefixes up to the length `suppressed` stay separate."""
    first, last, entry = 0, -1, None
    for segment in segments:
        if entry is not None and segment.first == last + 1 and _can_merge(entry, segment.entry, suppressed):
            last = segment.last
        else:
            if entry is not None:
                yield Segment(first, last, entry)
            first, last, entry = segment.first, segment.last, segment.entry
    if entry is not None:
        yield Segment(first, last, entry)


def _can_merge(one: RouteEntry, other: RouteEntry | None, suppressed: int) -> bool:
    return (
        other is not None
        and one.hops == other.hops
        and one.type == other.type
        and (one.prefix == other.prefix or min(one.prefix, other.prefix) > suppressed)
    )
