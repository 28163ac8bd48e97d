"""The network of an address: AS numbers, from an observation's places, and routed blocks."""

from ipaddress import ip_network

from vpn_sentinel.domain.observation import Observation
from vpn_sentinel.domain.policy import IPAddress, Policy


def asns_of(address: IPAddress | None, seen: Observation) -> frozenset[int]:
    """The AS numbers that any source names for an address; empty when none does."""
    return frozenset(p.asn for p in seen.places_of(address) if p.asn)


def exit_asns(seen: Observation) -> frozenset[int]:
    return asns_of(seen.exit(4), seen) | asns_of(seen.exit(6), seen)


def home_asns(seen: Observation, policy: Policy) -> frozenset[int]:
    return frozenset(p.asn for p in seen.places if p.asn and policy.is_home(p.ip))


def same_block(one: IPAddress, other: IPAddress) -> bool:
    """The same /24 or /48: the smallest blocks that are routed on the internet (RFC 7454, section 6.1.3)."""
    if one.version != other.version:
        return False
    block = ip_network(f"{other}/{24 if other.version == 4 else 48}", strict=False)
    return one in block
