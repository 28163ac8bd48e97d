"""The packet sockets on the event loop: one for each way out that is not the tunnel, filtered in the kernel.

Nothing here runs while nothing leaks: no timer, and no packet comes up. packet(7) describes the sockets.
"""

import asyncio
import logging
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from vpn_sentinel.agent.endpoints import PROTOCOLS, UDP, Endpoint
from vpn_sentinel.agent.interfaces import Paths, Survey
from vpn_sentinel.agent.leakwatch import bpf
from vpn_sentinel.agent.leakwatch.book import Book
from vpn_sentinel.agent.leakwatch.ground import Ground, Tables, ground
from vpn_sentinel.agent.leakwatch.packets import Packet, decode
from vpn_sentinel.agent.leakwatch.rules import Rules
from vpn_sentinel.agent.leakwatch.shapes import Shape, Shapes
from vpn_sentinel.agent.probes.canary import BESIDE_HOPS
from vpn_sentinel.agent.probes.targets import CLOUDFLARE, OPENDNS
from vpn_sentinel.domain.observation import Answer, Canary, Escape, Path, Probe
from vpn_sentinel.domain.policy import IPAddress, Policy
from vpn_sentinel.runtime.clock import Clock

log = logging.getLogger(__name__)

BATCH: Final = 64  # packets read at once; more of them are a flood
PAUSE: Final = 0.25  # seconds that a flood is left alone; the kernel goes on counting
AGAIN: Final = 1.0  # seconds between two tellings while it leaks
LOOK: Final = 0.2  # seconds that a look at routes and endpoints holds for further doubts
DOUBTS: Final = 4 * BATCH  # packets without a word to say about them, until the next look
MEANT: Final = 3.0  # seconds that a port stays known as a probe's own: longer than any question waits
_WHOAMI: Final = frozenset(t.domain for t in (*CLOUDFLARE, *OPENDNS))
_ETH_P_ALL: Final = 0x0003
_SOL_PACKET, _STATISTICS = 263, 6
_BUFFER: Final = 64 * 1024
_LEARNED: Final = 8


