"""Checks of the network: interfaces, the ways out of each family, and the nameservers."""

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from vpn_sentinel.agent.doctor.check import Check, gap, ok, unknown
from vpn_sentinel.agent.doctor.ground import Ground
from vpn_sentinel.agent.net.interfaces import Survey, is_up
from vpn_sentinel.agent.net.kernel import Netlink
from vpn_sentinel.agent.net.link import IFF_LOOPBACK
from vpn_sentinel.agent.probes import dns
from vpn_sentinel.agent.probes.system_resolver import SystemResolver
from vpn_sentinel.agent.rounds.route_audit import RouteAudit
from vpn_sentinel.domain.observation import Answer, Path, ResolverSighting, Routed, SystemLookup
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.domain.routes import is_shared, spoken

_PATIENCE: Final = 6.0  # seconds; glibc asks a silent nameserver for longer, but a check may take eight
_ASKED: Final = {4: ip_address("1.1.1.1"), 6: ip_address("2606:4700:4700::1111")}
_STUBS: Final = {
    "127.0.0.53": "systemd-resolved's stub: `resolvectl dns` names those behind it",
    "127.0.0.54": "systemd-resolved's proxy: `resolvectl dns` names those behind it",
    "127.0.0.11": "Docker's own forwarder: it asks the host's nameservers, or those of `dns:`",
}
_NO_NETLINK: Final = "netlink is not to be had here, so interfaces and routes stay unknown"
_ALLOW_NETLINK: Final = "allow AF_NETLINK in the sandbox (RestrictAddressFamilies, seccomp)"


async def interfaces(ground: Ground) -> list[Check]:
    return about_interfaces(ground.survey, ground.read.agent.probes.tunnel_interface)


def about_interfaces(survey: Survey, configured: str | None) -> list[Check]:
    if survey.interfaces is None:
        means = "a tunnel that goes away is only seen by its traffic."
        return [gap("interfaces", _NO_NETLINK, means, _ALLOW_NETLINK)]
    names = [i.name for i in survey.interfaces if not i.flags & IFF_LOOPBACK]
    every = f"here are {', '.join(names)}" if names else "here is none besides lo"
    return [_tunnel(survey, configured, every), _physical(survey, every)]


def _tunnel(survey: Survey, configured: str | None, every: str) -> Check:
    link = next((i for i in survey.interfaces or () if i.name == survey.tunnel), None)
    if survey.tunnel is None:
        means = "nothing tells whether traffic goes through a VPN; leaks are judged by home addresses alone."
        fix = "start the VPN, run this in its network namespace (network_mode: service:NAME), or name its interface in "
        return gap("tunnel", f"nothing shows that a VPN carries the way to the internet; {every}", means, fix + _NAME)
    why = "as configured" if configured else "it carries the way to the internet, and its own packets leave beside it"
    if link is None:
        fix = f"start the VPN, or correct {_NAME}"
        return gap("tunnel", f"{survey.tunnel} ({why}) is not here; {every}", "the tunnel counts as down.", fix)
    if not is_up(link):
        return gap("tunnel", f"{link.name} ({why}) is switched off", "the tunnel counts as down.", "start the VPN")
    kind = f", kind {link.kind}" if link.kind else ""
    if survey.misnamed is not None:
        says = f"{_NAME} names {survey.misnamed}, the way out beneath {link.name}{kind}"
        return gap(
            "tunnel", says, f"{link.name} is watched, whatever the setting says.", f"name {link.name}, or unset it"
        )
    return ok("tunnel", f"{link.name}{kind}: {why}")


_NAME: Final = "VPN_SENTINEL_TUNNEL_INTERFACE"


def _physical(survey: Survey, every: str) -> Check:
    if not survey.uplinks:
        means = "nothing can leave beside the tunnel from here; whether a kill switch holds cannot be tried."
        return unknown("way beside it", f"no other interface with an address; {every}", means)
    found = (f"{i.name} ({', '.join(str(a) for a in i.addresses if not a.is_link_local)})" for i in survey.uplinks)
    return ok("ways beside it" if len(survey.uplinks) > 1 else "way beside it", ", ".join(found))


@dataclass(frozen=True, slots=True)
class Way:
    """By which interface the kernel sends to the internet in one family. `device` is None without a route."""

    family: int
    path: Path
    device: str | None


async def routes(ground: Ground) -> list[Check]:
    if ground.kernel is None:
        return [unknown("route IPv4", _NO_NETLINK, fix=_ALLOW_NETLINK), unknown("route IPv6", _NO_NETLINK)]
    found = about_routes(*(_way(ground, ground.kernel, family) for family in (4, 6)), tunnel=ground.survey.tunnel)
    probes = ground.read.agent.probes
    return [
        *found,
        *about_bypasses(
            RouteAudit(probes).look(ground.survey, (e.address for e in probes.tunnel_endpoints)),
            tunnel=ground.survey.tunnel,
        ),
    ]


def about_bypasses(parts: Sequence[Routed] | None, *, tunnel: str | None) -> list[Check]:
    """What goes past the tunnel by routes of its own; nothing is said where nothing does."""
    parts = parts or ()
    beside = [p for p in parts if p.networks]
    fix = "remove that route or rule (`ip route`, `ip rule`), or declare it: VPN_SENTINEL_ALLOWED_OUTSIDE"
    means = "what is sent there leaves in the open, unless a firewall holds it."
    return [
        gap("route past the tunnel", spoken(part, tunnel, shared=is_shared(part, parts, tunnel)), means, fix)
        for part in beside
    ]


