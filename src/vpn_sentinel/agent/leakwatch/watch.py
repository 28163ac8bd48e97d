"""The packet sockets on the event loop: one for each way out that is not the tunnel, filtered in the kernel.

Nothing here runs while nothing leaks: no timer, and no packet comes up. packet(7) describes the sockets.
"""

import asyncio
import errno
import logging
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from ipaddress import ip_network
from typing import Final

from vpn_sentinel.agent.leakwatch import bpf
from vpn_sentinel.agent.leakwatch.book import Book, Way
from vpn_sentinel.agent.leakwatch.carrier import FRESH_S, SURE_S, Carrier
from vpn_sentinel.agent.leakwatch.diverted import is_diverted, is_led_out
from vpn_sentinel.agent.leakwatch.exempt import Exempt
from vpn_sentinel.agent.leakwatch.ground import Ground, Tables, ground
from vpn_sentinel.agent.leakwatch.inbound import OLD_S, Flows
from vpn_sentinel.agent.leakwatch.meant import Meant
from vpn_sentinel.agent.leakwatch.neighbors import Neighbor, Neighbors
from vpn_sentinel.agent.leakwatch.openings import Openings
from vpn_sentinel.agent.leakwatch.others import Others
from vpn_sentinel.agent.leakwatch.rules import Rules, is_dhcp, is_dns
from vpn_sentinel.agent.leakwatch.shapes import Shape, Shapes, is_dtls
from vpn_sentinel.agent.leakwatch.tap import BATCH, Tap
from vpn_sentinel.agent.leakwatch.users import Users
from vpn_sentinel.agent.net.closed_sockets import ClosedSockets
from vpn_sentinel.agent.net.endpoints import PROTOCOLS, TCP, UDP, Endpoint
from vpn_sentinel.agent.net.interfaces import Memory, Paths, Recollection, Survey, is_up
from vpn_sentinel.agent.net.own import OWN, OwnSockets
from vpn_sentinel.agent.net.packets import Packet, decode
from vpn_sentinel.agent.net.packettime import packet_times
from vpn_sentinel.agent.net.roles import has_way
from vpn_sentinel.agent.net.routing_rules import Sender
from vpn_sentinel.agent.net.sockets import Sockets
from vpn_sentinel.agent.probes.system_resolver import is_ours
from vpn_sentinel.agent.probes.tag import is_probe
from vpn_sentinel.domain.observation import Answer, Canary, Escape, Path, Probe
from vpn_sentinel.domain.policy import IPAddress, Policy, is_public, within
from vpn_sentinel.runtime.clock import Clock

log = logging.getLogger(__name__)

AGAIN: Final = 1.0  # seconds between two tellings while it leaks
LOOK: Final = 0.2  # seconds that a look at routes and endpoints holds for further doubts, at least
CHEAP: Final = 1.0  # seconds: where a look holds no longer, the next one comes soon whatever happened
LOOKS, LONGEST = 20, 10.0  # times as long as it took, and seconds at most: full tables take a while
DOUBTS: Final = 4 * BATCH  # packets without a word to say about them, until the next look
ENDED_S: Final = 0.2  # seconds in which the kernel tells of a socket that ended: when its last packet left the device
CONTROL_S: Final = 60.0  # seconds after its last packet that a control channel may be opened anew
_GONE: Final = frozenset({errno.ENODEV, errno.ENXIO})
_MARGIN: Final = 0.05  # seconds
UNREAD_S: Final = 10.0  # seconds after something that came in was left unread in which nobody is said not to have come
_LEARNED: Final = 8
_UNOWNED: Final = 8 * BATCH
_HELD: Final = 16  # packets that wait until it is tried which host carries the tunnel


_Ends = tuple[int, int | None, IPAddress, int | None]  # protocol, port here, address and port there


