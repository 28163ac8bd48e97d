"""Pulses: one small datagram a second to the server's echo, over one socket that stays open.

A pulse without a reply is followed by three quick ones. A round starts when those have no reply either, when a reply
has another address, or when replies resume. Where UDP does not reach the server, one canary every five seconds goes to
a literal address of a public service instead, and the server knows from the WebSocket that the agent is alive.
"""

import asyncio
import logging
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.agent.net.interfaces import Paths
from vpn_sentinel.agent.net.own import OWN_SOCKETS
from vpn_sentinel.agent.net.packettime import ANCILLARY_BYTES, enable_timestamps, packet_time
from vpn_sentinel.agent.probes import tag
from vpn_sentinel.agent.probes.canary import one
from vpn_sentinel.agent.probes.targets import ServerEcho, Target
from vpn_sentinel.agent.sensors.fallback_probe import EVERY_S, FallbackProbes, choose
from vpn_sentinel.agent.sensors.pulse_timing import REPLY_TIMEOUT_S, PulseTiming
from vpn_sentinel.agent.sensors.quality import Rates, Samples
from vpn_sentinel.domain.observation import Answer, Canary, Link, Observation, Path, Probe, Quality
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.wire import pulse

log = logging.getLogger(__name__)

ALIVE_FOR_S: Final = 2.0  # a reply is evidence for that long that the tunnel works
_WORKS_FOR_S: Final = 10.0  # since the last reply, pulses count as working
# Minimum and maximum until a new run, for a server that answers echo requests of a round but no pulses.
_NEW_RUN_AFTER_S: Final = (10.0, 600.0)


@dataclass(slots=True)
class Numbers:
    """Of one run: every pulse, also a sized one, has its own number, so that the server processes each once."""

    run: int = field(default_factory=lambda: secrets.randbits(32))
    number: int = 0
    heard: int = 0

    def next(self) -> int:
        self.number += 1
        return self.number


