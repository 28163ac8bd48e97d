"""What containment never cuts: what the owner declared as meant, answers to who connected from outside, and the VPN
program's own packets where routing rules except them by user, port or protocol. Pure: nftables matches, as text.

Answers are told by the port that takes connections here, and not by conntrack: it takes a flow that it meets in its
middle for one that was begun by whichever packet it saw first, and a leak would pass for an answer.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from vpn_sentinel.agent.leakwatch.meant import Meant
from vpn_sentinel.agent.leakwatch.rules import PortRange
from vpn_sentinel.agent.net.endpoints import TCP
from vpn_sentinel.agent.net.routing_rules import Rule

_PROTOCOLS: Final = {6: "tcp", 17: "udp"}
_ANSWER: Final = "tcp flags & (syn | ack) != syn"  # all but what opens a connection
_MAX_PORTS: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Exemptions:
    """`excepted` are routing rules that select by sender, `taking` TCP ports on which connections are taken here."""

    meant: Meant = field(default_factory=Meant)
    excepted: tuple[Rule, ...] = ()
    taking: frozenset[int] = frozenset()

    def matches(self) -> tuple[str, ...]:
        """Each lets a packet pass."""
        meant = self.meant
        found = [f'oifname "{name}"' for name in sorted(meant.interfaces)]
        found += [f"meta skuid {uid}" for uid in sorted(meant.users)]
        if meant.only:
            found.append(f"meta skuid != {{ {', '.join(map(str, sorted(meant.only)))} }}")
        found += [f"{_PROTOCOLS[p.protocol]} dport {p.low}-{p.high}" for p in meant.ports]
        found += [_answers(p) for p in meant.published]
        if self.taking:
            ports = ", ".join(map(str, sorted(self.taking)[:_MAX_PORTS]))
            found.append(f"tcp sport {{ {ports} }} {_ANSWER}")
        found += [match for rule in self.excepted if (match := _sender(rule))]
        return tuple(dict.fromkeys(found))


def _answers(ports: PortRange) -> str:
    text = f"{_PROTOCOLS[ports.protocol]} sport {ports.low}-{ports.high}"
    return f"{text} {_ANSWER}" if ports.protocol == TCP else text


def _sender(rule: Rule) -> str:
    """The rule's selectors; empty for one that selects by what nftables would have to look up."""
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
