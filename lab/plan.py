"""The address plan: who owns which network in the lab, and where each network claims to be.

One table feeds everything: routes, the stand-ins that geolocate callers, and the offline database.
The networks are real-looking public blocks, so that registry-based tools find plausible owners as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a network is, and whose it is."""

    country: str
    city: str
    region: str
    region_code: str
    timezone: str
    latitude: float
    longitude: float
    asn: int
    org: str

    @property
    def country_name(self) -> str:
        return COUNTRIES[self.country]


COUNTRIES = {
    "BE": "Belgium",
    "CA": "Canada",
    "CH": "Switzerland",
    "DE": "Germany",
    "FI": "Finland",
    "FR": "France",
    "NL": "Netherlands",
    "RO": "Romania",
    "SE": "Sweden",
    "US": "United States",
}

# country, city, region, region code, time zone, latitude, longitude
_MUNICH = ("DE", "Munich", "Bavaria", "BY", "Europe/Berlin", 48.1374, 11.5755)
_FALKENSTEIN = ("DE", "Falkenstein", "Saxony", "SN", "Europe/Berlin", 50.4779, 12.3713)
_AMSTERDAM = ("NL", "Amsterdam", "North Holland", "NH", "Europe/Amsterdam", 52.3740, 4.8897)
_MALMO = ("SE", "Malmö", "Skåne", "M", "Europe/Stockholm", 55.6059, 13.0007)
_STOCKHOLM = ("SE", "Stockholm", "Stockholm", "AB", "Europe/Stockholm", 59.3294, 18.0687)
_ZURICH = ("CH", "Zurich", "Zurich", "ZH", "Europe/Zurich", 47.3667, 8.5500)
_BUCHAREST = ("RO", "Bucharest", "București", "B", "Europe/Bucharest", 44.4323, 26.1063)
_NEW_YORK = ("US", "New York", "New York", "NY", "America/New_York", 40.7143, -74.0060)
_TORONTO = ("CA", "Toronto", "Ontario", "ON", "America/Toronto", 43.7001, -79.4163)
_HELSINKI = ("FI", "Helsinki", "Uusimaa", "18", "Europe/Helsinki", 60.1695, 24.9354)
_PARIS = ("FR", "Paris", "Île-de-France", "IDF", "Europe/Paris", 48.8534, 2.3488)
_GHISLAIN = ("BE", "Saint-Ghislain", "Wallonia", "WAL", "Europe/Brussels", 50.4488, 3.8189)
_VIEW = ("US", "Mountain View", "California", "CA", "America/Los_Angeles", 37.3861, -122.0839)


def _at(where: tuple[str, str, str, str, str, float, float], asn: int, org: str) -> Place:
    country, city, region, code, timezone, latitude, longitude = where
    return Place(
        country=country,
        city=city,
        region=region,
        region_code=code,
        timezone=timezone,
        latitude=latitude,
        longitude=longitude,
        asn=asn,
        org=org,
    )


# node, IPv4, IPv6 (or None), place. The node is the one that core routes the block to.
_TABLE: tuple[tuple[str, str, str | None, Place], ...] = (
    ("inet", "62.115.0.0/16", "2001:2034::/32", _at(_STOCKHOLM, 1299, "Arelion Sweden AB")),
    ("isp", "91.10.0.0/16", "2003:e0::/32", _at(_MUNICH, 3320, "Deutsche Telekom AG")),
    ("nl", "185.65.134.0/24", "2a03:1b20:3::/48", _at(_AMSTERDAM, 39351, "31173 Services AB")),
    ("nl", "193.138.218.0/24", "2a03:1b20:5::/48", _at(_MALMO, 39351, "31173 Services AB")),
    ("ch", "156.146.62.0/24", "2a02:6ea0:d100::/48", _at(_ZURICH, 212238, "Datacamp Limited")),
    ("ch", "149.102.239.0/24", "2a02:6ea0:cb00::/48", _at(_BUCHAREST, 212238, "Datacamp Limited")),
    ("us", "146.70.198.0/24", "2a0d:5600:24::/48", _at(_NEW_YORK, 9009, "M247 Europe SRL")),
    ("us", "146.70.112.0/24", "2a0d:5600:19::/48", _at(_TORONTO, 9009, "M247 Europe SRL")),
    ("srv", "65.108.77.0/24", "2a01:4f9:c012::/48", _at(_HELSINKI, 24940, "Hetzner Online GmbH")),
    ("svc", "1.1.1.0/24", "2606:4700::/32", _at(_VIEW, 13335, "Cloudflare, Inc.")),
    ("svc", "172.70.240.0/24", None, _at(_PARIS, 13335, "Cloudflare, Inc.")),
    ("svc", "8.8.8.0/24", "2001:4860::/32", _at(_VIEW, 15169, "Google LLC")),
    ("svc", "216.239.32.0/24", None, _at(_VIEW, 15169, "Google LLC")),
    ("svc", "172.253.8.0/24", None, _at(_GHISLAIN, 15169, "Google LLC")),
    ("svc", "208.67.222.0/24", "2620:119:35::/48", _at(_VIEW, 36692, "Cisco OpenDNS, LLC")),
    ("svc", "198.41.0.0/24", None, _at(_NEW_YORK, 396540, "VeriSign Global Registry Services")),
    ("svc", "192.5.6.0/24", None, _at(_NEW_YORK, 36619, "VeriSign Global Registry Services")),
    ("svc", "193.108.91.0/24", None, _at(_NEW_YORK, 21342, "Akamai International B.V.")),
    ("svc", "205.251.192.0/24", None, _at(_NEW_YORK, 16509, "Amazon.com, Inc.")),
    ("svc", "34.117.59.0/24", "2600:1901::/32", _at(_VIEW, 396982, "Google LLC")),
    ("svc", "208.95.112.0/24", None, _at(_NEW_YORK, 53334, "Total Uptime Technologies, LLC")),
    ("svc", "15.204.213.0/24", None, _at(_NEW_YORK, 16276, "OVH SAS")),
    ("svc", "45.83.223.0/24", "2a03:1b20:1::/48", _at(_MALMO, 39351, "31173 Services AB")),
    ("svc", "149.154.167.0/24", "2001:67c:4e8::/48", _at(_AMSTERDAM, 62041, "Telegram Messenger Inc")),
    ("svc", "5.9.10.0/24", "2a01:4f8:160::/48", _at(_FALKENSTEIN, 24940, "Hetzner Online GmbH")),
)

