"""Which resolver asks for this host: the same few questions to each of the system's nameservers.

`canary`: TXT of a random name in the zone of our own server → the resolver's egress, from no third party.
`google`: TXT o-o.myaddr.l.google.com → the resolver's egress, and the client subnet it passed on.
`akahelp`: TXT whoami.ds.akahelp.net → `"ns" "<egress>"`, `"ecs" "<subnet>"`.
`akamai`: A whoami.akamai.net → the egress.
`path`: CH TXT whoami.cloudflare of the nameserver itself → the address it was asked from, when it is Cloudflare's.
"""

import asyncio
import secrets
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path as FilePath
from typing import Final, TypeVar

from vpn_sentinel.agent.interfaces import Paths
from vpn_sentinel.agent.probes import dnswire
from vpn_sentinel.agent.probes.datagram import Destination, Outcome, ask
from vpn_sentinel.agent.probes.targets import address_in
from vpn_sentinel.domain.observation import Answer, Path, ResolverSighting
from vpn_sentinel.domain.policy import IPAddress, IPNetwork
from vpn_sentinel.wire import canary
from vpn_sentinel.wire.messages import Echo

T = TypeVar("T")

RESOLV_CONF: Final = FilePath("/etc/resolv.conf")
LIMIT, RESEND = 2.0, 0.8  # seconds
_INTERCEPTION_LIMIT: Final = 0.9
_MOST_NAMESERVERS: Final = 3  # as resolv.conf(5)


@dataclass(frozen=True, slots=True)
class Nameserver:
    address: IPAddress
    scope: int = 0
    port: int = 53


# TEST-NET-1 (RFC 5737): nobody runs DNS there, so an answer is a proxy's.
NO_DNS_HERE: Final = Nameserver(ip_address("192.0.2.53"))


@dataclass(frozen=True, slots=True)
class Revealed:
    """What one answer told. All empty when it was an answer, and told nothing."""

    egress: IPAddress | None = None
    client: IPAddress | None = None
    subnet: IPNetwork | None = None
    failed: bool = False
    forged: bool = False  # it is not what our own server says


@dataclass(frozen=True, slots=True)
class Method:
    name: str
    domain: str
    kind: int
    read: Callable[[dnswire.Reply], Revealed]
    klass: int = dnswire.IN


@dataclass(frozen=True, slots=True)
class CanaryZone:
    """The zone that our server is authoritative for, and what we are known by there."""

    name: str
    ident: bytes
    key: bytes = field(repr=False)

    def method(self) -> Method:
        """A question that nobody asked before, so that no cache answers it."""
        nonce = secrets.token_bytes(canary.NONCE)

        def read(reply: dnswire.Reply) -> Revealed:
            egress = next((a for t in reply.texts if (a := canary.read_answer(t, nonce, self.key))), None)
            return Revealed(egress=egress, forged=egress is None and bool(reply.texts or reply.addresses))

        return Method("canary", f"{canary.label(self.ident, nonce, self.key)}.{self.name}", dnswire.TXT, read)


@dataclass(slots=True)
class ToldZone:
    """The canary zone as the server's last Welcome told, None without one."""

    zone: CanaryZone | None = None

    def learn(self, name: str | None, echo: Echo | None) -> bool:
        """Take in a Welcome; whether a zone is known now that was not."""
        old, self.zone = self.zone, None
        if name and echo is not None and is_domain(name):
            self.zone = CanaryZone(name, bytes.fromhex(echo.id), bytes.fromhex(echo.key))
        return self.zone not in (None, old)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the lookups of one round revealed. `forged`: a canary's answer was not our server's."""

    sightings: tuple[ResolverSighting, ...] = ()
    forged: bool = False


def is_domain(name: str) -> bool:
    """Whether a canary's name can be made below it."""
    try:
        dnswire.query(0, f"{'0' * canary.LABEL}.{name}", dnswire.TXT)
    except ValueError:
        return False
    return True


def nameservers(text: str) -> tuple[Nameserver, ...]:
    """The nameservers of a resolv.conf, each once; what is no address is skipped, as glibc does."""
    found: dict[str, Nameserver] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) < 2 or words[0] != "nameserver":
            continue
        host, _, zone = words[1].partition("%")
        try:
            address = ip_address(host)
        except ValueError:
            continue
        found.setdefault(words[1], Nameserver(address, _scope(zone)))
    return tuple(found.values())[:_MOST_NAMESERVERS]


