"""Which networks are local: traffic to them stays on the link, and is not a leak.

A private network is local. So is a public one that this host has an address in, as on a hosted machine, or directly at
a modem. But the operator of a local network may assign addresses that belong to others: traffic to that network of the
internet then goes to the router beside the tunnel (LocalNet in TunnelCrack, CVE-2023-36672 and CVE-2023-35838). Where
NAT is between a device and the internet, a public address of the device is such an assignment. IPv6 usually has no NAT
that would show it: such networks are treated as local.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Final

from vpn_sentinel.agent.net.link import Interface
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, is_public

MIN_PREFIX_LENGTH: Final = {4: 16, 6: 48}  # of a public network that is local; no link has a shorter prefix


def natted(devices: Iterable[Interface], outside: Mapping[str, Collection[IPNetwork]]) -> frozenset[str]:
    """The devices with public IPv4 addresses whose packets come out at other addresses.

    `outside` has, by device name, where packets come out.
    """
    found = ((d.name, _public(d), [n for n in outside.get(d.name, ()) if n.version == 4]) for d in devices)
    return frozenset(
        name for name, own, seen in found if own and seen and not any(n.overlaps(s) for n in own for s in seen)
    )


def networks(device: Interface, behind_nat: Collection[str]) -> tuple[IPNetwork, ...]:
    """The local networks that a device has an address in."""
    found = (n for n in device.networks if n.prefixlen >= MIN_PREFIX_LENGTH[n.version])
    return tuple(n for n in found if not (device.name in behind_nat and _is_public4(n)))


def addresses(device: Interface, behind_nat: Collection[str]) -> tuple[IPAddress, ...]:
    """The device's addresses, without public IPv4 addresses behind NAT."""
    return tuple(a for a in device.addresses if not (device.name in behind_nat and a.version == 4 and is_public(a)))


def _public(device: Interface) -> list[IPNetwork]:
    return [n for n in device.networks if _is_public4(n)]


def _is_public4(network: IPNetwork) -> bool:
    return network.version == 4 and is_public(network.network_address)
