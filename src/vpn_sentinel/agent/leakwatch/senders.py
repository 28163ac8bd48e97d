"""Which senders the routing rules let out of the tunnel, and which they alone lead into it.

A VPN program excepts its own packets by a mark, a user, a source port or a protocol without ports. Whether a rule does
that for the watched tunnel depends on its place among the other rules, so lookups in the tables are compared: a packet
of an ordinary sender goes into the tunnel, the same packet with the mark does not. A rule that selects by destination
alone selects a part of the traffic, and is no exception.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Final

from vpn_sentinel.agent.net.endpoints import TCP, UDP
from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.interfaces import INTERNET
from vpn_sentinel.agent.net.packets import Packet
from vpn_sentinel.agent.net.routing_rules import ANY_SENDER, Rule, Sender, may_be_one_program
from vpn_sentinel.domain.policy import IPAddress

# For a family of which nothing goes through the tunnel.
_FALLBACK_ADDRESS: Final = {4: INTERNET[0], 6: INTERNET[-1]}
_DSCP_MASK: Final = 0xFC  # the type of service without the two bits of ECN (RFC 3168)
# Besides the usual two of a family, in case a rule leads one of those elsewhere.
_ANYWHERE: Final[tuple[IPAddress, ...]] = (*INTERNET, *(ip_address(a) for a in ("9.9.9.9", "2620:fe::fe")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Senders:
    """`excepted`: rules, none of them inverted, whose senders go outside the tunnel while others go through it.
    `leading_in`: rules whose senders alone go through it; none means that all packets should. In the IP versions of
    `everybody` all packets have gone through it before."""

    excepted: tuple[Rule, ...] = ()
    leading_in: tuple[Rule, ...] = ()
    everybody: frozenset[int] = frozenset()


def senders(fib: Fib, tunnel: int | None, before: Senders) -> Senders:
    """Read the rules. `tunnel` is the index of the tunnel's device, None while it is gone.

    What was found `before` stays valid while no packets go through the tunnel: its program still sends.
    """
    inverted = [replace(r, invert=False) for r in fib.rules if r.invert and r.names_sender() and may_be_one_program(r)]
    if tunnel is None:
        return replace(before, excepted=tuple(dict.fromkeys((*before.excepted, *inverted))))
    excepted: list[Rule] = []
    leading_in: list[Rule] = []
    through = {version: _everybody(fib, tunnel, version) for version in (4, 6)}
    everybody = before.everybody | {version for version, address in through.items() if address is not None}
    for rule in (replace(r, invert=False) for r in fib.rules if r.names_sender()):
        anywhere = through[rule.version] or _FALLBACK_ADDRESS[rule.version]
        to = rule.destination.network_address if rule.destination else anywhere
        sends = _sender_of(rule)
        others, this = (_leads_to(fib, s, to, tunnel) for s in (_ordinary_sender(rule, sends), sends))
        if others and not this and may_be_one_program(rule):
            excepted.append(rule)
        elif this and not others and _selects_sender_only(rule) and not _is_root(rule):
            leading_in.append(rule)
    if not (any(through.values()) or leading_in):
        # A route or rule took precedence over the tunnel: the rules that except its program are still there.
        excepted += [*inverted, *before.excepted]
    return Senders(
        excepted=tuple(dict.fromkeys(excepted)),
        # Where all packets went through the tunnel before, and now only one user's do, the others leak.
        leading_in=tuple(dict.fromkeys(r for r in leading_in if r.version not in everybody)),
        everybody=everybody,
    )


def _everybody(fib: Fib, tunnel: int, version: int) -> IPAddress | None:
    """An address to which an ordinary sender's packets go through the tunnel, if there is one."""
    some = (a for a in _ANYWHERE if a.version == version)
    return next((a for a in some if _leads_to(fib, ANY_SENDER, a, tunnel)), None)


