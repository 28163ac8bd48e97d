"""Which host carries the tunnel, and at which port and protocol, where no program says so.

OpenConnect and OpenVPN make a host route to their server; so does anybody who wants one address beside the tunnel, and
whatever else goes to the server's own host takes that route as well (TunnelCrack's ServerIP, CVE-2023-36673). It is
tried: packets of different sizes are sent into the tunnel, and what carries it sends one of the same size and a little
more at once, each time. They have one hop to live, so they die at the VPN server, and hold random bytes, so that
compression changes nothing. Takes CAP_NET_RAW, some 4 kB, and as long as the tunnel's program needs to send six
packets: milliseconds as a rule, two thirds of a second at most.
"""

import asyncio
import contextlib
import logging
import os
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from vpn_sentinel.agent.introspect.device import counters
from vpn_sentinel.agent.leakwatch import bpf
from vpn_sentinel.agent.leakwatch.tap import Tap
from vpn_sentinel.agent.net.endpoints import TCP, UDP, Endpoint
from vpn_sentinel.agent.net.facts import FactStore
from vpn_sentinel.agent.net.link import Interface
from vpn_sentinel.agent.net.packets import decode
from vpn_sentinel.agent.probes.datagram import plain_probe
from vpn_sentinel.domain.policy import IPAddress

log = logging.getLogger(__name__)

PROBES: Final = 6
ENOUGH: Final = 5  # probes that the carrier must have followed: one may fall together with a retransmission
FOLLOWS_S: Final = 0.11  # seconds after a probe until the next one, where its carrier's packet was not seen before
SIZES: Final = range(120, 1000)  # bytes of a probe's IP packet: smaller than those of an upload
SIZES_APART_BYTES: Final = 100  # bytes between the sizes of two probes
WRAPPING: Final = range(20, 180)  # bytes that a tunnel may add: headers outside, its own, padding, a MAC
PADDING: Final = 32  # bytes by which that differs from packet to packet
RETRY_S: Final = (2.0, 5.0, 10.0, 30.0, 300.0)
MOMENT_S: Final = 0.05  # seconds in which a busy tunnel shows that it is at work
BUSY, BUSY_SIZE = 3, 400  # packets in that time, and the size in bytes from which on they count
FRESH_S: Final = 0.2  # seconds that an answer holds against a packet to another host or port
SURE_S: Final = 30.0  # and against more packets of a flow that was told
# Where OpenConnect's protocols may go on from one to the other at any time: TLS, DTLS, ESP in UDP.
_TWINS: Final = frozenset({(TCP, 443), (UDP, 443), (UDP, 4500), (UDP, 4501)})
_ANYWHERE: Final[dict[int, IPAddress]] = {4: ip_address("1.1.1.1"), 6: ip_address("2606:4700:4700::1111")}
_FACT: Final = "vpn_server"


@dataclass(frozen=True, slots=True)
class Outer:
    """A packet that left beside the tunnel: to whom, its IP packet's size in bytes, and after how many probes."""

    to: Endpoint
    size: int
    probe: int


def twins(carrier: Endpoint) -> tuple[Endpoint, ...]:
    """It, and where else its program may send: DTLS shares its port with TLS, which stays open beside DTLS and ESP."""
    ends = {(TCP, carrier.port), (UDP, carrier.port)}
    if (carrier.protocol, carrier.port) in _TWINS:
        ends |= _TWINS
    others = (Endpoint(carrier.address, port, protocol) for protocol, port in sorted(ends))
    return tuple(dict.fromkeys((carrier, *others)))


