"""Targets whose input comes in datagrams: from the network, and from the kernel."""

import contextlib
import socket
from ipaddress import IPv4Address, IPv6Address, ip_address

from bench.fuzz.target import ENDS, Loop, Target, Try, Wire, check
from vpn_sentinel.agent.containment import table
from vpn_sentinel.agent.leakwatch.fingerprints import Fingerprints
from vpn_sentinel.agent.leakwatch.rules import is_dhcp
from vpn_sentinel.agent.net import packets, sockets
from vpn_sentinel.agent.net.fib import Fib
from vpn_sentinel.agent.net.kernel import Netlink, device_routes
from vpn_sentinel.agent.net.netlink import attribute, attributes, messages
from vpn_sentinel.agent.net.routing_rules import ANY_SENDER
from vpn_sentinel.agent.net.rtnetlink import (
    RTM_GETLINK,
    RTM_NEWNEXTHOP,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    parse_address,
    parse_entry,
    parse_group,
    parse_link,
    parse_network,
    parse_next_hops,
    parse_route,
    parse_rule,
)
from vpn_sentinel.agent.probes import datagram, dns, dnswire, origin, tag, targets
from vpn_sentinel.agent.sensors.netlink import NetworkChanges
from vpn_sentinel.server.connection_limit import ConnectionLimit
from vpn_sentinel.server.dns_canary.listener import TcpLimits, TcpStream
from vpn_sentinel.server.dns_canary.query_limit import QueryLimit
from vpn_sentinel.server.dns_canary.responder import Responder
from vpn_sentinel.server.dns_canary.zone import Zone
from vpn_sentinel.server.ingest.pulse import PulseProtocol
from vpn_sentinel.server.ingest.pulse_registry import PulseRegistry
from vpn_sentinel.wire import echo, pulse

SECRET = bytes(range(32))
ZONE = "canary.example.org"
NAME = "fuzz"
IDENT = echo.ident_for(SECRET, NAME)
KEY = echo.key_for(SECRET, IDENT)
_HOSTS = ("203.0.113.9", "2001:db8::9", "::ffff:203.0.113.9")


def dns_answers() -> Try:
    """The first byte chooses the question, the rest is the datagram that comes back."""
    zone = dns.CanaryZone(ZONE, IDENT, KEY)
    network = origin.block(IPv4Address("203.0.113.9"))
    methods = (dns.GOOGLE, dns.AKAHELP, dns.AKAMAI, dns.PATH, zone.method())
    whoamis = (*targets.CLOUDFLARE, *targets.OPENDNS)

    def one(data: bytes) -> None:
        method = methods[(data[:1] or b"\0")[0] % len(methods)]
        answer = data[1:]
        asked = dnswire.query(0x2B67, method.domain, method.kind, method.klass)
        for whoami in whoamis:
            whoami._read(dnswire.query(0x2B67, whoami.domain, whoami.kind, whoami.klass), answer)
        tag.unmarked(answer, asked, tag.dns_question(asked, 53))
        try:
            reply = dnswire.parse(answer, asked)
        except dnswire.BadMessageError:
            return
        check(len(reply.addresses) + len(reply.texts) <= 64, "more records than are read")
        method.read(reply)
        origin.read(reply, network)

    return one


def dns_questions() -> Try:
    """The first byte chooses who asks and how, the rest is the question."""
    made = Zone(name=ZONE, servers=(f"ns.{ZONE}",), addresses=lambda: (ip_address("203.0.113.1"),), secret=SECRET)
    now = 0.0

    def one(data: bytes) -> None:
        nonlocal now
        now += 1.0
        first, asked = (data[:1] or b"\0")[0], data[1:]
        responder = Responder(made, QueryLimit())
        reply, _ = responder.respond(asked, _HOSTS[first % 3], now, datagram=bool(first & 0x80))
        if reply is None:
            return
        check(len(reply) <= (len(asked) if first & 0x80 else 65535), "an answer larger than its question")
        check(reply[:2] == asked[:2] and reply[2] & 0x80, "no answer to this question")

    return one


