"""Addresses and networks: one form inside, whichever people write."""

from ipaddress import ip_address, ip_network

import pytest

from vpn_sentinel.runtime.addresses import parse_address, parse_network


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("0:0:0:0:0:FFFF:c000:0201", "192.0.2.1"),
        ("2001:DB8::1", "2001:db8::1"),
    ],
)
def test_an_address_has_one_form(text: str, found: str) -> None:
    assert parse_address(text) == ip_address(found)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("192.0.2.77/24", "192.0.2.0/24"),
        ("192.0.2.77/255.255.255.0", "192.0.2.0/24"),
        ("::ffff:192.0.2.1", "192.0.2.1/32"),
        ("::ffff:192.0.2.77/120", "192.0.2.0/24"),
        ("::ffff:0:0/96", "0.0.0.0/0"),
        ("2001:db8::1/56", "2001:db8::/56"),
        ("::/0", "::/0"),
    ],
)
def test_a_network_has_one_form(text: str, found: str) -> None:
    assert parse_network(text) == ip_network(found)


@pytest.mark.parametrize("text", ["", "vpn", "fe80::1%eth0", "192.0.2.1/24", "192.0.2.01"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=text or "''"):
        parse_address(text)


@pytest.mark.parametrize("text", ["", "vpn", "fe80::1%eth0", "fe80::1%eth0/64", "192.0.2.0/33", "::ffff:192.0.2.1/64"])
def test_what_is_no_network(text: str) -> None:
    with pytest.raises(ValueError, match=text or "''"):
        parse_network(text)


def test_bits_behind_the_prefix_are_a_mistake_where_a_program_writes() -> None:
    for text in ("192.0.2.1/24", "::ffff:192.0.2.1/120", "2001:db8::1/64"):
        with pytest.raises(ValueError, match="has host bits set"):
            parse_network(text, strict=True)
