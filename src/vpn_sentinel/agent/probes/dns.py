"""Which resolvers look names up for this host: the same few queries to each of the system's nameservers.

`canary`: TXT of a random name in the zone of our own server → the resolver's egress, from no third party.
`google`: TXT o-o.myaddr.l.google.com → the resolver's egress, and the client subnet that it forwarded.
`akahelp`: TXT whoami.ds.akahelp.net → `"ns" "<egress>"`, `"ecs" "<subnet>"`.
`akamai`: A whoami.akamai.net → the egress.
`path`: CH TXT whoami.cloudflare of the nameserver itself → the client's address, when it is Cloudflare's.
"""

import asyncio
import os
import secrets
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path as FilePath
from typing import Final, TypeVar

from vpn_sentinel.agent.net.interfaces import Paths
from vpn_sentinel.agent.net.urls import address_in
from vpn_sentinel.agent.probes import dnswire
from vpn_sentinel.agent.probes.datagram import DatagramResult, DatagramTarget, ask
from vpn_sentinel.domain.observation import Answer, Path, ResolverSighting
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, is_public, within
from vpn_sentinel.runtime.addresses import LOCAL_NAT64, NAT64
from vpn_sentinel.wire import canary
from vpn_sentinel.wire.messages import Echo

T = TypeVar("T")

RESOLV_CONF: Final = FilePath("/etc/resolv.conf")
DNS_TIMEOUT_S, DNS_RESEND_S = 2.0, 0.8
_INTERCEPTION_TIMEOUT_S: Final = 0.9
_SETTLE_S: Final = 0.1  # for the other lookups, once there are enough
_MAX_NAMESERVERS: Final = 3  # as resolv.conf(5)
_MUSL_LINE_BYTES: Final = 255  # including the line break
_BLANKS: Final = " \t\r\v\f"
_TO_BLANK: Final = str.maketrans(dict.fromkeys(_BLANKS, " "))
_LINK_MULTICAST: Final = ip_network("ff02::/16")
_MAX_FILE_BYTES: Final = 1 << 18  # of a resolv.conf; the usual size is some hundred


@dataclass(frozen=True, slots=True)
class Nameserver:
    address: IPAddress
    scope: int = 0
    port: int = 53