Network = IPv4Network | IPv6Network


@cache
def networks() -> tuple[tuple[Network, str, Place], ...]:
    """Every block as (network, owning node, place), the most specific first."""
    rows = [(ip_network(cidr), node, place) for node, v4, v6, place in _TABLE for cidr in (v4, v6) if cidr is not None]
    return tuple(sorted(rows, key=lambda row: -row[0].prefixlen))


def place_of(address: str) -> Place | None:
    """Where an address is, or None for one that no network of the plan holds."""
    ip = ip_address(address)
    return next((place for network, _, place in networks() if ip.version == network.version and ip in network), None)


@dataclass(frozen=True)
class Provider:
    """A VPN provider: one node with servers in one country and a second address block in another."""

    name: str
    number: int
    net4: str  # the first three octets
    net6: str  # the /48, ending in a colon
    elsewhere4: str
    elsewhere6: str

    @property
    def endpoint(self) -> str:
        return f"{self.net4}.2"

    def server(self, octet: int) -> str:
        """One of its VPN servers, by the last octet of the address."""
        return f"{self.net4}.{octet}"

    @property
    def resolver4(self) -> str:
        """In-tunnel address of the provider's resolver."""
        return f"10.{64 + self.number}.0.1"

    @property
    def resolver6(self) -> str:
        return f"fd64:{self.number}::1"

    @property
    def resolver_egress(self) -> str:
        return f"{self.net4}.53"

    @property
    def resolver_egress_elsewhere(self) -> str:
        return f"{self.elsewhere4}.53"

    def inner4(self, vpn: str, host: int) -> str:
        return f"10.{64 + self.number}.{KINDS[vpn].number}.{host}"

    def inner6(self, vpn: str, host: int) -> str:
        return f"fd64:{self.number}:{KINDS[vpn].number}::{host:x}"

    def exits(self, host: int) -> dict[str, tuple[str, str]]:
        """A client's possible exit addresses: at first, after a hop within the country, in another country."""
        return {
            "first": (f"{self.net4}.{host}", f"{self.net6}:{host:x}"),
            "same": (f"{self.net4}.{host + 100}", f"{self.net6}:{host + 100:x}"),
            "elsewhere": (f"{self.elsewhere4}.{host}", f"{self.elsewhere6}:{host:x}"),
        }

    @property
    def country(self) -> str:
        place = place_of(self.endpoint)
        assert place is not None
        return place.country

    @property
    def country_elsewhere(self) -> str:
        place = place_of(f"{self.elsewhere4}.1")
        assert place is not None
        return place.country


@dataclass(frozen=True)
class Kind:
    """A way to build a tunnel, as the addresses and the firewalls of the lab see it.

    `number` is the third octet of its addresses inside; `server` the last octet of the VPN server's own address;
    `outer` the (protocol, port) pairs of its packets on the home's line. `through` is for a tunnel in a tunnel: the
    device that carries the inner one, the last octet of the inner one's server, and its protocol and port.
    """

    number: int
    interface: str
    server: int
    outer: tuple[tuple[str, int], ...]
    through: tuple[str, int, str, int] | None = None


KINDS = {
    "wireguard": Kind(1, "wg0", 2, (("udp", 51820),)),
    "wg-quick": Kind(1, "wg0", 2, (("udp", 51820),)),
    "wireguard-tcp": Kind(1, "wg0", 6, (("tcp", 443),)),
    "wireguard-in-openvpn": Kind(1, "wg0", 2, (("udp", 1194),), ("tun0", 7, "udp", 51820)),
    "openvpn": Kind(2, "tun0", 2, (("udp", 1194),)),
    "openvpn-in-wireguard": Kind(2, "tun0", 2, (("udp", 51820),), ("wg0", 8, "udp", 1194)),
    "openvpn-tcp": Kind(3, "tun0", 3, (("tcp", 443),)),
    "openvpn-tap": Kind(4, "tap0", 2, (("udp", 1195),)),
    "openconnect": Kind(5, "tun0", 4, (("tcp", 443), ("udp", 443))),
    "strongswan": Kind(6, "ipsec0", 5, (("udp", 500), ("udp", 4500))),
}
STANDBY = "wg1"
"""Device of a WireGuard that stands by beside the first tunnel."""
NEXT_SERVER = 9
SERVERS = range(2, 10)
"""Last octets of a provider's VPN servers; the last is the next one of a client's list."""

