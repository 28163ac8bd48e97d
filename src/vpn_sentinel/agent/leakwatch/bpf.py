"""A small assembler of classic BPF, and the filter that the kernel runs on each packet (linux/filter.h, packet(7)).

The sockets are SOCK_DGRAM: the filter sees a packet from its IP header on. A load beyond its end rejects it.
"""

import socket
import struct
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import collapse_addresses, ip_network
from itertools import product
from typing import Any, Final

from vpn_sentinel.agent.leakwatch.rules import (
    ICMP,
    ICMP6,
    ICMP6_OWN,
    ICMP_ANSWERS,
    IPV6_FRAGMENT,
    NEVER_ROUTED,
    NO_REMOTE_HOST,
    PRIVATE,
    PortRange,
    Rules,
)
from vpn_sentinel.agent.net.endpoints import TCP, UDP, Endpoint
from vpn_sentinel.agent.net.packets import DNS_PORT, RST, SYN, SYN_ACK
from vpn_sentinel.agent.net.routing_rules import Rule
from vpn_sentinel.agent.probes.tag import PROBE_HOPS
from vpn_sentinel.domain.leaks import DNS_PORTS
from vpn_sentinel.domain.policy import IPAddress, IPNetwork

MAX_CAPTURE_BYTES: Final = 384  # read of a packet that leaves: enough for the longest name in a DNS query
HEADER_BYTES: Final = 80  # read of a packet that comes in: addresses, ports, flags
DROP: Final = 0
_SO_ATTACH_FILTER: Final = 26
_MAX_INSTRUCTIONS: Final = 4096 - 10  # BPF_MAXINSNS, less what `drop_other_sources` takes
_MEMORY_WORDS: Final = 16  # BPF_MEMWORDS

_LD_W, _LD_LEN, _LD_H, _LD_B, _LDH_X, _LDB_X, _LDX_MSH, _LDX_IMM = 0x20, 0x80, 0x28, 0x30, 0x48, 0x50, 0xB1, 0x01
_ST, _STX, _LD_MEM, _LDX_MEM = 0x02, 0x03, 0x60, 0x61
_AND, _JA, _JEQ, _JGT, _JSET, _RET = 0x54, 0x05, 0x15, 0x25, 0x45, 0x06
_ANCILLARY: Final = 0xFFFFF000  # SKF_AD_OFF
_LINK: Final = 0xFFE00000  # SKF_LL_OFF: from the link's header on
_PROTOCOL, _PKTTYPE, _MARK = _ANCILLARY, _ANCILLARY + 4, _ANCILLARY + 20
_HOST, _OUTGOING = 0, 4  # PACKET_HOST, PACKET_OUTGOING
_IPV4, _IPV6 = 0x0800, 0x86DD


@dataclass(frozen=True, slots=True)
class Insn:
    """One instruction: struct sock_filter."""

    code: int
    k: int = 0
    true: int = 0
    false: int = 0


DROP_ALL: Final = [Insn(_RET, DROP)]
"""The filter that passes nothing."""


@dataclass(frozen=True, slots=True)
class Test:
    """Instructions that load the accumulator, and the comparison it must pass; `negate` inverts the comparison."""

    loads: tuple[Insn, ...]
    k: int
    jump: int = _JEQ
    negate: bool = False


def verdict(*tests: Test, result: int = DROP) -> list[Insn]:
    """Return `result` when all tests hold, else continue with the next instruction. No jump leaves these tests."""
    length = sum(len(t.loads) + 1 for t in tests) + 1
    insns: list[Insn] = []
    for test in tests:
        insns += test.loads
        to_end = length - len(insns) - 1
        insns.append(Insn(test.jump, test.k, *((to_end, 0) if test.negate else (0, to_end))))
    return [*insns, Insn(_RET, result)]


@lru_cache(maxsize=1)  # each of many devices gets the same
def program(rules: Rules) -> list[Insn]:
    """The filter for outgoing IP packets that no rule explains. Raises ValueError when it is too long."""
    first = [
        *(verdict(*(replace(_marked(*m), negate=True) for m in rules.inside)) if rules.inside else ()),
        # The agent's own DNS queries pass whatever rule lets them out: the agent sets no mark, so a rule of this
        # host did.
        *(i for at in (_FOUR, _SIX) for i in _probes(at)),
        *(i for mark, mask in rules.marks for i in verdict(_marked(mark, mask))),
    ]
    return _program(first, _family_rules(rules, _SIX), _family_rules(rules, _FOUR))


