"""Parse VPN_SENTINEL_MEANT_OUTSIDE: what the owner declares as meant to go outside the tunnel.

Entries are separated by `;` or line ends:

    published 8000/tcp      answers of a local port to those who connect from outside; a range is `6881-6889/udp`
    port 123/udp            what goes to that port of any host
    user backup             what that user's programs send, by name or number
    only user vpn-user      the tunnel is for that user alone; packets of others do not matter
    interface eth1          this interface is not watched
"""

import pwd
import re
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.agent.leakwatch.rules import PortRange
from vpn_sentinel.agent.net.endpoints import PROTOCOLS, TCP, UDP
from vpn_sentinel.agent.net.routing_rules import Rule

FORMS: Final = "`published 8000/tcp`, `port 123/udp`, `user NAME`, `only user NAME` or `interface NAME`"
INTERFACE_NAME: Final = re.compile(r"[\w.:@+-]{1,15}", re.ASCII)  # safe in an nftables rule: no quote, no wildcard
_MAX_ENTRIES: Final = 64  # the kernel's filter has room for so many


@dataclass(frozen=True, slots=True, kw_only=True)
class MeantOutside:
    """`users` and `only_users` are user ids; `interfaces` names."""

    published: tuple[PortRange, ...] = ()
    ports: tuple[PortRange, ...] = ()
    users: frozenset[int] = frozenset()
    only_users: frozenset[int] = frozenset()
    interfaces: frozenset[str] = frozenset()

    def covers(self, rule: Rule) -> bool:
        """Whether a routing rule selects only ports that are meant to be reached outside the tunnel."""
        if rule.invert or rule.destination_ports is None:
            return False
        low, high = rule.destination_ports
        protocols = (TCP, UDP) if rule.protocol is None else (rule.protocol,)
        return all(any(p.has(one, low) and p.has(one, high) for p in self.ports) for one in protocols)


def parse_meant(text: str) -> MeantOutside:
    """Raises ValueError that names the entry that cannot be used, and why."""
    published: list[PortRange] = []
    ports: list[PortRange] = []
    users: set[int] = set()
    only: set[int] = set()
    interfaces: set[str] = set()
    entries = [e for line in text.splitlines() for e in line.split(";") if e.strip()]
    if len(entries) > _MAX_ENTRIES:
        msg = f"has {len(entries)} entries, and takes {_MAX_ENTRIES}"
        raise ValueError(msg)
    for entry in entries:
        match entry.split():
            case ["published", ports_text]:
                published.append(_ports(ports_text))
            case ["port", ports_text]:
                ports.append(_ports(ports_text))
            case ["user", name]:
                users.add(_uid(name))
            case ["only", "user", name] | ["user", name, "only"]:
                only.add(_uid(name))
            case ["interface", name] if INTERFACE_NAME.fullmatch(name):
                interfaces.add(name)
            case _:
                msg = f"{entry.strip()!r} is not understood; an entry is {FORMS}"
                raise ValueError(msg)
    return MeantOutside(
        published=tuple(published),
        ports=tuple(ports),
        users=frozenset(users),
        only_users=frozenset(only),
        interfaces=frozenset(interfaces),
    )


def _ports(text: str) -> PortRange:
    """`8000/tcp` or `6881-6889/udp`."""
    numbers, _, word = text.partition("/")
    low, dash, high = numbers.partition("-")
    protocol = PROTOCOLS.get(word.lower())
    found = [int(n) for n in (low, high or low) if n.isascii() and n.isdigit() and len(n) <= 5]
    if protocol is None or len(found) != 2 or (dash and not high) or not 0 < found[0] <= found[1] < 2**16:
        msg = f"{text!r} is no port such as 8000/tcp or 6881-6889/udp"
        raise ValueError(msg)
    return PortRange(protocol, found[0], found[1])


def _uid(name: str) -> int:
    if name.isascii() and name.isdigit() and int(name) < 2**32 - 1:
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError as e:
        msg = f"no user is called {name!r} here; a number works for a user of another container"
        raise ValueError(msg) from e