def carried(sizes: list[int], seen: Iterable[Outer]) -> Endpoint | None:
    """Whose packets followed the probes of these `sizes`; None unless they are one program's alone."""
    scores = _scores(sizes, seen)
    best = max(scores, key=lambda end: scores[end], default=None)
    if best is None or scores[best] < ENOUGH:
        return None
    # A program that sends packets of all sizes follows every probe too: then nobody can tell.
    others = scores.keys() - set(twins(best))
    return None if any(scores[end] > len(sizes) // 2 for end in others) else best


def _scores(sizes: list[int], seen: Iterable[Outer]) -> dict[Endpoint, int]:
    """How many of these probes, the first that were sent, were followed by packets to each far end."""
    wraps: dict[Endpoint, list[set[int]]] = {}
    for outer in seen:
        if outer.probe < len(sizes) and (wrap := outer.size - sizes[outer.probe]) in WRAPPING:
            wraps.setdefault(outer.to, [set() for _ in sizes])[outer.probe].add(wrap)
    return {end: _followed(found) for end, found in wraps.items()}


def _followed(wraps: list[set[int]]) -> int:
    """How many probes were followed by a packet that is larger by the same, but for padding; 0 without the first one.

    That one shows that the tunnel's program is at work now, and not about to connect anew.
    """
    every = {w for some in wraps for w in some}
    alike = [[any(0 <= w - low < PADDING for w in some) for some in wraps] for low in every]
    return max((sum(each) for each in alike if each[0]), default=0)


def _led(sizes: list[int], seen: Iterable[Outer]) -> bool:
    """Whether one that may be the carrier by all that was sent so far has followed the last probe."""
    now, before = _scores(sizes, seen), _scores(sizes[:-1], seen)
    return any(score >= _least(sizes) and score > before.get(end, 0) for end, score in now.items())


def _least(sizes: list[int]) -> int:
    """How many of these probes the carrier must have followed, the first one among them."""
    return max(1, len(sizes) - (PROBES - ENOUGH))


async def search(tunnel: Interface, hosts: tuple[IPAddress, ...], ways: tuple[str, ...]) -> Endpoint | None:
    """Try it. `ways` are the devices beside the tunnel. None when nobody can tell; raises OSError where it is refused.

    PermissionError without CAP_NET_RAW.
    """
    version = next((a.version for a in tunnel.addresses if not a.is_link_local), None)
    if version is None:
        return None
    sizes = [SIZES.start + SIZES_APART_BYTES * i + random.randrange(SIZES_APART_BYTES // 2) for i in range(PROBES)]  # noqa: S311 - no secret
    random.shuffle(sizes)
    seen: set[Outer] = set()
    came = asyncio.Event()
    probe = 0

    def packet(_interface: str, ethertype: int, data: bytes, _passed: float) -> None:
        found = decode(ethertype, data)
        if found is not None and found.destination_port is not None and found.protocol in (TCP, UDP):
            end = Endpoint(found.destination, found.destination_port, found.protocol)
            seen.add(Outer(end, found.size, probe))
            came.set()

    with contextlib.ExitStack() as stack:
        taps = []
        for way in ways:
            taps.append(Tap(way, bpf.towards((), range(1, 1)), packet, pause=0.0))
            stack.callback(taps[-1].close)
        header = 28 if version == 4 else 48
        for probe, size in enumerate(sizes):
            # Only what may be the carrier's packet comes up, so that no flood to such a host drowns it.
            made = bpf.towards(hosts, range(size + WRAPPING.start, size + WRAPPING.stop))
            for tap in taps:
                tap.filter(made)
            plain_probe(_ANYWHERE[version], tunnel.name, os.urandom(size - header))
            sent = sizes[: probe + 1]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FOLLOWS_S):
                    while not _led(sent, seen):
                        came.clear()
                        await came.wait()
            if max(_scores(sent, seen).values(), default=0) < _least(sent):
                return None
    return carried(sizes, seen)


async def keeps_on(tunnel: Interface, ends: tuple[Endpoint, ...], ways: tuple[str, ...]) -> bool:
    """Whether a busy tunnel is read in this moment, and some of `ends`, at one address, are sent to all the while.

    Probes get lost in a full queue, where the tunnel's own packets show the same. A TUN or TAP counts what its program
    reads (tun_put_user in drivers/net/tun.c), and one that is connecting anew reads nothing. Raises OSError.
    """
    many = 0

    def packet(_interface: str, ethertype: int, data: bytes, _passed: float) -> None:
        nonlocal many
        found = decode(ethertype, data)
        many += found is not None and (found.protocol, found.destination_port) in {(e.protocol, e.port) for e in ends}

    with contextlib.ExitStack() as stack:
        made = bpf.towards((ends[0].address,), range(BUSY_SIZE, 1 << 16))
        for way in ways:
            stack.callback(Tap(way, made, packet, pause=0.0).close)
        before = _sent(tunnel.name)
        await asyncio.sleep(MOMENT_S)
        return many >= BUSY and _sent(tunnel.name) - before >= BUSY * BUSY_SIZE


def _sent(name: str) -> int:
    """Bytes that a device sent so far, 0 when it is gone. Raises OSError."""
    _received, sent = counters(Path("/proc/net/dev").read_bytes(), name) or (0, 0)
    return sent


Search = Callable[[Interface, tuple[IPAddress, ...], tuple[str, ...]], Awaitable[Endpoint | None]]
KeepsOn = Callable[[Interface, tuple[Endpoint, ...], tuple[str, ...]], Awaitable[bool]]


@dataclass(slots=True, kw_only=True)
class Carrier:
    """What is known of the tunnel's server by trial, for one device and one set of hosts.

    Nothing is tried while nothing changes and no packet is in doubt. Where packets cannot be watched, the one host that
    had a route when the tunnel was seen first is remembered.
    """

    memory: FactStore
    now: Callable[[], float]
    search: Search = search
    keeps_on: KeepsOn = keeps_on
    changed: Callable[[], None] = lambda: None
    found: Endpoint | None = None
    steady: bool = False  # whether the last trial told at once, so that the tunnel's program was not connecting anew
    _tunnel: Interface | None = None
    _hosts: tuple[IPAddress, ...] = ()
    _ways: tuple[str, ...] = ()
    _is_reported: bool = False
    _failed: bool = False  # it was tried with these hosts, and nobody could tell
    _able: bool = True
    _at: float | None = None  # when it was found for these hosts, None when they changed since
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def server(self) -> IPAddress | None:
        """The host that carries the tunnel, None when nobody can tell."""
        if self.found is not None and self._at is not None:
            return self.found.address
        if self._is_reported:
            return None  # its own route alone says nothing of it
        return self._hosts[0] if len(self._hosts) == 1 else None if self._able else self._remembered()

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Where the tunnel's own packets were found to go."""
        return () if self.found is None else twins(self.found)

    @property
    def closed(self) -> bool:
        """Whether ports tell the tunnel's packets, so that more to the server's own host is in doubt: it can be tried,
        and was not in vain."""
        known = self.found is not None or self._is_reported
        return self._able and self._tunnel is not None and bool(self._hosts) and known and not self._failed

    @property
    def open(self) -> bool:
        """Whether it is to be tried where the tunnel's packets go."""
        untold = self.found is None and (self._failed or not self._is_reported)
        return self._able and self._tunnel is not None and bool(self._hosts) and untold

    def sure(self, seconds: float = FRESH_S) -> bool:
        """Whether `found` was tried in the last `seconds`."""
        return self._at is not None and self.now() - self._at < seconds

    def doubts(self, to: IPAddress) -> bool:
        """Whether what goes to this address may be the tunnel's all the same, and a trial would tell."""
        return self.closed and to in self._hosts

    def look(
        self,
        tunnel: Interface | None,
        hosts: tuple[IPAddress, ...],
        ways: tuple[str, ...],
        *,
        able: bool,
        reported: bool = False,
    ) -> None:
        """What is there now: the tunnel's device, the hosts that may be its server, the ways beside it.

        `able`: whether packets can be watched. `reported`: whether more than a route tells the tunnel's packets, so
        that what goes there is tried only when it comes up. A new device begins anew; where other hosts came, what is
        known is tried again.
        """
        self._able = self._able and able
        if tunnel is None:
            # Its program goes on sending, to the same server or the next one: nobody can tell which.
            self.found, self._tunnel, self._hosts, self._failed, self._at = None, None, (), False, None
            return
        before = self._tunnel.index if self._tunnel is not None else None
        if (before, self._hosts, self._is_reported) != (tunnel.index, hosts, reported):
            if before != tunnel.index or (self.found is not None and self.found.address not in hosts):
                self.found = None
            self._failed, self._at = False, None
            if hosts and not reported:
                self._wake.set()
        self._tunnel, self._hosts, self._ways, self._is_reported = tunnel, hosts, ways, reported
        if len(hosts) == 1 and not reported:
            self._keep(tunnel, hosts[0])

    def doubt(self) -> None:
        """A packet went to one of the hosts that is not known to be the tunnel's: the tunnel may have moved there."""
        self._wake.set()

    async def run(self) -> None:
        """Try it whenever that is asked for, and later again when nobody could tell."""
        tries = 0
        while True:
            await self._wait(RETRY_S[min(tries, len(RETRY_S)) - 1] if tries else None)
            await self.settle()
            tries = tries + 1 if self.open else 0

    async def settle(self) -> None:
        """Try it once, if there is something to try. Raises nothing."""
        self._wake.clear()
        tunnel, hosts = self._tunnel, self._hosts
        if tunnel is None or not hosts or not self._able:
            return
        found = await self._busy(tunnel) or await self._try(tunnel, hosts)
        self.steady = found is not None
        if found is None and self._able:
            found = await self._try(tunnel, hosts)  # once more, before what was known is given up
        if self._able and (self._tunnel is None or (tunnel.index, hosts) != (self._tunnel.index, self._hosts)):
            self._wake.set()  # the network changed meanwhile: it is tried anew
            return
        if self._able:
            if found is not None and found != self.found:
                log.info("what carries the tunnel was found by its packets", extra={"endpoint": str(found)})
                self._keep(tunnel, found.address)
            self.found, self._failed = found, found is None
            self._at = self.now() if found is not None else None
        self.changed()

    async def _busy(self, tunnel: Interface) -> Endpoint | None:
        """What was found before, where that carries so much that it needs no trial."""
        if self.found is None:
            return None
        with contextlib.suppress(OSError):  # the trial that follows says it
            if await self.keeps_on(tunnel, self.endpoints, self._ways):
                return self.found
        return None

    async def _try(self, tunnel: Interface, hosts: tuple[IPAddress, ...]) -> Endpoint | None:
        try:
            return await self.search(tunnel, hosts, self._ways)
        except PermissionError:
            self._able = False
        except (OSError, ValueError) as e:
            log.info("which host carries the tunnel cannot be tried now", extra={"reason": str(e)})
        return None

    async def _wait(self, seconds: float | None) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()

    def _keep(self, tunnel: Interface, server: IPAddress) -> None:
        """A device that is made anew has another index: its program may have gone on to another server."""
        self.memory.keep(_FACT, f"{tunnel.index} {server}")

    def _remembered(self) -> IPAddress | None:
        index, _, address = (self.memory.fact(_FACT) or "").partition(" ")
        if self._tunnel is None or index != str(self._tunnel.index):
            return None
        return next((h for h in self._hosts if str(h) == address), None)