def _program(first: list[Insn], six: list[Insn], four: list[Insn]) -> list[Insn]:
    six, four = _loaded_once(six), _loaded_once(four)
    insns = [
        *verdict(Test((Insn(_LD_W, _PKTTYPE),), _OUTGOING, negate=True)),
        *first,
        Insn(_LD_H, _PROTOCOL),
        Insn(_JEQ, _IPV4, 2, 0),
        Insn(_JEQ, _IPV6, 2, 0),
        Insn(_RET, DROP),
        Insn(_JA, len(six)),
        *six,
        *four,
    ]
    if len(insns) > _MAX_INSTRUCTIONS:
        msg = f"the filter takes {len(insns)} instructions, and the kernel at most {_MAX_INSTRUCTIONS}"
        raise ValueError(msg)
    return insns


def _loaded_once(half: list[Insn]) -> list[Insn]:
    """Load what several tests read into the filter's memory, once, where every header holds it.

    The kernel makes about nine instructions of a load from the packet, and one of a load from memory
    (bpf_convert_filter() in net/core/filter.c), and before Linux 6.8 has 20 KB for a socket's filter
    (net.core.optmem_max).
    """
    times = Counter(i for i in half if i.code in (_LD_W, _LD_H, _LD_B, _LDX_MSH) and i.k < _LINK)
    repeated = [load for load, count in times.items() if count > 1][:_MEMORY_WORDS]
    insns, replacement = [], {}
    for at, load in enumerate(repeated):
        to_index = load.code == _LDX_MSH
        insns += [load, Insn(_STX if to_index else _ST, at)]
        replacement[load] = Insn(_LDX_MEM if to_index else _LD_MEM, at)
    return [*insns, *(replacement.get(i, i) for i in half)]


def exempt(rules: Rules, trusted: Iterable[tuple[int, int]]) -> list[Insn]:
    """The filter for what `program` drops because of its sender alone: a mark, a source port, a published UDP port; and
    for connections to the LAN, which DNAT may have redirected there.

    Packets from `trusted` sockets, pairs of protocol and local port, do not pass. The filter is empty where the tunnel
    is for marked packets alone. Raises ValueError when it is too long.
    """
    published = tuple(p for p in rules.published if p.protocol == UDP)
    excepted = tuple(r for r in rules.excepted if r.mark or r.source_ports is not None)
    if rules.inside:
        return []
    known = tuple(PortRange(protocol, port, port) for protocol, port in trusted)

    def half(at: _Family) -> list[Insn]:
        insns = _tunnels(rules, at) + _answers(known, at) + _needed(rules, at)
        for tests in at.within((*rules.lan, *PRIVATE)):
            insns += verdict(*at.proto(TCP), at.byte(13, SYN, Insn(_AND, SYN_ACK)), *tests, result=MAX_CAPTURE_BYTES)
        insns += _stays_near(rules, at)
        for mark, mask in rules.marks:
            insns += verdict(_marked(mark, mask), result=MAX_CAPTURE_BYTES)
        for rule in excepted:
            insns += _excepted(rule, at, MAX_CAPTURE_BYTES)
        for ports in published:
            insns += verdict(*at.proto(UDP), *at.between(0, ports.low, ports.high), result=MAX_CAPTURE_BYTES)
        return [*insns, Insn(_RET, DROP)]

    return _program([], half(_SIX), half(_FOUR))


def drop_other_sources(address: bytes) -> list[Insn]:
    """Drop what leaves an Ethernet device with a source other than `address`, its own 6 bytes; b"" drops nothing."""
    if not address:
        return []
    loads = (
        (Insn(_LD_W, _LINK + 6), int.from_bytes(address[:4])),
        (Insn(_LD_H, _LINK + 10), int.from_bytes(address[4:])),
    )
    outgoing = Test((Insn(_LD_W, _PKTTYPE),), _OUTGOING)
    return [i for load, part in loads for i in verdict(outgoing, Test((load,), part, negate=True))]


@lru_cache(maxsize=1)
def inbound(rules: Rules) -> list[Insn]:
    """The filter for what comes in: the first packets of TCP connections, and UDP, from public addresses.

    It drops what comes from the own ports of the tunnel's servers, so that the tunnel's traffic costs nothing here.
    """
    six, four = _loaded_once(_inbound_half(rules, _SIX)), _loaded_once(_inbound_half(rules, _FOUR))
    return [
        *verdict(Test((Insn(_LD_W, _PKTTYPE),), _HOST, negate=True)),
        Insn(_LD_H, _PROTOCOL),
        Insn(_JEQ, _IPV4, 2, 0),
        Insn(_JEQ, _IPV6, 2, 0),
        Insn(_RET, DROP),
        Insn(_JA, len(six)),
        *six,
        *four,
    ]


