"""The nftables rules as text: what may leave outside the tunnel; everything else is dropped. Pure.

They are in a table of their own in the family `inet`, so that no other program's rules are touched. Its chains come
after address translation (priority -100) and see a packet's real destination. No rule asks conntrack: a flow from
before the leak is cut like any other. In nftables a *drop* is final whatever other tables say, while an *accept* here
ends only this table.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from vpn_sentinel.agent.containment.exempt import Exemptions
from vpn_sentinel.agent.leakwatch.meant import INTERFACE_NAME
from vpn_sentinel.agent.net.endpoints import TCP, Endpoint
from vpn_sentinel.domain.policy import IPAddress, IPNetwork

TABLE: Final = "vpn_sentinel"
RELEASED_TABLE: Final = f"{TABLE}_released"  # an empty table: `release` leaves it for the running agent
_OWNER: Final = re.compile(r"[A-Za-z0-9._/-]{1,120}", re.ASCII)
_DNS_PORTS: Final = "{ 53, 853 }"
_NEIGHBOURS: Final = (
    "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld2-listener-report } accept"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowedTraffic:
    """What may pass. `services` are single ports outside the tunnel: the server's, where it is on a private network.

    `marks`, each with its mask, identify the tunnel's own packets where its endpoints are not known.
    `lan` are networks that may be reached, except for DNS; `resolvers` may be asked for names. `leaking_names` are
    nameservers on this host that ask outside: Docker's, whose packets another namespace sends.
    """

    tunnel: str
    endpoints: tuple[Endpoint, ...] = ()
    services: tuple[Endpoint, ...] = ()
    marks: tuple[tuple[int, int], ...] = ()
    lan: tuple[IPNetwork, ...] = ()
    resolvers: tuple[IPNetwork, ...] = ()
    leaking_names: tuple[IPAddress, ...] = ()
    forwards: bool = False
    # What passes in any case: see `exempt`.
    exempt: Exemptions = field(default_factory=Exemptions)

    def __post_init__(self) -> None:
        if not INTERFACE_NAME.fullmatch(self.tunnel):
            msg = f"the interface's name {self.tunnel!r} cannot be used in a rule"
            raise ValueError(msg)
        if not all(INTERFACE_NAME.fullmatch(name) for name in self.exempt.meant.interfaces):
            msg = "an interface's name in VPN_SENTINEL_MEANT_OUTSIDE cannot be used in a rule"
            raise ValueError(msg)


def render(allowed: AllowedTraffic, owner: str) -> str:
    """Commands that replace the table, or create it, in one transaction (nft(8))."""
    rules = [
        'oifname "lo" accept',
        f'oifname "{allowed.tunnel}" accept',
        *(f"{_to(e)} accept" for e in dict.fromkeys((*allowed.endpoints, *allowed.services))),
        *(
            f"meta mark & {mask:#x} == {mark & mask:#x} accept"
            for mark, mask in (() if allowed.endpoints else allowed.marks)
        ),
        *(f"{match} accept" for match in allowed.exempt.matches()),
        *(f"{_destination_in(n)} meta l4proto {{ tcp, udp }} th dport {_DNS_PORTS} accept" for n in allowed.resolvers),
        f'meta l4proto {{ tcp, udp }} th dport {_DNS_PORTS} counter name "held" drop',
        *(f"{_destination_in(n)} accept" for n in _LINK_ONLY),
        *(f"{_destination_in(n)} accept" for n in allowed.lan),
        "udp sport 68 udp dport 67 accept",
        "udp sport 546 udp dport 547 accept",
        _NEIGHBOURS,
        'counter name "held" drop',
    ]
    chains = [_chain("ways_out", rules), _base_chain("output", "output", "filter + 10", ["jump ways_out"])]
    if allowed.forwards:
        chains += [_base_chain("forward", "forward", "filter + 10", ["jump ways_out"])]
    if allowed.leaking_names:
        # Before address translation: queries to Docker's resolver go to port 53, and it listens on another one.
        drops = [f"{_destination(a)} meta l4proto {{ tcp, udp }} th dport 53 drop" for a in allowed.leaking_names]
        chains += [_base_chain("names", "output", "raw", drops)]
    body = "\n".join([f'  comment "{owner}"', "  counter held {", "  }", *chains])
    # Declared first, so that deleting a missing table is no error.
    return f"table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{\n{body}\n}}\n"


def removal(*, released_owner: str | None = None) -> str:
    """Commands that remove the table. With `released_owner`, an empty table stays whose comment names that owner."""
    marker = ""
    if released_owner is not None:
        # It may be the comment of another program's table, and text in a rule can include files.
        released_owner = released_owner if _OWNER.fullmatch(released_owner) else ""
        marker = f'{remove_release_marker()}table inet {RELEASED_TABLE} {{\n  comment "{released_owner}"\n}}\n'
    return f"table inet {TABLE}\ndelete table inet {TABLE}\n{marker}"


def remove_release_marker() -> str:
    """Commands that remove the empty table that `release` left."""
    return f"table inet {RELEASED_TABLE}\ndelete table inet {RELEASED_TABLE}\n"


# No router forwards these: link-local addresses and multicast of the own link (RFC 4291, RFC 5771).
_LINK_ONLY: Final[tuple[str, ...]] = ("224.0.0.0/24", "fe80::/10", "ff02::/16")


def _to(endpoint: Endpoint) -> str:
    protocol = "tcp" if endpoint.protocol == TCP else "udp"
    near = "" if endpoint.near is None else f"{protocol} sport {endpoint.near} "
    return f"{_destination(endpoint.address)} {near}{protocol} dport {endpoint.port}"


def _destination(address: IPAddress) -> str:
    return f"{'ip6' if address.version == 6 else 'ip'} daddr {address}"


def _destination_in(network: IPNetwork | str) -> str:
    return f"{'ip6' if ':' in str(network) else 'ip'} daddr {network}"


def _chain(name: str, rules: Iterable[str]) -> str:
    return "\n".join([f"  chain {name} {{", *(f"    {rule}" for rule in rules), "  }"])


def _base_chain(name: str, hook: str, priority: str, rules: Iterable[str]) -> str:
    return _chain(name, [f"type filter hook {hook} priority {priority}; policy accept;", *rules])