PROVIDERS = {
    "nl": Provider("nl", 1, "185.65.134", "2a03:1b20:3:", "193.138.218", "2a03:1b20:5:"),
    "ch": Provider("ch", 2, "156.146.62", "2a02:6ea0:d100:", "149.102.239", "2a02:6ea0:cb00:"),
    "us": Provider("us", 3, "146.70.198", "2a0d:5600:24:", "146.70.112", "2a0d:5600:19:"),
}

ISP_RESOLVER = "91.10.0.53"
ISP_RESOLVER6 = "2003:e0:0:53::53"
ISP_RESOLVER_EGRESS = "91.10.0.54"

SRV4 = "65.108.77.20"
SRV6 = "2a01:4f9:c012:77::20"
SRV_NAME = "sentinel.test"
REWRITER = 5300  # port of the stand-in that rewrites, beside a provider's resolver
CANARY_ZONE = "canary.sentinel.test"
"""Delegated to the server: who is authoritative there sees every resolver that asks."""

CLOUDFLARE, CLOUDFLARE6, CLOUDFLARE_EGRESS = "1.1.1.1", "2606:4700:4700::1111", "172.70.240.53"
GOOGLE, GOOGLE6, GOOGLE_EGRESS = "8.8.8.8", "2001:4860:4860::8888", "172.253.8.53"
OPENDNS, OPENDNS6 = "208.67.222.222", "2620:119:35::35"
ROOT_SERVER, TLD_SERVER = "198.41.0.4", "192.5.6.30"
GOOGLE_NS, GOOGLE_NS6 = "216.239.32.10", "2001:4860:4802:32::a"
AKAMAI_NS, HOSTER_NS = "193.108.91.1", "205.251.192.10"

# Web services by host name: (IPv4 or None, IPv6 or None).
HOSTS: dict[str, tuple[str | None, str | None]] = {
    "ipinfo.io": ("34.117.59.81", None),
    "v6.ipinfo.io": (None, "2600:1901:0:344f::1"),
    "api.ipinfo.io": ("34.117.59.83", None),
    "ip-api.com": ("208.95.112.1", None),
    "ipwho.is": ("15.204.213.5", None),
    "ipv4.am.i.mullvad.net": ("45.83.223.233", None),
    "ipv6.am.i.mullvad.net": (None, "2a03:1b20:1:e011::233"),
    "one.one.one.one": (CLOUDFLARE, CLOUDFLARE6),
    "api.telegram.org": ("149.154.167.220", "2001:67c:4e8:f004::9"),
    "hooks.test": ("5.9.10.11", "2a01:4f8:160:1::11"),
    "mail.test": ("5.9.10.25", "2a01:4f8:160:1::25"),
}

SVC_ADDRESSES = sorted(
    {a for pair in HOSTS.values() for a in pair if a}
    | {CLOUDFLARE, CLOUDFLARE6, CLOUDFLARE_EGRESS, GOOGLE, GOOGLE6, GOOGLE_EGRESS, OPENDNS, OPENDNS6}
    | {ROOT_SERVER, TLD_SERVER, GOOGLE_NS, GOOGLE_NS6, AKAMAI_NS, HOSTER_NS}
)


@dataclass(frozen=True)
class HomePlan:
    """Addresses of the n-th home."""

    number: int

    @property
    def isp_side(self) -> str:
        return f"91.10.{10 + self.number}.1"

    @property
    def wan4(self) -> str:
        return f"91.10.{10 + self.number}.20"

    @property
    def carrier4(self) -> str:
        """The line's own address behind a carrier's NAT (RFC 6598), without the last octet."""
        return f"100.64.{10 + self.number}"

    @property
    def second4(self) -> str:
        """A second network between the host and its router, as a container's second network, without the last octet."""
        return f"172.18.{self.number}"

    @property
    def wan4_renewed(self) -> str:
        return f"91.10.{10 + self.number}.77"

    @property
    def wan6(self) -> str:
        """The transfer network between ISP and router, without the host part."""
        return f"2003:e0:f:{self.number:x}:"

    @property
    def prefix6(self) -> str:
        return f"{self.lan6}:/56"

    @property
    def lan4(self) -> str:
        return f"192.168.{20 + self.number}"

    @property
    def lan6(self) -> str:
        """The home LAN's /64, without the host part."""
        return f"2003:e0:1:{self.number + 1:x}00:"

    @property
    def client(self) -> int:
        """Last octet of this home's addresses in a tunnel and in a provider's exit pool."""
        return 10 + self.number