class LeakWatch:
    """Watches what `look` was told of. Unable to tell the tunnel's own packets from others, it says nothing."""

    def __init__(
        self,
        *,
        tables: Tables | None,
        policy: Policy,
        clock: Clock,
        told: Callable[["LeakWatch"], None],
        survey: Callable[[], Survey],
        endpoints: Callable[[], Iterable[Endpoint]] = tuple,
        meant: Callable[[], Iterable[IPAddress]] = tuple,
        on_escape: Callable[[Escape], None] = lambda _: None,
        declared: Meant | None = None,
        wanted: bool = True,
        own: OwnSockets = OWN,
        memory: Memory | None = None,
        server_found: Callable[[], None] = lambda: None,
        on_neighbor: Callable[[Neighbor], None] = lambda _: None,
        neighbor_left: Callable[[], None] = lambda: None,
    ) -> None:
        """`endpoints` are those that are known from elsewhere; `meant` are hosts whose own route is no leak.

        `declared` is what the owner means to go beside the tunnel; `wanted` False turns the watch off.
        `memory` keeps which host carries the tunnel; `server_found` is called when that was tried.
        `on_neighbor` gets each nameserver of the LAN that is seen to be asked anew, `neighbor_left` is called when
        nobody asks one any more that leaks: see `neighbors`.

        `on_escape` gets the first packet of each new destination at once. `told` is called when there is something to
        tell, with this watch: with the first escape, then at most once a second.
        """
        self._tables, self._policy, self._clock = tables, policy, clock
        self._told, self._survey, self._endpoints, self._meant = told, survey, endpoints, meant
        self._on_escape = on_escape
        self._declared = declared or Meant()
        self._wanted = wanted
        self._own = own
        self._server_found = server_found
        self._on_neighbor, self._neighbor_left = on_neighbor, neighbor_left
        self._neighbors = Neighbors(clock.boottime)
        self._leaving: asyncio.TimerHandle | None = None
        self.carrier = Carrier(
            memory=memory if memory is not None else Recollection(), now=clock.boottime, changed=self._tried
        )
        self.others = Others(clock.boottime, self._tried)
        self._held: list[tuple[Packet, str]] = []
        self._control: dict[Endpoint, float] = {}  # where a connection goes that nobody saw begin: when it did last
        self._killed: set[int] = set()  # families of which a kill switch refused a canary lately
        self._openings = Openings(self._is_no_vpns)
        self._taps: dict[int, Tap] = {}
        self._inbound: dict[int, Tap] = {}
        self._times = packet_times() if wanted else None  # long before the first packet is read
        self._sockets = _sockets()
        self._flows = Flows(self._sockets)
        self._users = Users(self._sockets, self._declared, lambda: ClosedSockets(clock.wall))
        self._unowned: dict[_Ends, asyncio.TimerHandle] = {}  # of senders that are gone: when they are judged
        self._exempt = Exempt(
            now=clock.boottime,
            sockets=self._sockets,
            declared=self._declared,
            flows=self._flows,
            explained=lambda packet: self._is_a_probe(packet) or self._is_a_vpns(packet),
            answers=lambda packet, passed: self._is_answer(packet, clock.boottime(), passed),
            sure=self._has_read_all,
            leads_out=self._leads_out,
            server_known=lambda: self._ground.tells_by_end(self.endpoints),
            leaked=self._excepted_leaks,
        )
        self._unread = float("-inf")  # when something that came in was left unread
        self._ground = Ground()
        self._rules = Rules()
        self._tunnel: str | None = None
        self._shapes = Shapes()
        self._learned: OrderedDict[Endpoint, None] = OrderedDict()
        self._book = Book()
        self._permitted: bool | None = None
        self._looked = float("-inf")
        self._rest = LOOK
        self._turned = float("-inf")  # when what may leave changed
        self._marked = float("-inf")  # when the filter that knows of the last new mark was set, by the packets' clock
        self._rerouted = float("-inf")  # when routes or rules were seen to have changed
        self._unsure: list[tuple[Packet, str, float]] = []  # with when it passed
        self._again: asyncio.TimerHandle | None = None
        self._serving: dict[int | None, asyncio.TimerHandle] = {}  # by port here: when its first packet is judged
        self._told_at = float("-inf")
        self._timer: asyncio.TimerHandle | None = None
        self._over: asyncio.TimerHandle | None = None
        self._said_unable = False
        self._doubts = 0
        self._deaf: dict[int, str] = {}  # by index: why an interface that should be watched is not

    # --- what others ask ---

    @property
    def on(self) -> bool | None:
        """Whether packets are watched, on every interface that should be.

        None when there is no tunnel to watch beside, or nothing tells its packets.
        """
        return False if self._deaf and self._tunnel is not None else self._judges

    @property
    def _judges(self) -> bool | None:
        """Whether what comes up on the interfaces that are watched tells anything."""
        if self._tunnel is None or self._permitted is None:
            return None
        if not self._permitted:
            return False
        return True if self._able() else None

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Where the tunnel's own packets go, as far as that is known: told from elsewhere first, then learned."""
        return tuple(dict.fromkeys((*self._endpoints(), *self._learned, *self.carrier.endpoints)))

    @property
    def servers(self) -> tuple[IPAddress, ...]:
        """The hosts that carry the tunnel, as far as they are known: also one of which no port is known."""
        server = self.carrier.server
        ends = (*self._endpoints(), *self._learned)  # what was found is in doubt where another host came
        return tuple(dict.fromkeys((*(e.address for e in ends), *((server,) if server else ()))))

    @property
    def judged_by_route(self) -> tuple[IPAddress, ...]:
        """The VPN's servers, where a route to any other single host counts as a leak by itself.

        None where packets are watched: such a route may be another VPN's, and what takes it is told.
        """
        return () if self.on else self.servers

    @property
    def neighbors(self) -> tuple[Neighbor, ...]:
        """Nameservers of the LAN that were seen to be asked beside the tunnel."""
        return self._neighbors.known

    def judged(self, asked: Iterable[IPAddress], leaking: Iterable[IPAddress]) -> None:
        """A round asked these nameservers, and found that some of them leak."""
        self._neighbors.judged(asked, leaking)
        self._make_rules()
        if self._leaving is None:
            self._see_who_left()

    def escapes(self, paths: Paths, canaries: tuple[Canary, ...] = ()) -> tuple[Escape, ...]:
        """The flows that matter now: seen in the last ten seconds, or still routed outside beside a tunnel that works.

        Two seconds are enough where the routes led them outside, and lead them through the tunnel again.
        Where a kill switch refuses a family, its packets do not leave, wherever they are routed.
        """
        link = paths.survey.link()
        works = link is not None and link.up
        asked = [c for c in canaries if c.probe is Probe.PHYSICAL]
        held = {c.family for c in asked if c.answer is Answer.BLOCKED}
        if asked:
            self._killed = held - {c.family for c in asked if c.answer is Answer.ANSWERED}

        def way(escape: Escape) -> Way:
            if not works or escape.destination.version in held:
                return Way.UNKNOWN
            protocol = PROTOCOLS.get(escape.protocol, 0)
            if escape.destination in self.servers or escape.destination in self.others.servers:
                return Way.UNKNOWN  # its route is the tunnel's own, and stays
            path = paths.of(escape.destination, escape.destination_port or 0, protocol)
            if path is Path.TUNNEL and self._is_routed_outside(escape.destination):
                return Way.UNKNOWN  # for some users alone
            return {Path.OUTSIDE: Way.OUTSIDE, Path.TUNNEL: Way.TUNNEL}.get(path, Way.UNKNOWN)

        self._neighbors.forget()
        self._make_rules()  # a round has asked the tunnel's own program again
        now = self._clock.boottime()
        self._expect_the_end(self._book.forget(now, way))
        return self._book.tell(now) if self._judges else ()

    def _expect_the_end(self, seconds: float | None) -> None:
        """Have it told when a flow is over: else the next regular round would tell."""
        if self._over is not None:
            self._over.cancel()
        self._over = (
            None if seconds is None else asyncio.get_running_loop().call_later(seconds + _MARGIN, self._told, self)
        )

    def _see_who_left(self) -> None:
        """Of a nameserver that leaks the end is told when it comes: else the next regular round would tell."""
        before = self._neighbors.leaking
        left = self._neighbors.forget()
        self._leaving = None if left is None else asyncio.get_running_loop().call_later(
            left + _MARGIN, self._see_who_left
        )  # fmt: skip
        if before != self._neighbors.leaking:
            self._neighbor_left()

    @property
    def _refused(self) -> bool:
        return self._permitted is False or not self._wanted

    # --- what it stands on ---

    def look(self, survey: Survey) -> None:
        """Watch what is there now: open and close sockets, and give all of them the filter that fits."""
        self._doubts = 0
        self._stand_on(survey)

    def _stand_on(self, survey: Survey) -> None:
        self._tunnel = survey.tunnel if self._wanted else None
        self._looked = self._clock.boottime()
        if survey.tunnel is None or survey.interfaces is None:
            self._close_taps(())
            return
        before = self._ground.fib
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
        if before is not None and (self._ground.fib is None or not before.is_like(self._ground.fib)):
            self._rerouted = self._looked
        self._look_for_server(survey)
        if self._refused:
            self._close_taps(())
            return
        wanted = {i.index: i.name for i in self._ground.interfaces if i.name not in self._declared.interfaces}
        self._flows.look(self._looked)
        self._close_taps(index for index, name in wanted.items() if self._hears(index, name))
        self._deaf = {index: why for index, why in self._deaf.items() if index in wanted}
        self._make_rules()
        if self._held and not self.carrier.closed:
            self._judge_held()
        for index, name in wanted.items():
            if index not in self._taps and not self._refused:
                self._open(index, name)
        if self._taps:
            devices = (i.index for i in self._ground.interfaces)
            self._users.learn(self._ground.senders, devices, self._ground.fib, self._ground.tunnel)
        self._look_at_exempt()
        self._say()

    def _look_for_server(self, survey: Survey) -> None:
        hosts, told = self._ground.candidates(self._endpoints(), self._meant())
        ways = tuple(i.name for i in self._ground.interfaces)
        device = survey.device()
        standing = device is not None and is_up(device) and survey.carries
        self.carrier.look(device if standing else None, hosts, ways, able=not self._refused, told=told)
        self.others.look(*self._ground.beside(self.servers), ways)

    def _tried(self) -> None:
        """Where the tunnel's packets go was tried: what went elsewhere meanwhile is told, or nobody knows."""
        self._make_rules()
        self._judge_held()
        self._server_found()

    def _judge_held(self) -> None:
        held, self._held = self._held, []
        for packet, interface in held:
            if self._rules.allow(packet) or self._waits(packet, interface, self._clock.boottime()):
                continue
            # A tunnel that stood still in that moment was connecting anew, and this packet may have been the first.
            if self.carrier.steady or packet.destination != self.carrier.server:
                self._is_no_vpns(packet, interface)

    async def settle(self) -> None:
        """Wait until it is decided what the packets are that wait now."""
        for waits, seconds in ((self._serving, OLD_S), (self._unsure, LOOK), (self._unowned, ENDED_S)):
            if waits:
                await asyncio.sleep(seconds + _MARGIN)
        if self._held:
            await self.others.settle()
            await self.carrier.settle()

    def close(self) -> None:
        self._close_taps(())
        self._openings.close()
        self._exempt.close()
        for held in (self._sockets, self._times):
            if held is not None:
                held.close()
        timers = (self._timer, self._over, self._again, self._leaving)
        for timer in (*timers, *self._unowned.values(), *self._serving.values()):
            if timer is not None:
                timer.cancel()

    def _able(self) -> bool:
        return self._ground.tells(self.endpoints)

    def _say(self) -> None:
        if self._permitted and not self._able() and not self._said_unable:
            self._said_unable = True
            log.warning(
                "nothing tells the tunnel's own packets from others: the leak watch says nothing",
                extra={"remedy": "set VPN_SENTINEL_TUNNEL_ENDPOINTS"},
            )

    def _hears(self, index: int, name: str) -> bool:
        return index in self._taps and self._taps[index].hears(name) and self._inbound[index].hears(name)

    def _is_deaf(self, index: int, name: str, error: Exception) -> None:
        """Say once why an interface is not watched; each look tries again."""
        if isinstance(error, OSError) and error.errno in _GONE and not _is_there(index):
            return  # it went away in this moment, and is not to be watched any more
        if self._deaf.get(index) != str(error):
            log.warning("an interface cannot be watched", extra={"interface": name, "reason": str(error)})
        self._deaf[index] = str(error)

    def _open(self, index: int, name: str) -> None:
        inbound = None
        try:
            inbound = Tap(name, bpf.inbound(self._rules), self._came_in, self._missed_inbound)
            tap = Tap(name, bpf.program(self._rules), self._packet, self._book_missed)
        except PermissionError:
            self._permitted = False
            log.warning("packets cannot be watched here", extra={"remedy": "CAP_NET_RAW"})
            return
        except (OSError, ValueError) as e:
            # It went away, this process has no descriptor left, or the filter was refused.
            if inbound is not None:
                inbound.close()
            self._is_deaf(index, name, e)
            return
        self._permitted = True
        if self._deaf.pop(index, None) is not None:
            log.info("an interface is watched again", extra={"interface": name})
        self._taps[index], self._inbound[index] = tap, inbound

    def _close_taps(self, wanted: Iterable[int]) -> None:
        for index in set(self._taps) - set(wanted):
            self._taps.pop(index).close()
            self._inbound.pop(index).close()
        if not self._taps:
            self._users.close()
            self._exempt.look({}, self._rules)

    def _look_at_exempt(self) -> None:
        """What leaves by a mark or a port is looked at where all the rest is."""
        watched = {i.index: i.name for i in self._ground.interfaces if i.index in self._taps}
        try:
            self._exempt.look(watched, self._rules)
        except (OSError, ValueError) as e:
            for index, name in watched.items():
                self._is_deaf(index, name, e)
            self._close_taps(())  # the next look opens anew

    def _make_rules(self) -> None:
        learned = (*self._learned, *self.carrier.endpoints, *self.others.endpoints)
        server, closed = self.carrier.server, self.carrier.closed
        rules = self._ground.with_endpoints(self._endpoints(), self._meant(), learned, server, closed=closed)
        rules = replace(rules, published=self._declared.published, ports=self._declared.ports)
        # Those are asked by each round: the next question of a program tells nothing new.
        known = tuple(ip_network(n.address) for n in self._neighbors.hushed)
        rules = replace(rules, resolvers=(*rules.resolvers, *known))
        if rules == self._rules:
            return
        if self._rules != Rules():  # else it is the first look: nothing turned
            self._turned = self._clock.boottime()
        new_mark = set(rules.marks) - set(self._rules.marks)
        self._rules = rules
        try:
            made = bpf.program(self._rules)
            for tap in self._taps.values():
                tap.filter(made)
            if new_mark and self._taps:
                self._marked = self._clock.wall()
            made = bpf.inbound(rules)
            for tap in self._inbound.values():
                tap.filter(made)
            self._look_at_exempt()
        except (OSError, ValueError) as e:
            # With the old filter it would go on, and overlook what may not leave any more. The next look opens anew.
            for interface in self._ground.interfaces:
                if interface.index in self._taps:
                    self._is_deaf(interface.index, interface.name, e)
            self._close_taps(())

    # --- packets ---

    def _packet(self, interface: str, ethertype: int, data: bytes, passed: float) -> None:
        packet = decode(ethertype, data)
        now = self._clock.boottime()
        if packet is None or self._may_leave(interface, packet, now, passed):
            return
        if self._is_to_a_neighbor(packet):
            self._asked(packet, interface, now)
            return
        if is_dhcp(packet) and not self._users.is_a_persons(packet):
            return
        if self._is_a_vpns(packet):
            return
        # The tunnel may have moved to another server, or the network changed, and the news is still on its way.
        looks = now - self._looked > self._rest and not self._book.has(packet)
        if looks and self._is_excused(packet):
            return
        if self._is_its_senders(packet, interface, passed) or self._waits_for_visitors(packet, interface, now):
            return
        self._flows.begins(packet, now)
        if self._is_put_off(packet, interface, now):
            return
        if looks or self._book.has(packet) or len(self._unsure) == _HELD or not self._looks_soon(now):
            self._leaked(packet, interface, now)
            return
        # What let it out may have come after the last look: it waits for the next one.
        self._users.note(packet)
        self._unsure.append((packet, interface, passed))
        if self._again is None:
            self._again = asyncio.get_running_loop().call_later(LOOK, self._judge_unsure)

    def _is_its_senders(self, packet: Packet, interface: str, passed: float) -> bool:
        """Whether its sender is let out, or may be."""
        if passed <= self._marked <= self._clock.wall():  # else that clock was set back since
            return True  # a rule for a mark came after it: whether it has the mark, only the kernel knew
        belongs = self._users.belongs(packet)
        if belongs is False:
            self._exempt.led_out(packet, interface, self._users.led_out(packet))
        elif belongs is None:
            self._wait_for_the_end(packet, interface, passed)
        return not belongs

    def _looks_soon(self, now: float) -> bool:
        """Whether one look follows another: where they are cheap, or one thing has changed, as more may."""
        return self._rest <= CHEAP or now - self._turned <= LOOK

    def _is_excused(self, packet: Packet) -> bool:
        """Look anew: whether the packet may leave by what is there now."""
        self._users.note(packet)  # its socket may be gone behind the look
        began = time.thread_time()  # of this thread: on a busy machine a cheap look takes long, and stays cheap
        self._read_anew()
        self._stand_on(self._survey())
        self._rest = min(max(LOOK, LOOKS * (time.thread_time() - began)), LONGEST)
        return self._is_let_out(packet)

    def _read_anew(self) -> None:
        """News of rules and routes come later than a packet; full tables, which are dear to read, wait for them."""
        if self._tables is not None and self._rest <= CHEAP:
            self._tables.changed()

    def _is_let_out(self, packet: Packet) -> bool:
        return self._rules.allow(packet) or (self._is_ours(packet) and not self._is_led_away(packet))

    def _judge_unsure(self) -> None:
        self._again = None
        unsure, self._unsure = self._unsure, []
        self._read_anew()
        self._stand_on(self._survey())
        for packet, interface, passed in unsure:
            if not self._is_its_senders(packet, interface, passed):
                self._is_no_vpns(packet, interface)

    def _wait_for_the_end(self, packet: Packet, interface: str, passed: float) -> None:
        """It waits until the kernel tells how the socket was bound that sent it and is gone. Of a flow one does.

        Of more flows in that time than can wait nobody knows what they are.
        """
        flow = packet.protocol, packet.source_port, packet.destination, packet.destination_port
        if flow not in self._unowned and len(self._unowned) < _UNOWNED:
            later = asyncio.get_running_loop().call_later(ENDED_S, self._judge_unowned, packet, interface, passed)
            self._unowned[flow] = later

    def _judge_unowned(self, packet: Packet, interface: str, passed: float) -> None:
        """Where routes changed about then, they tell nothing of what led it out, unless a kill switch stands."""
        del self._unowned[packet.protocol, packet.source_port, packet.destination, packet.destination_port]
        killed = packet.destination.version in self._killed
        known = killed or self._clock.boottime() - self._rerouted > LOOK + 2 * ENDED_S
        led_out = known and self._users.was_led_out(packet, passed, killed=killed)
        if not (led_out or self._is_let_out(packet)):
            self._judge(packet, interface)

    def _waits_for_visitors(self, packet: Packet, interface: str, now: float) -> bool:
        """Whether it may be a service's, to a visitor who is older than the watch."""
        if not self._flows.may_be_old(packet, now):
            return False
        if packet.source_port not in self._serving:
            later = asyncio.get_running_loop().call_later(OLD_S, self._judge_serving, packet, interface)
            self._serving[packet.source_port] = later
        return True

    def _judge_serving(self, packet: Packet, interface: str) -> None:
        del self._serving[packet.source_port]
        if not (self._flows.is_visited(packet) or self._is_let_out(packet)):
            self._judge(packet, interface)

    def _judge(self, packet: Packet, interface: str) -> None:
        """It has waited for what might have let it out."""
        now = self._clock.boottime()
        self._flows.begins(packet, now)
        if not self._is_put_off(packet, interface, now):
            self._leaked(packet, interface, now)

    def _is_put_off(self, packet: Packet, interface: str, now: float) -> bool:
        """Of a packet that nothing lets out: whether it tells nothing, or something has to be tried first."""
        if not self._judges:
            self._doubts += 1
            if self._doubts > DOUBTS:
                self._close_taps(())  # until the next look: nothing is to be learned here, and watching costs
            return True
        refused = packet.destination.version in self._killed
        return self._waits(packet, interface, now) or self._openings.waits(packet, interface, begin=refused)

    def _is_to_a_neighbor(self, packet: Packet) -> bool:
        to = packet.destination
        return is_dns(packet) and (not is_public(to) or within(to, self._ground.rules.lan))

    def _asked(self, packet: Packet, interface: str, now: float) -> None:
        """A question to a nameserver that is not on the internet: no leak by itself, and a reason to ask it."""
        if self._users.belongs(packet) is False:
            return
        self._flows.begins(packet, now)
        new = self._neighbors.saw(packet, interface)
        if new is not None:
            self._make_rules()
            self._on_neighbor(new)
        if self._leaving is None and self._neighbors.leaking:
            self._see_who_left()

    def _is_a_vpns(self, packet: Packet) -> bool:
        """Whether its shape tells a VPN's packet, or may still do so."""
        shape = self._shapes.of(packet, openvpn=self._ground.openvpn, unsure=not self._able())
        carrier = self.carrier.found
        if carrier is not None and (carrier.address, carrier.protocol) == (packet.destination, TCP) and is_dtls(packet):
            shape = Shape.OWN  # TLS carries the tunnel until DTLS is tried again
        if shape is Shape.OTHER or (self._able() and self._users.is_a_persons(packet)):
            return False
        if shape is Shape.OWN and packet.destination_port is not None:
            self._openings.belongs_to_vpn(packet)
            # What another program sends to the same end may be anything.
            self._learn(Endpoint(packet.destination, packet.destination_port, packet.protocol, packet.source_port))
        return True

    def _waits(self, packet: Packet, interface: str, now: float) -> bool:
        """Whether it is tried first where the tunnel's packets go: its program may have gone on to this one.

        Or where another VPN's do.
        """
        if self.others.doubts(packet.destination) and len(self._held) < _HELD:
            self._held.append((packet, interface))
            self.others.doubt()
            return True
        if not self.carrier.doubts(packet.destination):
            return False
        known = self._book.has(packet)
        if not known and self._may_be_control(packet, now):
            return True
        if self.carrier.sure(SURE_S if known else FRESH_S):
            return False
        if len(self._held) < _HELD:
            self._held.append((packet, interface))
        self.carrier.doubt()
        return True

    def _may_be_control(self, packet: Packet, now: float) -> bool:
        """Whether it may be of a control channel beside the tunnel's data: nobody saw the beginning of the connection.

        Or it begins one where such a one was until now: the program does so when it connects anew.
        """
        port, to = packet.destination_port, packet.destination
        if packet.protocol != TCP or port is None or all(end.address != to for end in self.endpoints):
            return False
        if packet.opens:
            return now - self._control.get(Endpoint(to, port, TCP), float("-inf")) <= CONTROL_S
        self._control[Endpoint(to, port, TCP)] = now
        if len(self._control) > _LEARNED:
            del self._control[next(iter(self._control))]
        return True

    def _excepted_leaks(self, packet: Packet, interface: str) -> None:
        """What lets it out lets everybody's out."""
        now = self._clock.boottime()
        self._flows.begins(packet, now)
        # Led to a server of the own LAN, the home's own address is that server's.
        if self._judges and not self._policy.is_home(packet.destination):
            self._leaked(packet, interface, now)

    def _is_no_vpns(self, packet: Packet, interface: str) -> None:
        if not self._rules.allow(packet):
            self._leaked(packet, interface, self._clock.boottime())

    def _leaked(self, packet: Packet, interface: str, now: float) -> None:
        if packet.name is not None and (is_ours(packet.name) or is_probe(packet)):
            # It shows the way of every program's lookups, by getaddrinfo(3) or diverted; the name itself is nobody's.
            packet = replace(packet, name=None)
        user = None if self._book.has(packet) else self._users.user(packet)
        new = self._book.see(packet, interface, now, routed=self._is_routed_outside(packet.destination), user=user)
        if new is not None:
            self._on_escape(new)
            self._tell(now)

    def _is_routed_outside(self, to: IPAddress) -> bool:
        """Whether routes lead there beside the tunnel, for a sender whom no rule names."""
        entry = self._ground.fib.lookup(to) if self._ground.fib else None
        return entry is not None and any(entry.leads_by(i.index) for i in self._ground.interfaces)

    def _leads_out(self, interface: str) -> bool:
        here, fib = next((i for i in self._ground.interfaces if i.name == interface), None), self._ground.fib
        return here is not None and fib is not None and any(has_way(here, fib, version) for version in (4, 6))

    def _may_leave(self, interface: str, packet: Packet, now: float, passed: float) -> bool:
        if self._is_led_away(packet):
            return is_diverted(packet, self._own) and self._rules.allow(packet)
        return (
            self._is_ours(packet)
            or self._rules.allow(packet)
            or self._is_the_end_of_a_report(interface, packet)
            or self._is_answer(packet, now, passed)
        )

    def _is_answer(self, packet: Packet, now: float, passed: float) -> bool:
        """What it may be an answer to came in before it, and may still wait to be read."""
        if self._flows.is_answer(packet, now, passed):
            return True
        for tap in tuple(self._inbound.values()):
            tap.read()
        return self._flows.is_answer(packet, now, passed)

    def _came_in(self, _interface: str, ethertype: int, data: bytes, passed: float) -> None:
        """A flood out of here hides what began a flow: its packets may be lost unread."""
        packet = decode(ethertype, data)
        if packet is None:
            return
        if packet.protocol == UDP and any(t.rests for t in self._taps.values()):
            self._unread = self._clock.boottime()
        else:
            self._flows.came_in(packet, self._clock.boottime(), passed)

    def _missed_inbound(self, packets: int) -> None:
        if packets:
            self._unread = self._clock.boottime()

    def _has_read_all(self) -> bool:
        """Whether who came in lately is known."""
        rests = any(t.rests for t in self._inbound.values())
        return not rests and self._clock.boottime() - self._unread > UNREAD_S

    def _is_led_away(self, packet: Packet) -> bool:
        """Whether this host's firewall leads a name that we asked, and so everybody's, elsewhere or past the tunnel."""
        if is_diverted(packet, self._own):
            return True
        fib, tunnel = self._ground.fib, self._ground.tunnel
        if fib is None or tunnel is None or self._tables is None or not is_led_out(packet, self._own):
            return False
        entry = fib.lookup(packet.destination, _sender(packet))
        if entry is None or {hop.interface for hop in entry.hops} != {tunnel}:
            return False
        to, port, protocol = packet.destination, packet.destination_port or 0, packet.protocol
        try:
            # Tables are not all: of routes by a router that does not answer, IPv6 takes another one.
            route = self._tables.route(to, port=port, protocol=protocol)
            if route is not None and route.source is not None:
                # A connected socket keeps this address, by which another rule may lead it (`from`).
                kept = (route.source, packet.source_port or 0)
                route = self._tables.route(to, port=port, protocol=protocol, source=kept)
        except OSError:
            return False
        return route is not None and route.interface == tunnel

    def _is_ours(self, packet: Packet) -> bool:
        """A probe shows where traffic goes, and a canary tells of it: its packets are no user's.

        What has one hop to live gets no further than the LAN.
        """
        return packet.hops == 1 or self._is_a_probe(packet)

    def _is_a_probe(self, packet: Packet) -> bool:
        return self._own.has(
            packet.protocol, packet.source_port, packet.destination, packet.destination_port
        ) or is_probe(packet, self._own.ports(packet.protocol, packet.destination, packet.destination_port))

    def _is_the_end_of_a_report(self, interface: str, packet: Packet) -> bool:
        """Whether it is of our own connection to the server, begun through a tunnel that went away meanwhile.

        A kill switch that lets established flows pass lets it out, with the tunnel's address as its source.
        """
        if packet.destination not in self._meant() or packet.protocol != TCP or packet.opens:
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
        self._told(self)

    def _tell_later(self) -> None:
        self._timer = None
        self._tell(self._told_at + AGAIN)


def _is_there(index: int) -> bool:
    """Whether there is such an interface, whatever its name: one that cannot be printed cannot be asked for here."""
    try:
        socket.if_indextoname(index)
    except OSError:
        return False
    return True


def _sender(packet: Packet) -> Sender:
    """This process, as it sent the packet."""
    return Sender(
        uid=os.geteuid(),
        protocol=packet.protocol,
        source_port=packet.source_port or 0,
        destination_port=packet.destination_port or 0,
    )


def _sockets() -> Sockets | None:
    try:
        return Sockets()
    except OSError as e:
        log.warning("whose packets leave cannot be asked here: users are unknown", extra={"reason": e.strerror})
        return None
