"""Where a request really came from, and who counts as one client."""

from ipaddress import ip_address, ip_network

import pytest

from vpn_sentinel.server import client as client_module
from vpn_sentinel.server.client import (
    client_address,
    client_of,
    client_prefix,
    headers_of,
    inside,
    network_prefix,
    resolver_prefix,
)


def test_lines_of_one_header_are_one_list() -> None:
    lines = [(b"x-forwarded-for", b"1.2.3.4"), (b"X-API-Key", b"k"), (b"x-forwarded-for", b"146.70.1.2, 10.0.0.2")]
    assert headers_of({"headers": lines}) == {"x-forwarded-for": "1.2.3.4,146.70.1.2, 10.0.0.2", "x-api-key": "k"}


PROXIES = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
PEERS: dict[str, tuple[str, str | None, str]] = {
    "nobody in between": ("146.70.1.2", None, "146.70.1.2"),
    "IPv4 on a socket of both versions": ("::ffff:146.70.1.2", None, "146.70.1.2"),
    "a link-local address": ("fe80::1%eth0", None, "fe80::1"),
    "a stranger's header is not believed": ("146.70.1.2", "1.2.3.4", "146.70.1.2"),
    "a proxy of ours": ("10.0.0.1", "146.70.1.2", "146.70.1.2"),
    "a proxy of ours, by IPv6": ("fd00::1", "2a0d::2", "2a0d::2"),
    "two proxies of ours": ("10.0.0.1", "146.70.1.2, 10.0.0.2", "146.70.1.2"),
    "what stands before the first stranger is the stranger's word": ("10.0.0.1", "1.2.3.4, 146.70.1.2", "146.70.1.2"),
    "with its port": ("10.0.0.1", "83.46.112.77:51008", "83.46.112.77"),
    "in quotes and brackets": ("10.0.0.1", '"[2001:db8::5]"', "2001:db8::5"),
    "in brackets with its port": ("10.0.0.1", "1.2.3.4, [2001:db8::5]:443", "2001:db8::5"),
    "in quotes with its port": ("10.0.0.1", '"83.46.112.77:51008"', "83.46.112.77"),
    "IPv6 without brackets": ("10.0.0.1", "2001:db8::5", "2001:db8::5"),
    "IPv4 that a proxy of both versions saw": ("10.0.0.1", "::ffff:83.46.112.77", "83.46.112.77"),
    "that, with its port": ("10.0.0.1", "[::ffff:83.46.112.77]:51008", "83.46.112.77"),
    "IPv4 by a NAT64 in front of us": ("64:ff9b::532e:704d", None, "83.46.112.77"),
    "IPv4 that a proxy behind a NAT64 saw": ("10.0.0.1", "[64:ff9b::532e:704d]:51008", "83.46.112.77"),
    "commas at the end": ("10.0.0.1", "1.2.3.4, 83.46.112.77, ,", "83.46.112.77"),
    "two proxies of ours with ports": ("10.0.0.1", "83.46.112.77:1, 10.0.0.2:2", "83.46.112.77"),
    "a zone": ("10.0.0.1", "fe80::1%eth0", "fe80::1"),
    "proxies all the way": ("10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"),
}


@pytest.mark.parametrize(("remote", "header", "found"), PEERS.values(), ids=PEERS.keys())
def test_where_a_request_really_came_from(remote: str, header: str | None, found: str) -> None:
    assert client_address(remote, header, iter(PROXIES)) == ip_address(found)


@pytest.mark.parametrize(
    "hop", ["unknown", "_hidden", "example.org", "83.46.112.77:x", "[2001:db8::5", "[2001:db8::5]x", "1.2.3", '""']
)
def test_what_a_proxy_says_in_another_way_is_unknown_and_said_once(
    hop: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_LOGGED_PROXIES", set())
    assert [client_address("10.0.0.1", f"146.70.1.2, {hop}", PROXIES) for _ in range(3)] == [None] * 3
    [said] = caplog.records
    assert (said.__dict__["proxy"], said.__dict__["value"]) == ("10.0.0.1", hop)


NOBODY: dict[str, tuple[str, str | None, str]] = {
    "no header": ("10.0.0.1", None, "10.0.0.1"),
    "an empty one": ("10.0.0.1", "", "10.0.0.1"),
    "less than nothing": ("10.0.0.1", " , ", "10.0.0.1"),
    "a proxy on the internet": ("185.1.2.3", None, "185.1.2.3"),
    "one behind another": ("10.0.0.1", "185.1.2.3", "185.1.2.3"),
}


@pytest.mark.parametrize(("remote", "header", "proxy"), NOBODY.values(), ids=NOBODY.keys())
def test_a_proxy_that_names_nobody_is_not_taken_for_the_client_and_said_once(
    remote: str, header: str | None, proxy: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_LOGGED_PROXIES", set())
    trusted = (*PROXIES, ip_network("185.1.2.3/32"))
    assert [client_address(remote, header, trusted) for _ in range(3)] == [None] * 3
    [said] = caplog.records
    assert said.__dict__["proxy"] == proxy
    assert "X-Forwarded-For" in said.__dict__["remedy"]


def test_without_trusted_proxies_no_header_counts() -> None:
    assert client_address("10.0.0.1", "1.2.3.4", ()) == ip_address("10.0.0.1")


def test_a_peer_that_is_no_address_is_an_error() -> None:
    with pytest.raises(ValueError, match="is no address such as"):
        client_address("/run/proxy.sock", "1.2.3.4", PROXIES)


def test_a_network_of_the_other_version_holds_nothing() -> None:
    assert inside(ip_address("10.1.2.3"), PROXIES)
    assert not inside(ip_address("::10.1.2.3"), PROXIES)


def test_one_client_has_an_ipv4_address_or_a_64() -> None:
    assert client_of(ip_address("203.0.113.9")) == "203.0.113.9"
    assert client_of(ip_address("2001:db8:0:1::9")) == "2001:db8:0:1::/64"
    assert client_prefix("192.0.2.1") == client_prefix("::ffff:192.0.2.1") != client_prefix("192.0.2.2")
    assert client_prefix("2001:db8::1") == client_prefix("2001:db8::2%eth0") != client_prefix("2001:db8:0:1::1")


def test_around_a_client_are_its_network_and_its_providers_resolvers() -> None:
    assert network_prefix("192.0.2.1") == network_prefix("::ffff:192.0.2.200") != network_prefix("192.0.3.1")
    assert network_prefix("2001:db8:0:1::1") == network_prefix("2001:db8:0:ff00::1") != network_prefix("2001:db8:1::1")
    assert resolver_prefix("192.0.2.1") == resolver_prefix("::ffff:192.0.2.200") != resolver_prefix("192.0.3.1")
    one, other = resolver_prefix("2001:db8:0:100::1"), resolver_prefix("2001:db8:0:200::1")
    assert one == resolver_prefix("2001:db8:0:1ff::2") != other
