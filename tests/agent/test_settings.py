from pathlib import Path

import pytest

from lab.certs import Authority
from vpn_sentinel.agent.net.urls import is_insecure
from vpn_sentinel.agent.settings import AgentSettings, valid_name
from vpn_sentinel.runtime.settings import SettingError, Source

LEAST = {"URL": "https://sentinel.example/", "API_KEY": "k"}


def read(**values: str) -> AgentSettings:
    given = {**LEAST, **values}
    return AgentSettings.read(Source({f"VPN_SENTINEL_{k}": v for k, v in given.items()}), hostname="box.lan")


def test_defaults() -> None:
    settings = read()
    assert (settings.urls, settings.api_path, settings.client_id) == (
        ("https://sentinel.example",),
        "/api/v1",
        "box.lan",
    )
    assert (settings.interval, settings.pulse, settings.health_host, settings.health_port) == (
        30.0,
        1.0,
        "127.0.0.1",
        8082,
    )
    assert (settings.probes.trace_url, settings.probes.geolocation_service) == ("https://1.1.1.1", "auto")
    assert "k" not in repr(settings.api_key)


def test_all_of_it(tmp_path: Path) -> None:
    Authority(tmp_path).file.rename(tmp_path / "ca")
    settings = read(
        URL="https://a.example, http://192.168.1.5:5000", API_PATH="x//y/", CLIENT_ID="nl-1", INTERVAL="300",
        TIMEOUT="7", GEOLOCATION_SERVICE="ipwho.is", TLS_CERT_PATH=str(tmp_path / "ca"),
        HOME_NETWORKS="198.51.100.7,2001:db8::/32",
        EXPECTED_COUNTRIES="nl,de", ALLOWED_RESOLVERS="10.0.0.1", TUNNEL_INTERFACE="tun0", PULSE_SECONDS="5",
        ALLOWED_OUTSIDE="192.0.2.0/24", TUNNEL_ENDPOINTS="198.51.100.7:51820, [2001:db8::7]:443/tcp",
        GEO_DB=f"{tmp_path / 'ca'}", DATA_DIR=str(tmp_path), HEALTH_HOST="0.0.0.0", DEBUG="true",
    )  # fmt: skip
    assert settings.urls == ("https://a.example", "http://192.168.1.5:5000")
    assert (settings.api_path, settings.interval, settings.probes.timeout) == ("/x/y", 300.0, 7.0)
    assert settings.probes.ca_file == str(tmp_path / "ca")
    assert settings.probes.policy.expected_countries == ("NL", "DE")
    assert [str(n) for n in settings.probes.policy.home_networks] == ["198.51.100.7/32", "2001:db8::/32"]
    assert [str(n) for n in settings.probes.policy.allowed_outside] == ["192.0.2.0/24"]
    assert [str(e) for e in settings.probes.tunnel_endpoints] == ["198.51.100.7:51820/udp", "[2001:db8::7]:443/tcp"]
    assert settings.probes.databases == (str(tmp_path / "ca"),)


BAD = {
    "INTERVAL": ["0", "3601", "x", "nan"],
    "URL": ["sentinel.example", "ftp://x", "http://sentinel.example", "http://8.8.8.8:5000"],
    "CLIENT_ID": [".x", "a b", "x" * 101],
    "GEOLOCATION_SERVICE": ["google"],
    "CA_FILE": ["/nonexistent"],
    "HOME_NETWORKS": ["home", "fe80::1", "::1"],
    "EXPECTED_COUNTRIES": ["Netherlands"],
    "TUNNEL_INTERFACE": ["a/b", "x" * 16],
    "TUNNEL_ENDPOINTS": ["vpn.example:1194", "198.51.100.7", "198.51.100.7:1194/sctp"],
    "ALLOWED_OUTSIDE": ["everything"],
    "HEALTH_HOST": ["sentinel.example"],
    "HEALTH_PORT": ["0", "x"],
    "PULSE_SECONDS": ["0"],
    "GEO_DB": ["/nonexistent"],
    "API_PATH": ["/a b", "/", "/\u00e9"],
    "API_KEY": ["k\u00e9y", "a\tb\x00"],
    "ALLOW_INSECURE": ["maybe"],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_a_value_that_cannot_be_used_is_named(name: str, value: str) -> None:
    with pytest.raises(SettingError, match=f"^VPN_SENTINEL_{name}"):
        read(**{name: value})


@pytest.mark.parametrize("end", ["", "/", "/api/v1", "/api/v1/"])
def test_the_server_is_found_with_the_apis_path_and_without(end: str) -> None:
    settings = read(URL=f"https://sentinel.example{end},https://10.0.0.2/beside{end}")
    assert (settings.urls, settings.api_path) == (("https://sentinel.example", "https://10.0.0.2/beside"), "/api/v1")


@pytest.mark.parametrize(
    ("said", "meant"),
    {
        "localhost": "127.0.0.1",
        "LocalHost": "127.0.0.1",
        "[::1]": "::1",
        "::": "::",
        "::ffff:10.0.0.1": "10.0.0.1",
    }.items(),
)
def test_health_listens_where_people_say(said: str, meant: str) -> None:
    assert read(HEALTH_HOST=said).health_host == meant


def test_what_is_meant_outside_begins_in_any_case() -> None:
    meant = read(MEANT_OUTSIDE="Published 8000/TCP;PORT 123/udp\nOnly User root; Interface Eth1").probes.meant_outside
    same = read(MEANT_OUTSIDE="published 8000/tcp; port 123/udp; only user root; interface Eth1").probes.meant_outside
    assert meant == same
    assert meant.interfaces == {"Eth1"}


def test_a_server_must_be_named() -> None:
    with pytest.raises(SettingError, match="VPN_SENTINEL_URL: is not set"):
        read(URL="")


INSECURE = {
    "https://sentinel.example": False,
    "http://sentinel.example": True,
    "http://203.0.114.1:5000": True,
    "http://[2a01::1]": True,
    "http://127.0.0.1": False,
    "http://[::1]:5000": False,
    "http://192.168.1.5": False,
    "http://100.64.0.1": True,
    "http://[fd00::1]": False,
    "http://server:5000": False,
    "http://nas.local": False,
    "http://sentinel.home.arpa": False,
}


@pytest.mark.parametrize(("url", "insecure"), INSECURE.items())
def test_the_key_goes_in_clear_only_where_nobody_listens(url: str, insecure: bool) -> None:
    assert is_insecure(url) is insecure
    assert read(URL=url, ALLOW_INSECURE="true").urls == (url,)


@pytest.mark.parametrize(
    ("host", "name"), [("box", "box"), ("my box!", "my-box-"), ("-x", "x"), ("", "agent"), ("\u00e9", "agent")]
)
def test_a_hostname_becomes_a_name(host: str, name: str) -> None:
    assert valid_name(host) == name


@pytest.mark.parametrize("spelt", ["ipwhois.app", "ipwhois", "IPWHOIS.io", "https://ipwho.is/"])
def test_a_geolocation_service_by_any_of_its_names(spelt: str) -> None:
    source = Source(env={"VPN_SENTINEL_URL": "https://x.example", "VPN_SENTINEL_GEOLOCATION_SERVICE": spelt})
    assert AgentSettings.read(source).probes.geolocation_service == "ipwho.is"