def _way(ground: Ground, kernel: Netlink, family: int) -> Way:
    address = _ASKED[family]
    route = kernel.route(address)
    links = ground.survey.interfaces or ()
    device = next((i.name for i in links if route and i.index == route.interface), None)
    return Way(family, ground.paths.of(address) if route else Path.UNKNOWN, device)


def about_routes(four: Way, six: Way, *, tunnel: str | None) -> list[Check]:
    return [_route4(four, tunnel), _route6(six, four, tunnel)]


def _route4(way: Way, tunnel: str | None) -> Check:
    name = "route IPv4"
    if way.device is None:
        return gap(name, "none to the internet", "this place is offline.", "start the VPN, or look at `ip route`")
    if way.path is Path.TUNNEL:
        return ok(name, f"by {way.device}: through the tunnel")
    if way.path is Path.OUTSIDE and tunnel is not None:
        means = "traffic goes past the tunnel."
        fix = "let the VPN take the default route (AllowedIPs = 0.0.0.0/0, redirect-gateway def1)"
        return gap(name, f"by {way.device}: beside {tunnel}", means, fix)
    return unknown(name, f"by {way.device}", "no tunnel is known, so whether that is right cannot be told.")


def _route6(way: Way, four: Way, tunnel: str | None) -> Check:
    name = "route IPv6"
    if way.device is None or way.path is Path.LOCAL:
        return ok(name, "none to the internet", "nothing can leave by IPv6.")
    if way.path is Path.TUNNEL:
        return ok(name, f"by {way.device}: through the tunnel")
    if way.path is Path.OUTSIDE and tunnel is not None:
        beside = " while IPv4 goes through it" if four.path is Path.TUNNEL else ""
        fix = "route ::/0 into the tunnel, or turn IPv6 off (net.ipv6.conf.all.disable_ipv6=1)"
        return gap(name, f"by {way.device}: beside {tunnel}{beside}", "IPv6 leaks, unless a firewall holds it.", fix)
    return unknown(name, f"by {way.device}", "no tunnel is known, so whether that is right cannot be told.")


@dataclass(frozen=True, slots=True)
class Server:
    """A nameserver, how it is reached, and whether the owner said that using it is never a leak."""

    address: IPAddress
    path: Path
    allowed: bool = False


async def system_resolver(ground: Ground) -> list[Check]:
    asking = SystemResolver(boottime=ground.clock.boottime, patience=_PATIENCE)
    return [about_system_resolver(await asking.ask(None, dns.system_nameservers()))]


def about_system_resolver(told: SystemLookup | None) -> Check:
    """One fresh name, looked up as programs do."""
    name = "system resolver"
    if told is not None and told.answer is Answer.ANSWERED:
        behind = f", which asks {', '.join(map(str, told.upstreams))}" if told.upstreams else ""
        return ok(name, f"getaddrinfo finds names{behind}")
    found = f"no answer within {_PATIENCE:g} s" if told is None or not told.error else told.error
    fix = "see /etc/resolv.conf and the line `hosts:` of /etc/nsswitch.conf, and that the nameserver answers"
    return gap(name, f"getaddrinfo finds no name: {found}", "programs here cannot look names up.", fix)


async def resolvers(ground: Ground) -> list[Check]:
    servers = dns.system_nameservers()
    if not servers:
        return about_resolvers((), (), tunnel=None)
    asked = await dns.resolvers(ground.paths, servers)
    policy = ground.read.agent.probes.policy
    told = [
        Server(s.address, dns.path_to(s, ground.paths), any(s.address in n for n in policy.allowed_resolvers))
        for s in servers
    ]
    return about_resolvers(told, asked.sightings, tunnel=ground.survey.tunnel)


def about_resolvers(
    servers: Sequence[Server], sightings: Sequence[ResolverSighting], *, tunnel: str | None
) -> list[Check]:
    if not servers:
        fix = "see that the VPN's client writes its nameservers there"
        return [gap("resolver", "/etc/resolv.conf names none", "names cannot be looked up.", fix)]
    return [_resolver(s, [x for x in sightings if x.nameserver == dns.plain(s.address)], tunnel) for s in servers]


def _resolver(server: Server, seen: Sequence[ResolverSighting], tunnel: str | None) -> Check:
    name, path = f"resolver {dns.plain(server.address)}", server.path
    egress = ", ".join(dict.fromkeys(str(s.egress) for s in seen if s.egress))
    stub = _STUBS.get(str(server.address), "a forwarder on this host")
    where = {Path.TUNNEL: "through the tunnel", Path.OUTSIDE: "by the way beside the tunnel", Path.LOCAL: stub}
    found = where.get(path, "by an unknown way") + (f"; it asks the world from {egress}" if egress else "")
    if not any(s.answer is Answer.ANSWERED for s in seen):
        fix = "see whether it can be reached through the VPN, or name one that can"
        return gap(name, f"{found}; it does not answer", "names that only it knows cannot be looked up.", fix)
    if path is Path.OUTSIDE and tunnel is None:
        return unknown(name, "answers", "no tunnel is known, so whether it is the right one cannot be told.")
    if path is Path.OUTSIDE and not server.allowed:
        fix = "use the VPN's resolver (DNS = … in its configuration), or allow this one: VPN_SENTINEL_ALLOWED_RESOLVERS"
        return gap(name, found, "what is looked up leaves outside the tunnel.", fix)
    if path is Path.LOCAL and not egress:
        return unknown(name, found, "where it asks could not be seen.")
    return ok(name, found)
