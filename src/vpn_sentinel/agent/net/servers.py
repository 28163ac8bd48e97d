"""By which devices packets to a VPN server leave: what is known of a server says something of those devices alone.

One tunnel may run inside another, and a program on this host may wrap a tunnel's packets: then what the tunnel's own
program tells of its server is true of the device that its packets take, and says nothing of the next one.
"""

from collections.abc import Collection, Iterable

from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.routes import RTN_UNICAST
from vpn_sentinel.agent.net.routing_rules import EVERYBODY
from vpn_sentinel.domain.policy import NOT_PUBLIC, IPAddress, within


def reached(fib: Fib, servers: Iterable[IPAddress], beside: Collection[int]) -> frozenset[int]:
    """Indices of those devices of `beside` by which packets to some of `servers` leave.

    Where everybody's packets go into the tunnel, those of its program are excepted by a rule: the senders that rules
    name are tried then.
    """
    found: set[int] = set()
    for server in servers:
        if within(server, NOT_PUBLIC):
            continue  # a wrapper on this host or on the LAN: what leaves from here on goes elsewhere
        senders = [EVERYBODY, *(r.sender() for r in fib.rules if r.version == server.version and r.names_sender())]
        for sender in senders:
            entry = fib.lookup(server, sender)
            leaves = {h.interface for h in entry.hops} if entry and entry.type == RTN_UNICAST else set()
            if leaves & set(beside):
                found |= leaves & set(beside)
                break
    return frozenset(found)
