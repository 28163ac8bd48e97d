"""What rules and tables route past the tunnel: known before any packet is sent, and without any capability."""

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from ipaddress import ip_network
from typing import Final, NamedTuple

from vpn_sentinel.agent.net.coverage import address_count, by_device, covering_networks, interval, public_space
from vpn_sentinel.agent.net.endpoints import TCP, UDP
from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.interfaces import Survey
from vpn_sentinel.agent.net.link import IFF_LOOPBACK, Interface, forwards
from vpn_sentinel.agent.net.local import networks as local_networks
from vpn_sentinel.agent.net.roles import has_internet_route
from vpn_sentinel.agent.net.routing_rules import FULL_PORT_MASK, Rule, Sender, may_be_one_program
from vpn_sentinel.agent.net.servers import devices_to
from vpn_sentinel.agent.net.space import Interval, intersect, joined, subtract
from vpn_sentinel.domain.observation import Routed
from vpn_sentinel.domain.policy import IPAddress, IPNetwork

MAX_NETWORKS: Final = 16  # networks named for one device; the others are counted
MAX_CLASSES: Final = 16  # classes of traffic (by protocol, port, …) that are looked up on their own
_NAMES_OF_PROTOCOLS: Final = {TCP: "TCP", UDP: "UDP", 1: "ICMP", 58: "ICMPv6"}


class TrafficClass(NamedTuple):
    """Traffic that rules distinguish: its name for people, and a sender whose packets are of it.

    `ports` are its lowest and highest destination port, None for any.
    """

    name: str
    sender: Sender
    ports: tuple[int, int] | None = None


def audit(
    survey: Survey,
    *,
    may_leave: Iterable[IPNetwork] = (),
    servers: Iterable[IPAddress] = (),
    services: Collection[IPAddress] = (),
    interfaces: Collection[str] = (),
    is_meant: Callable[[Rule], bool] = lambda _: False,
) -> tuple[Routed, ...] | None:
    """By which devices packets to the internet leave, and which part goes beside the tunnel.

    None when the rules and tables could not be read, or no tunnel is known; () when its device is missing.

    Excluded is what should go there: `may_leave`, the LAN, and the VPN's `servers`. Where none of the servers is known
    for a device, each single host with a route by it may be one, except `services` of the internet. Also excluded are
    the devices in `interfaces`, and the traffic of rules for which `is_meant` is true.
    """
    if survey.fib is None or survey.tunnel is None:
        return None
    device, sender = survey.device(), Sender(uid=os.geteuid() if survey.user is None else survey.user)
    if device is None:
        return ()
    known = tuple(servers)
    server_devices = devices_to(survey.fib, known, [i.index for i in survey.beside])
    local = (n for i in survey.beside for n in local_networks(i, survey.natted))
    excepted = [*may_leave, *local, *(ip_network(s) for s in known)]
    # A known server explains nothing on devices that its packets do not take: one tunnel may carry another.
    excepted += [
        network
        for network, entry in survey.fib.hosts_beside(device.index)
        if network.network_address not in services and not any(entry.leads_by(index) for index in server_devices)
    ]
    others = [i for i in survey.interfaces or () if i.name != device.name and not i.flags & IFF_LOOPBACK]
    found: list[Routed] = []
    for version in (4, 6):
        excluded = joined(interval(n) for n in excepted if n.version == version)
        beside = tuple(i for i in survey.beside if i.name not in interfaces)
        rules = tuple(r for r in survey.fib.rules if r.version == version and not is_meant(r))
        inner = [i for i in others if not has_internet_route(i, survey.fib, version)]
        classes = (*_classes(survey.fib, rules, version, sender), *_passed_on(inner, rules, version))
        found += _of_version(survey.fib, device, beside, version, sender, excluded, classes)
    return tuple(found)


def _of_version(
    fib: Fib,
    device: Interface,
    beside: tuple[Interface, ...],
    version: int,
    sender: Sender,
    excluded: list[Interval],
    classes: tuple[TrafficClass, ...],
) -> Iterator[Routed]:
    total = address_count(public_space(version))
    default = by_device(fib, version, sender)
    inside = default.get(device.index, [])
    if inside:
        yield Routed(interface=device.name, family=version, share=address_count(inside) / total)
    bound_sender = _with_address(fib, device, version, sender)
    bound = by_device(fib, version, bound_sender) if bound_sender else {}
    reported: dict[int, list[Interval]] = {}
    for other in beside:
        # A socket that has the tunnel's address is looked up again: a rule by source may route it elsewhere.
        parts = joined([*default.get(other.index, []), *intersect(inside, bound.get(other.index, []))])
        reported[other.index] = parts = subtract(parts, excluded)
        if parts:
            found = covering_networks(fib, version, sender, other.index, parts, MAX_NETWORKS)
            if bound_sender and not found[1]:
                found = covering_networks(fib, version, bound_sender, other.index, parts, MAX_NETWORKS)
            yield _routed(other, version, found, address_count(parts) / total)
    for traffic in classes:
        by_class = by_device(fib, version, traffic.sender)
        for other in beside:
            more = subtract(subtract(by_class.get(other.index, []), excluded), reported[other.index])
            if more:
                found = covering_networks(fib, version, traffic.sender, other.index, more, MAX_NETWORKS)
                yield _routed(other, version, found, address_count(more) / total, traffic)


