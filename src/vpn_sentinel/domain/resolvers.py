"""Which resolver asks for this host, and whether it reveals the home connection."""

from dataclasses import replace
from ipaddress import ip_network
from typing import Final

from vpn_sentinel.domain.leaks import path_fact
from vpn_sentinel.domain.observation import Answer, Observation, Path, ResolverSighting
from vpn_sentinel.domain.origins import asns_of, exit_asns, home_asns, same_block
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, Policy, is_public
from vpn_sentinel.domain.verdict import Code, Finding

# Large public resolvers by the AS that their queries come from (RIPEstat, PeeringDB). Their egress may be in any
# country; reached through the tunnel, it reveals nothing about home.
PUBLIC_RESOLVER_ASNS: Final = frozenset({13335, 15169, 19281, 34939, 36692, 212772})
# For hosts without an offline database: the networks that these operators publish.
PUBLIC_RESOLVER_NETWORKS: Final[tuple[IPNetwork, ...]] = tuple(
    ip_network(n)
    for n in (
        "1.0.0.0/24", "1.1.1.0/24", "162.158.0.0/15", "172.64.0.0/13", "141.101.64.0/18", "2400:cb00::/32",
        "8.8.4.0/24", "8.8.8.0/24", "74.125.0.0/16", "172.217.0.0/16", "172.253.0.0/16", "173.194.0.0/16",
        "2404:6800::/32", "2607:f8b0::/32", "2a00:1450::/32", "9.9.9.0/24", "149.112.112.0/24", "74.63.16.0/20",
        "2620:fe::/48", "208.67.216.0/21", "208.69.32.0/21", "146.112.0.0/16", "2620:119::/32", "94.140.14.0/24",
        "94.140.15.0/24",
    )
)  # fmt: skip

# Lookups whose result is the address of a name, which a resolver may invent, unlike a text.
_BY_ADDRESS: Final = frozenset({"akamai"})


# What a lookup asked for, by its name in observations.
_ASKED_FOR: Final = {
    "canary": "a name of the server's own zone",
    "google": "o-o.myaddr.l.google.com",
    "akahelp": "whoami.ds.akahelp.net",
    "akamai": "whoami.akamai.net",
    "path": "whoami.cloudflare",
}


def _shown_by(method: str) -> str:
    """A lookup's method, for people."""
    return f"a lookup of {_ASKED_FOR[method]}" if method in _ASKED_FOR else "a lookup"


def leak(sighting: ResolverSighting, seen: Observation, policy: Policy) -> Finding | None:
    """The finding if this lookup reveals the home connection, else None.

    A resolver that the policy allows never leaks.
    """
    server, egress = sighting.nameserver, egress_of(sighting, seen)
    if sighting.answer is not Answer.ANSWERED or policy.allows_resolver(server):
        return None
    if egress is not None and policy.allows_resolver(egress):
        return None
    facts = {"nameserver": str(server), "seen_by": _shown_by(sighting.method), **path_fact(sighting.path)}
    if egress is not None:
        facts["resolver"] = str(egress)
        if policy.is_home(egress):
            return Finding(Code.DNS_LEAK, f"DNS queries come out at {egress}, in the home network.", facts)
    if sighting.client is not None and policy.is_home(sighting.client):
        return Finding(
            Code.DNS_LEAK,
            f"The nameserver {server} is asked from the home address {sighting.client}.",
            facts | {"asked_from": str(sighting.client)},
        )
    if sighting.subnet is not None and any(
        sighting.subnet.version == home.version and sighting.subnet.overlaps(home) for home in policy.home_networks
    ):
        return Finding(
            Code.DNS_LEAK,
            f"The resolver passes on the home network {sighting.subnet} as client subnet.",
            facts | {"client_subnet": str(sighting.subnet)},
        )
    if egress is not None and (asn := _isp_asn(egress, seen, policy)):
        return Finding(
            Code.DNS_LEAK,
            f"DNS queries come out at {egress}, in the home provider's network AS{asn}.",
            facts | {"asn": str(asn)},
        )
    if sighting.path is Path.OUTSIDE and seen.link is not None:
        return _reached_outside(sighting, egress or _client_of(sighting), seen, policy, facts)
    return None


def _reached_outside(
    sighting: ResolverSighting, asks_from: IPAddress | None, seen: Observation, policy: Policy, facts: dict[str, str]
) -> Finding | None:
    """What a nameserver that is reached outside the tunnel proves.

    `asks_from` is the address that it asks the internet from, None while that is unknown.

    A query to a public one is on the internet already. One on the LAN forwards it, perhaps by a VPN of its own: its
    egress decides, and while that is unknown nothing is proved.
    """
    server = sighting.nameserver
    if is_public(server):
        return Finding(Code.DNS_LEAK, f"Queries to the nameserver {server} leave outside the tunnel.", facts)
    if asks_from is None or _is_vpns(asks_from, seen, policy):
        return None
    return Finding(
        Code.DNS_LEAK,
        f"The nameserver {server} is reached outside the tunnel, on the local network, and asks the internet from "
        f"{asks_from}, which is not the VPN's.",
        facts | {"resolver": str(asks_from)},
    )


def system_leak(seen: Observation, policy: Policy) -> Finding | None:
    """The finding if the system's own resolver, which resolv.conf need not name, reveals the home connection, else
    None.
    """
    for egress in system_egresses(seen, policy):
        facts = {"resolver": str(egress), "seen_by": "getaddrinfo(3)"}
        text = f"Programs here ask a resolver that comes out at {egress}"
        if policy.is_home(egress):
            return Finding(Code.DNS_LEAK, f"{text}, in the home network.", facts)
        if asn := _isp_asn(egress, seen, policy):
            return Finding(Code.DNS_LEAK, f"{text}, in the home provider's network AS{asn}.", facts | {"asn": str(asn)})
    return None


