"""What leaves by a mark, by a source port, as a published port's answer, or to the LAN: what rules or the owner except.

A mark is no word of the program that sends. It may be a firewall's, for everybody who sends to a port, to a network or
as some user; so is what comes here tried (`trial`). A source port that a rule lets out is a VPN program's, unless a
person's program has it. From a published port only answers are meant to leave: what it begins towards a peer that never
came in is none. A connection that its program opened to the internet is none of the LAN's, though a firewall leads it
there (DNAT).

Such packets are let up by taps of their own, so that they never stand in the way of other ones. Those to the tunnel's
server stay in the kernel, and those of a socket that was found to be a VPN program's do so for five minutes.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Final, Protocol

from vpn_sentinel.agent.leakwatch import bpf
from vpn_sentinel.agent.leakwatch.inbound import Flows
from vpn_sentinel.agent.leakwatch.meant import Meant
from vpn_sentinel.agent.leakwatch.rules import PRIVATE, Rules
from vpn_sentinel.agent.leakwatch.senders import selects
from vpn_sentinel.agent.leakwatch.tap import Tap
from vpn_sentinel.agent.leakwatch.trial import TRIED, Takers, Trials
from vpn_sentinel.agent.net.endpoints import TCP, UDP
from vpn_sentinel.agent.net.packets import Packet, decode
from vpn_sentinel.agent.net.routing_rules import FIRST_PERSONAL_UID, Rule
from vpn_sentinel.agent.net.sockets import Socket
from vpn_sentinel.domain.policy import IPAddress, is_public, within

log = logging.getLogger(__name__)

TRUST_S: Final = 300.0  # seconds that a port counts as a VPN program's
LONGEST_S: Final = 30  # seconds between two looks for a proxy of one user, after as many that found none
_MAX_TRUSTED_PORTS: Final = 32  # trusted ports
RESTS: Final = 50  # times as long as looking through all sockets took
_SOON: Final = 0.1  # seconds in which several of them become one change of the filter


class SenderSockets(Takers, Protocol):
    def sender(self, protocol: int, port: int, far: IPAddress, far_port: int) -> Socket | None:
        """Who sends from `port`, None when nobody can tell. It may raise OSError."""
        ...

    def has(self, source: IPAddress, port: int, far: IPAddress, far_port: int) -> bool:
        """Whether a TCP socket has exactly these ends. It may raise OSError."""
        ...

    def connecting(self, port: int, version: int) -> list[Socket]:
        """TCP sockets of programs with this local port that do not listen. It may raise OSError."""
        ...


class ExemptWatch:
    """Bounded. The taps are open while anything is watched."""

    def __init__(
        self,
        *,
        now: Callable[[], float],
        sockets: SenderSockets | None,
        declared: Meant,
        flows: Flows,
        explained: Callable[[Packet], bool],
        answers: Callable[[Packet, float], bool],
        sure: Callable[[], bool],
        leads_out: Callable[[str], bool],
        server_known: Callable[[], bool],
        leaked: Callable[[Packet, str], None],
    ) -> None:
        """`explained`: whether a packet is our own or has a VPN's shape; `answers`: whether it is an answer to what
        came in before that time of the kernel's; `sure`: whether all that came in was read; `leads_out`: whether an
        interface leads to the internet, not to containers of this host alone; `server_known`: whether the tunnel's
        packets are known by where they go. `leaked` gets the leaks."""
        self._now, self._sockets, self._declared, self._flows = now, sockets, declared, flows
        self._explained, self._answers, self._sure, self._leaked = explained, answers, sure, leaked
        self._leads_out, self._server_known = leads_out, server_known
        self._trials = Trials(now=now, sockets=sockets, leak=self._marked, none=self._trust)
        self._proxies = Trials(now=now, sockets=sockets, leak=self._proxied, proxies=True)
        self._led = Trials(now=now, sockets=sockets, leak=self._leaks)
        self._filtered: list[bpf.Insn] = []
        self._rest = float("-inf")  # until when sockets are not looked through again: it takes a while
        self._next: dict[int, tuple[float, int]] = {}  # by user: when a proxy is looked for again, how often it was
        self._taps: dict[int, Tap] = {}
        self._rules = Rules()
        self._first: tuple[Rule, ...] | None = None  # that were there when the watch began
        self._trusted: OrderedDict[tuple[int, int], float] = OrderedDict()  # protocol and port here: until when
        self._again: asyncio.TimerHandle | None = None

    def look(self, interfaces: dict[int, str], rules: Rules) -> None:
        """Watch these, by index and name, for what the rules except. Raises OSError or ValueError, as taps do."""
        if (rules.marks, rules.excepted) != (self._rules.marks, self._rules.excepted):
            self._trusted.clear()
            self._trials.forget()
            self._proxies.forget()
            self._led.forget()
            self._next.clear()
        self._rules = rules
        if self._first is None and interfaces:
            self._first = rules.excepted
        now = self._now()
        self._trusted = OrderedDict((port, until) for port, until in self._trusted.items() if now < until)
        made = self._made() if interfaces else []
        same, self._filtered = made == self._filtered, made
        for index in [
            i for i, tap in self._taps.items() if not (made and i in interfaces and tap.hears(interfaces[i]))
        ]:
            self._taps.pop(index).close()
        for index, name in interfaces.items() if made else ():
            if index in self._taps:
                if not same:
                    self._taps[index].filter(made)
            else:
                self._taps[index] = Tap(name, made, self._left)

    def led_out(self, packet: Packet, interface: str, uid: int | None) -> None:
        """A packet of a user whom a routing rule leads out: it may be of a proxy that sends everybody's."""
        if not packet.opens or uid is None or self._proxies.knows(packet, interface, uid):
            return
        at, tries = self._next.get(uid, (0.0, 0))
        if self._now() >= at:
            self._next[uid] = self._now() + min(tries, LONGEST_S), tries + 1
            self._proxies.of(packet, interface, uid)

    def close(self) -> None:
        if self._again is not None:
            self._again.cancel()
        self._trials.close()
        self._proxies.close()
        self._led.close()
        for tap in self._taps.values():
            tap.close()
        self._taps.clear()

    def _left(self, interface: str, ethertype: int, data: bytes, passed: float) -> None:
        packet = decode(ethertype, data)
        if packet is None or packet.fragment or self._is_trusted(packet) or self._explained(packet):
            return
        if packet.hops == 1:
            self._trials.seen(packet)
            self._led.seen(packet)
            return
        if self._is_near(packet):
            self._to_the_lan(packet, interface)
            return
        answers = self._answers(packet, passed)
        if not self._is_published(packet):
            self._judge(packet, interface, answers=answers)
        elif not (answers or self._visited(packet)) and self._sure():
            self._leaks(packet, interface)

    def _is_near(self, packet: Packet) -> bool:
        return within(packet.destination, PRIVATE) or within(packet.destination, self._rules.lan)

    def _to_the_lan(self, packet: Packet, interface: str) -> None:
        """A connection is opened to a host of the LAN: whether its program meant another one."""
        here, there = packet.source_port, packet.destination_port
        if self._sockets is None or here is None or there is None or self._now() < self._rest:
            return
        try:
            if self._sockets.has(packet.source, here, packet.destination, there):
                return
            began = self._now()
            found = self._sockets.connecting(here, packet.destination.version)
            self._rest = self._now() + RESTS * (self._now() - began)
        except OSError:
            return  # a sandbox that does not tell
        ends = {(s.far, s.far_port, s.uid) for s in found}
        if len(ends) != 1:
            return
        far, port, uid = ends.pop()
        if far is None or not is_public(far):
            return
        meant = replace(packet, destination=far, destination_port=port)
        if not self._rules.allow(meant) and self._leads_out(interface):
            self._led.of(meant, interface, uid, packet)

    def _judge(self, packet: Packet, interface: str, *, answers: bool) -> None:
        owner = self._owner(packet)
        uid = None if owner is None else owner.uid
        if answers:
            if packet.protocol == TCP or uid is None or uid < FIRST_PERSONAL_UID:
                self._trust(packet)  # but not a person's port, which may begin flows too
        elif packet.protocol not in TRIED or uid in self._declared.users or (owner is not None and owner.is_kernels):
            self._trust(packet)
        elif any(selects(rule, packet) for rule in self._rules.excepted):
            self._by_port(packet, interface, uid)
        else:
            self._trials.of(packet, interface, uid)

    def _by_port(self, packet: Packet, interface: str, uid: int | None) -> None:
        """A person's program has no tunnel; whose port it is when the socket is gone, nobody knows."""
        if uid is not None and uid < FIRST_PERSONAL_UID:
            self._trust(packet)
        elif uid is not None and not self._visited(packet) and self._sure():
            self._leaks(packet, interface)

    def _visited(self, packet: Packet) -> bool:
        """Whether it goes to a visitor; who is older than the watch comes by a rule that is older, too."""
        older = self._is_published(packet) or any(selects(rule, packet) for rule in self._first or ())
        return self._flows.visited(packet, self._now(), older=older)

    def _leaks(self, packet: Packet, interface: str) -> None:
        only, owner = self._declared.only, self._owner(packet)
        if not only or (owner is not None and owner.uid in only):
            self._leaked(packet, interface)

    def _marked(self, packet: Packet, interface: str) -> None:
        """Where nothing else tells the tunnel's packets, what is marked for everybody may be its server's address."""
        owner = self._owner(packet)
        if self._server_known() or (owner is not None and owner.uid >= FIRST_PERSONAL_UID):
            self._leaks(packet, interface)

    def _proxied(self, packet: Packet, interface: str) -> None:
        self._next.clear()
        self._leaks(packet, interface)

    def _is_trusted(self, packet: Packet) -> bool:
        return not packet.opens and (packet.protocol, packet.source_port) in self._trusted

    def _is_published(self, packet: Packet) -> bool:
        port = packet.source_port
        return port is not None and any(p.has(packet.protocol, port) for p in self._rules.published)

    def _owner(self, packet: Packet) -> Socket | None:
        """Whose it is, by its port here and its far end: NAT may have given it another address."""
        if self._sockets is None or packet.source_port is None or packet.destination_port is None:
            return None
        try:
            return self._sockets.sender(
                packet.protocol, packet.source_port, packet.destination, packet.destination_port
            )
        except OSError:
            return None

    def _trust(self, packet: Packet) -> None:
        """It is a VPN program's, or an answer: what leaves from its port stays in the kernel."""
        if packet.source_port is None or packet.protocol not in (TCP, UDP):
            return
        self._trusted[packet.protocol, packet.source_port] = self._now() + TRUST_S
        if len(self._trusted) > _MAX_TRUSTED_PORTS:
            self._trusted.popitem(last=False)
        if self._again is None:
            self._again = asyncio.get_running_loop().call_later(_SOON, self._filter)

    def _made(self) -> list[bpf.Insn]:
        try:
            return bpf.exempt(self._rules, self._trusted)
        except ValueError:
            self._trusted.clear()  # too long for the kernel: then they come up, and are tried again
            return bpf.exempt(self._rules, self._trusted)

    def _filter(self) -> None:
        self._again = None
        try:
            made = self._filtered = self._made()
            for tap in self._taps.values():
                tap.filter(made)
        except (OSError, ValueError) as e:
            log.warning("what is excepted is looked at packet by packet", extra={"reason": str(e)})
