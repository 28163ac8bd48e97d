"""By which devices packets to a VPN server leave: a known server address explains traffic on those devices only.

One tunnel may run inside another, and a program on this host may wrap a tunnel's packets. Then the server that the
tunnel's program reports applies to the device that its packets take, and not to the next one.
"""

from collections.abc import Collection, Iterable

from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.routes import RTN_UNICAST
from vpn_sentinel.agent.net.routing_rules import ANY_SENDER
from vpn_sentinel.domain.policy import NOT_PUBLIC, IPAddress, within


def devices_to(fib: Fib, servers: Iterable[IPAddress], beside: Collection[int]) -> frozenset[int]:
    """Indices of the devices of `beside` by which packets to any of `servers` leave.

    Where ordinary packets to a server go into the tunnel, a rule excepts those of the tunnel's program: so the senders
    that rules select are tried too.
    """
    found: set[int] = set()
    for server in servers:
        if within(server, NOT_PUBLIC):
            continue  # a wrapper on this host or on the LAN: the outer packets go to another address
        senders = [ANY_SENDER, *(r.sender() for r in fib.rules if r.version == server.version and r.names_sender())]
        for sender in senders:
            entry = fib.lookup(server, sender)
            leaves = {h.interface for h in entry.hops} if entry and entry.type == RTN_UNICAST else set()
            if leaves & set(beside):
                found |= leaves & set(beside)
                break
    return frozenset(found)