def dns_streams() -> Try:
    """Questions over TCP, each behind its length, in pieces as large as the first byte says; 0 is at once."""
    made = Zone(name=ZONE, servers=(f"ns.{ZONE}",), addresses=lambda: (ip_address("203.0.113.1"),), secret=SECRET)
    limits, loop = TcpLimits(), Loop()

    async def one(data: bytes) -> None:
        size, sent = (data[:1] or b"\0")[0] or max(1, len(data)), data[1:]
        limit = ConnectionLimit(8, 8, 8)
        slot = limit.enter("127.0.0.1", 0.0, lambda: None)
        assert slot is not None
        stream = TcpStream(Responder(made, QueryLimit()), lambda _: None, slot, limits)
        wire = Wire(stream)
        stream.connection_made(wire)
        for at in range(0, len(sent), size):
            if not wire.is_closing():
                stream.data_received(sent[at : at + size])
        check(wire.is_closing() or len(stream._buffer) <= limits.message + 1, "more is kept than one question")
        check(len(wire.written) <= 256 * (len(sent) // 14 + 1), "more answers than questions")
        wire.lose()
        check(not limit.open, "a slot is not given back")

    return lambda data: loop(one(data))


def pulses() -> Try:
    """The first byte chooses the way: a request, one whose MAC is made right, or a reply."""
    pulse_registry = PulseRegistry(SECRET, lambda _: None)
    pulse_registry.greet(NAME, "")
    now = 0.0

    class Sent:
        def sendto(self, data: bytes, _: object) -> None:
            replies.append(data)

    replies: list[bytes] = []
    protocol = PulseProtocol(pulse_registry, lambda: now)
    protocol.connection_made(Sent())  # type: ignore[arg-type]

    def one(data: bytes) -> None:
        nonlocal now
        now += 0.01
        first, body = (data[:1] or b"\0")[0], data[1:]
        if first & 1 and len(body) >= echo.SIZE_BYTES:
            body = body[: -echo.MAC_BYTES]
            body += echo.mac(body, KEY)
        if first & 2:
            pulse.read_reply(body, IDENT, 1, KEY)
            echo.read_reply(body, IDENT, body[16:24], KEY)
            return
        replies.clear()
        protocol.datagram_received(body, (_HOSTS[first % 3], 40000))
        check(len(replies) <= 1, "two replies to one datagram")
        for reply in replies:
            check(len(reply) == len(body), "a reply of another size than its request")
            said = pulse.read(body)
            told = pulse.read_reply(reply, IDENT, said.run, KEY)
            check(told is not None and told[0] == said.number, "a reply that its sender does not know")

    return one


def captured() -> Try:
    """A packet as a packet socket gives it; the first two bytes are the ethertype."""
    shapes = Fingerprints()

    def one(data: bytes) -> None:
        packet = packets.decode(int.from_bytes(data[:2]), data[2:])
        if packet is None:
            return
        check(packet.name is None or packet.name.isprintable(), "a name that cannot be shown")
        check(packet.payload_size >= 0 and len(packet.payload) <= len(data), "a payload that is not there")
        check(packet.protocol_name, "a protocol without a name")
        shapes.of(packet, openvpn=True, unsure=True)
        tag.is_probe(packet, (40000,))
        is_dhcp(packet)

    return one


def icmp_errors() -> Try:
    def one(data: bytes) -> None:
        datagram.offender(data)

    return one


class Told:
    """A socket that says what it is told to, once, and then would block."""

    def __init__(self) -> None:
        kind = socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK
        self.near, self._far = socket.socketpair(socket.AF_UNIX, kind)
        for end in (self.near, self._far):
            ENDS.callback(end.close)

    def says(self, data: bytes) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self._far.recv(65536)  # what was asked
        with contextlib.suppress(BlockingIOError):
            while True:
                self.near.recv(65536)
        self._far.send(data)


class _Kernel(Netlink):
    def _renew(self) -> None:
        """It stays with what it is told."""


def netlink() -> Try:
    """A datagram of rtnetlink's. Whatever rules and routes it tells are walked."""
    told, kernel = Told(), _Kernel()
    kernel.close()
    kernel._sock = told.near

    def asked(data: bytes) -> Netlink:
        told.says(data)
        kernel._sequence = 0
        return kernel

    def one(data: bytes) -> None:
        with contextlib.suppress(OSError):
            asked(data).route(ip_address("203.0.113.9"))
        with contextlib.suppress(OSError):
            asked(data)._dump(RTM_GETLINK)
        changes = NetworkChanges()
        changes.notice(data)
        changes.notice(data)
        found = list(messages(data))
        for message in found:
            for parse in (parse_link, parse_group, parse_address, parse_network, parse_route):
                parse(message.body)
            known = attributes(message.body)
            again = attributes(b"".join(attribute(kind, value) for kind, value in known.items()))
            check(again == known, "attributes that do not come back")
        hops = parse_next_hops(m.body for m in found if m.type == RTM_NEWNEXTHOP)
        rules = [r for m in found if m.type == RTM_NEWRULE and (r := parse_rule(m.body))]
        entries = [e for m in found if m.type == RTM_NEWROUTE and (e := parse_entry(m.body, hops))]
        for entry in entries:
            list(device_routes(entry, [hop.interface for hop in entry.hops]))
        _walk(Fib(tuple(rules), tuple(entries)))

    return one


def _walk(fib: Fib) -> None:
    for version, made in ((4, IPv4Address), (6, IPv6Address)):
        for sender in (ANY_SENDER, *(rule.sender() for rule in fib.rules[:2])):
            at = -1
            for segment in fib.segments(version, sender):
                check(at < segment.first <= segment.last, "parts of the address space that overlap")
                at = segment.last
                for number in (segment.first, segment.last):
                    found = fib.lookup(made(number), sender)
                    check(found is None or found == segment.entry, "one packet goes otherwise than all of them")
            check(at < 1 << (32 if version == 4 else 128), "an address that there is not")


def sock_diag() -> Try:
    """A datagram of sock_diag's."""
    told, asks = Told(), sockets.SocketTable()
    asks.close()
    asks._sock = told.near

    def one(data: bytes) -> None:
        told.says(data)
        asks._sequence = 0
        with contextlib.suppress(OSError):
            for found in asks._on_port(socket.IPPROTO_UDP, 53, 6, 0):
                check(found.port == 53, "a socket that nobody asked for")
        sockets.parse_socket(data)

    return one


def nft_tables() -> Try:
    """A datagram of nfnetlink's."""

    def one(data: bytes) -> None:
        with contextlib.suppress(OSError):
            table.read_owner(data)
        table.comment_in(data)

    return one


TARGETS = {
    "dns_answers": Target(
        modules=(
            "agent.probes.dnswire", "agent.probes.dns", "agent.probes.origin", "agent.probes.targets",
            "agent.probes.tag", "wire.canary",
        ),
        make=dns_answers,
        longest=1500,
    ),
    "dns_questions": Target(
        modules=("server.dns_canary.message", "server.dns_canary.responder", "server.dns_canary.zone", "wire.canary"),
        make=dns_questions,
        longest=1500,
    ),
    "dns_streams": Target(modules=("server.dns_canary.listener",), make=dns_streams),
    "pulses": Target(
        modules=("wire.pulse", "wire.echo", "server.ingest.pulse", "server.ingest.pulse_registry"),
        make=pulses,
        longest=1600,
    ),
    "captured": Target(
        modules=("agent.net.packets", "agent.leakwatch.rules", "agent.leakwatch.fingerprints", "agent.probes.tag"),
        make=captured,
        longest=600,
    ),
    "icmp_errors": Target(modules=("agent.probes.datagram",), make=icmp_errors, longest=64),
    "netlink": Target(
        modules=("agent.net.rtnetlink", "agent.net.netlink"),
        make=netlink,
        longest=2048,
    ),
    "sock_diag": Target(modules=("agent.net.sockets", "agent.net.closed_sockets"), make=sock_diag, longest=1024),
    "nft_tables": Target(modules=("agent.containment.table",), make=nft_tables, longest=512),
}  # fmt: skip
