"""What containment never blocks, as nftables matches: traffic that the owner declared as meant, answers to connections
from outside, and the VPN program's own packets where routing rules except them by user, port or protocol. Pure.

Answers are recognized by the listening port, not by conntrack: for a flow that was there before, conntrack takes the
first packet that it sees for the opening one, and a leak would pass for an answer.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from vpn_sentinel.agent.leakwatch.meant import MeantOutside
from vpn_sentinel.agent.leakwatch.rules import PortRange
from vpn_sentinel.agent.net.endpoints import TCP
from vpn_sentinel.agent.net.routing_rules import Rule

_NFT_PROTOCOLS: Final = {6: "tcp", 17: "udp"}
_NOT_OPENING: Final = "tcp flags & (syn | ack) != syn"  # all but a packet that opens a connection
_MAX_PORTS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Exemptions:
    """`excepted` are routing rules that select by sender, `listening` are the listening TCP ports of this namespace."""

    meant: MeantOutside = field(default_factory=MeantOutside)
    excepted: tuple[Rule, ...] = ()
    listening: frozenset[int] = frozenset()

    def matches(self) -> tuple[str, ...]:
        """The nftables matches; a packet passes by any one of them."""
        meant = self.meant
        found = [f'oifname "{name}"' for name in sorted(meant.interfaces)]
        found += [f"meta skuid {uid}" for uid in sorted(meant.users)]
        if meant.only_users:
            found.append(f"meta skuid != {{ {', '.join(map(str, sorted(meant.only_users)))} }}")
        found += [f"{_NFT_PROTOCOLS[p.protocol]} dport {p.low}-{p.high}" for p in meant.ports]
        found += [_published(p) for p in meant.published]
        if self.listening:
            ports = ", ".join(map(str, sorted(self.listening)[:_MAX_PORTS]))
            found.append(f"tcp sport {{ {ports} }} {_NOT_OPENING}")
        found += [match for rule in self.excepted if (match := _sender(rule))]
        return tuple(dict.fromkeys(found))


def _published(ports: PortRange) -> str:
    text = f"{_NFT_PROTOCOLS[ports.protocol]} sport {ports.low}-{ports.high}"
    return f"{text} {_NOT_OPENING}" if ports.protocol == TCP else text


def _sender(rule: Rule) -> str:
    """The rule's selectors as a match; empty for a rule with a selector that nftables cannot match."""
    if rule.invert or rule.outgoing or rule.incoming or rule.tos or rule.l3mdev:
        return ""
    ip = "ip6" if rule.version == 6 else "ip"
    parts = [f"meta nfproto ipv{rule.version}"]
    if rule.mark:
        parts.append(f"meta mark & {rule.mask:#x} == {rule.mark & rule.mask:#x}")
    if rule.uids:
        parts.append(f"meta skuid {_range(rule.uids)}")
    parts += [f"{ip} {end} {n}" for end, n in (("saddr", rule.source), ("daddr", rule.destination)) if n is not None]
    if rule.protocol:
        parts.append(f"meta l4proto {rule.protocol}")
    parts += [
        f"th {end} {_range(r)}" for end, r in (("sport", rule.source_ports), ("dport", rule.destination_ports)) if r
    ]
    return " ".join(parts)


def _range(ends: Iterable[int]) -> str:
    low, high = ends
    return str(low) if low == high else f"{low}-{high}"