class PulseSensor:
    """`run` never returns. A round uses `canary`, `silent_for`, `quality` and `works`."""

    def __init__(
        self,
        every: float,
        *,
        echoes: Callable[[], Sequence[Target]],
        on_change: Callable[[], None],
        fits: Callable[[Target], bool] = lambda _: True,
        acked: Callable[[], float | None] = lambda: None,
        boottime: Callable[[], float] = lambda: 0.0,
        wall: Callable[[], float] = lambda: 0.0,
        route: Callable[[IPAddress, int], object] = lambda _address, _port: None,
    ) -> None:
        """`every` is the interval of pulses in seconds; `fits` is whether a target is reached by the tunnel; `acked`
        when the server last acknowledged a report, by the clock `boottime`; `wall` is the clock of the kernel's packet
        timestamps; `route` is any value that changes with the kernel's route to an address and port.
        """
        self._every = every
        self._echoes = echoes
        self._on_change = on_change
        self._fits = fits
        self._acked = acked
        self._boottime, self._wall = boottime, wall
        self._route = route
        self._socket_route: object = None
        self._route_checked_at = 0.0  # when the kernel was asked for it
        self.numbers = Numbers()
        self.samples = Samples()
        self.rates = Rates()
        self._timing = PulseTiming(every)
        self._fallback = FallbackProbes()
        self._seen: Observation | None = None
        self._target: ServerEcho | None = None
        self._sock: socket.socket | None = None
        self._wakes = False  # whether the loop watches the socket
        self._wake = asyncio.Event()
        self._choice: Target | None = None
        self._last: tuple[float, float, IPAddress] | None = None  # time of the last reply, its round trip, its address
        self._fresh_from = 0.0  # earlier replies may have taken another route
        self._lost_since: float | None = None  # of fallback probes, to literal addresses
        self._unreachable_since: float | None = None  # by `boottime`: others answer, and the echo does not
        self._logged_unreachable = False
        self._silent_from: float | None = None
        self._skip_until, self._skip_for = 0.0, _NEW_RUN_AFTER_S[0]
        # Set by `pathmtu`: the largest packet that passes, and the size of one that is lost.
        self.mtu: int | None = None
        self.vanished: int | None = None
        self.full_at: float | None = None  # when one of the full size passed last, or when its route changed

    # --- events ---

    def saw(self, seen: Observation) -> None:
        """A round is over."""
        self._seen = seen
        self._choice = None
        self._fallback.start_from(seen.canaries)
        answers = {c.target == "echo": c.answer is Answer.ANSWERED for c in _best_last(seen)}
        if answers.get(True):
            self._unreachable_since, self._logged_unreachable = None, False
        elif answers.get(True) is False and answers.get(False) and self._unreachable_since is None:
            self._unreachable_since = self._boottime()
        self._wake.set()

    def reset(self) -> None:
        """Routes or addresses changed: the socket's source address may be stale, and the target may be unreachable."""
        self._close()
        self._choice = None
        self._fresh_from = _now()
        self._wake.set()

    def paused(self) -> None:
        """This process did not run for a while: replies that are missing since before prove nothing."""
        self._timing, self._lost_since = PulseTiming(self._every), None
        self.reset()

    # --- queries by a round ---

    def canary(self, paths: Paths) -> Canary | None:
        """A canary for a reply to a pulse within the last two seconds; None without one.

        On a line with a deep queue, a reply takes longer than a round waits. Only for a tunnel whose interface is up.
        """
        target, link = self._target, paths.survey.link()
        if self._last is None or target is None or (link is not None and not (link.present and link.up)):
            return None
        at, rtt, address = self._last
        path = paths.of(target.address, target.port)
        # Beside the tunnel it would be a leak, for which an earlier answer is no proof.
        if at < max(_now() - ALIVE_FOR_S, self._fresh_from) or path is Path.OUTSIDE:
            return None
        return Canary(
            probe=Probe.DEFAULT,
            target="pulse",
            family=target.address.version,
            answer=Answer.ANSWERED,
            path=path,
            address=address,
            rtt_ms=round(1000 * rtt, 1),
        )

    def silent_for(self) -> float:
        """Seconds since the first pulse or fallback probe without an answer; 0 when something has answered since."""
        since = self._timing.unanswered_since if self._target is not None else self._lost_since
        return 0.0 if since is None else round(max(0.0, _now() - since), 3)

    def quality(self, link: Link | None) -> Quality | None:
        """None before anything is known."""
        now = _now()
        received, sent = self.rates.of(link, now)
        found = self.samples.quality(now)
        if not found.sent and self.mtu is None and self.vanished is None and received is None:
            return None
        return Quality(
            seconds=found.seconds,
            sent=found.sent,
            lost=found.lost,
            reordered=found.reordered,
            rtt_ms=found.rtt_ms,
            jitter_ms=found.jitter_ms,
            mtu=self.mtu,
            vanished=self.vanished,
            vanished_for=round(now - self.full_at, 1) if self.vanished and self.full_at is not None else 0.0,
            lossy_for=found.lossy_for,
            rx_rate=received,
            tx_rate=sent,
        )

    @property
    def lossy(self) -> bool:
        """Whether a close look found too many lost pulses, and no later one found the end of that."""
        return self.samples.high

    def works(self) -> bool | None:
        """Whether pulses reach the server and its replies this host; False only while it accepts reports over TCP."""
        if self._last is not None and _now() - self._last[0] < _WORKS_FOR_S:
            return True
        acked = self._acked()
        if self._unreachable_since is None or acked is None or acked <= self._unreachable_since:
            return None
        if not self._logged_unreachable:
            self._logged_unreachable = True
            log.warning(
                "UDP does not reach the server: reports show that the agent is alive, and public services are probed"
            )
        return False

    @property
    def rtt(self) -> float | None:
        """The last round trip in seconds."""
        return None if self._last is None else self._last[1]

    @property
    def target(self) -> ServerEcho | None:
        """The target of pulses while it replies; None while it does not."""
        return self._target if self._last is not None and not self._timing.silent else None

    # --- the loop ---

    async def run(self) -> None:
        try:
            while True:
                self._wake.clear()
                target = self._choose()
                if isinstance(target, ServerEcho):
                    await self._step(target)
                else:
                    self._close()
                    self._target = None
                    await self._ask_fallback(target)
        finally:
            self._close()

    def _choose(self) -> Target:
        if self._choice is None:
            skipped = _now() < self._skip_until
            self._choice = choose(() if skipped else self._echoes(), self._seen, self._fits)
        elif not isinstance(self._choice, ServerEcho) or self._choice not in self._echoes():
            self._choice = None
            return self._choose()
        return self._choice

    async def _step(self, target: ServerEcho) -> None:
        """Send or decide what is due, and wait for the next due time, or for a reply."""
        if target != self._target:
            self._close()
            self._target, self._timing, self._last = target, PulseTiming(self._every), None
        if not self._wakes:
            self._read(target)
        now = _now()
        if self._timing.dead(now):
            self._silent_from = now
            self.samples.discard_since(self._timing.unanswered_since or now)
            self._on_change()
        self._restart_stale(now)
        if self._timing.due(now):
            self._send(target, now)
        self._look_closely(now)
        self._listen(target, wakes=not self.samples.looking)
        await self._wait(self._timing.wait(_now()))

    def _look_closely(self, now: float) -> None:
        """Send faster while the loss is uncertain; a round reports the result, and the end of a loss."""
        looking, high, poor = self.samples.looking, self.samples.high, self.samples.poor
        pace = self.samples.pace(now)
        if pace is not None and not self._timing.silent:
            self._timing.hurry(now, pace)
        ended = looking and not self.samples.looking
        if ended:
            self.samples.quality(now)  # before more pulses change the result
        if self.samples.high != high or (ended and pace is None and (poor or self.samples.poor)):
            self._on_change()

    def _restart_stale(self, now: float) -> None:
        """A server that answers a round's echo request but no pulse may take this run for an old one: begin another."""
        if not self._timing.silent or self._silent_from is None or now < self._silent_from + _NEW_RUN_AFTER_S[0]:
            return
        answered = self._seen is not None and any(
            c.target == "echo" and c.answer is Answer.ANSWERED for c in self._seen.asked(Probe.DEFAULT)
        )
        if answered:
            self._skip_until, self._skip_for = now + self._skip_for, min(_NEW_RUN_AFTER_S[1], 2 * self._skip_for)
            self.numbers, self._timing, self._choice = Numbers(), PulseTiming(self._every), None

    def datagram(self, target: ServerEcho, size: int | None = None) -> tuple[int, bytes]:
        """The next pulse, a sized one of `size` bytes, and its number."""
        numbers = self.numbers
        number = numbers.next()
        silent = pulse.NEVER if self._last is None else min(pulse.NEVER - 1, int(1000 * (_now() - self._last[0])))
        return number, pulse.request(
            target.ident, target.key, run=numbers.run, number=number, heard=numbers.heard, silent=silent, size=size,
            tag=tag.of_echo(pulse.nonce(numbers.run, number)),
        )  # fmt: skip

    def _send(self, target: ServerEcho, now: float) -> None:
        number, datagram = self.datagram(target)
        try:
            self._open(target, now).send(datagram)
        except BlockingIOError:
            pass  # this host's send queue is full: counts as lost
        except OSError:
            self._close()
            if self._timing.refused(now):
                self._silent_from = now
                self._on_change()
            return
        self.samples.sent(number, now, counts=not self._timing.silent)
        self._timing.sent(now)

    def _open(self, target: ServerEcho, now: float) -> socket.socket:
        """The socket, connected, so that it only receives from the target. Raises OSError.

        When the route has changed, a new one is made: a kill switch that accepts established flows would let the old
        one out with the tunnel's address, which does not show what another program could send.
        """
        if self._sock is None or now - self._route_checked_at >= self._every / 2:  # not for each quick pulse
            route, self._route_checked_at = self._route(target.address, target.port), now
            if route != self._socket_route:
                self._close()
                self._socket_route = route
        if self._sock is None:
            family = socket.AF_INET if target.address.version == 4 else socket.AF_INET6
            sock = AS_USER.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            try:
                enable_timestamps(sock)
                sock.connect((str(target.address), target.port))
            except OSError:
                sock.close()
                raise
            self._sock = sock
            OWN_SOCKETS.add(sock)
        return self._sock

    def _listen(self, target: ServerEcho, *, wakes: bool) -> None:
        """Watch the socket for replies, except during a close look: then they are read before the next pulse.

        The kernel's timestamps say when each arrived.
        """
        if self._sock is None or wakes is self._wakes:
            return
        self._wakes = wakes
        loop = asyncio.get_running_loop()
        if wakes:
            loop.add_reader(self._sock, self._read, target)
        else:
            loop.remove_reader(self._sock)

    def _close(self) -> None:
        if self._sock is not None:
            asyncio.get_running_loop().remove_reader(self._sock)
            self._sock.close()
            self._sock, self._wakes = None, False
            self.samples.discard_since()

    def _read(self, target: ServerEcho) -> None:
        sock = self._sock
        while sock is not None and self._sock is sock:
            try:
                data, ancillary, *_ = sock.recvmsg(2048, ANCILLARY_BYTES)
            except BlockingIOError:
                return
            except OSError:
                # ECONNREFUSED and the like: an ICMP error came back for a pulse.
                if self._timing.refused(_now()):
                    self._silent_from = _now()
                    self._on_change()
                self._wake.set()
                return
            self._received(data, target, _now() - self._waited(packet_time(ancillary)))

    def _waited(self, arrived_at: float) -> float:
        """Seconds since a packet arrived; 0 when the clock was set meanwhile."""
        waited = self._wall() - arrived_at
        return waited if 0 < waited < REPLY_TIMEOUT_S[0] else 0.0

    def _received(self, data: bytes, target: ServerEcho, now: float) -> None:
        reply = pulse.read_reply(data, target.ident, self.numbers.run, target.key)
        if reply is None:
            return
        number, address = reply
        rtt = self.samples.received(number, now)
        if rtt is None:
            return
        newest = number > self.numbers.heard
        self.numbers.heard = max(number, self.numbers.heard)
        self._last = (now, rtt, address)
        self._skip_for = _NEW_RUN_AFTER_S[0]
        again = self._timing.received(rtt)
        seen = Canary(
            probe=Probe.DEFAULT,
            target=target.name,
            family=target.address.version,
            answer=Answer.ANSWERED,
            address=address,
        )
        if (newest and self._fallback.moved(seen)) or again:
            self._on_change()
        if again or not self.samples.looking:  # during a close look the next pulse is due first
            self._wake.set()

    async def _ask_fallback(self, target: Target) -> None:
        """Probe a literal address, and wait."""
        began = _now()
        seen = await one(target, Path.UNKNOWN)  # a round finds out what it means
        if seen.answer is Answer.ANSWERED:
            self._lost_since = None
        elif self._lost_since is None:
            self._lost_since = began
        if self._fallback.note(seen):
            self._on_change()
        if not self._fallback.in_doubt:
            await self._wait(began + max(self._every, EVERY_S) - _now())

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._wake.wait()
        except TimeoutError:
            return


def _best_last(seen: Observation) -> list[Canary]:
    """The canaries on the default route, with the answered ones last."""
    return sorted(seen.asked(Probe.DEFAULT), key=lambda c: c.answer is Answer.ANSWERED)


def _now() -> float:
    return asyncio.get_running_loop().time()