THIS_HOST: Final = Nameserver(ip_address("127.0.0.1"))
# Addresses that no public host has, besides NOT_PUBLIC of the domain: documentation (RFC 5737, 3849, 9637) and the
# NAT64 prefixes (RFC 6052, RFC 8215). Ad blockers and rebinding protection answer with such addresses.
_NO_HOST_BLOCKS: Final[tuple[IPNetwork, ...]] = (
    *(ip_network(n) for n in ("192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "2001:db8::/32", "3fff::/20")),
    NAT64,
    LOCAL_NAT64,
)
# TEST-NET-1 (RFC 5737): no DNS server is there, so an answer comes from a proxy.
NO_DNS_HERE: Final = Nameserver(ip_address("192.0.2.53"))


@dataclass(frozen=True, slots=True)
class Revealed:
    """The facts in one answer. All are empty for an answer without any."""

    egress: IPAddress | None = None
    client: IPAddress | None = None
    subnet: IPNetwork | None = None
    failed: bool = False
    forged: bool = False  # the answer is not from our own server


@dataclass(frozen=True, slots=True)
class Method:
    name: str
    domain: str
    kind: int
    read: Callable[[dnswire.DnsReply], Revealed]
    klass: int = dnswire.IN


@dataclass(frozen=True, slots=True)
class CanaryZone:
    """The zone that our server is authoritative for, and this agent's id and key there."""

    name: str
    ident: bytes
    key: bytes = field(repr=False)

    def method(self) -> Method:
        """A query with a random name, so that no cache has the answer."""
        nonce = secrets.token_bytes(canary.NONCE_BYTES)

        def read(reply: dnswire.DnsReply) -> Revealed:
            egress = next((a for t in reply.texts if (a := canary.read_answer(t, nonce, self.key))), None)
            return Revealed(egress=egress, forged=egress is None and bool(reply.texts or reply.addresses))

        return Method("canary", f"{canary.label(self.ident, nonce, self.key)}.{self.name}", dnswire.TXT, read)


@dataclass(slots=True)
class LearnedZone:
    """The canary zone in the server's last Welcome, None without one."""

    zone: CanaryZone | None = None

    def learn(self, name: str | None, echo: Echo | None) -> bool:
        """Process a Welcome; returns whether the zone is a new one."""
        old, self.zone = self.zone, None
        if name and echo is not None and is_domain(name):
            self.zone = CanaryZone(name, bytes.fromhex(echo.id), bytes.fromhex(echo.key))
        return self.zone not in (None, old)


@dataclass(frozen=True, slots=True)
class ResolverAnswers:
    """The results of the lookups of one round. `forged`: the answer to a canary was not from our server."""

    sightings: tuple[ResolverSighting, ...] = ()
    forged: bool = False


def is_domain(name: str) -> bool:
    """Whether it is a domain name, with room for the label of a canary."""
    try:
        dnswire.query(0, f"{'0' * canary.LABEL_LENGTH}.{name}", dnswire.TXT)
    except ValueError:
        return False
    return True


def nameservers(text: str, *, musl: bool = False) -> tuple[Nameserver, ...]:
    """The nameservers that programs use, each once, as the C library reads resolv.conf(5).

    The keyword begins the line and ends with a blank or tab; what follows the address is ignored; the first three
    entries count, including duplicates; a file without any means this host. glibc's res_init.c and musl's resolvconf.c
    differ in what is a blank, in long lines, and in zones that are no interface. Tested against glibc 2.36 and musl
    1.2.3.
    """
    words = _musl_words(text) if musl else _glibc_words(text)
    found = [server for word in words if (server := _nameserver(word, musl=musl)) is not None]
    return tuple(dict.fromkeys(found[:_MAX_NAMESERVERS])) or (THIS_HOST,)


def _glibc_words(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        line = line.partition("\0")[0]  # a C string ends there
        if line.startswith(("nameserver ", "nameserver\t")):
            yield line[len("nameserver") :].lstrip(" \t").replace("\t", " ").partition(" ")[0]


def _musl_words(text: str) -> Iterator[str]:
    """All of isspace(3) are blanks here, CR too; a line that fills the buffer of fgets(3) or has a NUL is ignored."""
    for line in text.split("\n"):
        short = len(line.encode("utf-8", "replace")) < _MUSL_LINE_BYTES and "\0" not in line
        if short and line[:10] == "nameserver" and line[10:11] in tuple(_BLANKS):
            yield line[11:].lstrip(_BLANKS).translate(_TO_BLANK).partition(" ")[0]


def _nameserver(word: str, *, musl: bool) -> Nameserver | None:
    host, percent, zone = word.partition("%")
    try:
        address = IPv6Address(host)
    except ValueError:
        pass
    else:
        scope = _scope(address, zone)
        # musl skips one with an unknown zone; glibc ignores the zone.
        return None if musl and percent and scope is None else Nameserver(address, scope or 0)
    # inet_aton(3), which accepts "10.1" too, but no space after the address: with a CR it is not an address.
    if not word or not word.isascii() or word.split() != [word]:
        return None
    try:
        return Nameserver(IPv4Address(socket.inet_aton(word)))
    except OSError:
        return None


def system_nameservers(path: FilePath = RESOLV_CONF) -> tuple[Nameserver, ...]:
    """Read each time: a VPN client rewrites the file when it connects.

    Without a file the C library asks this host. Empty for a file that this process cannot read (other programs may),
    and for a named pipe, which would block, and give its content to one reader only.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
                return ()
            return nameservers(file.read(_MAX_FILE_BYTES).decode("utf-8", "replace"), musl=_is_musl())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return (THIS_HOST,)
    except OSError:
        return ()


def on_link(address: IPAddress, device: str) -> Nameserver:
    """The nameserver at an address that is reached by `device`."""
    return Nameserver(address, (isinstance(address, IPv6Address) and _scope(address, device)) or 0)


def besides(servers: Iterable[Nameserver], more: Iterable[Nameserver]) -> tuple[Nameserver, ...]:
    """Those of `more` whose addresses are not among `servers`, each once."""
    known = {plain(s.address) for s in servers}
    return tuple(s for s in dict.fromkeys(more) if plain(s.address) not in known)


def _scope(address: IPv6Address, zone: str) -> int | None:
    """The interface index for a zone; None if it is neither a number nor an interface here. Only link-local addresses
    can have a zone by name."""
    if zone.isascii() and zone.isdigit():
        digits = zone.lstrip("0") or "0"
        return int(digits) if len(digits) <= 10 and int(digits) < 2**32 else None
    if not zone or not (address.is_link_local or address in _LINK_MULTICAST):
        return None
    try:
        return socket.if_nametoindex(zone)
    except OSError:
        return None


@cache
def _is_musl() -> bool:
    """Whether this process's C library is not glibc, which gives its name in confstr(3)."""
    try:
        return not os.confstr("CS_GNU_LIBC_VERSION")
    except (ValueError, OSError):
        return True


def read_google(reply: dnswire.DnsReply) -> Revealed:
    egress, subnet = None, None
    for strings in reply.texts:
        text = " ".join(strings)
        if text.startswith("edns0-client-subnet "):
            subnet = network_in(text.split(" ", 1)[1])
        elif egress is None:
            egress = on_the_internet(address_in(text))
    return Revealed(egress=egress, subnet=subnet)


def read_akahelp(reply: dnswire.DnsReply) -> Revealed:
    fields = {strings[0]: strings[1] for strings in reply.texts if len(strings) >= 2}
    return Revealed(egress=on_the_internet(address_in(fields.get("ns", ""))), subnet=network_in(fields.get("ecs", "")))


def read_akamai(reply: dnswire.DnsReply) -> Revealed:
    """The name has no alias: an answer with one leads to a page that says that the name is blocked."""
    found = () if reply.aliased else reply.addresses
    return Revealed(egress=next((a for a in map(on_the_internet, found) if a), None))


def read_path(reply: dnswire.DnsReply) -> Revealed:
    texts = (on_the_internet(address_in(s)) for strings in reply.texts for s in strings)
    return Revealed(client=next((a for a in texts if a), None))


def network_in(text: str) -> IPNetwork | None:
    """A client subnet as `192.0.2.0/24`, or followed by its scope: `192.0.2.0/24/0`. None for `/0`."""
    parts = text.strip().split("/")
    try:
        found = ip_network("/".join(parts[:2]), strict=False)
    except ValueError:
        return None
    return found if found.prefixlen and on_the_internet(found.network_address) else None


def on_the_internet(address: IPAddress | None) -> IPAddress | None:
    """`address` if a host on the internet can have it, an IPv4-mapped one as IPv4; else None."""
    address = _unmapped(address)
    return address if address is not None and is_public(address) and not within(address, _NO_HOST_BLOCKS) else None


def _unmapped(address: IPAddress | None) -> IPAddress | None:
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address


GOOGLE: Final = Method("google", "o-o.myaddr.l.google.com", dnswire.TXT, read_google)
AKAHELP: Final = Method("akahelp", "whoami.ds.akahelp.net", dnswire.TXT, read_akahelp)
AKAMAI: Final = Method("akamai", "whoami.akamai.net", dnswire.A, read_akamai)
PATH: Final = Method("path", "whoami.cloudflare", dnswire.TXT, read_path, dnswire.CHAOS)
_ROOT: Final = Method("root", "a.root-servers.net", dnswire.A, read_akamai)


def plan(servers: Iterable[Nameserver], zone: CanaryZone | None = None) -> list[tuple[Nameserver, Method]]:
    """Five to ten queries to all nameservers, by two methods at least; with a zone, our own server's first.

    A resolver with several egresses shows more than one.
    """
    servers = tuple(servers)
    methods = {1: (GOOGLE, GOOGLE, AKAHELP, AKAMAI, PATH), 2: (GOOGLE, AKAHELP, AKAMAI, PATH)}.get(
        len(servers), (GOOGLE, AKAHELP, PATH)
    )
    if zone is None:
        return [(server, method) for server in servers for method in methods]
    own = {1: 3, 2: 2}.get(len(servers), 1)
    whoami = (GOOGLE, AKAHELP, PATH) if len(servers) < 2 else (GOOGLE, PATH)
    return [(server, m) for server in servers for m in (*(zone.method() for _ in range(own)), *whoami)]


async def resolvers(
    paths: Paths,
    servers: Iterable[Nameserver],
    zone: CanaryZone | None = None,
    *,
    enough: Callable[[ResolverAnswers], bool] = lambda _: False,
) -> ResolverAnswers:
    """Ask all in parallel, for two seconds at most, or until `enough` is true and 0.1 s have passed since."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_sighting(server, method, paths)) for server, method in plan(servers, zone)]
        waiting = set(tasks)
        while waiting:
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if waiting and enough(_answers(tasks)):
                await asyncio.wait(waiting, timeout=_SETTLE_S)
                break
        found = _answers(tasks)
        for task in tasks:
            task.cancel()
    return found


def _answers(tasks: Iterable[asyncio.Task[tuple[ResolverSighting | None, bool]]]) -> ResolverAnswers:
    found = [t.result() for t in tasks if t.done()]
    return ResolverAnswers(tuple(s for s, _ in found if s is not None), any(forged for _, forged in found))


async def intercepted(limit: float = _INTERCEPTION_TIMEOUT_S, at: Nameserver = NO_DNS_HERE) -> bool:
    """Whether something answers a query to an address without a DNS server."""
    return (await lookup(at, _ROOT, limit=limit, resend=None)).answer is Answer.ANSWERED


async def rewritten(servers: Iterable[Nameserver], zone: CanaryZone | None = None) -> bool | None:
    """Whether a nameserver gives an address for a name that cannot exist; None when no answer shows it."""
    # No such name exists below the zone; without a zone, no such top-level domain exists.
    name = f"nx-{secrets.token_hex(8)}.{zone.name if zone else 'nx' + secrets.token_hex(8)}"
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_has_address(server, name)) for server in servers]
    results = {t.result() for t in tasks}
    return True if True in results else (False if False in results else None)


async def sighting(server: Nameserver, zone: CanaryZone) -> ResolverSighting | None:
    """One canary through one nameserver, without its path; None when it says nothing about the nameserver."""
    return (await _sighting(server, zone.method(), None))[0]


async def _sighting(server: Nameserver, method: Method, paths: Paths | None) -> tuple[ResolverSighting | None, bool]:
    """The result of one lookup, None when it says nothing about the nameserver; and whether the answer was forged."""
    path = path_to(server, paths) if paths else Path.UNKNOWN
    outcome = await lookup(server, method, limit=DNS_TIMEOUT_S, resend=DNS_RESEND_S)
    revealed = outcome.value or Revealed()
    if method is PATH and revealed.client is None:
        return None, False  # most nameservers refuse it, which is normal
    if method.name == "canary" and revealed.failed:
        return None, False  # our own server may be down
    egress = _unmapped(revealed.egress)
    seen = ResolverSighting(
        method=method.name,
        nameserver=plain(server.address),
        # A nameserver that cannot look anything up is of no use: it counts as unreachable.
        answer=Answer.UNREACHABLE if revealed.failed else outcome.answer,
        path=path,
        # Our own server on the same LAN sees a private address, which is not the egress.
        egress=egress if egress is not None and is_public(egress) else None,
        client=revealed.client,
        subnet=revealed.subnet,
    )
    return seen, revealed.forged


async def _has_address(server: Nameserver, name: str) -> bool | None:
    """Whether this nameserver has an address for `name`; None for any answer except an address or NXDOMAIN."""

    def read(reply: dnswire.DnsReply) -> bool | None:
        return True if reply.addresses else (False if reply.rcode == dnswire.NXDOMAIN else None)

    found = await _exchange(server, dnswire.query(secrets.randbits(16), name, dnswire.A), lambda r: (read(r),))
    return found.value[0] if found.value else None


def path_to(server: Nameserver, paths: Paths) -> Path:
    """By which kind of interface a nameserver is reached; a zone (`fe80::1%eth0`) names the interface itself.

    The path is unknown for a neighbour whose packets this host forwards into the tunnel, such as a container.
    """
    if server.address.is_loopback or server.address.is_unspecified:
        return Path.LOCAL
    if not (server.scope and server.address.is_link_local):
        path = paths.of(server.address, server.port)
        return Path.UNKNOWN if path is Path.OUTSIDE and paths.forwards_into_tunnel(server.address) else path
    found = next((i for i in paths.survey.interfaces or () if i.index == server.scope), None)
    return Path.UNKNOWN if found is None else paths.by(found)


def plain(address: IPAddress) -> IPAddress:
    """The address without its zone, which only has a meaning on this host."""
    return ip_address(address.packed) if isinstance(address, IPv6Address) else address


async def lookup(server: Nameserver, method: Method, *, limit: float, resend: float | None) -> DatagramResult[Revealed]:
    asked = dnswire.query(secrets.randbits(16), method.domain, method.kind, method.klass)

    def read(reply: dnswire.DnsReply) -> Revealed:
        if reply.rcode != dnswire.NOERROR:
            return Revealed(failed=reply.rcode == dnswire.SERVFAIL)
        return method.read(reply)

    return await _exchange(server, asked, read, limit=limit, resend=resend)


async def _exchange(
    server: Nameserver,
    asked: bytes,
    read: Callable[[dnswire.DnsReply], T],
    *,
    limit: float = DNS_TIMEOUT_S,
    resend: float | None = DNS_RESEND_S,
) -> DatagramResult[T]:
    def parsed(datagram: bytes) -> T | None:
        try:
            reply = dnswire.parse(datagram, asked)
        except dnswire.BadMessageError:
            return None
        return read(reply)

    where = DatagramTarget(address=server.address, port=server.port, scope=server.scope)
    return await ask(where, asked, parsed, limit=limit, resend=resend)
