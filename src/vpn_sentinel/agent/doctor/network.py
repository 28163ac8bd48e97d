"""Checks of the network: interfaces, the routes of each IP version, and the nameservers."""

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from vpn_sentinel.agent.doctor.check import Check, gap, ok, unknown
from vpn_sentinel.agent.doctor.context import DoctorContext
from vpn_sentinel.agent.net.interfaces import Survey, is_up
from vpn_sentinel.agent.net.kernel import Netlink
from vpn_sentinel.agent.net.link import IFF_LOOPBACK
from vpn_sentinel.agent.probes import dns
from vpn_sentinel.agent.probes.system_resolver import SystemResolver
from vpn_sentinel.agent.rounds.route_audit import RouteAudit
from vpn_sentinel.domain.observation import Answer, Path, ResolverSighting, Routed, SystemLookup
from vpn_sentinel.domain.policy import IPAddress
from vpn_sentinel.domain.routes import described, is_shared

_LOOKUP_TIMEOUT_S: Final = 6.0  # glibc waits longer for a silent nameserver, but a check has eight seconds
_ROUTE_DESTINATIONS: Final = {4: ip_address("1.1.1.1"), 6: ip_address("2606:4700:4700::1111")}
_STUB_RESOLVERS: Final = {
    "127.0.0.53": "systemd-resolved's stub: `resolvectl dns` names those behind it",
    "127.0.0.54": "systemd-resolved's proxy: `resolvectl dns` names those behind it",
    "127.0.0.11": "Docker's own forwarder: it asks the host's nameservers, or those of `dns:`",
}
_NO_NETLINK: Final = "netlink is not available here, so interfaces and routes stay unknown"
_ALLOW_NETLINK: Final = "allow AF_NETLINK in the sandbox (RestrictAddressFamilies, seccomp)"


async def interfaces(context: DoctorContext) -> list[Check]:
    return about_interfaces(context.survey, context.settings.agent.probes.tunnel_interface)


def about_interfaces(survey: Survey, configured: str | None) -> list[Check]:
    if survey.interfaces is None:
        means = "a tunnel that goes away is noticed by its traffic only."
        return [gap("interfaces", _NO_NETLINK, means, _ALLOW_NETLINK)]
    names = [i.name for i in survey.interfaces if not i.flags & IFF_LOOPBACK]
    listing = f"here are {', '.join(names)}" if names else "here is none besides lo"
    return [_tunnel(survey, configured, listing), _physical(survey, listing)]


def _tunnel(survey: Survey, configured: str | None, listing: str) -> Check:
    link = next((i for i in survey.interfaces or () if i.name == survey.tunnel), None)
    if survey.tunnel is None:
        means = "it is unknown whether traffic goes through a VPN; leaks are judged by home addresses alone."
        fix = "start the VPN, run this in its network namespace (network_mode: service:NAME), or name its interface in "
        return gap(
            "tunnel",
            f"nothing shows that a VPN carries traffic to the internet; {listing}",
            means,
            fix + _INTERFACE_SETTING,
        )
    why = (
        "as configured"
        if configured
        else "traffic to the internet goes through it, and its own packets leave beside it"
    )
    if link is None:
        fix = f"start the VPN, or correct {_INTERFACE_SETTING}"
        return gap("tunnel", f"{survey.tunnel} ({why}) does not exist; {listing}", "the tunnel counts as down.", fix)
    if not is_up(link):
        return gap("tunnel", f"{link.name} ({why}) is switched off", "the tunnel counts as down.", "start the VPN")
    kind = f", kind {link.kind}" if link.kind else ""
    if survey.misnamed is not None:
        says = f"{_INTERFACE_SETTING} names {survey.misnamed}, the uplink of {link.name}{kind}"
        return gap(
            "tunnel", says, f"{link.name} is watched, whatever the setting says.", f"name {link.name}, or unset it"
        )
    return ok("tunnel", f"{link.name}{kind}: {why}")