def _leads_to(fib: Fib, sender: Sender, to: IPAddress, tunnel: int) -> bool:
    found = fib.lookup(to, sender)
    return found is not None and found.leads_by(tunnel)


def _sender_of(rule: Rule) -> Sender:
    """A sender that the rule selects."""
    return Sender(
        mark=rule.mark or 0,
        uid=rule.uids[0] if rule.uids else None,
        source=rule.source.network_address if rule.source else None,
        protocol=rule.protocol or 0,
        source_port=rule.source_ports[0] if rule.source_ports else 0,
        destination_port=rule.destination_ports[0] if rule.destination_ports else 0,
        outgoing=rule.outgoing,
    )


def _ordinary_sender(rule: Rule, sender: Sender) -> Sender:
    """The same packet without what identifies its sender; what selects a part of the traffic (a port, TCP) stays."""
    ordinary = rule.protocol in (TCP, UDP)
    return replace(sender, mark=0, uid=None, source_port=0, protocol=sender.protocol if ordinary else 0)


def is_mark(rule: Rule) -> bool:
    """Whether the rule selects by mark and by nothing else."""
    return bool(rule.mark) and rule.uids is None and _has_nothing_else(rule)


def _selects_sender_only(rule: Rule) -> bool:
    """Whether it selects by user or mark and by nothing else: then only that program's traffic belongs to the
    tunnel.
    """
    return is_mark(rule) or (rule.uids is not None and not rule.mark and _has_nothing_else(rule))


def _is_root(rule: Rule) -> bool:
    """Whether root is the first of its users: no tunnel is for root's many programs alone."""
    return rule.uids is not None and rule.uids[0] == 0


def _has_nothing_else(rule: Rule) -> bool:
    others = (rule.source, rule.destination, rule.protocol, rule.source_ports, rule.destination_ports)
    return all(o is None for o in others) and not (rule.outgoing or rule.tos or rule.l3mdev)


def leads_in(senders: Senders, fib: Fib | None, packet: Packet, near: IPAddress | None, tunnel: int | None) -> bool:
    """Whether the packet goes into the tunnel, from a socket bound to no device, for all senders that are not excepted.

    `near` is the address that the socket is bound to.
    """
    if fib is None or tunnel is None:
        return False
    anybody = Sender(
        source=near,
        protocol=packet.protocol,
        source_port=packet.source_port or 0,
        destination_port=packet.destination_port or 0,
        tos=packet.tos & _DSCP_MASK,
    )
    named = (r for r in fib.rules if r.version == packet.destination.version and (r.mark or r.uids is not None))
    others = [r for r in named if replace(r, invert=False) not in senders.excepted]
    sent = [anybody, *(replace(anybody, mark=r.mark or 0, uid=r.uids[0] if r.uids else None) for r in others)]
    entries = [fib.lookup(packet.destination, s) for s in sent]
    return all(entry is None or {hop.interface for hop in entry.hops} == {tunnel} for entry in entries)


def selects(rule: Rule, packet: Packet, uid: int | None = None) -> bool:
    """Whether a rule without a mark selects a packet that user `uid` sent, None if the user is not known."""
    to, port, own = packet.destination, packet.destination_port or 0, packet.source_port or 0
    return (
        rule.version == to.version
        and not rule.mark
        and not rule.outgoing
        and (rule.uids is None or (uid is not None and rule.uids[0] <= uid <= rule.uids[1]))
        and (rule.destination is None or to in rule.destination)
        and (rule.source is None or packet.source in rule.source)
        and rule.protocol in (None, packet.protocol)
        and (rule.source_ports is None or rule.source_ports[0] <= own <= rule.source_ports[1])
        and (rule.destination_ports is None or rule.destination_ports[0] <= port <= rule.destination_ports[1])
    )


def marks(rules: Iterable[Rule]) -> tuple[tuple[int, int], ...]:
    """Mark and mask of the rules that select by mark alone."""
    return tuple(dict.fromkeys((r.mark or 0, r.mask) for r in rules if is_mark(r)))
