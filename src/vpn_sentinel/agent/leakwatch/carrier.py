"""Find by trial which host carries the tunnel, and at which port and protocol, where no program reports it.

A host route proves nothing: OpenConnect and OpenVPN make one to their server, users make one for an address that they
want outside the tunnel, and all traffic to the server's own host takes it (TunnelCrack's ServerIP, CVE-2023-36673).

The trial: packets of different sizes are sent into the tunnel. Each time, the program that carries the tunnel sends a
packet of that size plus its overhead. The packets have a hop limit of one, so they end at the VPN server, and hold
random bytes, so that compression does not change their size. A trial needs CAP_NET_RAW, about 4 kB, and the time in
which the tunnel's program sends six packets: usually milliseconds, two thirds of a second at most.
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
MIN_FOLLOWED: Final = 5  # probes that the carrier must follow: one may coincide with a retransmission
FOLLOW_TIMEOUT_S: Final = 0.11  # wait for the carrier's packet after a probe, before the next probe
PROBE_SIZES_BYTES: Final = range(120, 1000)  # of a probe's IP packet: smaller than packets of an upload
PROBE_STEP_BYTES: Final = 100  # between the sizes of two probes
OVERHEAD_BYTES: Final = range(20, 180)  # what a tunnel may add: outer headers, its own header, padding, a MAC
PADDING_BYTES: Final = 32  # by how much the overhead differs from packet to packet
RETRY_S: Final = (2.0, 5.0, 10.0, 30.0, 300.0)
BUSY_WINDOW_S: Final = 0.05  # time in which a busy tunnel shows that it works
BUSY_PACKETS, BUSY_PACKET_BYTES = 3, 400  # packets in that time, and the least size of one that counts
FRESH_S: Final = 0.2  # a result holds so long against a packet to another host or port
SURE_S: Final = 30.0  # and against more packets of a flow that was reported
# OpenConnect may change between these at any time: TLS, DTLS, ESP in UDP.
_OPENCONNECT_ENDS: Final = frozenset({(TCP, 443), (UDP, 443), (UDP, 4500), (UDP, 4501)})
_ANYWHERE: Final[dict[int, IPAddress]] = {4: ip_address("1.1.1.1"), 6: ip_address("2606:4700:4700::1111")}
_FACT: Final = "vpn_server"


@dataclass(frozen=True, slots=True)
class OuterPacket:
    """A packet that left outside the tunnel: its destination, the IP packet's size in bytes, the last probe before
    it.
    """

    to: Endpoint
    size: int
    probe: int


def possible_ends(carrier: Endpoint) -> tuple[Endpoint, ...]:
    """`carrier`, and where else its program may send: DTLS and TLS share a port, and TLS stays open next to DTLS and
    ESP.
    """
    ends = {(TCP, carrier.port), (UDP, carrier.port)}
    if (carrier.protocol, carrier.port) in _OPENCONNECT_ENDS:
        ends |= _OPENCONNECT_ENDS
    others = (Endpoint(carrier.address, port, protocol) for protocol, port in sorted(ends))
    return tuple(dict.fromkeys((carrier, *others)))


def carrier_of(sizes: list[int], seen: Iterable[OuterPacket]) -> Endpoint | None:
    """The endpoint whose packets followed probes of these `sizes` in bytes; None unless one program's alone did."""
    scores = _scores(sizes, seen)
    best = max(scores, key=lambda end: scores[end], default=None)
    if best is None or scores[best] < MIN_FOLLOWED:
        return None
    # A program that sends packets of all sizes follows every probe as well: then the result is open.
    others = scores.keys() - set(possible_ends(best))
    return None if any(scores[end] > len(sizes) // 2 for end in others) else best


def _scores(sizes: list[int], seen: Iterable[OuterPacket]) -> dict[Endpoint, int]:
    """For each far end, how many of the probes sent so far (`sizes`) were followed by packets to it."""
    wraps: dict[Endpoint, list[set[int]]] = {}
    for outer in seen:
        if outer.probe < len(sizes) and (wrap := outer.size - sizes[outer.probe]) in OVERHEAD_BYTES:
            wraps.setdefault(outer.to, [set() for _ in sizes])[outer.probe].add(wrap)
    return {end: _followed_probes(found) for end, found in wraps.items()}


def _followed_probes(wraps: list[set[int]]) -> int:
    """How many probes were followed by a packet that is larger by the same overhead, but for padding.

    0 if none followed the first probe: that one shows that the tunnel's program works now and is not reconnecting.
    """
    every = {w for some in wraps for w in some}
    alike = [[any(0 <= w - low < PADDING_BYTES for w in some) for some in wraps] for low in every]
    return max((sum(each) for each in alike if each[0]), default=0)


def _is_followed(sizes: list[int], seen: Iterable[OuterPacket]) -> bool:
    """Whether an endpoint that may be the carrier, by all probes so far, has followed the last one."""
    now, before = _scores(sizes, seen), _scores(sizes[:-1], seen)
    return any(score >= _min_score(sizes) and score > before.get(end, 0) for end, score in now.items())


def _min_score(sizes: list[int]) -> int:
    """How many of these probes the carrier must have followed, including the first one."""
    return max(1, len(sizes) - (PROBES - MIN_FOLLOWED))


async def search(tunnel: Interface, hosts: tuple[IPAddress, ...], outside_devices: tuple[str, ...]) -> Endpoint | None:
    """Run one trial. `outside_devices` are the names of the interfaces outside the tunnel.

    None when the result is open. Raises OSError, PermissionError without CAP_NET_RAW.
    """
    version = next((a.version for a in tunnel.addresses if not a.is_link_local), None)
    if version is None:
        return None
    steps = (PROBE_SIZES_BYTES.start + PROBE_STEP_BYTES * i for i in range(PROBES))
    sizes = [step + random.randrange(PROBE_STEP_BYTES // 2) for step in steps]  # noqa: S311 - no secret
    random.shuffle(sizes)
    seen: set[OuterPacket] = set()
    packet_seen = asyncio.Event()
    probe = 0

    def packet(_interface: str, ethertype: int, data: bytes, _passed: float) -> None:
        found = decode(ethertype, data)
        if found is not None and found.destination_port is not None and found.protocol in (TCP, UDP):
            end = Endpoint(found.destination, found.destination_port, found.protocol)
            seen.add(OuterPacket(end, found.size, probe))
            packet_seen.set()

    with contextlib.ExitStack() as stack:
        taps = []
        for device in outside_devices:
            taps.append(Tap(device, bpf.towards((), range(1, 1)), packet, pause=0.0))
            stack.callback(taps[-1].close)
        header = 28 if version == 4 else 48
        for probe, size in enumerate(sizes):
            # Only what may be the carrier's packet passes, so that a flood to such a host does not hide it.
            insns = bpf.towards(hosts, range(size + OVERHEAD_BYTES.start, size + OVERHEAD_BYTES.stop))
            for tap in taps:
                tap.filter(insns)
            plain_probe(_ANYWHERE[version], tunnel.name, os.urandom(size - header))
            sent = sizes[: probe + 1]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FOLLOW_TIMEOUT_S):
                    while not _is_followed(sent, seen):
                        packet_seen.clear()
                        await packet_seen.wait()
            if max(_scores(sent, seen).values(), default=0) < _min_score(sent):
                return None
    return carrier_of(sizes, seen)


async def is_busy(tunnel: Interface, ends: tuple[Endpoint, ...], outside_devices: tuple[str, ...]) -> bool:
    """Whether the tunnel's program reads much from its device now, and packets go to `ends`, all at one address.

    In a busy tunnel probes get lost in a full queue, and its own packets show the same. A TUN or TAP device counts what
    its program reads (tun_put_user in drivers/net/tun.c); a program that reconnects reads nothing. Raises OSError.
    """
    many = 0

    def packet(_interface: str, ethertype: int, data: bytes, _passed: float) -> None:
        nonlocal many
        found = decode(ethertype, data)
        many += found is not None and (found.protocol, found.destination_port) in {(e.protocol, e.port) for e in ends}

    with contextlib.ExitStack() as stack:
        insns = bpf.towards((ends[0].address,), range(BUSY_PACKET_BYTES, 1 << 16))
        for device in outside_devices:
            stack.callback(Tap(device, insns, packet, pause=0.0).close)
        before = _sent(tunnel.name)
        await asyncio.sleep(BUSY_WINDOW_S)
        return many >= BUSY_PACKETS and _sent(tunnel.name) - before >= BUSY_PACKETS * BUSY_PACKET_BYTES


def _sent(name: str) -> int:
    """Bytes that a device has sent, 0 when it is gone. Raises OSError."""
    _received, sent = counters(Path("/proc/net/dev").read_bytes(), name) or (0, 0)
    return sent


Search = Callable[[Interface, tuple[IPAddress, ...], tuple[str, ...]], Awaitable[Endpoint | None]]
IsBusy = Callable[[Interface, tuple[Endpoint, ...], tuple[str, ...]], Awaitable[bool]]


@dataclass(slots=True, kw_only=True)
class Carrier:
    """What trials have shown of the tunnel's server, for one device and one set of hosts.

    There is no trial while nothing changes and no packet is in doubt. Where packets cannot be watched, the one host
    that had a route when the tunnel was first seen is remembered.
    """

    memory: FactStore
    now: Callable[[], float]
    search: Search = search
    is_busy: IsBusy = is_busy
    changed: Callable[[], None] = lambda: None
    found: Endpoint | None = None
    steady: bool = False  # the last trial succeeded at once: the tunnel's program was not reconnecting
    _tunnel: Interface | None = None
    _hosts: tuple[IPAddress, ...] = ()
    _outside_devices: tuple[str, ...] = ()
    _is_reported: bool = False
    _failed: bool = False  # the trial with these hosts had no result
    _able: bool = True
    _at: float | None = None  # when the carrier of these hosts was found, None when they have changed since
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def server(self) -> IPAddress | None:
        """The host that carries the tunnel, None when that is not known."""
        if self.found is not None and self._at is not None:
            return self.found.address
        if self._is_reported:
            return None  # a host route alone proves nothing
        return self._hosts[0] if len(self._hosts) == 1 else None if self._able else self._remembered()

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Where the tunnel's own packets were found to go."""
        return () if self.found is None else possible_ends(self.found)

    @property
    def closed(self) -> bool:
        """Whether the tunnel's packets are known by their ports, so that other packets to the server's host are in
        doubt: a trial is possible, and the last one had a result.
        """
        known = self.found is not None or self._is_reported
        return self._able and self._tunnel is not None and bool(self._hosts) and known and not self._failed

    @property
    def open(self) -> bool:
        """Whether a trial is due."""
        unknown = self.found is None and (self._failed or not self._is_reported)
        return self._able and self._tunnel is not None and bool(self._hosts) and unknown

    def sure(self, seconds: float = FRESH_S) -> bool:
        """Whether `found` was tried in the last `seconds`."""
        return self._at is not None and self.now() - self._at < seconds

    def doubts(self, to: IPAddress) -> bool:
        """Whether a packet to this address may be the tunnel's all the same, and a trial would show it."""
        return self.closed and to in self._hosts

    def update(
        self,
        tunnel: Interface | None,
        hosts: tuple[IPAddress, ...],
        outside_devices: tuple[str, ...],
        *,
        able: bool,
        reported: bool = False,
    ) -> None:
        """Take the present state: the tunnel's device, the hosts that may be its server, the interfaces outside it.

        `able`: packets can be watched. `reported`: more than a route shows which packets are the tunnel's, so a trial
        waits until a packet is in doubt. A new device starts from nothing; with other hosts, what is known is tried
        again.
        """
        self._able = self._able and able
        if tunnel is None:
            # Its program goes on sending, to the same server or to the next one: which of them is not known.
            self.found, self._tunnel, self._hosts, self._failed, self._at = None, None, (), False, None
            return
        before = self._tunnel.index if self._tunnel is not None else None
        if (before, self._hosts, self._is_reported) != (tunnel.index, hosts, reported):
            if before != tunnel.index or (self.found is not None and self.found.address not in hosts):
                self.found = None
            self._failed, self._at = False, None
            if hosts and not reported:
                self._wake.set()
        self._tunnel, self._hosts, self._outside_devices, self._is_reported = tunnel, hosts, outside_devices, reported
        if len(hosts) == 1 and not reported:
            self._keep(tunnel, hosts[0])

    def doubt(self) -> None:
        """Ask for a trial: a packet went to one of the hosts outside the known endpoints; the tunnel may have moved
        there.
        """
        self._wake.set()

    async def run(self) -> None:
        """Run a trial whenever one is asked for, and again later when it had no result."""
        tries = 0
        while True:
            await self._wait(RETRY_S[min(tries, len(RETRY_S)) - 1] if tries else None)
            await self.settle()
            tries = tries + 1 if self.open else 0

    async def settle(self) -> None:
        """Run one trial if it is possible. Raises nothing."""
        self._wake.clear()
        tunnel, hosts = self._tunnel, self._hosts
        if tunnel is None or not hosts or not self._able:
            return
        found = await self._busy(tunnel) or await self._try(tunnel, hosts)
        self.steady = found is not None
        if found is None and self._able:
            found = await self._try(tunnel, hosts)  # once more before the known server is dropped
        if self._able and (self._tunnel is None or (tunnel.index, hosts) != (self._tunnel.index, self._hosts)):
            self._wake.set()  # the network changed meanwhile: try again
            return
        if self._able:
            if found is not None and found != self.found:
                log.info("what carries the tunnel was found by its packets", extra={"endpoint": str(found)})
                self._keep(tunnel, found.address)
            self.found, self._failed = found, found is None
            self._at = self.now() if found is not None else None
        self.changed()

    async def _busy(self, tunnel: Interface) -> Endpoint | None:
        """The endpoint found before, where it carries so much that no trial is needed."""
        if self.found is None:
            return None
        with contextlib.suppress(OSError):  # the trial that follows logs it
            if await self.is_busy(tunnel, self.endpoints, self._outside_devices):
                return self.found
        return None

    async def _try(self, tunnel: Interface, hosts: tuple[IPAddress, ...]) -> Endpoint | None:
        try:
            return await self.search(tunnel, hosts, self._outside_devices)
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
        """Remember it with the index: a device that is made anew has another one, and perhaps another server."""
        self.memory.keep(_FACT, f"{tunnel.index} {server}")

    def _remembered(self) -> IPAddress | None:
        index, _, address = (self.memory.fact(_FACT) or "").partition(" ")
        if self._tunnel is None or index != str(self._tunnel.index):
            return None
        return next((h for h in self._hosts if str(h) == address), None)
