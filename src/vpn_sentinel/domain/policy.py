"""The policy of a tunnel, as its owner declares it: where traffic may come out, and how long trouble must last."""

from abc import ABC
from collections.abc import Iterable
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    IPAddress = IPv4Address | IPv6Address
    IPNetwork = IPv4Network | IPv6Network
else:
    # Decoders that build these values from annotations take one class, not a union of two.
    class IPAddress(ABC):  # noqa: B024 - a name for two classes
        """Either version's address."""

    class IPNetwork(ABC):  # noqa: B024
        """Either version's network."""

    IPAddress.register(IPv4Address)
    IPAddress.register(IPv6Address)
    IPNetwork.register(IPv4Network)
    IPNetwork.register(IPv6Network)


# Addresses that no packet on the internet comes from: IANA's special-purpose registries (RFC 6890 and its updates).
# The prefixes of NAT64 (RFC 6052, RFC 8215) are not among them: behind the translator is the IPv4 internet. A list, and
# not `is_global`, which differs between Python versions. Documentation blocks count as public: nobody routes them, and
# examples use them.
NOT_PUBLIC: Final[tuple[IPNetwork, ...]] = tuple(
    ip_network(block)
    for block in (
        "0.0.0.0/8",  # "this host"; Linux connects to loopback
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT, and what Tailscale uses
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local; the metadata services of clouds
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
        "::/127",  # unspecified and loopback
        "100::/64",
        "fc00::/7",  # unique local
        "fe80::/9",  # link-local, and the site-local of old
        "ff00::/8",
    )
)


def is_public(address: IPAddress) -> bool:
    """Whether `address` can be seen on the internet."""
    return not within(address, NOT_PUBLIC)


MAX_FLAP_COUNT: Final = 16  # so many departures from *protected* are remembered


@dataclass(frozen=True, kw_only=True)  # without slots: settings read the defaults from the class
class Policy:
    """One tunnel's rules. Durations are seconds.

    `home_networks` are the addresses that traffic must never come from: the home connection's own, and its ISP's
    resolvers where known. `grace_*` is how long a verdict must last before it becomes the state; a leak has no grace.
    `grace_unverified` is how long verification may be impossible before that is reported: shorter than the quick rounds
    after a change of verdict (16 s), so that one of them decides. `allowed_outside` are destinations whose traffic is
    meant to leave outside the tunnel. A share of lost pulses above `max_loss` (0 to 1), or a median round trip above
    `max_rtt_ms`, is trouble. A tunnel that left *protected* `flap_count` times within `flap_window` is flapping, and
    has recovered only after `flap_calm` without a break; `flap_count` is at most `MAX_FLAP_COUNT`.
    """

    home_networks: tuple[IPNetwork, ...] = ()
    expected_countries: tuple[str, ...] = ()
    allowed_resolvers: tuple[IPNetwork, ...] = ()
    allowed_outside: tuple[IPNetwork, ...] = ()
    max_loss: float = 0.2
    max_rtt_ms: float = 1000.0
    grace_down: float = 2.0
    grace_degraded: float = 15.0
    grace_recovery: float = 4.0
    grace_unverified: float = 15.0
    flap_count: int = 3
    flap_window: float = 300.0
    flap_calm: float = 60.0

    def is_home(self, address: IPAddress) -> bool:
        return within(address, self.home_networks)

    def allows_resolver(self, address: IPAddress) -> bool:
        return within(address, self.allowed_resolvers)

    def allows_outside(self, address: IPAddress) -> bool:
        return within(address, self.allowed_outside)

    def with_home(self, more: Iterable[IPNetwork]) -> "Policy":
        """The same policy with further home networks, each once."""
        networks = tuple(dict.fromkeys((*self.home_networks, *more)))
        return self if networks == self.home_networks else replace(self, home_networks=networks)


def within(address: IPAddress, networks: Iterable[IPNetwork]) -> bool:
    """Whether one of `networks`, of either version, holds `address`."""
    return any(address.version == network.version and address in network for network in networks)
