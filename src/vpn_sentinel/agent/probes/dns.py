"""Which resolver asks for this host: the same few questions to each of the system's nameservers.

`google`: TXT o-o.myaddr.l.google.com → the resolver's egress, and the client subnet it passed on.
`akahelp`: TXT whoami.ds.akahelp.net → `"ns" "<egress>"`, `"ecs" "<subnet>"`.
`akamai`: A whoami.akamai.net → the egress.
`path`: CH TXT whoami.cloudflare of the nameserver itself → the address it was asked from, when it is Cloudflare's.
"""

import asyncio
import secrets
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path as FilePath
from typing import Final

from vpn_sentinel.agent.interfaces import Paths
from vpn_sentinel.agent.probes import dnswire
from vpn_sentinel.agent.probes.datagram import Destination, Outcome, ask
from vpn_sentinel.agent.probes.targets import address_in
from vpn_sentinel.domain.observation import Answer, Path, ResolverSighting
from vpn_sentinel.domain.policy import IPAddress, IPNetwork

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


@dataclass(frozen=True, slots=True)
class Method:
    name: str
    domain: str
    kind: int
    read: Callable[[dnswire.Reply], Revealed]
    klass: int = dnswire.IN


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


def plan(servers: Iterable[Nameserver]) -> list[tuple[Nameserver, Method]]:
    """Five to ten questions over all nameservers: a resolver with several egresses shows more than one."""
    servers = tuple(servers)
    methods = {1: (GOOGLE, GOOGLE, AKAHELP, AKAMAI, PATH), 2: (GOOGLE, AKAHELP, AKAMAI, PATH)}.get(
        len(servers), (GOOGLE, AKAHELP, PATH)
    )
    return [(server, method) for server in servers for method in methods]


async def resolvers(paths: Paths, servers: Iterable[Nameserver]) -> tuple[ResolverSighting, ...]:
    """Ask all at once; at most two seconds."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_sighting(server, method, paths)) for server, method in plan(servers)]
    return tuple(s for t in tasks if (s := t.result()) is not None)


async def intercepted(limit: float = _INTERCEPTION_LIMIT, at: Nameserver = NO_DNS_HERE) -> bool:
    """Whether something answers a query to an address that runs no DNS."""
    return (await lookup(at, _ROOT, limit=limit, resend=None)).answer is Answer.ANSWERED


async def _sighting(server: Nameserver, method: Method, paths: Paths) -> ResolverSighting | None:
    path = path_to(server, paths)
    outcome = await lookup(server, method, limit=LIMIT, resend=RESEND)
    revealed = outcome.value or Revealed()
    if method is PATH and revealed.client is None:
        return None  # most nameservers refuse it, which says nothing of them
    return ResolverSighting(
        method=method.name,
        nameserver=plain(server.address),
        # A nameserver that is there and cannot look anything up serves nobody: as good as out of reach.
        answer=Answer.UNREACHABLE if revealed.failed else outcome.answer,
        path=path,
        egress=revealed.egress,
        client=revealed.client,
        subnet=revealed.subnet,
    )


def path_to(server: Nameserver, paths: Paths) -> Path:
    return Path.LOCAL if server.address.is_loopback else paths.of(server.address, server.port)


def plain(address: IPAddress) -> IPAddress:
    """The address without its zone, which names an interface of this host only."""
    return ip_address(address.packed) if isinstance(address, IPv6Address) else address


async def lookup(server: Nameserver, method: Method, *, limit: float, resend: float | None) -> Outcome[Revealed]:
    asked = dnswire.query(secrets.randbits(16), method.domain, method.kind, method.klass)

    def read(datagram: bytes) -> Revealed | None:
        try:
            reply = dnswire.parse(datagram, asked)
        except dnswire.BadMessageError:
            return None
        return Revealed(failed=True) if reply.rcode == dnswire.SERVFAIL else method.read(reply)

    where = Destination(address=server.address, port=server.port, scope=server.scope)
    return await ask(where, asked, read, limit=limit, resend=resend)