class LeakWatch:
    """Watches what `look` was told of. Unable to tell the tunnel's own packets from others, it says nothing."""

    def __init__(
        self,
        *,
        tables: Tables | None,
        policy: Policy,
        clock: Clock,
        told: Callable[[], None],
        survey: Callable[[], Survey],
        endpoints: Callable[[], Iterable[Endpoint]] = tuple,
        meant: Callable[[], Iterable[IPAddress]] = tuple,
        on_escape: Callable[[Escape], None] = lambda _: None,
    ) -> None:
        """`endpoints` are those that are known from elsewhere; `meant` are hosts whose own route is no leak.

        `on_escape` gets the first packet of each new destination at once. `told` is called when there is something to
        tell: with the first escape, then at most once a second.
        """
        self._tables, self._policy, self._clock = tables, policy, clock
        self._told, self._survey, self._endpoints, self._meant = told, survey, endpoints, meant
        self._on_escape = on_escape
        self._taps: dict[int, _Tap] = {}
        self._ground = Ground()
        self._rules = Rules()
        self._tunnel: str | None = None
        self._shapes = Shapes()
        self._learned: OrderedDict[Endpoint, None] = OrderedDict()
        self._ports: dict[int, float] = {}
        self._book = Book()
        self._permitted: bool | None = None
        self._looked = float("-inf")
        self._told_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._said_unable = False
        self._doubts = 0

    # --- what others ask ---

    @property
    def on(self) -> bool | None:
        """Whether packets are watched; None when there is no tunnel to watch beside, or nothing tells its packets."""
        if self._tunnel is None or self._permitted is None:
            return None
        if not self._permitted:
            return False
        return True if self._able() else None

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Where the tunnel's own packets go, as far as that is known: told from elsewhere first, then learned."""
        return tuple(dict.fromkeys((*self._endpoints(), *self._learned)))

    def expect(self, port: int) -> None:
        """A probe will send beside the tunnel from this port: that is no leak."""
        now = self._clock.boottime()
        self._ports = {p: until for p, until in self._ports.items() if until > now}
        self._ports[port] = now + MEANT

    def escapes(self, paths: Paths, canaries: tuple[Canary, ...] = ()) -> tuple[Escape, ...]:
        """The flows that matter now: seen in the last ten seconds, or still routed outside beside a tunnel that works.

        Where a kill switch refuses a family, its packets do not leave, wherever they are routed.
        """
        link = paths.survey.link()
        works = link is not None and link.up
        held = {c.family for c in canaries if c.probe is Probe.PHYSICAL and c.answer is Answer.BLOCKED}

        def still(escape: Escape) -> bool:
            if not works or escape.destination.version in held:
                return False
            protocol = PROTOCOLS.get(escape.protocol, 0)
            return paths.of(escape.destination, escape.destination_port or 0, protocol) is Path.OUTSIDE

        self._make_rules()  # a round has asked the tunnel's own program again
        now = self._clock.boottime()
        self._book.forget(now, still)
        return self._book.tell(now) if self.on else ()

    @property
    def _refused(self) -> bool:
        return self._permitted is False

    # --- what it stands on ---

    def look(self, survey: Survey) -> None:
        """Watch what is there now: open and close sockets, and give all of them the filter that fits."""
        self._doubts = 0
        self._stand_on(survey)

    def _stand_on(self, survey: Survey) -> None:
        self._tunnel = survey.tunnel
        self._looked = self._clock.boottime()
        if survey.tunnel is None or survey.interfaces is None or self._refused:
            self._close_taps(())
            return
        try:
            self._ground = ground(
                survey,
                self._tables,
                allowed=self._policy.allowed_outside,
                resolvers=self._policy.allowed_resolvers,
                before=self._ground,
            )
        except OSError as e:
            log.warning("routes cannot be read: the leak watch stays as it is", extra={"reason": e.strerror})
            return
        wanted = {i.index: i.name for i in self._ground.interfaces}
        self._close_taps(wanted)
        self._make_rules()
        for index, name in wanted.items():
            if index not in self._taps and not self._refused:
                self._open(index, name)
        self._say()

    def close(self) -> None:
        self._close_taps(())
        if self._timer is not None:
            self._timer.cancel()

    def _able(self) -> bool:
        return self._ground.tells(self.endpoints)

    def _say(self) -> None:
        if self._permitted and not self._able() and not self._said_unable:
            self._said_unable = True
            log.warning(
                "nothing tells the tunnel's own packets from others: the leak watch says nothing",
                extra={"remedy": "set VPN_SENTINEL_TUNNEL_ENDPOINTS"},
            )

    def _open(self, index: int, name: str) -> None:
        try:
            tap = _Tap(name, bpf.program(self._rules), self._packet, self._book_missed)
        except PermissionError:
            self._permitted = False
            log.warning("packets cannot be watched here", extra={"remedy": "CAP_NET_RAW"})
            return
        except (OSError, ValueError) as e:
            # It went away in this moment, or the sandbox has no packet sockets.
            log.warning("an interface cannot be watched", extra={"interface": name, "reason": str(e)})
            return
        self._permitted = True
        self._taps[index] = tap

    def _close_taps(self, wanted: Iterable[int]) -> None:
        for index in set(self._taps) - set(wanted):
            self._taps.pop(index).close()

    def _make_rules(self) -> None:
        rules = self._ground.with_endpoints(self._endpoints(), self._meant(), self._learned)
        if rules == self._rules:
            return
        self._rules = rules
        try:
            made = bpf.program(self._rules)
            for tap in self._taps.values():
                tap.filter(made)
        except (OSError, ValueError) as e:
            log.error("the leak watch's filter was refused", extra={"reason": str(e)})  # noqa: TRY400 - its text is all

    # --- packets ---

    def _packet(self, interface: str, packet: Packet) -> None:
        now = self._clock.boottime()
        if (
            self._ports.get(packet.source_port or 0, 0.0) > now
            or _is_canary_beside(packet)
            or self._rules.allow(packet)
            or self._is_the_end_of_a_report(interface, packet)
        ):
            return
        shape = self._shapes.of(packet, openvpn=self._ground.openvpn, unsure=not self._able())
        if shape is Shape.OWN and packet.destination_port is not None:
            self._learn(Endpoint(packet.destination, packet.destination_port, UDP))
        if shape is not Shape.OTHER:
            return
        if now - self._looked > LOOK:
            # The tunnel may have moved to another server, or the network changed, and the news is still on its way.
            self._stand_on(self._survey())
            if self._rules.allow(packet):
                return
        if not self.on:
            self._doubts += 1
            if self._doubts > DOUBTS:
                self._close_taps(())  # until the next look: nothing is to be learned here, and watching costs
            return
        new = self._book.see(packet, interface, now)
        if new is not None:
            self._on_escape(new)
            self._tell(now)

    def _is_the_end_of_a_report(self, interface: str, packet: Packet) -> bool:
        """Whether it is of our own connection to the server, begun through a tunnel that went away meanwhile.

        A kill switch that lets established flows pass lets it out, with the tunnel's address as its source.
        """
        if packet.destination not in self._meant():
            return False
        here = next((i for i in self._ground.interfaces if i.name == interface), None)
        return here is not None and packet.source not in here.addresses

    def _learn(self, end: Endpoint) -> None:
        self._learned[end] = None
        self._learned.move_to_end(end)
        if len(self._learned) > _LEARNED:
            self._learned.popitem(last=False)
        log.info("the tunnel's own packets are known by their shape", extra={"endpoint": str(end)})
        self._make_rules()

    def _book_missed(self, packets: int) -> None:
        self._book.missed(packets, self._clock.boottime())

    def _tell(self, now: float) -> None:
        """At once when nothing was told for a second; else when the second is over."""
        if self._timer is not None:
            return
        wait = self._told_at + AGAIN - now
        if wait > 0:
            self._timer = asyncio.get_running_loop().call_later(wait, self._tell_later)
            return
        self._told_at = now
        self._told()

    def _tell_later(self) -> None:
        self._timer = None
        self._tell(self._told_at + AGAIN)


