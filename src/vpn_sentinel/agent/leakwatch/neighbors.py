"""Nameservers beside the tunnel that are no public ones, or on the own link, and that packets were seen to ask.

Such a packet proves no leak: the home router, or a forwarder on the container's subnet, may answer by itself or ask
through a VPN of its own. What it asks the internet from tells, so whoever finds one here asks it (`probes.dns`).
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from vpn_sentinel.agent.net.packets import Packet
from vpn_sentinel.domain.policy import IPAddress

# Seconds that one is asked after a packet to it, before another packet must show it again: a regular round's interval,
# so that what was asked once does not leak for longer than it can be seen to.
KEEP_ASKING_S: Final = 30.0
# And of one that asks the internet from beside the tunnel, whose every packet comes up: as long as any other flow is
# told of after its last packet. Else a leak that has been mended would last for as long as we ask by ourselves.
KEEP_ASKING_LEAKING_S: Final = 10.0
MAX_NEIGHBORS: Final = 3  # as many as resolv.conf(5) takes
_MARGIN_S: Final = 0.05
# Names that a resolver answers from what it knows of the own network, and asks nobody for: RFC 6761, 6762, 8375, IANA's
# special-use domain names, ICANN's `internal`; `lan`, `home` and `localdomain` are what home routers call theirs. Not
# `test` and `invalid`: routers pass them on like any other (dnsmasq), so a question for one shows where others go too.
_LOCAL: Final = frozenset({"local", "localhost", "internal", "lan", "home", "localdomain", "onion"})
# What home routers call themselves: names of the internet, which they answer themselves.
_ROUTERS: Final = (
    "fritz.box", "speedport.ip", "easy.box", "o2.box", "routerlogin.net", "tplinkwifi.net", "router.asus.com",
    "asusrouter.com",
)  # fmt: skip
# Reverse names of private networks (RFC 6303).
_REVERSE: Final = (
    "10.in-addr.arpa", "168.192.in-addr.arpa", "254.169.in-addr.arpa", "127.in-addr.arpa", "d.f.ip6.arpa",
    "8.e.f.ip6.arpa", "home.arpa", *(f"{n}.172.in-addr.arpa" for n in range(16, 32)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Neighbor:
    """`interface` is the name of the device that the question left by."""

    address: IPAddress
    interface: str


class Neighbors:
    """Knows whom packets asked lately. At most three; the one that was seen longest ago makes room."""

    def __init__(self, now: Callable[[], float], left: Callable[[], None] = lambda: None) -> None:
        """`now` is a clock in seconds that never jumps; `left` is called when nobody asks one any more that leaks."""
        self._now, self._left = now, left
        self._timer: asyncio.TimerHandle | None = None
        self._seen: dict[Neighbor, float] = {}
        self._leaking: frozenset[IPAddress] = frozenset()

    @property
    def known(self) -> tuple[Neighbor, ...]:
        return tuple(self._seen)

    @property
    def hushed(self) -> tuple[Neighbor, ...]:
        """Those of which the next packet tells nothing new, since each round asks them."""
        return tuple(n for n in self._seen if n.address not in self._leaking)

    @property
    def leaking(self) -> tuple[Neighbor, ...]:
        return tuple(n for n in self._seen if n.address in self._leaking)

    def saw(self, packet: Packet, interface: str) -> Neighbor | None:
        """Note a question to a nameserver. Returns it when it is a new one."""
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
        """A round asked these, and found that some of them leak.

        One that turns out to leak was hushed until now: its packets have the whole time to show.
        """
        found = frozenset(leaking)
        news = found - self._leaking
        self._seen = {n: self._now() if n.address in news else at for n, at in self._seen.items()}
        # What is not seen any more may come again, as a forwarder asks it only when it is asked itself.
        kept = self._leaking - frozenset(asked)
        self._leaking = found if len(kept) > MAX_NEIGHBORS else found | kept

    def forget(self) -> float | None:
        """Drop those that no packet is known to have gone to lately; seconds until the next one that leaks is over."""
        now = self._now()
        left = {
            n: at + (KEEP_ASKING_LEAKING_S if n.address in self._leaking else KEEP_ASKING_S) - now
            for n, at in self._seen.items()
        }
        self._seen = {n: at for n, at in self._seen.items() if left[n] > 0}
        return min((left[n] for n in self.leaking), default=None)

    def expect_the_end(self) -> None:
        """Of one that leaks, have the end told when it comes: else the next regular round would tell."""
        if self._timer is None:
            self._see_who_left()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _see_who_left(self) -> None:
        before, seconds = self.leaking, self.forget()
        self._timer = None
        if seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(seconds + _MARGIN_S, self._see_who_left)
        if before != self.leaking:
            self._left()


def stays_local(name: str) -> bool:
    """Whether a name is one of the own network, of which the internet is not asked."""
    name = name.lower().rstrip(".")
    own = "." not in name or name.rpartition(".")[2] in _LOCAL
    return own or any(name == r or name.endswith("." + r) for r in (*_REVERSE, *_ROUTERS))
