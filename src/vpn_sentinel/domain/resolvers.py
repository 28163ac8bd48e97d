"""Which resolver asks for this host, and whether its path gives the home connection away."""

from ipaddress import ip_network
from typing import Final

from vpn_sentinel.domain.observation import Answer, Observation, Path, ResolverSighting
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, Policy, is_public
from vpn_sentinel.domain.verdict import Code, Finding

# Large public resolvers by the AS that their queries come out of (RIPEstat, PeeringDB). Their egress sits in any
# country; reached through the tunnel it tells nothing of home.
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


def leak(sighting: ResolverSighting, seen: Observation, policy: Policy) -> Finding | None:
    """Tell why this lookup gave the home connection away, or None.

    A resolver that the policy allows never leaks: its owner knows of it.
    """
    server, egress = sighting.nameserver, sighting.egress
    if sighting.answer is not Answer.ANSWERED or policy.allows_resolver(server):
        return None
    if egress is not None and policy.allows_resolver(egress):
        return None
    facts = {"nameserver": str(server), "method": sighting.method, "path": str(sighting.path)}
    if egress is not None:
        facts["resolver"] = str(egress)
        if policy.is_home(egress):
            return Finding(Code.DNS_LEAK, f"DNS queries come out at {egress}, in the home network.", facts)
    if sighting.client is not None and policy.is_home(sighting.client):
        return Finding(
            Code.DNS_LEAK, f"The nameserver {server} is asked from the home address {sighting.client}.", facts
        )
    if sighting.subnet is not None and any(
        sighting.subnet.version == home.version and sighting.subnet.overlaps(home) for home in policy.home_networks
    ):
        return Finding(
            Code.DNS_LEAK, f"The resolver passes on the home network {sighting.subnet} as client subnet.", facts
        )
    if sighting.path is Path.OUTSIDE and is_public(server) and seen.link is not None:
        return Finding(Code.DNS_LEAK, f"Queries to the nameserver {server} leave outside the tunnel.", facts)
    if egress is not None and (asn := _isp_asn(egress, seen, policy)):
        return Finding(
            Code.DNS_LEAK, f"DNS queries come out at {egress}, in the home provider's network AS{asn}.", facts
        )
    return None


def is_expected(egress: IPAddress, seen: Observation, policy: Policy) -> bool:
    """Whether an egress needs no explanation: the exit, its network, a known public resolver, or the policy's."""
    if policy.allows_resolver(egress) or any(
        egress in n for n in PUBLIC_RESOLVER_NETWORKS if n.version == egress.version
    ):
        return True
    if any(exit_ and _same_block(egress, exit_) for exit_ in (seen.exit(4), seen.exit(6), seen.reported_from)):
        return True
    asns = _asns(egress, seen)
    exits = _asns(seen.exit(4), seen) | _asns(seen.exit(6), seen)
    return bool(asns & (exits | PUBLIC_RESOLVER_ASNS))


def _isp_asn(egress: IPAddress, seen: Observation, policy: Policy) -> int | None:
    """The AS that a resolver shares with a home address and not with the exit."""
    home = {p.asn for p in seen.places if p.asn and policy.is_home(p.ip)}
    exits = _asns(seen.exit(4), seen) | _asns(seen.exit(6), seen)
    return next(iter((_asns(egress, seen) & home) - exits), None)


def _asns(address: IPAddress | None, seen: Observation) -> frozenset[int]:
    return frozenset(p.asn for p in seen.places_of(address) if p.asn)


def _same_block(one: IPAddress, other: IPAddress) -> bool:
    """The same /24 or /48: the smallest blocks that are routed on the internet (RFC 7454, section 6.1.3)."""
    if one.version != other.version:
        return False
    block = ip_network(f"{other}/{24 if other.version == 4 else 48}", strict=False)
    return one in block
