"""The zone's settings: checked whole at the start, and off when there is no zone."""

from ipaddress import ip_address

import pytest

from vpn_sentinel.runtime.settings import SettingError, Source
from vpn_sentinel.server.settings import DnsCanarySettings, ServerSettings

ZONE = "VPN_SENTINEL_CANARY_ZONE"


def read(**env: str) -> DnsCanarySettings | None:
    return ServerSettings.read(Source({f"VPN_SENTINEL_{k}": v for k, v in env.items()})).canary


def test_without_a_zone_no_dns_is_served() -> None:
    assert read() is None
    assert read(CANARY_PORT="5353") is None


def test_a_zone_is_enough() -> None:
    assert read(CANARY_ZONE="Canary.Example.org.") == DnsCanarySettings(
        zone="canary.example.org", hosts=("::",), port=53, servers=("ns.canary.example.org",), addresses=()
    )


def test_all_can_be_said() -> None:
    found = read(
        CANARY_ZONE="canary.example.org",
        CANARY_HOST="192.0.2.1, 2001:db8::1",
        CANARY_PORT="5353",
        CANARY_NS="sentinel.example.org,ns2.example.net",
        CANARY_ADDRESSES="192.0.2.1,2001:db8::1",
    )
    assert found == DnsCanarySettings(
        zone="canary.example.org",
        hosts=("192.0.2.1", "2001:db8::1"),
        port=5353,
        servers=("sentinel.example.org", "ns2.example.net"),
        addresses=(ip_address("192.0.2.1"), ip_address("2001:db8::1")),
    )


@pytest.mark.parametrize(
    "zone", ["org", "canary..org", "-a.example.org", "a b.example.org", "é.org", "a." * 120 + "org"]
)
def test_what_is_no_zone_is_told(zone: str) -> None:
    with pytest.raises(SettingError, match=f"^{ZONE}: .* is not a domain name such as"):
        read(CANARY_ZONE=zone)


@pytest.mark.parametrize(
    ("name", "value"),
    [("CANARY_HOST", "localhost"), ("CANARY_PORT", "0"), ("CANARY_NS", "ns"), ("CANARY_ADDRESSES", "192.0.2.0/24")],
)
def test_each_is_checked(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=f"^VPN_SENTINEL_{name}: "):
        read(CANARY_ZONE="canary.example.org", **{name: value})


def test_its_port_is_its_own() -> None:
    with pytest.raises(SettingError, match=r"^VPN_SENTINEL_CANARY_PORT: 5000 is taken by VPN_SENTINEL_SERVER_API_PORT"):
        read(CANARY_ZONE="canary.example.org", CANARY_PORT="5000")