def _is_canary_beside(packet: Packet) -> bool:
    """C2 or C3 of another program of ours in this namespace; what has one hop to live gets no further than the LAN."""
    return packet.hops == 1 or (packet.hops == BESIDE_HOPS and packet.name in _WHOAMI)


class _Tap:
    """One packet socket. It takes nothing in before it is bound, so the filter is there before the first packet."""

    def __init__(
        self,
        interface: str,
        made: list[bpf.Insn],
        packet: Callable[[str, Packet], None],
        missed: Callable[[int], None],
    ) -> None:
        """Raises OSError: PermissionError without CAP_NET_RAW."""
        self._packet, self._missed = packet, missed
        self._resume: asyncio.TimerHandle | None = None
        self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
            bpf.attach(self._sock, made)
            self._sock.bind((interface, _ETH_P_ALL))
        except OSError:
            self._sock.close()
            raise
        asyncio.get_running_loop().add_reader(self._sock, self._readable)

    def filter(self, made: list[bpf.Insn]) -> None:
        bpf.attach(self._sock, made)

    def close(self) -> None:
        if self._resume is not None:
            self._resume.cancel()
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()

    def _readable(self) -> None:
        for _ in range(BATCH):
            try:
                data, (interface, ethertype, *_rest) = self._sock.recvfrom(bpf.SNAP)
            except BlockingIOError:
                return
            except OSError:
                return  # ENETDOWN: the interface went down; the socket hears of it again when it comes up
            packet = decode(ethertype, data)
            if packet is not None:
                self._packet(interface, packet)
            if self._sock.fileno() < 0:
                return  # what the packet led to closed this socket
        asyncio.get_running_loop().remove_reader(self._sock)
        self._resume = asyncio.get_running_loop().call_later(PAUSE, self._go_on)

    def _go_on(self) -> None:
        self._resume = None
        _taken, dropped = struct.unpack("=II", self._sock.getsockopt(_SOL_PACKET, _STATISTICS, 8))
        self._missed(dropped)
        asyncio.get_running_loop().add_reader(self._sock, self._readable)