def system_nameservers(path: FilePath = RESOLV_CONF) -> tuple[Nameserver, ...]:
    """Read each time: a VPN client rewrites the file when it connects."""
    try:
        return nameservers(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ()


def _scope(zone: str) -> int:
    if zone.isdigit():
        return int(zone)
    try:
        return socket.if_nametoindex(zone) if zone else 0
    except OSError:
        return 0


def read_google(reply: dnswire.Reply) -> Revealed:
    egress, subnet = None, None
    for strings in reply.texts:
        text = " ".join(strings)
        if text.startswith("edns0-client-subnet "):
            subnet = network_in(text.split(" ", 1)[1])
        elif egress is None:
            egress = address_in(text)
    return Revealed(egress=egress, subnet=subnet)


def read_akahelp(reply: dnswire.Reply) -> Revealed:
    said = {strings[0]: strings[1] for strings in reply.texts if len(strings) >= 2}
    return Revealed(egress=address_in(said.get("ns", "")), subnet=network_in(said.get("ecs", "")))


def read_akamai(reply: dnswire.Reply) -> Revealed:
    return Revealed(egress=reply.addresses[0] if reply.addresses else None)


def read_path(reply: dnswire.Reply) -> Revealed:
    texts = (address_in(s) for strings in reply.texts for s in strings)
    return Revealed(client=next((a for a in texts if a), None))


def network_in(text: str) -> IPNetwork | None:
    """A client subnet as `192.0.2.0/24`, or with its scope behind: `192.0.2.0/24/0`. `/0` tells nothing."""
    parts = text.strip().split("/")
    try:
        found = ip_network("/".join(parts[:2]), strict=False)
    except ValueError:
        return None
    return found if found.prefixlen else None


GOOGLE: Final = Method("google", "o-o.myaddr.l.google.com", dnswire.TXT, read_google)
AKAHELP: Final = Method("akahelp", "whoami.ds.akahelp.net", dnswire.TXT, read_akahelp)
AKAMAI: Final = Method("akamai", "whoami.akamai.net", dnswire.A, read_akamai)
PATH: Final = Method("path", "whoami.cloudflare", dnswire.TXT, read_path, dnswire.CHAOS)
_ROOT: Final = Method("root", "a.root-servers.net", dnswire.A, read_akamai)


def plan(servers: Iterable[Nameserver], zone: CanaryZone | None = None) -> list[tuple[Nameserver, Method]]:
    """Five to ten questions over all nameservers, by two methods at least; with a zone, our own server's first.

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


async def resolvers(paths: Paths, servers: Iterable[Nameserver], zone: CanaryZone | None = None) -> Asked:
    """Ask all at once; at most two seconds."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_sighting(server, method, paths)) for server, method in plan(servers, zone)]
    found = [t.result() for t in tasks]
    return Asked(tuple(s for s, _ in found if s is not None), any(forged for _, forged in found))


async def intercepted(limit: float = _INTERCEPTION_LIMIT, at: Nameserver = NO_DNS_HERE) -> bool:
    """Whether something answers a query to an address that runs no DNS."""
    return (await lookup(at, _ROOT, limit=limit, resend=None)).answer is Answer.ANSWERED


async def rewritten(servers: Iterable[Nameserver], zone: CanaryZone | None = None) -> bool | None:
    """Whether a nameserver gives a name that cannot exist an address; None when none says either way."""
    # Below the zone nothing like it exists; without one, no top level domain is called so.
    name = f"nx-{secrets.token_hex(8)}.{zone.name if zone else 'nx' + secrets.token_hex(8)}"
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_invents(server, name)) for server in servers]
    told = {t.result() for t in tasks}
    return True if True in told else (False if False in told else None)


async def sighting(server: Nameserver, zone: CanaryZone) -> ResolverSighting | None:
    """One canary through one nameserver, its path not looked at; None when the zone cannot be asked."""
    return (await _sighting(server, zone.method(), None))[0]


async def _sighting(server: Nameserver, method: Method, paths: Paths | None) -> tuple[ResolverSighting | None, bool]:
    """What one lookup showed, None when it says nothing of the nameserver; and whether the answer was forged."""
    path = path_to(server, paths) if paths else Path.UNKNOWN
    outcome = await lookup(server, method, limit=LIMIT, resend=RESEND)
    revealed = outcome.value or Revealed()
    if method is PATH and revealed.client is None:
        return None, False  # most nameservers refuse it, which says nothing of them
    if method.name == "canary" and revealed.failed:
        return None, False  # it may be our own server that is down
    seen = ResolverSighting(
        method=method.name,
        nameserver=plain(server.address),
        # A nameserver that is there and cannot look anything up serves nobody: as good as out of reach.
        answer=Answer.UNREACHABLE if revealed.failed else outcome.answer,
        path=path,
        egress=revealed.egress,
        client=revealed.client,
        subnet=revealed.subnet,
    )
    return seen, revealed.forged


async def _invents(server: Nameserver, name: str) -> bool | None:
    """Whether this nameserver has an address for `name`; None when it does not say that there is none."""

    def read(reply: dnswire.Reply) -> bool | None:
        return True if reply.addresses else (False if reply.rcode == dnswire.NXDOMAIN else None)

    found = await _exchange(server, dnswire.query(secrets.randbits(16), name, dnswire.A), lambda r: (read(r),))
    return found.value[0] if found.value else None


def path_to(server: Nameserver, paths: Paths) -> Path:
    return Path.LOCAL if server.address.is_loopback else paths.of(server.address, server.port)


def plain(address: IPAddress) -> IPAddress:
    """The address without its zone, which names an interface of this host only."""
    return ip_address(address.packed) if isinstance(address, IPv6Address) else address


async def lookup(server: Nameserver, method: Method, *, limit: float, resend: float | None) -> Outcome[Revealed]:
    asked = dnswire.query(secrets.randbits(16), method.domain, method.kind, method.klass)

    def read(reply: dnswire.Reply) -> Revealed:
        return Revealed(failed=True) if reply.rcode == dnswire.SERVFAIL else method.read(reply)

    return await _exchange(server, asked, read, limit=limit, resend=resend)


async def _exchange(
    server: Nameserver,
    asked: bytes,
    read: Callable[[dnswire.Reply], T],
    *,
    limit: float = LIMIT,
    resend: float | None = RESEND,
) -> Outcome[T]:
    def parsed(datagram: bytes) -> T | None:
        try:
            reply = dnswire.parse(datagram, asked)
        except dnswire.BadMessageError:
            return None
        return read(reply)

    where = Destination(address=server.address, port=server.port, scope=server.scope)
    return await ask(where, asked, parsed, limit=limit, resend=resend)