def towards(hosts: Iterable[IPAddress], sizes: range) -> list[Insn]:
    """The filter for outgoing packets to `hosts` whose IP packet has one of `sizes` bytes, at least 1."""
    insns = [
        *verdict(Test((Insn(_LD_W, _PKTTYPE),), _OUTGOING, negate=True)),
        *verdict(Test((Insn(_LD_LEN),), sizes.start - 1, _JGT, negate=True)),
        *verdict(Test((Insn(_LD_LEN),), sizes.stop - 1, _JGT)),
    ]
    for host in hosts:
        version = Test((Insn(_LD_H, _PROTOCOL),), _IPV4 if host.version == 4 else _IPV6)
        insns += verdict(version, *_within(ip_network(host)), result=HEADER_BYTES)
    return [*insns, Insn(_RET, DROP)]


def _inbound_half(rules: Rules, at: "_Family") -> list[Insn]:
    insns: list[Insn] = []
    for end in rules.endpoints:
        if end.address.version == at.version:
            own = Test((*at.behind, Insn(_LDH_X, 0)), end.port)
            insns += verdict(*_within(ip_network(end.address), source=True), *at.proto(end.protocol), own)
    # Packets to these may leave whichever side began the flow; among them is a VPN's server whose port is not known.
    for tests in at.within((*NEVER_ROUTED, *PRIVATE, *rules.outside, *rules.lan), source=True):
        insns += verdict(*tests)
    insns += verdict(*at.proto(UDP), result=HEADER_BYTES)
    insns += verdict(*at.proto(TCP), at.byte(13, SYN, Insn(_AND, SYN_ACK)), result=HEADER_BYTES)
    return [*insns, Insn(_RET, DROP)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """Where the header of an IP version holds what the rules read."""

    version: int
    protocol: Insn
    hops: Insn
    behind: tuple[Insn, ...]  # points the index register to the first byte after the header
    not_later_fragment: tuple[Test, ...]
    later_fragment: Test | None
    icmp: int
    icmp_own: tuple[int, ...]

    def proto(self, number: int) -> tuple[Test, ...]:
        return (Test((self.protocol,), number), *self.not_later_fragment)

    def byte(self, offset: int, value: int, *more: Insn, jump: int = _JEQ) -> Test:
        return Test((*self.behind, Insn(_LDB_X, offset), *more), value, jump)

    def port(self, number: int) -> Test:
        return Test((*self.behind, Insn(_LDH_X, 2)), number)

    def between(self, offset: int, low: int, high: int) -> tuple[Test, ...]:
        """A port at `offset` in its header, from `low` to `high`."""
        load = (*self.behind, Insn(_LDH_X, offset))
        least = () if low == 0 else (Test(load, low - 1, _JGT),)
        return (*least, Test(load, high, _JGT, negate=True))

    def within(self, networks: Iterable[IPNetwork], *, source: bool = False) -> Iterator[tuple[Test, ...]]:
        """Tests for an address in one of the networks. A network inside another one gets no test of its own, since the
        filter has little room: see `_loaded_once`.
        """
        same_version: list[Any] = [net for net in networks if net.version == self.version]
        return (_within(net, source=source) for net in collapse_addresses(same_version))


_OFFSET: Final = (Insn(_LD_H, 6), Insn(_AND, 0x1FFF))
_FOUR: Final = _Family(
    version=4, protocol=Insn(_LD_B, 9), hops=Insn(_LD_B, 8), behind=(Insn(_LDX_MSH, 0),),
    not_later_fragment=(Test(_OFFSET, 0),), later_fragment=Test(_OFFSET, 0, _JGT), icmp=ICMP, icmp_own=ICMP_ANSWERS,
)  # fmt: skip
_SIX: Final = _Family(
    version=6, protocol=Insn(_LD_B, 6), hops=Insn(_LD_B, 7), behind=(Insn(_LDX_IMM, 40),), not_later_fragment=(),
    later_fragment=None, icmp=ICMP6, icmp_own=ICMP6_OWN,
)  # fmt: skip


def _family_rules(rules: Rules, at: _Family) -> list[Insn]:
    """The rules for one IP version, in the order of `Rules.allow`."""
    insns = _tunnels(rules, at)
    for rule in rules.excepted:
        insns += _excepted(rule, at)
    insns += _answers(rules.published, at) + _needed(rules, at)
    for protocol, port in product((UDP, TCP), DNS_PORTS):
        for tests in at.within(rules.resolvers):
            insns += verdict(*tests, *at.proto(protocol), at.port(port))
        insns += verdict(*at.proto(protocol), at.port(port), result=MAX_CAPTURE_BYTES)
    return [*insns, *_stays_near(rules, at), Insn(_RET, MAX_CAPTURE_BYTES)]


def _answers(published: Iterable[PortRange], at: _Family) -> list[Insn]:
    insns: list[Insn] = []
    for ports in published:
        begun = Test((*at.behind, Insn(_LDB_X, 13), Insn(_AND, SYN_ACK)), SYN, negate=True)
        answers = (begun,) if ports.protocol == TCP else ()
        insns += verdict(*at.proto(ports.protocol), *at.between(0, ports.low, ports.high), *answers)
    return insns


def _needed(rules: Rules, at: _Family) -> list[Insn]:
    """What may leave because of its destination, and what the network needs to run."""
    insns: list[Insn] = []
    for ports in rules.ports:
        insns += verdict(*at.proto(ports.protocol), *at.between(2, ports.low, ports.high))
    for tests in at.within((*NO_REMOTE_HOST, *rules.outside)):
        insns += verdict(*tests)
    for kind in at.icmp_own:
        insns += verdict(*at.proto(at.icmp), at.byte(0, kind))
    insns += verdict(*at.proto(TCP), at.byte(13, RST, jump=_JSET))
    return [*insns, *verdict(*at.proto(TCP), at.byte(13, SYN_ACK, Insn(_AND, SYN_ACK)))]


def _stays_near(rules: Rules, at: _Family) -> list[Insn]:
    return [i for tests in at.within((*NEVER_ROUTED, *rules.lan, *PRIVATE)) for i in verdict(*tests)]


def _probes(at: _Family) -> list[Insn]:
    """DNS queries with a probe's hop limit: `leakwatch.diverted` judges by them."""
    version = Test((Insn(_LD_H, _PROTOCOL),), _IPV4 if at.version == 4 else _IPV6)
    return verdict(version, Test((at.hops,), PROBE_HOPS), *at.proto(UDP), at.port(DNS_PORT), result=MAX_CAPTURE_BYTES)


def _tunnels(rules: Rules, at: _Family) -> list[Insn]:
    return [i for end in rules.endpoints for i in _tunnel(end, at)]


def _tunnel(end: Endpoint, at: _Family) -> list[Insn]:
    if end.address.version != at.version:
        return []
    to = _within(ip_network(end.address))
    # Later fragments have no ports: they may leave where the tunnel's own packets go.
    fragments = Test((at.protocol,), IPV6_FRAGMENT) if at.later_fragment is None else at.later_fragment
    same_protocol = () if at.later_fragment is None else (Test((at.protocol,), end.protocol),)
    near = at.between(0, end.near, end.near) if end.near is not None else ()
    return [*verdict(*to, *same_protocol, fragments), *verdict(*to, *at.proto(end.protocol), at.port(end.port), *near)]


def _excepted(rule: Rule, at: _Family, result: int = DROP) -> list[Insn]:
    """A routing rule that selects by sender: as `senders.selects` does, and by its mark. A filter cannot see the
    user.
    """
    if rule.version != at.version or rule.uids is not None or rule.outgoing:
        return []
    tests = [_marked(rule.mark, rule.mask)] if rule.mark else []
    if rule.destination is not None:
        tests += _within(rule.destination)
    if rule.source is not None:
        tests += _within(rule.source, source=True)
    if rule.source_ports is None and rule.destination_ports is None:
        return verdict(*tests, *((Test((at.protocol,), rule.protocol),) if rule.protocol else ()), result=result)
    insns: list[Insn] = []
    for protocol in (TCP, UDP) if rule.protocol is None else (rule.protocol,):
        ports = [t for o, r in ((0, rule.source_ports), (2, rule.destination_ports)) if r for t in at.between(o, *r)]
        insns += verdict(*tests, *at.proto(protocol), *ports, result=result)
    return insns


def _marked(mark: int, mask: int) -> Test:
    return Test((Insn(_LD_W, _MARK), Insn(_AND, mask)), mark & mask)


def _within(net: IPNetwork, *, source: bool = False) -> tuple[Test, ...]:
    words = len(net.network_address.packed) // 4
    start = (12 if source else 16) if net.version == 4 else (8 if source else 24)
    masks, values = (struct.unpack(f"!{words}I", a.packed) for a in (net.netmask, net.network_address))
    return tuple(
        Test((Insn(_LD_W, start + 4 * i), *((Insn(_AND, mask),) if mask != 0xFFFFFFFF else ())), value)
        for i, (mask, value) in enumerate(zip(masks, values, strict=True))
        if mask
    )


def packed(insns: list[Insn]) -> bytes:
    return b"".join(struct.pack("=HBBI", i.code, i.true, i.false, i.k) for i in insns)


def attach(sock: socket.socket, insns: list[Insn]) -> None:
    """Replace the socket's filter in one step. Raises OSError."""
    code = array("B", packed(insns))
    address, _length = code.buffer_info()  # for struct sock_fprog; the kernel copies the instructions
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(insns), address))
