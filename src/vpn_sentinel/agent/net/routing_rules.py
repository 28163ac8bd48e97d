"""A routing rule, which packets it selects, and by which of their properties (ip-rule(8), linux/fib_rules.h)."""

import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.agent.net.space import Interval, subtract, whole_space
from vpn_sentinel.domain.policy import IPAddress, IPNetwork

FR_ACT_TO_TBL, FR_ACT_GOTO = 1, 2
FR_ACT_BLACKHOLE, FR_ACT_UNREACHABLE, FR_ACT_PROHIBIT = 6, 7, 8

FULL_PORT_MASK: Final = 0xFFFF
# The incoming interface of packets that this host itself sends (fib_rules.c: LOOPBACK_IFINDEX).
_LOOPBACK: Final = "lo"
MAX_OWN_PORTS: Final = 256  # a longer range is not one program's
FIRST_PERSONAL_UID: Final = 1000  # login.defs(5), UID_MIN
# Above them are dynamic service users and `nobody`, which VPN programs switch to.
PERSONAL_UIDS: Final = range(FIRST_PERSONAL_UID, 60_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A routing rule. Selectors that are None, or "" for a name, match everything; `invert` negates all of them.

    `version` is 4 or 6. `mark` is compared under `mask`; `uids`, `source_ports` and `destination_ports` are closed
    ranges, or one port under a mask; `table` is used with the action FR_ACT_TO_TBL, `target` with FR_ACT_GOTO. A
    route of the table is ignored, and the next rule applies, if its prefix is not longer than `suppress_prefix` or it
    leads by a device of the group `suppress_group`. `tos` is compared under `tos_mask`, 0 is any. `rare`: it has a
    selector that is not read here, such as IPv6's flow label, so it selects no ordinary packet.
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
    source_mask: int = FULL_PORT_MASK
    destination_ports: tuple[int, int] | None = None
    destination_mask: int = FULL_PORT_MASK
    incoming: str = ""
    outgoing: str = ""
    tos: int = 0
    tos_mask: int = 0xFF
    l3mdev: bool = False
    rare: bool = False
    suppress_prefix: int | None = None
    suppress_group: int | None = None

    def names_sender(self) -> bool:
        """Whether it selects by sender: by mark, user or source port, or by a protocol without ports.

        VPN programs except their own packets like this. A rule by destination selects a part of all traffic instead.
        """
        own_protocol = self.protocol is not None and self.protocol not in (
            socket.IPPROTO_TCP,
            socket.IPPROTO_UDP,
            socket.IPPROTO_ICMP,
            socket.IPPROTO_ICMPV6,
        )
        return bool(self.mark) or self.uids is not None or self.source_ports is not None or own_protocol

    def sender(self, uid: int | None = None) -> "Sender":
        """A sender that the selectors match, before any inversion; `uid` is its user if the rule has none."""
        return Sender(
            mark=(self.mark or 0) & self.mask,
            uid=self.uids[0] if self.uids else uid,
            protocol=self.protocol or 0,
            source_port=self.source_ports[0] if self.source_ports else 0,
            destination_port=self.destination_ports[0] if self.destination_ports else 0,
        )


def may_be_one_program(rule: Rule) -> bool:
    """Whether the users or ports of a rule may belong to one program, such as the VPN program, or one that should use
    the VPN.

    A single user may. A range that includes people does not; nor does root, who runs many programs. Debian and Fedora,
    and login.defs(5), assign ids from 1000 on to people. One program has one or a few ports; a long range includes the
    ports of other programs' connections.
    """
    if rule.source_ports is not None:
        low, high = rule.source_ports
        if (high - low + 1) << (FULL_PORT_MASK & ~rule.source_mask).bit_count() > MAX_OWN_PORTS:
            return False
    if rule.uids is None:
        return True
    low, high = rule.uids
    return low > 0 and (low == high or high < FIRST_PERSONAL_UID)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """The properties of a packet, besides its destination, that decide its route.

    A port or protocol of 0 is one that no rule selects.
    `uid` None is a sender that no rule by user selects; `outgoing` is the device that its socket is bound to. A packet
    that this host forwards came in by the device `incoming`.
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


ANY_SENDER: Final = Sender()


def selected(rule: Rule, sender: Sender) -> Iterable[Interval]:
    """The destinations for which the rule selects packets of `sender`."""
    whole = whole_space(rule.version)
    others = selects(rule, sender)
    if rule.destination is None:
        return [whole] if others is not rule.invert else []
    within = (int(rule.destination.network_address), int(rule.destination.broadcast_address))
    if not rule.invert:
        return [within] if others else []
    return subtract([whole], [within]) if others else [whole]


def selects(rule: Rule, sender: Sender) -> bool:
    """Whether all selectors except the destination match, before any inversion."""
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
