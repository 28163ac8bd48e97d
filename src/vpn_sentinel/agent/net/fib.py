"""The kernel's routing rules and tables, and the lookup in them that the kernel does for each packet.

Both are readable without any capability. Sources: ip-rule(8), ip-route(8), ip-nexthop(8), and the kernel's
fib_rule_match(), fib_rules_lookup() and fib_table_lookup().

`Fib.lookup` answers for one packet. `Fib.segments` answers for all destinations at once: which part of the address
space leaves by which device.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from vpn_sentinel.agent.net.routes import REFUSING, RTN_THROW, RTN_UNICAST, RouteEntry, Segment
from vpn_sentinel.agent.net.routing_rules import (
    ANY_SENDER,
    FR_ACT_BLACKHOLE,
    FR_ACT_GOTO,
    FR_ACT_PROHIBIT,
    FR_ACT_TO_TBL,
    FR_ACT_UNREACHABLE,
    Rule,
    Sender,
    selected,
    selects,
)
from vpn_sentinel.agent.net.segments import best, flattened, merged
from vpn_sentinel.agent.net.space import Interval, intersect, last_address, subtract, whole_space
from vpn_sentinel.domain.policy import IPAddress, IPNetwork

# One view of a table: IP version, table number, and the type of service and sources whose routes are included.
_TableView = tuple[int, int, int, frozenset[IPNetwork]]


@dataclass(eq=False)
class Fib:
    """All rules and tables at one moment. Rules keep the kernel's order, which is that of their priorities.

    `groups` are the groups of devices by index (ip-link(8)); a device not in it has group 0. It is immutable, so what
    took a walk through full tables is cached: a round asks for the same about ten times.
    """

    rules: tuple[Rule, ...] = ()
    entries: tuple[RouteEntry, ...] = ()
    groups: Mapping[int, int] = field(default_factory=dict)
    _by_table: dict[tuple[int, int], list[RouteEntry]] = field(init=False, repr=False)
    _segments: dict[_TableView, list[Segment]] = field(init=False, repr=False, default_factory=dict)
    _merged: dict[_TableView, list[Segment]] = field(init=False, repr=False, default_factory=dict)
    _without: dict[int, "Fib"] = field(init=False, repr=False, default_factory=dict)
    by_device_cache: dict[Hashable, dict[int, list[Interval]]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.rules = tuple(sorted(self.rules, key=lambda rule: rule.priority))
        self._by_table = defaultdict(list)
        for entry in self.entries:
            self._by_table[entry.version, entry.table].append(entry)

    def is_like(self, other: "Fib") -> bool:
        """Whether both route every packet the same way."""
        mine, others = ((f.rules, f.entries, f.groups) for f in (self, other))
        return mine == others

    def sender_class(self, version: int, sender: Sender) -> Hashable:
        """A key for what rules and routes match on: senders with the same key have the same routes."""
        return (
            version,
            self._tos_of(sender),
            self._sources_of(sender),
            bool(self._sources) and sender.source is None,
            tuple(selects(rule, sender) for rule in self.rules if rule.version == version),
        )

    def without(self, interface: int) -> "Fib":
        """A copy without any route by one device: what the kernel would do if that device went away."""
        if interface not in self._without:
            self._without[interface] = self._without_device(interface)
        return self._without[interface]

    def _without_device(self, interface: int) -> "Fib":
        kept, touched = [], set()
        for entry in self.entries:
            if entry.leads_by(interface):
                touched.add((entry.version, entry.table))
                hops = tuple(hop for hop in entry.hops if hop.interface != interface)
                if hops:
                    kept.append(replace(entry, hops=hops))
            else:
                kept.append(entry)
        left = Fib(self.rules, tuple(kept), self.groups)
        for mine, others in ((self._segments, left._segments), (self._merged, left._merged)):
            others.update((key, found) for key, found in mine.items() if key[:2] not in touched)
        return left

    def hosts_beside(self, tunnel: int) -> list[tuple[IPNetwork, RouteEntry]]:
        """Single hosts with a route of their own past the tunnel's device: VPN clients except their server like this.

        By a host route, as OpenVPN and vpnc-script make it; only where there is none, by a rule for one host.
        """
        routes = [(e.network, e) for e in self._single_hosts if not e.leads_by(tunnel)]
        if routes:
            return routes
        found = []
        for network in dict.fromkeys(r.destination for r in self.rules if r.destination and not r.invert):
            if network.prefixlen == network.max_prefixlen:
                entry = self.lookup(network.network_address)
                if entry is not None and entry.type == RTN_UNICAST and entry.hops and not entry.leads_by(tunnel):
                    found.append((network, entry))
        return found

    @cached_property
    def _single_hosts(self) -> tuple[RouteEntry, ...]:
        return tuple(e for e in self.entries if e.is_for_one_host())

    @cached_property
    def internet_routes(self) -> frozenset[tuple[int, int, bool]]:
        """IP version and device of the routes to the internet, and whether they go by a router."""
        found: set[tuple[int, int, bool]] = set()
        for entry in self.entries:
            if entry.type == RTN_UNICAST:
                for hop in entry.hops:
                    key = entry.version, hop.interface, hop.gateway is not None
                    if key not in found and entry.leads_to_internet():
                        found.add(key)
        return frozenset(found)

    def lookup(self, destination: IPAddress, sender: Sender = ANY_SENDER) -> RouteEntry | None:
        """The route that a packet takes; None when nothing leads there or a rule refuses it."""
        number = int(destination)
        found = self._walk(destination.version, sender, [(number, number)])
        entry = found[0].entry if found else None
        return None if entry is None or entry.type in REFUSING else entry

    def segments(
        self,
        version: int,
        sender: Sender = ANY_SENDER,
        within: Sequence[Interval] | None = None,
        *,
        merge: bool = False,
    ) -> list[Segment]:
        """The address space of one IP version in disjoint parts, in order; parts without a route are left out.

        Only `within` is looked up, or everything where it is None. `merge`: adjacent parts by the same next hop become
        one, with the route of the first, so that a full table by one device becomes a few parts.
        """
        space = [whole_space(version)] if within is None else list(within)
        return sorted(self._walk(version, sender, space, merge=merge), key=lambda s: s.first)

    @cached_property
    def _tos_in_use(self) -> frozenset[int]:
        return frozenset(e.tos for e in self.entries)

    def _tos_of(self, sender: Sender) -> int:
        """The sender's type of service if some route is for it, else 0."""
        return sender.tos if sender.tos in self._tos_in_use else 0

    @cached_property
    def _sources(self) -> frozenset[IPNetwork]:
        return frozenset(e.source for e in self.entries if e.source is not None)

    def _sources_of(self, sender: Sender) -> frozenset[IPNetwork]:
        """Of the source networks that routes are limited to, those that contain the sender's address."""
        return frozenset(n for n in self._sources if sender.source is not None and sender.source in n)

    def _walk(self, version: int, sender: Sender, space: list[Interval], *, merge: bool = False) -> list[Segment]:
        """The route of each part of `space`.

        A socket without an address takes a route for all sources. Only where there is none, the kernel gives it an
        address and looks up the routes for that source (ip6_dst_lookup_tail).
        """
        found = self._apply_rules(version, sender, space, self._sources_of(sender), merge=merge)
        if version == 6 and sender.source is None and self._sources:
            found = [s for s in found if s.entry is not None and s.entry.type not in REFUSING]
            rest = subtract(space, sorted((s.first, s.last) for s in found))
            found += self._apply_rules(version, sender, rest, self._sources, merge=merge)
        return found

    def _apply_rules(
        self, version: int, sender: Sender, space: list[Interval], sources: frozenset[IPNetwork], *, merge: bool
    ) -> list[Segment]:
        """Apply the rules in order, each to the part of the address space that is not decided yet."""
        out: list[Segment] = []
        rules = [r for r in self.rules if r.version == version]
        jumped: dict[int, list[Interval]] = {}  # by position of the rule that a `goto` leads to
        for at, rule in enumerate(rules):
            space = sorted(space + jumped.pop(at, []))
            hit = intersect(space, list(selected(rule, sender)))
            if not hit:
                continue
            if rule.action == FR_ACT_GOTO:
                # The kernel skips one whose target does not exist (ip-rule(8) calls it unresolved).
                target = next((n for n in range(at + 1, len(rules)) if rules[n].priority == rule.target), None)
                if target is not None:
                    jumped.setdefault(target, []).extend(hit)
                    space = subtract(space, hit)
            elif rule.action in (FR_ACT_BLACKHOLE, FR_ACT_UNREACHABLE, FR_ACT_PROHIBIT):
                out += [Segment(first, last, None, rule) for first, last in hit]
                space = subtract(space, hit)
            elif rule.action == FR_ACT_TO_TBL and rule.table:
                of_table = self._merged_table if merge else self._of_table
                segments = of_table((version, rule.table, self._tos_of(sender), sources))
                taken = list(self._routed(rule, hit, segments))
                out += taken
                space = subtract(space, [(s.first, s.last) for s in taken])
        return out

    def _routed(self, rule: Rule, space: list[Interval], segments: list[Segment]) -> Iterator[Segment]:
        at = 0
        for first, last in space:
            at = max(0, at - 1)  # the last segment of the previous interval may extend into this one
            if at < len(segments) and segments[at].last < first:
                at = bisect_left(segments, first, lo=at, key=last_address)
            while at < len(segments) and segments[at].first <= last:
                segment, entry = segments[at], segments[at].entry
                at += 1
                if entry is None or entry.type == RTN_THROW:
                    continue
                if entry.type in REFUSING or not self._is_suppressed(entry, rule):
                    yield Segment(max(first, segment.first), min(last, segment.last), entry, rule)

    def _is_suppressed(self, entry: RouteEntry, rule: Rule) -> bool:
        """Whether the rule ignores the route that its table has (fib4_rule_suppress, fib6_rule_suppress).

        For a route with several devices the first one counts. A less specific route of the table is not tried.
        """
        if rule.suppress_prefix is not None and entry.prefix <= rule.suppress_prefix:
            return True
        device = entry.hops[0].interface if entry.hops else None
        return (
            rule.suppress_group is not None
            and device is not None
            and (self.groups.get(device, 0) == rule.suppress_group)
        )

    def _of_table(self, view: _TableView) -> list[Segment]:
        """The table as disjoint parts of the address space, each with its most specific route."""
        if view not in self._segments:
            version, table, tos, sources = view
            entries = (
                e
                for e in self._by_table.get((version, table), ())
                if e.tos in (0, tos) and (e.source is None or e.source in sources)
            )
            self._segments[view] = list(flattened(best(entries)))
        return self._segments[view]

    def _merged_table(self, view: _TableView) -> list[Segment]:
        """The same, with adjacent parts merged that no rule treats differently: most of a full table."""
        if view not in self._merged:
            asking = (r for r in self.rules if (r.version, r.table) == view[:2])
            longest = max((r.suppress_prefix for r in asking if r.suppress_prefix is not None), default=-1)
            self._merged[view] = list(merged(self._of_table(view), longest))
        return self._merged[view]