def system_egresses(seen: Observation, policy: Policy) -> tuple[IPAddress, ...]:
    """The egress addresses of the system's own resolver that no lookup through a nameserver showed.

    () where the policy allows one of the nameservers: that one may have been asked.
    """
    lookup = seen.system_lookup
    if lookup is None or lookup.answer is not Answer.ANSWERED or seen.dns_rewritten:
        return ()  # its result is the address of a name, which a resolver may have invented
    if any(policy.allows_resolver(n) for n in (*(s.nameserver for s in seen.resolvers), *lookup.upstreams)):
        return ()
    by_nameserver = {egress_of(s, seen) for s in seen.resolvers}
    return tuple(e for e in lookup.egress if is_public(e) and e not in by_nameserver and not policy.allows_resolver(e))


def egress_of(sighting: ResolverSighting, seen: Observation) -> IPAddress | None:
    """The address that the resolver asks the internet from; None for a private one, or one that may be invented."""
    if sighting.egress is None or not is_public(sighting.egress):
        return None
    return None if seen.dns_rewritten and sighting.method in _BY_ADDRESS else sighting.egress


def _client_of(sighting: ResolverSighting) -> IPAddress | None:
    """The address from which a public resolver saw a local forwarder ask."""
    return sighting.client if sighting.client is not None and is_public(sighting.client) else None


def unverified_nameservers(seen: Observation, policy: Policy) -> tuple[IPAddress, ...]:
    """Nameservers outside the tunnel that answer, and whose egress no lookup showed."""
    if seen.link is None:
        return ()
    answering = [s for s in seen.resolvers if s.answer is Answer.ANSWERED and not policy.allows_resolver(s.nameserver)]
    verified = {s.nameserver for s in answering if egress_of(s, seen) or _client_of(s)}
    beside = dict.fromkeys(s.nameserver for s in answering if s.path is Path.OUTSIDE)
    return tuple(n for n in beside if n not in verified)


def unexplained_egresses(seen: Observation, policy: Policy) -> tuple[IPAddress, ...]:
    """Egresses that only their AS could explain: neither declared, nor in the exit's block, nor a public resolver's."""
    found: dict[IPAddress, None] = {}
    for sighting in seen.resolvers:
        egress = egress_of(sighting, seen)
        if egress is None or sighting.answer is not Answer.ANSWERED or policy.allows_resolver(sighting.nameserver):
            continue
        if policy.allows_resolver(egress) or policy.is_home(egress) or _in_exit_block(egress, seen):
            continue
        if not _is_known_public(egress):
            found[egress] = None
    for egress in system_egresses(seen, policy):
        if not (policy.is_home(egress) or _in_exit_block(egress, seen) or _is_known_public(egress)):
            found[egress] = None
    return tuple(found)


def undecided_egresses(seen: Observation, policy: Policy) -> tuple[IPAddress, ...]:
    """Unexplained egresses that may turn out to be the VPN's: their own AS, or an exit's, is not known yet."""
    compared = all(asns_of(e, seen) for e in (seen.exit(4), seen.exit(6)) if e)
    return tuple(e for e in unexplained_egresses(seen, policy) if not (compared and asns_of(e, seen)))


def without_egresses(egresses: tuple[IPAddress, ...], seen: Observation) -> Observation:
    """The observation as if no lookup had shown these egresses."""
    sightings = tuple(replace(s, egress=None) if s.egress in egresses else s for s in seen.resolvers)
    lookup = seen.system_lookup
    if lookup is not None:
        lookup = replace(lookup, egress=tuple(e for e in lookup.egress if e not in egresses))
    return replace(seen, resolvers=sightings, system_lookup=lookup)


def is_expected(egress: IPAddress, seen: Observation, policy: Policy) -> bool:
    """Whether an egress needs no explanation: the exit, its network, a known public resolver, or the policy's."""
    if policy.allows_resolver(egress) or _is_known_public(egress) or _in_exit_block(egress, seen):
        return True
    return bool(asns_of(egress, seen) & (exit_asns(seen) | PUBLIC_RESOLVER_ASNS))


def missing_knowledge(egress: IPAddress, seen: Observation, policy: Policy) -> str:
    """What must be known to decide whether an unexpected egress is the home provider's; "" when all is known."""
    if not asns_of(egress, seen):
        return f"the AS number of {egress}"
    if not policy.home_networks:
        return "the home address (VPN_SENTINEL_HOME_NETWORKS)"
    return "" if home_asns(seen, policy) else "the AS number of the home network"


def _is_vpns(address: IPAddress, seen: Observation, policy: Policy) -> bool:
    """Whether an address is the VPN's: the exit's block, or its AS unless home is in the same one."""
    if _in_exit_block(address, seen):
        return True
    return bool(asns_of(address, seen) & (exit_asns(seen) - home_asns(seen, policy)))


def _is_known_public(egress: IPAddress) -> bool:
    return any(egress in n for n in PUBLIC_RESOLVER_NETWORKS if n.version == egress.version)


def _in_exit_block(address: IPAddress, seen: Observation) -> bool:
    return any(exit_ and same_block(address, exit_) for exit_ in (seen.exit(4), seen.exit(6), seen.reported_from))


def _isp_asn(egress: IPAddress, seen: Observation, policy: Policy) -> int | None:
    """The AS that a resolver shares with a home address and not with the exit."""
    return min((asns_of(egress, seen) & home_asns(seen, policy)) - exit_asns(seen), default=None)
