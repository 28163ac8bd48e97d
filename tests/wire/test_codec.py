"""Addresses in JSON, and what the edge refuses for the inside."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address, ip_network
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpn_sentinel.domain.observation import (
    Answer,
    Canary,
    Link,
    Observation,
    Place,
    Probe,
    ResolverSighting,
    Routed,
    SystemLookup,
    Trigger,
)
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, Policy
from vpn_sentinel.wire import limits
from vpn_sentinel.wire.codec import address, check_observation, check_policy, checked_text, decoder, encode
from vpn_sentinel.wire.messages import FromAgent
from vpn_sentinel.wire.problem import CONTENT_TYPE, problem

SEEN = Observation(trigger=Trigger.TIMER)
CANARY = Canary(probe=Probe.DEFAULT, target="echo", family=4, answer=Answer.LOST)
SIGHTING = ResolverSighting(method="akamai", nameserver=ip_address("127.0.0.11"), answer=Answer.LOST)
PLACE = Place(ip=ip_address("146.70.1.2"), source="mmdb")
ROUTED = Routed(interface="eth0", family=4, share=1.0)
LINK = Link(name="wg0", present=True, up=True)
MOST = limits.MAX_PER_OBSERVATION


@pytest.mark.parametrize(
    ("said", "meant"),
    {
        "146.70.1.2": "146.70.1.2",
        "2A0D:5600:0::2": "2a0d:5600::2",
        "::ffff:146.70.1.2": "146.70.1.2",
        "0000:0000:0000:0000:0000:ffff:146.170.101.102": "146.170.101.102",
    }.items(),
)
def test_an_address(said: str, meant: str) -> None:
    assert address(said) == ip_address(meant)


@pytest.mark.parametrize(
    "said", ["", "unknown", "146.70.1", "146.070.1.2", "1", "fe80::1%eth0", "::1/128", "9" * 10_000]
)
def test_no_address(said: str) -> None:
    with pytest.raises(ValueError, match="address") as refused:
        address(said)
    assert len(str(refused.value)) < 200


@settings(deadline=None)
@given(st.ip_addresses())
def test_every_address_comes_back(found: IPAddress) -> None:
    plain = getattr(found, "ipv4_mapped", None) or found
    assert decoder(IPAddress)(encode(plain)) == plain


@pytest.mark.parametrize(
    ("kind", "said", "meant"),
    [
        (IPv4Address, '"146.70.1.2"', ip_address("146.70.1.2")),
        (IPv6Address, '"2a0d::2"', ip_address("2a0d::2")),
        (IPNetwork, '"10.0.0.0/8"', ip_network("10.0.0.0/8")),
        (IPNetwork, '"::ffff:10.0.0.0/104"', ip_network("10.0.0.0/8")),
        (IPv4Network, '"10.0.0.1"', ip_network("10.0.0.1/32")),
    ],
)
def test_addresses_and_networks_are_read(kind: Any, said: str, meant: object) -> None:
    assert decoder(kind)(said) == meant
    assert decoder(kind)(encode(meant)) == meant


@pytest.mark.parametrize("said", ["1", "null", "[]", '"10.0.0.1/8"', '"fe80::%eth0/64"', '"x"', f'"{"9" * 9000}"'])
def test_no_network(said: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"home_networks\[0\]") as refused:
        decoder(Policy)(f'{{"home_networks": [{said}]}}')
    assert len(str(refused.value)) < 300


def test_a_kind_without_a_json_form_is_refused_in_both_directions() -> None:
    with pytest.raises(NotImplementedError, match="complex has no JSON form"):
        encode(1j)
    with pytest.raises(NotImplementedError, match="no JSON form"):
        decoder(complex)('"1"')


@pytest.mark.parametrize("value", [None, "", "Zürich", "x" * limits.MAX_TEXT_LENGTH, "日本"])
def test_text_that_can_be_kept(value: str | None) -> None:
    assert checked_text("city", value) == value


@pytest.mark.parametrize(
    "value", ["x" * (limits.MAX_TEXT_LENGTH + 1), "a\x00", "a\nb", "\x1b[31m", "\u202eevil", "\u2028", "\ud800"]
)
def test_text_that_cannot_is_refused_by_its_name(value: str) -> None:
    with pytest.raises(ValueError, match=r"^city ") as refused:
        checked_text("city", value)
    assert value not in str(refused.value)


GOOD: dict[str, Observation] = {
    "a bare one": SEEN,
    "a full one": replace(
        SEEN, canaries=(CANARY,) * MOST, resolvers=(SIGHTING,) * MOST, places=(PLACE,) * MOST, link=LINK,
        interfaces=("eth0",) * 4 * MOST, took_ms=1e8,
    ),
    "a place with everything": replace(
        SEEN, places=(replace(PLACE, country="NL", city="Zürich", region="x", timezone="UTC", org="AS", asn=2**32 - 1),)
    ),
    "a link that has carried much": replace(SEEN, link=replace(LINK, rx_bytes=2**64 - 1, tx_bytes=0)),
}  # fmt: skip
BAD: dict[str, tuple[Observation, str]] = {
    "too many canaries": (replace(SEEN, canaries=(CANARY,) * (MOST + 1)), "canaries"),
    "ports in the wrong order": (replace(SEEN, routed=(replace(ROUTED, ports=(54, 53)),)), "ports"),
    "port 0": (replace(SEEN, routed=(replace(ROUTED, ports=(0, 53)),)), "ports"),
    "a port beyond the last": (replace(SEEN, routed=(replace(ROUTED, ports=(53, 2**16)),)), "ports"),
    "too many lookups": (replace(SEEN, resolvers=(SIGHTING,) * (MOST + 1)), "resolvers"),
    "too many places": (replace(SEEN, places=(PLACE,) * (MOST + 1)), "places"),
    "too many interfaces": (replace(SEEN, interfaces=("eth0",) * (4 * MOST + 1)), "interfaces"),
    "an interface without end": (replace(SEEN, interfaces=("x" * 65,)), "interface"),
    "an interface of two lines": (replace(SEEN, interfaces=("a\nb",)), "interface"),
    "a tunnel's interface of two lines": (replace(SEEN, link=replace(LINK, name="a\nb")), "interface"),
    "a counter below zero": (replace(SEEN, link=replace(LINK, rx_bytes=-1)), "rx_bytes"),
    "a counter of a thousand digits": (replace(SEEN, link=replace(LINK, tx_bytes=10**1000)), "tx_bytes"),
    "a target with an escape": (replace(SEEN, canaries=(replace(CANARY, target="\x1b"),)), "target"),
    "a method without end": (replace(SEEN, resolvers=(replace(SIGHTING, method="x" * 65),)), "method"),
    "a source of two lines": (replace(SEEN, places=(replace(PLACE, source="a\n"),)), "source"),
    "a city without end": (replace(SEEN, places=(replace(PLACE, city="x" * 201),)), "city"),
    "a country in words": (replace(SEEN, places=(replace(PLACE, country="Netherlands"),)), "country"),
    "a country of digits": (replace(SEEN, places=(replace(PLACE, country="12"),)), "country"),
    "a country of markup": (replace(SEEN, places=(replace(PLACE, country="<b"),)), "country"),
    "an AS below zero": (replace(SEEN, places=(replace(PLACE, asn=-1),)), "asn"),
    "an AS of a thousand digits": (replace(SEEN, places=(replace(PLACE, asn=10**1000),)), "asn"),
    "a round that took less than no time": (replace(SEEN, took_ms=-0.1), "took_ms"),
    "a round that took for ever": (replace(SEEN, took_ms=float("inf")), "took_ms"),
    "a round that took no number": (replace(SEEN, took_ms=float("nan")), "took_ms"),
}


@pytest.mark.parametrize("seen", GOOD.values(), ids=GOOD.keys())
def test_an_observation_that_is_taken(seen: Observation) -> None:
    check_observation(seen)


@pytest.mark.parametrize(("seen", "field"), BAD.values(), ids=BAD.keys())
def test_an_observation_that_is_refused_by_the_name_of_its_field(seen: Observation, field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}|{field} "):
        check_observation(seen)


BAD_POLICIES: dict[str, tuple[Policy, str]] = {
    "too many homes": (Policy(home_networks=(ip_network("10.0.0.0/8"),) * (MOST + 1)), "home_networks"),
    "too many countries": (Policy(expected_countries=("NL",) * (MOST + 1)), "expected_countries"),
    "too many resolvers": (Policy(allowed_resolvers=(ip_network("10.0.0.0/8"),) * (MOST + 1)), "allowed_resolvers"),
    "a country in words": (Policy(expected_countries=("Netherlands",)), "expected_countries"),
    "a country with a bell": (Policy(expected_countries=("\x07",)), "expected_countries"),
    "a grace below zero": (Policy(grace_down=-1.0), "grace"),
    "a grace of days": (Policy(grace_degraded=1e6), "grace"),
    "a grace that is no number": (Policy(grace_recovery=float("nan")), "grace"),
}


@pytest.mark.parametrize(("policy", "field"), BAD_POLICIES.values(), ids=BAD_POLICIES.keys())
def test_a_policy_that_is_refused_by_the_name_of_its_field(policy: Policy, field: str) -> None:
    with pytest.raises(ValueError, match=field):
        check_policy(policy)


def test_a_policy_that_is_taken() -> None:
    check_policy(Policy(home_networks=(ip_network("10.0.0.0/8"),), expected_countries=("NL",), grace_down=0.0))


BAD_MESSAGES = {
    "an object without a type": b"{}",
    "a type that nobody knows": b'{"type": "nope"}',
    "what only the server says": b'{"type": "ack", "seq": 1}',
    "no object": b"[]",
    "a family of 5": b'{"type":"reports","items":[{"seq":1,"age":1,"observation":{"trigger":"timer","canaries":'
    b'[{"probe":"default","target":"x","family":5,"answer":"lost"}]}}]}',
    "a trigger that nobody knows": b'{"type":"reports","items":[{"seq":1,"age":1,"observation":{"trigger":"moon"}}]}',
    "an age beyond numbers": b'{"type":"reports","items":[{"seq":1,"age":1e400,"observation":{"trigger":"timer"}}]}',
    "a seq of half": b'{"type":"reports","items":[{"seq":1.5,"age":1,"observation":{"trigger":"timer"}}]}',
}


@pytest.mark.parametrize("body", BAD_MESSAGES.values(), ids=BAD_MESSAGES.keys())
def test_a_message_that_says_something_impossible(body: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        decoder(FromAgent)(body)


def test_a_problem_says_its_kind_by_its_status() -> None:
    found = problem(429, "more than 30 reports a minute from here")
    assert (found.title, found.type) == ("Too Many Requests", "about:blank")
    assert problem(413, "").title == "Content Too Large"  # on every Python
    assert CONTENT_TYPE == "application/problem+json"


@pytest.mark.parametrize(
    "found",
    [
        SystemLookup(answer=Answer.LOST, error="x" * 201),
        SystemLookup(answer=Answer.LOST, error="\n"),
        SystemLookup(answer=Answer.ANSWERED, upstreams=(ip_address("127.0.0.1"),) * (MOST + 1)),
        SystemLookup(answer=Answer.ANSWERED, egress=(ip_address("80.58.184.30"),) * (MOST + 1)),
    ],
)
def test_a_lookup_that_no_agent_of_ours_tells(found: SystemLookup) -> None:
    with pytest.raises(ValueError, match=r"error|upstreams"):
        check_observation(replace(SEEN, system_lookup=found))


def test_a_lookup_crosses_the_wire() -> None:
    seen = replace(
        SEEN, system_lookup=SystemLookup(answer=Answer.LOST, error="late", upstreams=(ip_address("10.0.0.1"),))
    )
    check_observation(seen)
    assert decoder(Observation)(encode(seen)) == seen
