"""The packet sockets on the event loop: one for each way out that is not the tunnel, filtered in the kernel.

Nothing here runs while nothing leaks: no timer, and no packet comes up. packet(7) describes the sockets.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from ipaddress import ip_network
from typing import Final

from vpn_sentinel.agent.leakwatch.carrier import FRESH_S, SURE_S
from vpn_sentinel.agent.leakwatch.delayed import Delayed
from vpn_sentinel.agent.leakwatch.egress_map import EgressMap, Tables, egress_map
from vpn_sentinel.agent.leakwatch.exempt import ExemptWatch
from vpn_sentinel.agent.leakwatch.fingerprints import Fingerprint, Fingerprints
from vpn_sentinel.agent.leakwatch.flow_table import Direction, FlowTable
from vpn_sentinel.agent.leakwatch.inbound import OLD_S, Flows
from vpn_sentinel.agent.leakwatch.look_timing import LOOK_S, LookTiming
from vpn_sentinel.agent.leakwatch.meant import Meant
from vpn_sentinel.agent.leakwatch.neighbors import Neighbor, Neighbors
from vpn_sentinel.agent.leakwatch.openings import Openings
from vpn_sentinel.agent.leakwatch.own_packets import OwnPackets
from vpn_sentinel.agent.leakwatch.rules import Rules, is_dhcp, is_dns
from vpn_sentinel.agent.leakwatch.tap import BATCH_PACKETS
from vpn_sentinel.agent.leakwatch.taps import Taps
from vpn_sentinel.agent.leakwatch.telling import MARGIN_S, Telling
from vpn_sentinel.agent.leakwatch.tunnel_ends import TunnelEnds
from vpn_sentinel.agent.leakwatch.users import Users
from vpn_sentinel.agent.net.closed_sockets import ClosedSockets
from vpn_sentinel.agent.net.endpoints import PROTOCOLS, UDP, Endpoint
from vpn_sentinel.agent.net.facts import FactStore, InMemoryFacts
from vpn_sentinel.agent.net.interfaces import Paths, Survey
from vpn_sentinel.agent.net.own import OWN_SOCKETS, OwnSockets
from vpn_sentinel.agent.net.packets import Packet, decode
from vpn_sentinel.agent.net.packettime import timestamp_socket
from vpn_sentinel.agent.net.roles import has_internet_route
from vpn_sentinel.agent.net.sockets import SocketTable
from vpn_sentinel.agent.probes.system_resolver import is_agent_name
from vpn_sentinel.agent.probes.tag import is_probe
from vpn_sentinel.domain.observation import Answer, Canary, Escape, Path, Probe
from vpn_sentinel.domain.policy import IPAddress, Policy, is_public, within
from vpn_sentinel.runtime.clock import Clock

log = logging.getLogger(__name__)

MAX_DOUBTS: Final = 4 * BATCH_PACKETS  # packets without a word to say about them, until the next look
ENDED_S: Final = 0.2  # in which the kernel tells of a socket that ended: when its last packet left the device
MAX_UNOWNED: Final = 8 * BATCH_PACKETS  # packets whose socket is gone, until it is known how that was bound
MAX_HELD: Final = 16  # packets that wait until it is tried which host carries the tunnel


class LeakWatch:
    """Watches what `look` was told of. Unable to tell the tunnel's own packets from others, it says nothing."""

    def __init__(
        self,
        *,
        tables: Tables | None,
        policy: Policy,
        clock: Clock,
        on_update: Callable[["LeakWatch"], None],
        survey: Callable[[], Survey],
        endpoints: Callable[[], Iterable[Endpoint]] = tuple,
        meant: Callable[[], Iterable[IPAddress]] = tuple,
        on_escape: Callable[[Escape], None] = lambda _: None,
        declared: Meant | None = None,
        wanted: bool = True,
        own: OwnSockets = OWN_SOCKETS,
        memory: FactStore | None = None,
        server_found: Callable[[], None] = lambda: None,
        on_neighbor: Callable[[Neighbor], None] = lambda _: None,
        neighbor_left: Callable[[], None] = lambda: None,
    ) -> None:
        """`endpoints` are those that are known from elsewhere; `meant` are hosts whose own route is no leak.

        `declared` is what the owner means to go beside the tunnel; `wanted` False turns the watch off.
        `memory` keeps which host carries the tunnel; `server_found` is called when that was tried.
        `on_neighbor` gets each nameserver of the LAN that is seen to be asked anew, `neighbor_left` is called when
        nobody asks one any more that leaks: see `neighbors`.

        `on_escape` gets the first packet of each new destination at once. `on_update` is called with this watch when
        there is something to tell: with the first escape, then at most once a second.
        """
        self._tables, self._policy, self._clock = tables, policy, clock
        self._survey, self._meant = survey, meant
        self._on_escape = on_escape
        self._declared = declared or Meant()
        self._wanted = wanted
        self._server_found = server_found
        self._on_neighbor = on_neighbor
        self._neighbors = Neighbors(clock.boottime, neighbor_left)
        self._ends = TunnelEnds(
            endpoints, memory if memory is not None else InMemoryFacts(), clock.boottime, tried=self._tried
        )
        self.carrier, self.others = self._ends.carrier, self._ends.others
        self._ours = OwnPackets(own, tables, meant)
        self._killed: set[int] = set()  # families of which a kill switch refused a canary lately
        self._times = timestamp_socket() if wanted else None  # long before the first packet is read
        self._taps = Taps(self._packet, self._missed, self._came_in, clock.boottime)
        self._sockets = _sockets()
        self._flows = Flows(self._sockets)
        self._users = Users(self._sockets, self._declared, lambda: ClosedSockets(clock.wall))
        self._exempt = ExemptWatch(
            now=clock.boottime,
            sockets=self._sockets,
            declared=self._declared,
            flows=self._flows,
            explained=lambda packet: self._ours.is_probe(packet) or self._is_a_vpns(packet),
            answers=lambda packet, passed: self._is_answer(packet, clock.boottime(), passed),
            sure=self._taps.has_read_all,
            leads_out=self._leads_out,
            server_known=lambda: self._egress.tells_by_end(self.endpoints),
            leaked=self._excepted_leaks,
        )
        self._egress = EgressMap()
        self._rules = Rules()
        self._tunnel: str | None = None
        self._fingerprints = Fingerprints()
        self._flow_table = FlowTable()
        self._telling = Telling(lambda: on_update(self))
        # Packets that wait: for data, for what the kernel tells of their socket, for visitors, for a trial, for a look.
        self._openings = Openings(self._is_no_vpns)
        self._unowned = Delayed(self._judge_unowned, MAX_UNOWNED)
        self._serving = Delayed(self._judge_serving)
        self._held: list[tuple[Packet, str]] = []
        self._unsure: list[tuple[Packet, str, float]] = []  # with when it passed
        self._again: asyncio.TimerHandle | None = None
        self._looks = LookTiming()
        # When, by the clock of packets in the first case, else by `clock.boottime`:
        self._marked = float("-inf")  # the filter that knows of the last new mark was set
        self._rerouted = float("-inf")  # routes or rules were seen to have changed
        self._said_unable = False
        self._doubts = 0

    # --- what others ask ---

    @property
    def on(self) -> bool | None:
        """Whether packets are watched, on every interface that should be.

        None when there is no tunnel to watch beside, or nothing tells its packets.
        """
        return False if self._taps.unwatched and self._tunnel is not None else self._judges

    @property
    def _judges(self) -> bool | None:
        """Whether what comes up on the interfaces that are watched tells anything."""
        if self._tunnel is None or self._taps.permitted is None:
            return None
        if not self._taps.permitted:
            return False
        return True if self._able() else None

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Where the tunnel's own packets go, as far as that is known: told from elsewhere first, then learned."""
        return self._ends.all

    @property
    def servers(self) -> tuple[IPAddress, ...]:
        """The hosts that carry the tunnel, as far as they are known: also one of which no port is known."""
        return self._ends.servers

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
        self._neighbors.expect_the_end()

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

        def way(escape: Escape) -> Direction:
            if not works or escape.destination.version in held:
                return Direction.UNKNOWN
            protocol = PROTOCOLS.get(escape.protocol, 0)
            if escape.destination in self.servers or escape.destination in self.others.servers:
                return Direction.UNKNOWN  # its route is the tunnel's own, and stays
            path = paths.of(escape.destination, escape.destination_port or 0, protocol)
            if path is Path.TUNNEL and self._is_routed_outside(escape.destination):
                return Direction.UNKNOWN  # for some users alone
            return {Path.OUTSIDE: Direction.OUTSIDE, Path.TUNNEL: Direction.TUNNEL}.get(path, Direction.UNKNOWN)

        self._neighbors.forget()
        self._make_rules()  # a round has asked the tunnel's own program again
        now = self._clock.boottime()
        self._telling.expect_the_end(self._flow_table.forget(now, way))
        return self._flow_table.tell(now) if self._judges else ()

    @property
    def _refused(self) -> bool:
        return self._taps.permitted is False or not self._wanted

    # --- what it stands on ---

    def look(self, survey: Survey) -> None:
        """Watch what is there now: open and close sockets, and give all of them the filter that fits."""
        self._doubts = 0
        self._stand_on(survey)

    def _stand_on(self, survey: Survey) -> None:
        self._tunnel = survey.tunnel if self._wanted else None
        now = self._looks.looked = self._clock.boottime()
        if survey.tunnel is None or survey.interfaces is None:
            self._close_taps(())
            return
        before = self._egress.fib
        try:
            self._egress = egress_map(
                survey,
                self._tables,
                allowed=self._policy.allowed_outside,
                resolvers=self._policy.allowed_resolvers,
                before=self._egress,
            )
        except OSError as e:
            log.warning("routes cannot be read: the leak watch stays as it is", extra={"reason": e.strerror})
            return
        if before is not None and (self._egress.fib is None or not before.is_like(self._egress.fib)):
            self._rerouted = now
        self._ends.look(survey, self._egress, self._meant(), able=not self._refused)
        if self._refused:
            self._close_taps(())
            return
        wanted = {i.index: i.name for i in self._egress.interfaces if i.name not in self._declared.interfaces}
        self._flows.look(now)
        self._close_taps(index for index, name in wanted.items() if self._taps.hears(index, name))
        self._taps.unwatched = {index: why for index, why in self._taps.unwatched.items() if index in wanted}
        self._make_rules()
        if self._held and not self.carrier.closed:
            self._judge_held()
        for index, name in wanted.items():
            if index not in self._taps and not self._refused:
                self._taps.open(index, name, self._rules)
        if self._taps:
            devices = (i.index for i in self._egress.interfaces)
            self._users.learn(self._egress.senders, devices, self._egress.fib, self._egress.tunnel)
        self._look_at_exempt()
        self._say()

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
        for waits, seconds in ((self._serving, OLD_S), (self._unsure, LOOK_S), (self._unowned, ENDED_S)):
            if waits:
                await asyncio.sleep(seconds + MARGIN_S)
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
        for waiting in (self._telling, self._unowned, self._serving, self._neighbors):
            waiting.close()
        if self._again is not None:
            self._again.cancel()

    def _able(self) -> bool:
        return self._egress.tells(self.endpoints)

    def _say(self) -> None:
        if self._taps.permitted and not self._able() and not self._said_unable:
            self._said_unable = True
            log.warning(
                "nothing tells the tunnel's own packets from others: the leak watch says nothing",
                extra={"remedy": "set VPN_SENTINEL_TUNNEL_ENDPOINTS"},
            )

    def _close_taps(self, wanted: Iterable[int]) -> None:
        self._taps.keep_only(wanted)
        if not self._taps:
            self._users.close()
            self._exempt.look({}, self._rules)

    def _look_at_exempt(self) -> None:
        """What leaves by a mark or a port is looked at where all the rest is."""
        watched = {i.index: i.name for i in self._egress.interfaces if i.index in self._taps}
        try:
            self._exempt.look(watched, self._rules)
        except (OSError, ValueError) as e:
            for index, name in watched.items():
                self._taps.failed(index, name, e)
            self._close_taps(())  # the next look opens anew

    def _make_rules(self) -> None:
        server, closed = self.carrier.server, self.carrier.closed
        rules = self._egress.with_endpoints(self._ends.reported, self._meant(), self._ends.found, server, closed=closed)
        rules = replace(rules, published=self._declared.published, ports=self._declared.ports)
        # Those are asked by each round: the next question of a program tells nothing new.
        known = tuple(ip_network(n.address) for n in self._neighbors.hushed)
        rules = replace(rules, resolvers=(*rules.resolvers, *known))
        if rules == self._rules:
            return
        if self._rules != Rules():  # else it is the first look: nothing turned
            self._looks.turned = self._clock.boottime()
        new_mark = set(rules.marks) - set(self._rules.marks)
        self._rules = rules
        try:
            self._taps.filter_outbound(rules)
            if new_mark and self._taps:
                self._marked = self._clock.wall()
            self._taps.filter_inbound(rules)
            self._look_at_exempt()
        except (OSError, ValueError) as e:
            # With the old filter it would go on, and overlook what may not leave any more. The next look opens anew.
            for interface in self._egress.interfaces:
                if interface.index in self._taps:
                    self._taps.failed(interface.index, interface.name, e)
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
        looks = self._looks.is_due(now) and not self._flow_table.has(packet)
        if looks and self._is_excused(packet):
            return
        if self._is_its_senders(packet, interface, passed) or self._waits_for_visitors(packet, interface, now, passed):
            return
        self._flows.begins(packet, now)
        if self._is_put_off(packet, interface, now):
            return
        if looks or self._flow_table.has(packet) or len(self._unsure) == MAX_HELD or not self._looks.comes_soon(now):
            self._leaked(packet, interface, now)
            return
        # What let it out may have come after the last look: it waits for the next one.
        self._users.note(packet)
        self._unsure.append((packet, interface, passed))
        if self._again is None:
            self._again = asyncio.get_running_loop().call_later(LOOK_S, self._judge_unsure)

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

    def _is_excused(self, packet: Packet) -> bool:
        """Look anew: whether the packet may leave by what is there now."""
        self._users.note(packet)  # its socket may be gone behind the look
        with self._looks.measured():
            self._read_anew()
            self._stand_on(self._survey())
        return self._is_let_out(packet)

    def _read_anew(self) -> None:
        """Full tables are expensive to read: there the kernel's news are waited for."""
        if self._tables is not None and self._looks.is_cheap:
            self._tables.changed()

    def _is_let_out(self, packet: Packet) -> bool:
        return self._rules.allow(packet) or (
            self._ours.has(packet) and not self._ours.is_led_away(packet, self._egress)
        )

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
        self._unowned.add(flow, ENDED_S, packet, interface, passed)

    def _judge_unowned(self, packet: Packet, interface: str, passed: float) -> None:
        """Where routes changed about then, they tell nothing of what led it out, unless a kill switch stands."""
        killed = packet.destination.version in self._killed
        known = killed or self._clock.boottime() - self._rerouted > LOOK_S + 2 * ENDED_S
        led_out = known and self._users.was_led_out(packet, passed, killed=killed)
        if not (led_out or self._is_let_out(packet)):
            self._judge(packet, interface)

    def _waits_for_visitors(self, packet: Packet, interface: str, now: float, passed: float) -> bool:
        """Whether it may be a service's, to a visitor who is older than the watch."""
        if not self._flows.may_be_old(packet, now):
            return False
        self._serving.add(packet.source_port, OLD_S, packet, interface, passed)
        return True

    def _judge_serving(self, packet: Packet, interface: str, _passed: float) -> None:
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
            if self._doubts > MAX_DOUBTS:
                self._close_taps(())  # until the next look: nothing is to be learned here, and watching costs
            return True
        refused = packet.destination.version in self._killed
        return self._waits(packet, interface, now) or self._openings.waits(packet, interface, begin=refused)

    def _is_to_a_neighbor(self, packet: Packet) -> bool:
        to = packet.destination
        return is_dns(packet) and (not is_public(to) or within(to, self._egress.rules.lan))

    def _asked(self, packet: Packet, interface: str, now: float) -> None:
        """A question to a nameserver that is not on the internet: no leak by itself, and a reason to ask it."""
        if self._users.belongs(packet) is False:
            return
        self._flows.begins(packet, now)
        new = self._neighbors.saw(packet, interface)
        if new is not None:
            self._make_rules()
            self._on_neighbor(new)
        if self._neighbors.leaking:
            self._neighbors.expect_the_end()

    def _is_a_vpns(self, packet: Packet) -> bool:
        """Whether its shape tells a VPN's packet, or may still do so."""
        shape = self._fingerprints.of(packet, openvpn=self._egress.openvpn, unsure=not self._able())
        if self._ends.is_dtls_again(packet):
            shape = Fingerprint.OWN  # TLS carries the tunnel until DTLS is tried again
        if shape is Fingerprint.OTHER or (self._able() and self._users.is_a_persons(packet)):
            return False
        if shape is Fingerprint.OWN and packet.destination_port is not None:
            self._openings.belongs_to_vpn(packet)
            # What another program sends to the same end may be anything.
            self._ends.learn(Endpoint(packet.destination, packet.destination_port, packet.protocol, packet.source_port))
            self._make_rules()
        return True

    def _waits(self, packet: Packet, interface: str, now: float) -> bool:
        """Whether it is tried first where the tunnel's packets go: its program may have gone on to this one.

        Or where another VPN's do.
        """
        if self.others.doubts(packet.destination) and len(self._held) < MAX_HELD:
            self._held.append((packet, interface))
            self.others.doubt()
            return True
        if not self.carrier.doubts(packet.destination):
            return False
        known = self._flow_table.has(packet)
        if not known and self._ends.may_be_control(packet, now):
            return True
        if self.carrier.sure(SURE_S if known else FRESH_S):
            return False
        if len(self._held) < MAX_HELD:
            self._held.append((packet, interface))
        self.carrier.doubt()
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
        if packet.name is not None and (is_agent_name(packet.name) or is_probe(packet)):
            # It shows the way of every program's lookups, by getaddrinfo(3) or diverted; the name itself is nobody's.
            packet = replace(packet, name=None)
        user = None if self._flow_table.has(packet) else self._users.user(packet)
        new = self._flow_table.see(
            packet, interface, now, routed=self._is_routed_outside(packet.destination), user=user
        )
        if new is not None:
            self._on_escape(new)
            self._telling.leaked(now)

    def _is_routed_outside(self, to: IPAddress) -> bool:
        """Whether routes lead there beside the tunnel, for a sender whom no rule names."""
        entry = self._egress.fib.lookup(to) if self._egress.fib else None
        return entry is not None and any(entry.leads_by(i.index) for i in self._egress.interfaces)

    def _leads_out(self, interface: str) -> bool:
        here, fib = next((i for i in self._egress.interfaces if i.name == interface), None), self._egress.fib
        return (
            here is not None and fib is not None and any(has_internet_route(here, fib, version) for version in (4, 6))
        )

    def _may_leave(self, interface: str, packet: Packet, now: float, passed: float) -> bool:
        if self._ours.is_led_away(packet, self._egress):
            return self._ours.is_diverted(packet) and self._rules.allow(packet)
        return (
            self._ours.has(packet)
            or self._rules.allow(packet)
            or self._ours.is_the_end_of_a_report(packet, interface, self._egress)
            or self._is_answer(packet, now, passed)
        )

    def _is_answer(self, packet: Packet, now: float, passed: float) -> bool:
        """What it may be an answer to came in before it, and may still wait to be read."""
        if self._flows.is_answer(packet, now, passed):
            return True
        self._taps.read_inbound()
        return self._flows.is_answer(packet, now, passed)

    def _came_in(self, _interface: str, ethertype: int, data: bytes, passed: float) -> None:
        """A flood out of here hides what began a flow: its packets may be lost unread."""
        packet = decode(ethertype, data)
        if packet is None:
            return
        if packet.protocol == UDP and self._taps.floods_out:
            self._taps.leave_unread()
        else:
            self._flows.came_in(packet, self._clock.boottime(), passed)

    def _missed(self, packets: int) -> None:
        self._flow_table.missed(packets, self._clock.boottime())


def _sockets() -> SocketTable | None:
    try:
        return SocketTable()
    except OSError as e:
        log.warning("whose packets leave cannot be asked here: users are unknown", extra={"reason": e.strerror})
        return None
