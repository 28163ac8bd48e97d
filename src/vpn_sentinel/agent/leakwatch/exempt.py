"""Watch packets that rules or the owner except: by mark or source port, as a published port's answer, or to the LAN.

A mark does not identify the program that sends. A firewall may set it for everybody who sends to a port or a network,
or for a user; so such packets are tried (`trial`). A source port that a rule lets out is a VPN program's, unless a
person's program has it. From a published port only answers may leave: a flow that it begins towards a peer that never
came in is no answer. A connection that its program opened to the internet does not belong to the LAN, even where a
firewall redirects it there (DNAT).

Separate taps read these packets, so that they never delay others. Their filter in the kernel drops the packets to the
tunnel's server, and for five minutes those of a socket that was found to be a VPN program's.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Final, Protocol

from vpn_sentinel.agent.leakwatch import bpf
from vpn_sentinel.agent.leakwatch.inbound import Flows
from vpn_sentinel.agent.leakwatch.meant import MeantOutside
from vpn_sentinel.agent.leakwatch.rules import PRIVATE, Rules
from vpn_sentinel.agent.leakwatch.senders import selects
from vpn_sentinel.agent.leakwatch.tap import Tap
from vpn_sentinel.agent.leakwatch.trial import TRIED_PROTOCOLS, Acceptors, Trials
from vpn_sentinel.agent.net.endpoints import TCP, UDP
from vpn_sentinel.agent.net.packets import Packet, decode
from vpn_sentinel.agent.net.routing_rules import FIRST_PERSONAL_UID, Rule
from vpn_sentinel.agent.net.sockets import Socket
from vpn_sentinel.domain.policy import IPAddress, is_public, within

log = logging.getLogger(__name__)

TRUST_S: Final = 300.0  # how long a port counts as a VPN program's
MAX_PROXY_RETRY_S: Final = 30  # between two searches for a proxy of one user; each failed search adds a second
_MAX_TRUSTED_PORTS: Final = 32
SCAN_PAUSE_TIMES: Final = 50  # the pause after a scan of all sockets, in multiples of the time it took
_FILTER_DELAY_S: Final = 0.1  # ports that become trusted within this time share one change of the filter


class SenderSockets(Acceptors, Protocol):
    def sender(self, protocol: int, port: int, far: IPAddress, far_port: int) -> Socket | None:
        """The socket that sends from `port`, None when it is not known. It may raise OSError."""
        ...

    def has(self, source: IPAddress, port: int, far: IPAddress, far_port: int) -> bool:
        """Whether a TCP socket has exactly these ends. It may raise OSError."""
        ...

    def connecting(self, port: int, version: int) -> list[Socket]:
        """Non-listening TCP sockets of programs with this local port. It may raise OSError."""
        ...


class ExemptWatch:
    """Bounded. The taps are open while anything is watched."""

    def __init__(
        self,
        *,
        now: Callable[[], float],
        sockets: SenderSockets | None,
        declared: MeantOutside,
        flows: Flows,
        explained: Callable[[Packet], bool],
        answers: Callable[[Packet, float], bool],
        sure: Callable[[], bool],
        leads_out: Callable[[str], bool],
        server_known: Callable[[], bool],
        leaked: Callable[[Packet, str], None],
    ) -> None:
        """`explained`: whether a packet is the agent's own or has a VPN's fingerprint; `answers`: whether it answers a
        packet that came in before that time of the kernel's clock; `sure`: whether all that came in was read;
        `leads_out`: whether an interface leads to the internet, not only to containers of this host; `server_known`:
        whether the tunnel's packets are known by their destination. `leaked` gets the leaks."""
        self._now, self._sockets, self._declared, self._flows = now, sockets, declared, flows
        self._explained, self._answers, self._sure, self._leaked = explained, answers, sure, leaked
        self._leads_out, self._server_known = leads_out, server_known
        self._trials = Trials(now=now, sockets=sockets, leak=self._marked, no_leak=self._trust)
        self._proxies = Trials(now=now, sockets=sockets, leak=self._proxied, proxies=True)
        self._redirected = Trials(now=now, sockets=sockets, leak=self._report)
        self._current_filter: list[bpf.Insn] = []
        self._scan_after = float("-inf")  # no scan of all sockets before then: it is slow
        # By user: when a proxy is searched for again, and how often it was.
        self._proxy_tries: dict[int, tuple[float, int]] = {}
        self._taps: dict[int, Tap] = {}
        self._rules = Rules()
        self._first_rules: tuple[Rule, ...] | None = None  # those present when the watch began
        self._trusted: OrderedDict[tuple[int, int], float] = OrderedDict()  # protocol and local port: until when
        self._filter_timer: asyncio.TimerHandle | None = None

    def update(self, interfaces: dict[int, str], rules: Rules) -> None:
        """Watch these interfaces, by index and name, for what the rules except. Raises OSError or ValueError, as taps
        do.
        """
        if (rules.marks, rules.excepted) != (self._rules.marks, self._rules.excepted):
            self._trusted.clear()
            self._trials.forget()
            self._proxies.forget()
            self._redirected.forget()
            self._proxy_tries.clear()
        self._rules = rules
        if self._first_rules is None and interfaces:
            self._first_rules = rules.excepted
        now = self._now()
        self._trusted = OrderedDict((port, until) for port, until in self._trusted.items() if now < until)
        insns = self._insns() if interfaces else []
        is_same, self._current_filter = insns == self._current_filter, insns
        for index in [
            i for i, tap in self._taps.items() if not (insns and i in interfaces and tap.is_bound_to(interfaces[i]))
        ]:
            self._taps.pop(index).close()
        for index, name in interfaces.items() if insns else ():
            if index in self._taps:
                if not is_same:
                    self._taps[index].filter(insns)
            else:
                self._taps[index] = Tap(name, insns, self._on_packet)

    def try_as_proxy(self, packet: Packet, interface: str, uid: int | None) -> None:
        """Try whether a user whom a routing rule lets out, and who sent this packet, runs a proxy for everybody."""
        if not packet.opens or uid is None or self._proxies.knows(packet, interface, uid):
            return
        at, searches = self._proxy_tries.get(uid, (0.0, 0))
        if self._now() >= at:
            self._proxy_tries[uid] = self._now() + min(searches, MAX_PROXY_RETRY_S), searches + 1
            self._proxies.start(packet, interface, uid)

    def close(self) -> None:
        if self._filter_timer is not None:
            self._filter_timer.cancel()
        self._trials.close()
        self._proxies.close()
        self._redirected.close()
        for tap in self._taps.values():
            tap.close()
        self._taps.clear()

    def _on_packet(self, interface: str, ethertype: int, data: bytes, passed: float) -> None:
        packet = decode(ethertype, data)
        if packet is None or packet.fragment or self._is_trusted(packet) or self._explained(packet):
            return
        if packet.ttl == 1:
            self._trials.seen(packet)
            self._redirected.seen(packet)
            return
        if self._is_near(packet):
            self._to_the_lan(packet, interface)
            return
        answers = self._answers(packet, passed)
        if not self._is_published(packet):
            self._judge(packet, interface, answers=answers)
        elif not (answers or self._goes_to_visitor(packet)) and self._sure():
            self._report(packet, interface)

    def _is_near(self, packet: Packet) -> bool:
        return within(packet.destination, PRIVATE) or within(packet.destination, self._rules.lan)

    def _to_the_lan(self, packet: Packet, interface: str) -> None:
        """Take a new connection to a LAN host, and try whether its program addressed another host."""
        here, there = packet.source_port, packet.destination_port
        if self._sockets is None or here is None or there is None or self._now() < self._scan_after:
            return
        try:
            if self._sockets.has(packet.source, here, packet.destination, there):
                return
            started_at = self._now()
            found = self._sockets.connecting(here, packet.destination.version)
            self._scan_after = self._now() + SCAN_PAUSE_TIMES * (self._now() - started_at)
        except OSError:
            return  # a sandbox that hides sockets
        ends = {(s.far, s.far_port, s.uid) for s in found}
        if len(ends) != 1:
            return
        far, port, uid = ends.pop()
        if far is None or not is_public(far):
            return
        addressed = replace(packet, destination=far, destination_port=port)
        if not self._rules.allow(addressed) and self._leads_out(interface):
            self._redirected.start(addressed, interface, uid, packet)

    def _judge(self, packet: Packet, interface: str, *, answers: bool) -> None:
        owner = self._owner(packet)
        uid = None if owner is None else owner.uid
        if answers:
            if packet.protocol == TCP or uid is None or uid < FIRST_PERSONAL_UID:
                self._trust(packet)  # but not a person's port, which may begin flows too
        elif uid in self._declared.users or packet.protocol not in TRIED_PROTOCOLS or (owner and owner.is_kernels):
            self._trust(packet)
        elif any(selects(rule, packet) for rule in self._rules.excepted):
            self._by_port(packet, interface, uid)
        else:
            self._trials.start(packet, interface, uid)

    def _by_port(self, packet: Packet, interface: str, uid: int | None) -> None:
        """Trust a system user's port; a person's program runs no tunnel. Without a socket the owner is not known."""
        if uid is not None and uid < FIRST_PERSONAL_UID:
            self._trust(packet)
        elif uid is not None and not self._goes_to_visitor(packet) and self._sure():
            self._report(packet, interface)

    def _goes_to_visitor(self, packet: Packet) -> bool:
        """Whether it goes to a host that sent datagrams to its port before, maybe before the watch began.

        A visitor from before the watch is possible only where a rule of that time, or a published port, let it in.
        """
        older = self._is_published(packet) or any(selects(rule, packet) for rule in self._first_rules or ())
        return self._flows.knows_visitor(packet, self._now(), older=older)

    def _report(self, packet: Packet, interface: str) -> None:
        only, owner = self._declared.only_users, self._owner(packet)
        if not only or (owner is not None and owner.uid in only):
            self._leaked(packet, interface)

    def _marked(self, packet: Packet, interface: str) -> None:
        """Report a packet whose mark everybody's packets get, unless it may be the tunnel's own: where only the mark
        identifies those, one that no person's program sent may go to the tunnel's server.
        """
        owner = self._owner(packet)
        if self._server_known() or (owner is not None and owner.uid >= FIRST_PERSONAL_UID):
            self._report(packet, interface)

    def _proxied(self, packet: Packet, interface: str) -> None:
        self._proxy_tries.clear()
        self._report(packet, interface)

    def _is_trusted(self, packet: Packet) -> bool:
        return not packet.opens and (packet.protocol, packet.source_port) in self._trusted

    def _is_published(self, packet: Packet) -> bool:
        port = packet.source_port
        return port is not None and any(p.has(packet.protocol, port) for p in self._rules.published)

    def _owner(self, packet: Packet) -> Socket | None:
        """The socket that sent it, by local port and far end: NAT may have changed the local address."""
        if self._sockets is None or packet.source_port is None or packet.destination_port is None:
            return None
        try:
            return self._sockets.sender(
                packet.protocol, packet.source_port, packet.destination, packet.destination_port
            )
        except OSError:
            return None

    def _trust(self, packet: Packet) -> None:
        """Keep what leaves from this port in the kernel: it is a VPN program's, or answers."""
        if packet.source_port is None or packet.protocol not in (TCP, UDP):
            return
        self._trusted[packet.protocol, packet.source_port] = self._now() + TRUST_S
        if len(self._trusted) > _MAX_TRUSTED_PORTS:
            self._trusted.popitem(last=False)
        if self._filter_timer is None:
            self._filter_timer = asyncio.get_running_loop().call_later(_FILTER_DELAY_S, self._filter)

    def _insns(self) -> list[bpf.Insn]:
        try:
            return bpf.exempt(self._rules, self._trusted)
        except ValueError:
            self._trusted.clear()  # too long for the kernel: those packets are read and tried again
            return bpf.exempt(self._rules, self._trusted)

    def _filter(self) -> None:
        self._filter_timer = None
        try:
            insns = self._current_filter = self._insns()
            for tap in self._taps.values():
                tap.filter(insns)
        except (OSError, ValueError) as e:
            log.warning(
                "the filter for excepted packets could not be updated: each of them is read", extra={"reason": str(e)}
            )
