"""The leak watch: packet sockets (packet(7)) on each interface that is not the tunnel, filtered in the kernel.

While nothing leaks, no timer runs, and the filter of the outgoing taps drops every packet.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from ipaddress import ip_network
from typing import Final

from vpn_sentinel.agent.leakwatch.awaiting_trial import AwaitingTrial
from vpn_sentinel.agent.leakwatch.delayed import Delayed, Gathered
from vpn_sentinel.agent.leakwatch.egress_map import EgressMap, Tables, egress_map
from vpn_sentinel.agent.leakwatch.exempt import ExemptWatch
from vpn_sentinel.agent.leakwatch.fingerprints import Fingerprint, Fingerprints
from vpn_sentinel.agent.leakwatch.flow_table import Direction, FlowTable
from vpn_sentinel.agent.leakwatch.inbound import FIRST_SENDS_S, Flows
from vpn_sentinel.agent.leakwatch.meant import MeantOutside
from vpn_sentinel.agent.leakwatch.neighbors import Neighbor, Neighbors
from vpn_sentinel.agent.leakwatch.own_packets import OwnPackets
from vpn_sentinel.agent.leakwatch.pending_connections import PendingConnections
from vpn_sentinel.agent.leakwatch.refresh_timing import REFRESH_S, RefreshTiming
from vpn_sentinel.agent.leakwatch.rules import Rules, is_dhcp, is_dns
from vpn_sentinel.agent.leakwatch.tap import BATCH_PACKETS
from vpn_sentinel.agent.leakwatch.taps import Taps
from vpn_sentinel.agent.leakwatch.tunnel_ends import TunnelEnds
from vpn_sentinel.agent.leakwatch.update_timing import MARGIN_S, UpdateTiming
from vpn_sentinel.agent.leakwatch.users import Users
from vpn_sentinel.agent.net.closed_sockets import ClosedSockets
from vpn_sentinel.agent.net.endpoints import PROTOCOLS, UDP, Endpoint
from vpn_sentinel.agent.net.facts import FactStore, InMemoryFacts
from vpn_sentinel.agent.net.interfaces import Paths, Survey
from vpn_sentinel.agent.net.own import OWN_SOCKETS, OwnSockets
from vpn_sentinel.agent.net.packets import Packet, decode
from vpn_sentinel.agent.net.packettime import timestamp_socket
from vpn_sentinel.agent.net.sockets import SocketTable
from vpn_sentinel.agent.probes.system_resolver import is_agent_name
from vpn_sentinel.agent.probes.tag import is_probe
from vpn_sentinel.domain.observation import Answer, Canary, Escape, Path, Probe
from vpn_sentinel.domain.policy import IPAddress, Policy, is_public, within
from vpn_sentinel.runtime.clock import Clock

log = logging.getLogger(__name__)

MAX_UNJUDGED_PACKETS: Final = 4 * BATCH_PACKETS  # that cannot be judged, until the next update
SOCKET_END_S: Final = 0.2  # the kernel reports the end of a socket within this time: when its last packet left
MAX_UNOWNED_PACKETS: Final = 8 * BATCH_PACKETS  # that wait for the kernel's report of their closed socket
MAX_UNSURE_PACKETS: Final = 16  # that wait for the next refresh of the rules


class LeakWatch:
    """Watches what `update` was given. It reports nothing while it cannot distinguish the tunnel's own packets."""

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
        declared: MeantOutside | None = None,
        wanted: bool = True,
        own: OwnSockets = OWN_SOCKETS,
        memory: FactStore | None = None,
        server_found: Callable[[], None] = lambda: None,
        on_neighbor: Callable[[Neighbor], None] = lambda _: None,
        neighbor_left: Callable[[], None] = lambda: None,
    ) -> None:
        """`endpoints` returns the reported endpoints; `meant` the hosts whose host route is no leak.

        `declared` is what the owner means to go outside the tunnel; `wanted` False turns the watch off.
        `memory` keeps which host carries the tunnel; `server_found` is called after each trial of that.
        `on_neighbor` gets each nameserver of the LAN that is newly asked, `neighbor_left` is called when a leaking one
        is not asked any more: see `neighbors`.

        `on_escape` gets the first packet to each new destination at once. `on_update` is called with this watch when
        there is something to report: with the first escape, then at most once a second.
        """
        self._tables, self._policy, self._clock = tables, policy, clock
        self._survey, self._meant = survey, meant
        self._on_escape = on_escape
        self._declared = declared or MeantOutside()
        self._wanted = wanted
        self._server_found = server_found
        self._on_neighbor = on_neighbor
        self._neighbors = Neighbors(clock.boottime, neighbor_left)
        self._ends = TunnelEnds(
            endpoints, memory if memory is not None else InMemoryFacts(), clock.boottime, tried=self._on_trial
        )
        self.carrier, self.others = self._ends.carrier, self._ends.others
        self._own = OwnPackets(own, tables, meant)
        self._refused_families: set[int] = set()  # IP versions of which a kill switch blocked a canary lately
        self._times = timestamp_socket() if wanted else None  # must exist long before the first packet is read
        self._taps = Taps(self._packet, self._missed, self._came_in, clock.boottime)
        self._sockets = _sockets()
        self._flows = Flows(self._sockets)
        self._users = Users(self._sockets, self._declared, lambda: ClosedSockets(clock.wall))
        self._exempt = ExemptWatch(
            now=clock.boottime,
            sockets=self._sockets,
            declared=self._declared,
            flows=self._flows,
            explained=lambda packet: self._own.is_probe(packet) or self._recognize_vpn(packet),
            answers=lambda packet, passed: self._is_answer(packet, clock.boottime(), passed),
            sure=self._taps.has_read_all,
            leads_out=lambda interface: self._egress.leads_out(interface),
            server_known=lambda: self._egress.can_tell_by_destination(self.endpoints),
            leaked=self._excepted_leaks,
        )
        self._egress = EgressMap()
        self._rules = Rules()
        self._tunnel: str | None = None
        self._fingerprints = Fingerprints()
        self._flow_table = FlowTable()
        self._updates = UpdateTiming(lambda: on_update(self))
        # Packets that wait: for data, for the kernel's report of their socket, for clients, for a trial, for a refresh.
        self._pending = PendingConnections(self._report_unless_allowed)
        self._unowned = Delayed(self._judge_unowned, MAX_UNOWNED_PACKETS)
        self._serving = Delayed(self._judge_serving)
        self._awaiting_trial = AwaitingTrial(self._ends)
        self._unsure = Gathered(self._judge_unsure, REFRESH_S, MAX_UNSURE_PACKETS)
        self._refresh = RefreshTiming()
        # The first by the clock of packets, the second by `clock.boottime`:
        self._mark_filtered_at = float("-inf")  # when the filter with the last new mark was set
        self._rerouted_at = float("-inf")  # when routes or rules last changed
        self._is_warned_unable = False
        self._unjudged_packets = 0

    # --- for callers ---

    @property
    def on(self) -> bool | None:
        """Whether packets are watched on every interface that should be watched.

        None when there is no tunnel, or nothing identifies its packets.
        """
        return False if self._taps.unwatched and self._tunnel is not None else self._judges

    @property
    def _judges(self) -> bool | None:
        """Whether packets on the watched interfaces can be judged."""
        if self._tunnel is None or self._taps.permitted is None:
            return None
        if not self._taps.permitted:
            return False
        return True if self._can_tell_tunnel() else None

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        """Where the tunnel's own packets go, as far as that is known: reported endpoints first, then learned ones."""
        return self._ends.all

    @property
    def servers(self) -> tuple[IPAddress, ...]:
        """The known hosts that carry the tunnel, including one of which no port is known."""
        return self._ends.servers

    @property
    def judged_by_route(self) -> tuple[IPAddress, ...]:
        """The VPN's servers, where a route to any other single host counts as a leak by itself.

        Empty where packets are watched: such a route may be another VPN's, and the packets that take it are reported.
        """
        return () if self.on else self.servers

    @property
    def neighbors(self) -> tuple[Neighbor, ...]:
        """Nameservers of the LAN to which queries went outside the tunnel."""
        return self._neighbors.known

    def judged(self, asked: Iterable[IPAddress], leaking: Iterable[IPAddress]) -> None:
        """Take a round's result: the nameservers it asked, and those that leak."""
        self._neighbors.judged(asked, leaking)
        self._make_rules()
        self._neighbors.expect_the_end()

    def escapes(self, paths: Paths, canaries: tuple[Canary, ...] = ()) -> tuple[Escape, ...]:
        """The flows to report now: seen in the last ten seconds, or still routed outside a tunnel that works.

        Two seconds are enough where the routes led them outside, and lead them through the tunnel again.
        Where a kill switch blocks an IP version, its packets do not leave, wherever they are routed.
        """
        link = paths.survey.link()
        works = link is not None and link.up
        asked = [c for c in canaries if c.probe is Probe.PHYSICAL]
        blocked = {c.family for c in asked if c.answer is Answer.BLOCKED}
        if asked:
            self._refused_families = blocked - {c.family for c in asked if c.answer is Answer.ANSWERED}

        def direction(escape: Escape) -> Direction:
            if not works or escape.destination.version in blocked:
                return Direction.UNKNOWN
            protocol = PROTOCOLS.get(escape.protocol, 0)
            if escape.destination in self.servers or escape.destination in self.others.servers:
                return Direction.UNKNOWN  # its route is the tunnel's own and does not change
            path = paths.of(escape.destination, escape.destination_port or 0, protocol)
            if path is Path.TUNNEL and self._egress.is_routed_outside(escape.destination):
                return Direction.UNKNOWN  # for some users alone
            return {Path.OUTSIDE: Direction.OUTSIDE, Path.TUNNEL: Direction.TUNNEL}.get(path, Direction.UNKNOWN)

        self._neighbors.forget()
        self._make_rules()  # a round has read the endpoints from the VPN's program again
        now = self._clock.boottime()
        self._updates.expect_the_end(self._flow_table.forget(now, direction))
        return self._flow_table.entries(now) if self._judges else ()

    @property
    def _refused(self) -> bool:
        return self._taps.permitted is False or not self._wanted

    # --- state of the network ---

    def update(self, survey: Survey) -> None:
        """Watch the interfaces of this survey: open and close sockets, and set their filters."""
        self._unjudged_packets = 0
        self._refresh_from(survey)

    def _refresh_from(self, survey: Survey) -> None:
        self._tunnel = survey.tunnel if self._wanted else None
        now = self._refresh.refreshed = self._clock.boottime()
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
            self._rerouted_at = now
        self._ends.update(survey, self._egress, self._meant(), able=not self._refused)
        if self._refused:
            self._close_taps(())
            return
        wanted = {i.index: i.name for i in self._egress.interfaces if i.name not in self._declared.interfaces}
        self._flows.update(now)
        self._close_taps(index for index, name in wanted.items() if self._taps.is_bound_to(index, name))
        self._taps.unwatched = {index: why for index, why in self._taps.unwatched.items() if index in wanted}
        self._make_rules()
        if self._awaiting_trial and not self.carrier.closed:
            self._judge_after_trial()
        for index, name in wanted.items():
            if index not in self._taps and not self._refused:
                self._taps.open(index, name, self._rules)
        if self._taps:
            devices = (i.index for i in self._egress.interfaces)
            self._users.learn(self._egress.senders, devices, self._egress.fib, self._egress.tunnel)
        self._update_exempt()
        self._warn_if_unable()

    def _on_trial(self) -> None:
        """Judge the packets that waited for a trial."""
        self._make_rules()
        self._judge_after_trial()
        self._server_found()

    def _judge_after_trial(self) -> None:
        for packet, interface in self._awaiting_trial.take():
            if self._rules.allow(packet) or self._hold_for_trial(packet, interface, self._clock.boottime()):
                continue
            # A tunnel that sent nothing in the trial was reconnecting, and this packet may have been its first.
            if self.carrier.steady or packet.destination != self.carrier.server:
                self._report_unless_allowed(packet, interface)

    async def settle(self) -> None:
        """Wait until the packets that wait now are judged."""
        waiting = ((self._serving, FIRST_SENDS_S), (self._unsure, REFRESH_S), (self._unowned, SOCKET_END_S))
        for packets, seconds in waiting:
            if packets:
                await asyncio.sleep(seconds + MARGIN_S)
        await self._awaiting_trial.settle()

    def close(self) -> None:
        self._close_taps(())
        self._pending.close()
        self._exempt.close()
        for resource in (self._sockets, self._times):
            if resource is not None:
                resource.close()
        for waiting in (self._updates, self._unowned, self._serving, self._unsure, self._neighbors):
            waiting.close()

    def _can_tell_tunnel(self) -> bool:
        return self._egress.can_tell_tunnel(self.endpoints)

    def _warn_if_unable(self) -> None:
        if self._taps.permitted and not self._can_tell_tunnel() and not self._is_warned_unable:
            self._is_warned_unable = True
            log.warning(
                "the tunnel's own packets cannot be distinguished from others: the leak watch reports nothing",
                extra={"remedy": "set VPN_SENTINEL_TUNNEL_ENDPOINTS"},
            )

    def _close_taps(self, wanted: Iterable[int]) -> None:
        self._taps.keep_only(wanted)
        if not self._taps:
            self._users.close()
            self._exempt.update({}, self._rules)

    def _update_exempt(self) -> None:
        """Watch the excepted packets on the same interfaces."""
        watched = {i.index: i.name for i in self._egress.interfaces if i.index in self._taps}
        try:
            self._exempt.update(watched, self._rules)
        except (OSError, ValueError) as e:
            for index, name in watched.items():
                self._taps.failed(index, name, e)
            self._close_taps(())  # the next update opens them again

    def _make_rules(self) -> None:
        server, closed = self.carrier.server, self.carrier.closed
        rules = self._egress.with_endpoints(self._ends.reported, self._meant(), self._ends.found, server, closed=closed)
        rules = replace(rules, published=self._declared.published, ports=self._declared.ports)
        # Each round asks these: further queries of programs tell nothing new.
        known = tuple(ip_network(n.address) for n in self._neighbors.quiet)
        rules = replace(rules, resolvers=(*rules.resolvers, *known))
        if rules == self._rules:
            return
        if self._rules != Rules():  # else it is the first update: nothing has changed
            self._refresh.rules_changed = self._clock.boottime()
        new_mark = set(rules.marks) - set(self._rules.marks)
        self._rules = rules
        try:
            self._taps.filter_outbound(rules)
            if new_mark and self._taps:
                self._mark_filtered_at = self._clock.wall()
            self._taps.filter_inbound(rules)
            self._update_exempt()
        except (OSError, ValueError) as e:
            # With the old filter, packets that may not leave any more would be missed. The next update opens the taps
            # again.
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
        if self._recognize_vpn(packet):
            return
        # The tunnel may have moved to another server, or the network changed, and the notification is still to come.
        is_due = self._refresh.is_due(now) and not self._flow_table.has(packet)
        if is_due and self._refresh_and_check(packet):
            return
        if self._is_its_senders(packet, interface, passed) or self._waits_for_visitors(packet, interface, now, passed):
            return
        self._flows.begins(packet, now)
        if self._defer(packet, interface, now):
            return
        if is_due or self._flow_table.has(packet) or self._unsure.is_full or not self._refresh.worth_waiting_for(now):
            self._leaked(packet, interface, now)
            return
        # A rule that lets it out may be newer than the last refresh: it waits for the next one.
        self._users.note(packet)
        self._unsure.add(packet, interface, passed)

    def _is_its_senders(self, packet: Packet, interface: str, passed: float) -> bool:
        """Whether a rule lets its sender out, or may do so."""
        if passed <= self._mark_filtered_at <= self._clock.wall():  # else that clock was set back
            return True  # older than the filter for a new mark: whether it has that mark is not known
        belongs = self._users.belongs_in_tunnel(packet)
        if belongs is False:
            self._exempt.try_as_proxy(packet, interface, self._users.user_let_out(packet))
        elif belongs is None:
            self._wait_for_the_end(packet, interface, passed)
        return not belongs

    def _refresh_and_check(self, packet: Packet) -> bool:
        """Refresh, and return whether the packet may leave by the present state."""
        self._users.note(packet)  # its socket may be gone after the refresh
        with self._refresh.measured():
            self._read_anew()
            self._refresh_from(self._survey())
        return self._is_let_out(packet)

    def _read_anew(self) -> None:
        """Have the tables read again. Full ones are expensive to read: there the notifications are waited for."""
        if self._tables is not None and self._refresh.is_cheap:
            self._tables.changed()

    def _is_let_out(self, packet: Packet) -> bool:
        return self._rules.allow(packet) or (self._own.has(packet) and not self._own.is_led_away(packet, self._egress))

    def _judge_unsure(self, unsure: list[tuple[Packet, str, float]]) -> None:
        self._read_anew()
        self._refresh_from(self._survey())
        for packet, interface, passed in unsure:
            if not self._is_its_senders(packet, interface, passed):
                self._report_unless_allowed(packet, interface)

    def _wait_for_the_end(self, packet: Packet, interface: str, passed: float) -> None:
        """Hold it until the kernel reports how its closed socket was bound; one packet of each flow.

        Flows beyond `MAX_UNOWNED_PACKETS` in that time are not judged.
        """
        flow = packet.protocol, packet.source_port, packet.destination, packet.destination_port
        self._unowned.add(flow, SOCKET_END_S, packet, interface, passed)

    def _judge_unowned(self, packet: Packet, interface: str, passed: float) -> None:
        """Judge it by the routes, unless they changed at about that time and no kill switch blocks its IP version."""
        is_refused = packet.destination.version in self._refused_families
        known = is_refused or self._clock.boottime() - self._rerouted_at > REFRESH_S + 2 * SOCKET_END_S
        let_out = known and self._users.was_let_out(packet, passed, is_refused=is_refused)
        if not (let_out or self._is_let_out(packet)):
            self._judge(packet, interface)

    def _waits_for_visitors(self, packet: Packet, interface: str, now: float, passed: float) -> bool:
        """Whether it may be a service's, to a client from before the watch."""
        if not self._flows.may_be_old(packet, now):
            return False
        self._serving.add(packet.source_port, FIRST_SENDS_S, packet, interface, passed)
        return True

    def _judge_serving(self, packet: Packet, interface: str, _passed: float) -> None:
        if not (self._flows.has_visitors(packet) or self._is_let_out(packet)):
            self._judge(packet, interface)

    def _judge(self, packet: Packet, interface: str) -> None:
        """Judge a packet that has waited."""
        now = self._clock.boottime()
        self._flows.begins(packet, now)
        if not self._defer(packet, interface, now):
            self._leaked(packet, interface, now)

    def _defer(self, packet: Packet, interface: str, now: float) -> bool:
        """Count or hold a packet that nothing lets out, and return True, where it cannot be judged, or not yet."""
        if not self._judges:
            self._unjudged_packets += 1
            if self._unjudged_packets > MAX_UNJUDGED_PACKETS:
                self._close_taps(())  # until the next update, since watching costs and tells nothing
            return True
        refused = packet.destination.version in self._refused_families
        return self._hold_for_trial(packet, interface, now) or self._pending.waits(packet, interface, begin=refused)

    def _is_to_a_neighbor(self, packet: Packet) -> bool:
        to = packet.destination
        return is_dns(packet) and (not is_public(to) or within(to, self._egress.rules.lan))

    def _asked(self, packet: Packet, interface: str, now: float) -> None:
        """Take a query to a nameserver of the LAN: no leak by itself, but a reason for the next round to ask it."""
        if self._users.belongs_in_tunnel(packet) is False:
            return
        self._flows.begins(packet, now)
        new = self._neighbors.saw(packet, interface)
        if new is not None:
            self._make_rules()
            self._on_neighbor(new)
        if self._neighbors.leaking:
            self._neighbors.expect_the_end()

    def _recognize_vpn(self, packet: Packet) -> bool:
        """Return whether its fingerprint is a VPN's, or may still become one; learn the tunnel's endpoint from it."""
        fingerprint = self._fingerprints.of(packet, openvpn=self._egress.openvpn, unsure=not self._can_tell_tunnel())
        if self._ends.is_dtls_again(packet):
            fingerprint = Fingerprint.OWN  # TLS carries the tunnel until DTLS works
        if fingerprint is Fingerprint.OTHER or (self._can_tell_tunnel() and self._users.is_a_persons(packet)):
            return False
        if fingerprint is Fingerprint.OWN and packet.destination_port is not None:
            self._pending.belongs_to_vpn(packet)
            # With the local port, since another program may send anything to the same end.
            self._ends.learn(Endpoint(packet.destination, packet.destination_port, packet.protocol, packet.source_port))
            self._make_rules()
        return True

    def _hold_for_trial(self, packet: Packet, interface: str, now: float) -> bool:
        """Hold a packet, and return True, where a trial must decide first."""
        return self._awaiting_trial.hold(packet, interface, now, reported=self._flow_table.has(packet))

    def _excepted_leaks(self, packet: Packet, interface: str) -> None:
        """Report an excepted packet: what lets it out lets everybody's out."""
        now = self._clock.boottime()
        self._flows.begins(packet, now)
        # Where DNAT leads to a server of the LAN, the home's public address stands for that server.
        if self._judges and not self._policy.is_home(packet.destination):
            self._leaked(packet, interface, now)

    def _report_unless_allowed(self, packet: Packet, interface: str) -> None:
        if not self._rules.allow(packet):
            self._leaked(packet, interface, self._clock.boottime())

    def _leaked(self, packet: Packet, interface: str, now: float) -> None:
        if packet.name is not None and (is_agent_name(packet.name) or is_probe(packet)):
            # It shows the route of every program's lookups, by getaddrinfo(3) or diverted; the name is the agent's own.
            packet = replace(packet, name=None)
        user = None if self._flow_table.has(packet) else self._users.user(packet)
        new = self._flow_table.count(
            packet, interface, now, routed=self._egress.is_routed_outside(packet.destination), user=user
        )
        if new is not None:
            self._on_escape(new)
            self._updates.leaked(now)

    def _may_leave(self, interface: str, packet: Packet, now: float, passed: float) -> bool:
        if self._own.is_led_away(packet, self._egress):
            return self._own.is_diverted(packet) and self._rules.allow(packet)
        return (
            self._own.has(packet)
            or self._rules.allow(packet)
            or self._own.is_of_a_broken_connection(packet, interface, self._egress)
            or self._is_answer(packet, now, passed)
        )

    def _is_answer(self, packet: Packet, now: float, passed: float) -> bool:
        """Whether it answers a packet that came in; that packet may still wait to be read."""
        if self._flows.is_answer(packet, now, passed):
            return True
        self._taps.read_inbound()
        return self._flows.is_answer(packet, now, passed)

    def _came_in(self, _interface: str, ethertype: int, data: bytes, passed: float) -> None:
        """Take an incoming packet. While outgoing packets flood, the one that began its flow may be lost."""
        packet = decode(ethertype, data)
        if packet is None:
            return
        if packet.protocol == UDP and self._taps.floods_out:
            self._taps.note_unread()
        else:
            self._flows.came_in(packet, self._clock.boottime(), passed)

    def _missed(self, packets: int) -> None:
        self._flow_table.missed(packets, self._clock.boottime())


def _sockets() -> SocketTable | None:
    try:
        return SocketTable()
    except OSError as e:
        log.warning("senders of packets cannot be asked for here: users are unknown", extra={"reason": e.strerror})
        return None