_INTERFACE_SETTING: Final = "VPN_SENTINEL_TUNNEL_INTERFACE"


def _physical(survey: Survey, listing: str) -> Check:
    if not survey.uplinks:
        means = "nothing can leave beside the tunnel from here; whether a kill switch holds cannot be tested."
        return unknown("way beside it", f"no other interface with an address; {listing}", means)
    found = (f"{i.name} ({', '.join(str(a) for a in i.addresses if not a.is_link_local)})" for i in survey.uplinks)
    return ok("ways beside it" if len(survey.uplinks) > 1 else "way beside it", ", ".join(found))


@dataclass(frozen=True, slots=True)
class FamilyRoute:
    """By which `device` the kernel sends packets of one IP version to the internet, None without a route."""

    family: int
    path: Path
    device: str | None


async def routes(context: DoctorContext) -> list[Check]:
    if context.kernel is None:
        return [unknown("route IPv4", _NO_NETLINK, fix=_ALLOW_NETLINK), unknown("route IPv6", _NO_NETLINK)]
    found = about_routes(
        *(_family_route(context, context.kernel, family) for family in (4, 6)), tunnel=context.survey.tunnel
    )
    probes = context.settings.agent.probes
    return [
        *found,
        *about_bypasses(
            RouteAudit(probes).read(context.survey, (e.address for e in probes.tunnel_endpoints)),
            tunnel=context.survey.tunnel,
        ),
    ]


def about_bypasses(parts: Sequence[Routed] | None, *, tunnel: str | None) -> list[Check]:
    """What goes past the tunnel by routes of its own; empty when nothing does."""
    parts = parts or ()
    beside = [p for p in parts if p.networks]
    fix = "remove that route or rule (`ip route`, `ip rule`), or declare it: VPN_SENTINEL_ALLOWED_OUTSIDE"
    means = "what is sent there leaves outside the tunnel, unless a firewall blocks it."
    return [
        gap("route past the tunnel", described(part, tunnel, shared=is_shared(part, parts, tunnel)), means, fix)
        for part in beside
    ]


def _family_route(context: DoctorContext, kernel: Netlink, family: int) -> FamilyRoute:
    address = _ROUTE_DESTINATIONS[family]
    route = kernel.route(address)
    links = context.survey.interfaces or ()
    device = next((i.name for i in links if route and i.index == route.interface), None)
    return FamilyRoute(family, context.paths.of(address) if route else Path.UNKNOWN, device)


def about_routes(ipv4: FamilyRoute, ipv6: FamilyRoute, *, tunnel: str | None) -> list[Check]:
    return [_route4(ipv4, tunnel), _route6(ipv6, ipv4, tunnel)]


def _route4(route: FamilyRoute, tunnel: str | None) -> Check:
    name = "route IPv4"
    if route.device is None:
        return gap(name, "none to the internet", "this host is offline.", "start the VPN, or check `ip route`")
    if route.path is Path.TUNNEL:
        return ok(name, f"by {route.device}: through the tunnel")
    if route.path is Path.OUTSIDE and tunnel is not None:
        means = "traffic goes past the tunnel."
        fix = "let the VPN take the default route (AllowedIPs = 0.0.0.0/0, redirect-gateway def1)"
        return gap(name, f"by {route.device}: beside {tunnel}", means, fix)
    return unknown(name, f"by {route.device}", "no tunnel is known, so it is unknown whether that is right.")


def _route6(route: FamilyRoute, ipv4: FamilyRoute, tunnel: str | None) -> Check:
    name = "route IPv6"
    if route.device is None or route.path is Path.LOCAL:
        return ok(name, "none to the internet", "nothing can leave by IPv6.")
    if route.path is Path.TUNNEL:
        return ok(name, f"by {route.device}: through the tunnel")
    if route.path is Path.OUTSIDE and tunnel is not None:
        beside = " while IPv4 goes through it" if ipv4.path is Path.TUNNEL else ""
        fix = "route ::/0 into the tunnel, or turn IPv6 off (net.ipv6.conf.all.disable_ipv6=1)"
        return gap(name, f"by {route.device}: beside {tunnel}{beside}", "IPv6 leaks, unless a firewall blocks it.", fix)
    return unknown(name, f"by {route.device}", "no tunnel is known, so it is unknown whether that is right.")


