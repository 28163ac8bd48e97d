"""Which networks are local: what goes to them stays on the link, and is no leak.

A private network is. So is a public one that this host has an address in, as a hosted machine does, or one right at the
modem. But whoever runs a local network may give out addresses of anybody's: what a host then sends to that network of
the internet goes to the router beside the tunnel (LocalNet in TunnelCrack, CVE-2023-36672 and CVE-2023-35838). Where a
NAT stands between a device and the internet, its public addresses are no such machine's. For IPv6 there is no NAT to
tell by: such networks are believed.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Final

from vpn_sentinel.agent.net.link import Interface
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, is_public

SHORTEST: Final = {4: 16, 6: 48}  # prefix lengths of a public network that is local; a shorter one is no link's


def natted(devices: Iterable[Interface], outside: Mapping[str, Collection[IPNetwork]]) -> frozenset[str]:
    """The devices that have public IPv4 addresses, and whose packets come out somewhere else.

    `outside` is where packets by the device of a name come out.
    """
    found = ((d.name, _public(d), [n for n in outside.get(d.name, ()) if n.version == 4]) for d in devices)
    return frozenset(
        name for name, own, seen in found if own and seen and not any(n.overlaps(s) for n in own for s in seen)
    )


def networks(device: Interface, behind_nat: Collection[str]) -> tuple[IPNetwork, ...]:
    """The local networks that a device has an address in."""
    found = (n for n in device.networks if n.prefixlen >= SHORTEST[n.version])
    return tuple(n for n in found if not (device.name in behind_nat and _is_public4(n)))


def addresses(device: Interface, behind_nat: Collection[str]) -> tuple[IPAddress, ...]:
    """The device's own addresses, but for those that are in no network of its own."""
    return tuple(a for a in device.addresses if not (device.name in behind_nat and a.version == 4 and is_public(a)))


def _public(device: Interface) -> list[IPNetwork]:
    return [n for n in device.networks if _is_public4(n)]


def _is_public4(network: IPNetwork) -> bool:
    return network.version == 4 and is_public(network.network_address)
