"""Local networks, by the addresses that people and attackers give to devices."""

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from tests.agent.doubles import ETH
from vpn_sentinel.agent.net.local import addresses, natted, networks

HOME, OTHER = ip_network("91.10.10.20/32"), ip_network("91.10.20.0/24")
# The device's addresses, where its packets come out, and the networks that are local.
DEVICES = {
    "a home behind a router": (["192.168.1.20/24"], [HOME], ["192.168.1.0/24"]),
    "a hosted machine": (["198.51.100.7/24"], ["198.51.100.7/32"], ["198.51.100.0/24"]),
    "the same, nothing seen of where it comes out": (["198.51.100.7/24"], [], ["198.51.100.0/24"]),
    "the same, home declared as a network": (["198.51.100.7/24"], ["198.51.0.0/16"], ["198.51.100.0/24"]),
    "right at the modem": (["91.10.10.20/22"], [HOME], ["91.10.8.0/22"]),
    "two public networks, the other address shown": (
        ["198.51.100.7/24", "203.0.113.7/24"], ["203.0.113.7/32"], ["198.51.100.0/24", "203.0.113.0/24"],
    ),
    "a network of the internet's from a stranger's router": (["93.184.216.99/24"], [HOME], []),
    "the same beside the real one": (["192.168.1.20/24", "93.184.216.99/24"], [HOME], ["192.168.1.0/24"]),
    "the same, and home is known for IPv6 alone": (["93.184.216.99/24"], ["2003:e0::/64"], ["93.184.216.0/24"]),
    "a network that is too large": (["93.184.216.99/12"], [], []),
    "IPv6 of anybody's": (["2a00:1450:4001::10/64"], ["2003:e0::/64"], ["2a00:1450:4001::/64"]),
    "carrier-grade NAT": (["100.64.3.4/24"], [HOME], ["100.64.3.0/24"]),
}  # fmt: skip


@pytest.mark.parametrize(("own", "outside", "local"), DEVICES.values(), ids=DEVICES.keys())
def test_local_networks(own: list[str], outside: list[str], local: list[str]) -> None:
    device = replace(
        ETH,
        addresses=tuple(ip_address(a.partition("/")[0]) for a in own),
        networks=tuple(ip_network(a, strict=False) for a in own),
    )
    found = natted([device], {"eth0": [ip_network(n) for n in outside]} if outside else {})
    assert [str(n) for n in networks(device, found)] == local
    kept = {n for n in device.networks if any(a in n for a in addresses(device, found))}
    assert {ip_network(n) for n in local} <= kept
    assert natted([device], {"eth1": [HOME]}) == frozenset()  # what another device shows says nothing of this one
