"""The text of our nftables rules: what may leave beside the tunnel, and the end of everything else. Pure.

One table of our own in the family `inet`, so that nothing of anybody else's is touched. Its chains come after address
translation (priority -100) and see where a packet really goes. No rule asks conntrack: a flow that was there before the
leak is cut like any other. A verdict *drop* is final in nftables whatever other tables say; an *accept* here only means
that we have nothing against it.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from vpn_sentinel.agent.containment.exempt import Exemptions
from vpn_sentinel.agent.net.endpoints import TCP, Endpoint
from vpn_sentinel.domain.policy import IPAddress, IPNetwork

TABLE: Final = "vpn_sentinel"
RELEASED: Final = f"{TABLE}_released"  # an empty table: `release` leaves it for the agent that runs
_INTERFACE: Final = re.compile(r"[\w.:@+-]{1,15}", re.ASCII)  # no quote, no wildcard
_OWNER: Final = re.compile(r"[A-Za-z0-9._/-]{1,120}", re.ASCII)
_DNS_PORTS: Final = "{ 53, 853 }"
_NEIGHBOURS: Final = (
    "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld2-listener-report } accept"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """What stays open. `services` are single ports beside the tunnel: our own server, when it is on a private network.

    `marks`, each with its mask, tell the tunnel's own packets where its endpoints are not known.
    `lan` are networks that may be reached, except for DNS; `resolvers` may be asked for names. `leaking_names` are
    nameservers on this very host that ask outside: Docker's, whose packets another namespace sends.
    """

    tunnel: str
    endpoints: tuple[Endpoint, ...] = ()
    services: tuple[Endpoint, ...] = ()
    marks: tuple[tuple[int, int], ...] = ()
    lan: tuple[IPNetwork, ...] = ()
    resolvers: tuple[IPNetwork, ...] = ()
    leaking_names: tuple[IPAddress, ...] = ()
    forwards: bool = False
    # What passes whatever else holds: see `exempt`.
    exempt: Exemptions = field(default_factory=Exemptions)

    def __post_init__(self) -> None:
        if not _INTERFACE.fullmatch(self.tunnel):
            msg = f"the interface's name {self.tunnel!r} cannot stand in a rule"
            raise ValueError(msg)
        if not all(_INTERFACE.fullmatch(name) for name in self.exempt.meant.interfaces):
            msg = "an interface's name in VPN_SENTINEL_MEANT_OUTSIDE cannot stand in a rule"
            raise ValueError(msg)


def render(ways: Ways, owner: str) -> str:
    """Commands that put the table in place of any older one of ours, in one transaction (nft(8))."""
    rules = [
        'oifname "lo" accept',
        f'oifname "{ways.tunnel}" accept',
        *(f"{_to(e)} accept" for e in dict.fromkeys((*ways.endpoints, *ways.services))),
        *(f"meta mark & {mask:#x} == {mark & mask:#x} accept" for mark, mask in (() if ways.endpoints else ways.marks)),
        *(f"{match} accept" for match in ways.exempt.matches()),
        *(f"{_within(n)} meta l4proto {{ tcp, udp }} th dport {_DNS_PORTS} accept" for n in ways.resolvers),
        f'meta l4proto {{ tcp, udp }} th dport {_DNS_PORTS} counter name "held" drop',
        *(f"{_within(n)} accept" for n in _LINK_ONLY),
        *(f"{_within(n)} accept" for n in ways.lan),
        "udp sport 68 udp dport 67 accept",
        "udp sport 546 udp dport 547 accept",
        _NEIGHBOURS,
        'counter name "held" drop',
    ]
    chains = [_chain("ways_out", rules), _hooked("output", "output", "filter + 10", ["jump ways_out"])]
    if ways.forwards:
        chains += [_hooked("forward", "forward", "filter + 10", ["jump ways_out"])]
    if ways.leaking_names:
        # Before address translation: Docker's resolver is asked on port 53 and listens on another one.
        asked = [f"{_at(a)} meta l4proto {{ tcp, udp }} th dport 53 drop" for a in ways.leaking_names]
        chains += [_hooked("names", "output", "raw", asked)]
    body = "\n".join([f'  comment "{owner}"', "  counter held {", "  }", *chains])
    # Declared first, so that the deletion of a table that is not there is no error.
    return f"table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n{body}\n}}\n"


def removal(*, leave_word: str | None = None) -> str:
    """Commands that remove the table. With `leave_word`, an empty one stays that names who was released."""
    word = ""
    if leave_word is not None:
        # It may be the comment of somebody else's table, and the text of a rule can include files.
        leave_word = leave_word if _OWNER.fullmatch(leave_word) else ""
        word = f'{forget_word()}table inet {RELEASED} {{\n  comment "{leave_word}"\n}}\n'
    return f"table inet {TABLE}\ndelete table inet {TABLE}\n{word}"


def forget_word() -> str:
    """Commands that remove what `release` left."""
    return f"table inet {RELEASED}\ndelete table inet {RELEASED}\n"


# Packets that no router passes on: link-local addresses and multicast of the own link (RFC 4291, RFC 5771).
_LINK_ONLY: Final[tuple[str, ...]] = ("224.0.0.0/24", "fe80::/10", "ff02::/16")


def _to(endpoint: Endpoint) -> str:
    protocol = "tcp" if endpoint.protocol == TCP else "udp"
    near = "" if endpoint.near is None else f"{protocol} sport {endpoint.near} "
    return f"{_at(endpoint.address)} {near}{protocol} dport {endpoint.port}"


def _at(address: IPAddress) -> str:
    return f"{'ip6' if address.version == 6 else 'ip'} daddr {address}"


def _within(network: IPNetwork | str) -> str:
    return f"{'ip6' if ':' in str(network) else 'ip'} daddr {network}"


def _chain(name: str, rules: Iterable[str]) -> str:
    return "\n".join([f"  chain {name} {{", *(f"    {rule}" for rule in rules), "  }"])


def _hooked(name: str, hook: str, priority: str, rules: Iterable[str]) -> str:
    return _chain(name, [f"type filter hook {hook} priority {priority}; policy accept;", *rules])