@dataclass(frozen=True, slots=True)
class NameserverRoute:
    """A nameserver, the path to it, and whether the owner declared that its use is never a leak."""

    address: IPAddress
    path: Path
    allowed: bool = False


async def system_resolver(context: DoctorContext) -> list[Check]:
    asking = SystemResolver(boottime=context.clock.boottime, patience=_LOOKUP_TIMEOUT_S)
    return [about_system_resolver(await asking.ask(None, dns.system_nameservers()))]


def about_system_resolver(lookup: SystemLookup | None) -> Check:
    """The lookup of one new name as programs do it; None when it has no result yet."""
    name = "system resolver"
    if lookup is not None and lookup.answer is Answer.ANSWERED:
        behind = f", which asks {', '.join(map(str, lookup.upstreams))}" if lookup.upstreams else ""
        return ok(name, f"getaddrinfo finds names{behind}")
    found = f"no answer within {_LOOKUP_TIMEOUT_S:g} s" if lookup is None or not lookup.error else lookup.error
    fix = "see /etc/resolv.conf and the line `hosts:` of /etc/nsswitch.conf, and that the nameserver answers"
    return gap(name, f"getaddrinfo finds no name: {found}", "programs here cannot look up names.", fix)


async def resolvers(context: DoctorContext) -> list[Check]:
    servers = dns.system_nameservers()
    if not servers:
        return about_resolvers((), (), tunnel=None)
    asked = await dns.resolvers(context.paths, servers)
    policy = context.settings.agent.probes.policy
    routed = [
        NameserverRoute(s.address, dns.path_to(s, context.paths), any(s.address in n for n in policy.allowed_resolvers))
        for s in servers
    ]
    return about_resolvers(routed, asked.sightings, tunnel=context.survey.tunnel)


def about_resolvers(
    servers: Sequence[NameserverRoute], sightings: Sequence[ResolverSighting], *, tunnel: str | None
) -> list[Check]:
    if not servers:
        fix = "check that the VPN client writes its nameservers there"
        return [gap("resolver", "/etc/resolv.conf names none", "names cannot be looked up.", fix)]
    return [_resolver(s, [x for x in sightings if x.nameserver == dns.plain(s.address)], tunnel) for s in servers]


def _resolver(server: NameserverRoute, seen: Sequence[ResolverSighting], tunnel: str | None) -> Check:
    name, path = f"resolver {dns.plain(server.address)}", server.path
    egress = ", ".join(dict.fromkeys(str(s.egress) for s in seen if s.egress))
    stub = _STUB_RESOLVERS.get(str(server.address), "a forwarder on this host")
    where = {Path.TUNNEL: "through the tunnel", Path.OUTSIDE: "beside the tunnel", Path.LOCAL: stub}
    found = where.get(path, "by an unknown path") + (f"; it queries the internet from {egress}" if egress else "")
    if not any(s.answer is Answer.ANSWERED for s in seen):
        fix = "check whether it can be reached through the VPN, or use one that can"
        return gap(name, f"{found}; it does not answer", "names that only it knows cannot be looked up.", fix)
    if path is Path.OUTSIDE and tunnel is None:
        return unknown(name, "answers", "no tunnel is known, so it is unknown whether it is the right one.")
    if path is Path.OUTSIDE and not server.allowed:
        fix = "use the VPN's resolver (DNS = … in its configuration), or allow this one: VPN_SENTINEL_ALLOWED_RESOLVERS"
        return gap(name, found, "DNS queries leave outside the tunnel.", fix)
    if path is Path.LOCAL and not egress:
        return unknown(name, found, "where its own queries go is unknown.")
    return ok(name, found)
