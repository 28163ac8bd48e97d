"""Nameservers of the LAN, private or on an own link, to which DNS queries were seen to go outside the tunnel.

Such a query proves no leak: the home router, or a forwarder on the container's subnet, may answer by itself or through
a VPN of its own. The address from which it asks the internet decides, so each round asks it (`probes.dns`).
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.agent.net.packets import Packet
from vpn_sentinel.domain.policy import IPAddress

# How long rounds ask one after a query to it was seen: the interval of regular rounds, so that a nameserver that was
# asked once is not reported for longer than it can be checked.
KEEP_ASKING_S: Final = 30.0
# The same for one that asks the internet outside the tunnel: as long as any other flow is reported after its last
# packet. Else a repaired leak would last for as long as the agent itself asks.
KEEP_ASKING_LEAKING_S: Final = 10.0
MAX_NEIGHBORS: Final = 3  # as many as resolv.conf(5) allows
_MARGIN_S: Final = 0.05
# A resolver answers these from its knowledge of the own network and forwards none: RFC 6761, 6762, 8375, IANA's
# special-use domain names, ICANN's `internal`; `lan`, `home` and `localdomain` are home routers' zones. Not `test`
# and `invalid`: routers forward them like any other name (dnsmasq), so a query for one shows where others go too.
_LOCAL_SUFFIXES: Final = frozenset({"local", "localhost", "internal", "lan", "home", "localdomain", "onion"})
# Names of home routers: public domains, which the routers answer themselves.
_ROUTER_NAMES: Final = (
    "fritz.box", "speedport.ip", "easy.box", "o2.box", "routerlogin.net", "tplinkwifi.net", "router.asus.com",
    "asusrouter.com",
)  # fmt: skip
# Reverse names of private networks (RFC 6303).
_PRIVATE_REVERSE_ZONES: Final = (
    "10.in-addr.arpa", "168.192.in-addr.arpa", "254.169.in-addr.arpa", "127.in-addr.arpa", "d.f.ip6.arpa",
    "8.e.f.ip6.arpa", "home.arpa", *(f"{n}.172.in-addr.arpa" for n in range(16, 32)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Neighbor:
    """`interface` is the name of the device that the query left by."""

    address: IPAddress
    interface: str


class Neighbors:
    """The nameservers that were asked lately, at most three; a new one replaces the one that was asked longest ago."""

    def __init__(self, now: Callable[[], float], on_left: Callable[[], None] = lambda: None) -> None:
        """`now` is a monotonic clock in seconds; `on_left` is called when a leaking one is not asked any more."""
        self._now, self._on_left = now, on_left
        self._timer: asyncio.TimerHandle | None = None
        self._seen: dict[Neighbor, float] = {}
        self._leaking: frozenset[IPAddress] = frozenset()

    @property
    def known(self) -> tuple[Neighbor, ...]:
        return tuple(self._seen)

    @property
    def quiet(self) -> tuple[Neighbor, ...]:
        """Those that do not leak: each round asks them, so further queries to them tell nothing new."""
        return tuple(n for n in self._seen if n.address not in self._leaking)

    @property
    def leaking(self) -> tuple[Neighbor, ...]:
        return tuple(n for n in self._seen if n.address in self._leaking)

    def saw(self, packet: Packet, interface: str) -> Neighbor | None:
        """Note a query to a nameserver. Returns the nameserver when it is new."""
        if packet.name is not None and stays_local(packet.name):
            return None
        neighbor = Neighbor(packet.destination, interface)
        new = neighbor not in self._seen
        self._seen.pop(neighbor, None)
        self._seen[neighbor] = self._now()
        while len(self._seen) > MAX_NEIGHBORS:
            del self._seen[next(iter(self._seen))]
        return neighbor if new else None

    def judged(self, asked: Iterable[IPAddress], leaking: Iterable[IPAddress]) -> None:
        """Take a round's result: the nameservers it asked, and those that leak.

        Queries to one that is found to leak were not seen until now: its time starts anew.
        """
        found = frozenset(leaking)
        new = found - self._leaking
        self._seen = {n: self._now() if n.address in new else at for n, at in self._seen.items()}
        # One that was not asked now may come again, since a forwarder asks it only when it is asked itself.
        kept = self._leaking - frozenset(asked)
        self._leaking = found if len(kept) > MAX_NEIGHBORS else found | kept

    def forget(self) -> float | None:
        """Drop those that were not asked lately. Returns the seconds until the next leaking one is over."""
        now = self._now()
        on_left = {
            n: at + (KEEP_ASKING_LEAKING_S if n.address in self._leaking else KEEP_ASKING_S) - now
            for n, at in self._seen.items()
        }
        self._seen = {n: at for n, at in self._seen.items() if on_left[n] > 0}
        return min((on_left[n] for n in self.leaking), default=None)

    def expect_the_end(self) -> None:
        """Have the end of a leak reported when it comes, and not by the next regular round only."""
        if self._timer is None:
            self._check_leaking()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _check_leaking(self) -> None:
        before, seconds = self.leaking, self.forget()
        self._timer = None
        if seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(seconds + _MARGIN_S, self._check_leaking)
        if before != self.leaking:
            self._on_left()


def stays_local(name: str) -> bool:
    """Whether a name belongs to the own network, so that no query for it goes to the internet."""
    name = name.lower().rstrip(".")
    own = "." not in name or name.rpartition(".")[2] in _LOCAL_SUFFIXES
    return own or any(name == r or name.endswith("." + r) for r in (*_PRIVATE_REVERSE_ZONES, *_ROUTER_NAMES))
