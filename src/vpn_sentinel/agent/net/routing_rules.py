"""A routing rule, whom it selects, and what of a packet it looks at (ip-rule(8), linux/fib_rules.h)."""

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.agent.net.space import Interval, subtract, whole_space
from vpn_sentinel.domain.policy import IPAddress, IPNetwork

FR_ACT_TO_TBL, FR_ACT_GOTO = 1, 2
FR_ACT_BLACKHOLE, FR_ACT_UNREACHABLE, FR_ACT_PROHIBIT = 6, 7, 8

WHOLE_PORT: Final = 0xFFFF
# Where what this host itself sends is said to come in (fib_rules.c: LOOPBACK_IFINDEX).
_LOOPBACK: Final = "lo"
MAX_OWN_PORTS: Final = 256
FIRST_PERSON: Final = 1000  # the first user id that is a person's
# Behind them are those of services that have none of their own, and nobody's, which VPN programs change to.
PERSONS: Final = range(FIRST_PERSON, 60_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A routing rule. Selectors that are None, or "" for a name, match everything; `invert` turns all of them round.

    `version` is 4 or 6. `mark` is compared under `mask`; `uids`, `source_ports` and `destination_ports` are closed
    ranges, or one port under a mask; `table` counts for the action FR_ACT_TO_TBL, `target` for FR_ACT_GOTO. Where the
    table's route has a prefix that is not longer than `suppress_prefix`, or leads by a device of the group
    `suppress_group`, the next rule is asked. `tos` is compared under `tos_mask`, 0 is any. `rare`: it
    has a selector that is not read here, such as IPv6's flow label, so that it selects no ordinary packet.
    """

    version: int
    priority: int
    action: int = FR_ACT_TO_TBL
    table: int = 0
    target: int = 0
    invert: bool = False
    source: IPNetwork | None = None
    destination: IPNetwork | None = None
    mark: int | None = None
    mask: int = 0xFFFFFFFF
    uids: tuple[int, int] | None = None
    protocol: int | None = None
    source_ports: tuple[int, int] | None = None
    source_mask: int = WHOLE_PORT
    destination_ports: tuple[int, int] | None = None
    destination_mask: int = WHOLE_PORT
    incoming: str = ""
    outgoing: str = ""
    tos: int = 0
    tos_mask: int = 0xFF
    l3mdev: bool = False
    rare: bool = False
    suppress_prefix: int | None = None
    suppress_group: int | None = None

    def names_sender(self) -> bool:
        """Whether it selects by who sends: by mark, user or port of the sender, or by a protocol without ports.

        So VPN programs except their own packets. What a rule selects by destination is a part of the traffic instead.
        """
        own_protocol = self.protocol is not None and self.protocol not in (
            socket.IPPROTO_TCP,
            socket.IPPROTO_UDP,
            socket.IPPROTO_ICMP,
            socket.IPPROTO_ICMPV6,
        )
        return bool(self.mark) or self.uids is not None or self.source_ports is not None or own_protocol

    def sender(self, uid: int | None = None) -> "Sender":
        """A sender whom the selectors name, before any inversion; `uid` is its user where none is named."""
        return Sender(
            mark=(self.mark or 0) & self.mask,
            uid=self.uids[0] if self.uids else uid,
            protocol=self.protocol or 0,
            source_port=self.source_ports[0] if self.source_ports else 0,
            destination_port=self.destination_ports[0] if self.destination_ports else 0,
        )


def may_be_a_programs(rule: Rule) -> bool:
    """Whether the users or ports that a rule names may be those of one program, such as a VPN's own or one that is
    meant for it.

    One user may be. Several, with people among them, are a part of everybody; so is root, whose programs are many.
    Debian and Fedora, and login.defs(5), give numbers from 1000 on to people. One program has a port or a few of its
    own; a long range has those of everybody's connections in it.
    """
    if rule.source_ports is not None:
        low, high = rule.source_ports
        if (high - low + 1) << (WHOLE_PORT & ~rule.source_mask).bit_count() > MAX_OWN_PORTS:
            return False
    if rule.uids is None:
        return True
    low, high = rule.uids
    return low > 0 and (low == high or high < FIRST_PERSON)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """What of a packet beside its destination decides where it goes. 0 for ports and protocol: any that no rule names.

    `uid` None is a sender whom no rule by user selects; `outgoing` is the device that its socket is bound to. What this
    host passes on for somebody else came in by the device `incoming`.
    """

    mark: int = 0
    uid: int | None = None
    source: IPAddress | None = None
    protocol: int = 0
    source_port: int = 0
    destination_port: int = 0
    tos: int = 0
    outgoing: str = ""
    incoming: str = _LOOPBACK


EVERYBODY: Final = Sender()


def selected(rule: Rule, sender: Sender) -> Iterable[Interval]:
    """The destinations for which the rule selects what `sender` sends."""
    whole = whole_space(rule.version)
    others = selects(rule, sender)
    if rule.destination is None:
        return [whole] if others is not rule.invert else []
    within = (int(rule.destination.network_address), int(rule.destination.broadcast_address))
    if not rule.invert:
        return [within] if others else []
    return subtract([whole], [within]) if others else [whole]


def selects(rule: Rule, sender: Sender) -> bool:
    """Whether all selectors but that of the destination agree, before the inversion."""
    return (
        rule.incoming in ("", sender.incoming)
        and rule.outgoing in ("", sender.outgoing)
        and (rule.mark is None or (rule.mark ^ sender.mark) & rule.mask == 0)
        and (rule.uids is None or (sender.uid is not None and rule.uids[0] <= sender.uid <= rule.uids[1]))
        and (rule.source is None or (sender.source is not None and sender.source in rule.source))
        and rule.protocol in (None, sender.protocol)
        and _is_in(rule.source_ports, rule.source_mask, sender.source_port)
        and _is_in(rule.destination_ports, rule.destination_mask, sender.destination_port)
        and (rule.tos == 0 or (rule.tos ^ sender.tos) & rule.tos_mask == 0)
        and not (rule.l3mdev or rule.rare)
    )


def _is_in(ports: tuple[int, int] | None, mask: int, port: int) -> bool:
    return ports is None or ports[0] & mask <= port & mask <= ports[1] & mask