def _routed(
    device: Interface,
    version: int,
    found: tuple[list[IPNetwork], int],
    share: float,
    traffic: TrafficClass | None = None,
) -> Routed:
    named, count = found
    return Routed(
        interface=device.name,
        family=version,
        share=share,
        networks=tuple(named),
        more=count - len(named),
        only="" if traffic is None else traffic.name,
        ports=None if traffic is None else traffic.ports,
    )


def _with_address(fib: Fib, device: Interface, version: int, sender: Sender) -> Sender | None:
    """The sender with the device's address as source; None where no rule matches on sources."""
    if not any(rule.source is not None and rule.version == version for rule in fib.rules):
        return None
    source = next((a for a in device.addresses if a.version == version and not a.is_link_local), None)
    return None if source is None else Sender(uid=sender.uid, source=source)


def _classes(fib: Fib, rules: tuple[Rule, ...], version: int, sender: Sender) -> Iterator[TrafficClass]:
    """Classes of traffic that rules distinguish by user, protocol, port or type of service."""
    for label, uid in _user_groups(rules):
        yield TrafficClass(label, replace(sender, uid=uid))
    for rule in [r for r in rules if r.source_ports is not None and not may_be_one_program(r)][:MAX_CLASSES]:
        low, high = rule.source_ports or (0, 0)
        label = f"{_NAMES_OF_PROTOCOLS.get(rule.protocol or 0, 'packets')} from ports {low}-{high}"
        yield TrafficClass(label, replace(sender, protocol=rule.protocol or TCP, source_port=low))
    seen: set[str] = set()
    for rule in [r for r in rules if _is_class(r)][:MAX_CLASSES]:
        low, high = rule.destination_ports or (0, 0)
        words = [_NAMES_OF_PROTOCOLS.get(rule.protocol, f"protocol {rule.protocol}") if rule.protocol else "packets"]
        if low:
            words.append(f"to port {low}" if low == high else f"to ports {low}-{high}")
        if rule.destination_mask != FULL_PORT_MASK:
            words.append(f"under mask 0x{rule.destination_mask:04x}")
        if rule.tos:
            words.append(f"with TOS 0x{rule.tos:02x}")
        name = " ".join(w for w in words if w)
        if name not in seen:
            seen.add(name)
            # A port belongs to a protocol; rules for another protocol do not select it.
            protocol = rule.protocol or TCP
            rule_sender = Sender(uid=sender.uid, protocol=protocol, destination_port=low, tos=rule.tos)
            yield TrafficClass(name, rule_sender, _ports_of(rule))
    for tos in sorted({e.tos for e in fib.entries if e.tos and e.version == version})[:MAX_CLASSES]:
        yield TrafficClass(f"packets with TOS 0x{tos:02x}", replace(sender, tos=tos))


def _ports_of(rule: Rule) -> tuple[int, int] | None:
    """The lowest and the highest destination port that a rule selects, None where it selects any."""
    if rule.destination_ports is None:
        return None
    low, high = rule.destination_ports
    mask = rule.destination_mask
    return max(1, low & mask), (high & mask) | (FULL_PORT_MASK & ~mask)


def _passed_on(inner: list[Interface], rules: tuple[Rule, ...], version: int) -> Iterator[TrafficClass]:
    """What this host forwards for others, such as containers, where rules distinguish it."""
    incoming = {r.incoming for r in rules}
    sources = [r.source for r in rules if r.source is not None]
    for device in inner:
        own = [n for n in device.networks if n.version == version and not n.is_link_local]
        parts = [_longer_prefix(s, n) for s in sources for n in own if s.overlaps(n)]
        parts = [p for p in parts if not any(p == ip_network(a) for a in device.addresses)]
        named = parts or (own if device.name in incoming else [])
        if named and forwards(device, version):
            for part in dict.fromkeys(named[:MAX_CLASSES]):
                sender = Sender(source=_example_host(part), incoming=device.name)
                yield TrafficClass(f"packets from {part}", sender)


def _longer_prefix(one: IPNetwork, other: IPNetwork) -> IPNetwork:
    return one if one.prefixlen > other.prefixlen else other


def _example_host(network: IPNetwork) -> IPAddress:
    """An address in it, not the first host address, which often is this host's."""
    return network[min(2, network.num_addresses - 1)]


def _user_groups(rules: tuple[Rule, ...]) -> Iterator[tuple[str, int]]:
    """Groups of users that rules distinguish and that are not one program's user: a label, and one member's uid."""
    of_groups = [r for r in rules if r.uids is not None and not may_be_one_program(r)]
    for low, high, inverted in dict.fromkeys((*(r.uids or (0, 0)), r.invert) for r in of_groups[:MAX_CLASSES]):
        users = f"user {low}" if low == high else f"users {low}-{high}"
        yield (f"packets of all but {users}", high + 1) if inverted else (f"packets of {users}", low)


def _is_class(rule: Rule) -> bool:
    named = rule.protocol is not None or rule.destination_ports is not None or rule.tos
    return not rule.names_sender() and bool(named)
