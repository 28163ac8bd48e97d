"""The replaced system's report, in both its forms, and everything that only looks like one."""

import json
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vpn_sentinel.domain.observation import Answer, Canary, Observation, Place, Probe, Trigger
from vpn_sentinel.wire import limits
from vpn_sentinel.wire.keepalive import Keepalive, ParsedKeepalive, Received, read

NOW = 1_800_000_000.0  # 2027-01-15T08:00:00Z
GOLDEN = Path(__file__).parent / "golden"
EXIT = ip_address("146.70.1.2")


def body(**said: object) -> bytes:
    return json.dumps({"client_id": "synology-vpn", **said}).encode()


@pytest.mark.parametrize("form", ["nested", "flat"])
def test_both_forms_say_the_same(form: str) -> None:
    reading = read((GOLDEN / f"keepalive_{form}.json").read_bytes(), NOW)
    assert reading.client_id == "synology-vpn"
    assert (reading.version, reading.dns_loc, reading.dns_colo, reading.skew) == ("1.0.0-dev", "NL", "AMS", 0.0)
    assert reading.observation == Observation(
        trigger=Trigger.KEEPALIVE,
        canaries=(
            Canary(probe=Probe.DEFAULT, target="client", family=4, answer=Answer.ANSWERED, address=EXIT),
        ),
        places=(
            Place(
                ip=EXIT, source="client", country="NL", region="North Holland", city="Amsterdam",
                timezone="Europe/Amsterdam", org="AS9009 M247",
            ),
        ),
    )  # fmt: skip


def test_a_name_is_enough() -> None:
    reading = read(b'{"client_id": "nl-1"}', NOW)
    assert reading.observation == Observation(trigger=Trigger.KEEPALIVE)
    assert (reading.version, reading.dns_loc, reading.dns_colo, reading.skew) == ("", "", "", None)


def test_where_it_came_from_is_what_the_server_saw() -> None:
    for said in (body(), body(ip="146.70.1.2")):
        assert read(said, NOW, EXIT).observation == replace(read(said, NOW).observation, reported_from=EXIT)


def test_the_nested_form_wins_over_the_flat_one() -> None:
    said = body(
        ip="1.2.3.4", public_ip="146.70.1.2", country="DE", city="Berlin", location={"country": "nl"},
        dns_loc="DE", dns_colo="FRA", dns_test={"location": "NL"},
    )  # fmt: skip
    reading = read(said, NOW)
    (place,) = reading.observation.places
    assert (str(place.ip), place.country, place.city) == ("146.70.1.2", "NL", "Berlin")
    assert (reading.dns_loc, reading.dns_colo) == ("NL", "FRA")


@pytest.mark.parametrize("nothing", [None, "", "unknown", "Unknown", " UNKNOWN ", "null", "None", "n/a"])
def test_what_its_clients_write_where_they_know_nothing_is_nothing(nothing: str | None) -> None:
    said = body(public_ip=nothing, location={"country": nothing}, client_version=nothing, dns_loc=nothing)
    reading = read(said, NOW)
    assert reading.observation == Observation(trigger=Trigger.KEEPALIVE)
    assert (reading.version, reading.dns_loc) == ("", "")
    assert read(body(public_ip=nothing, ip="146.70.1.2"), NOW).observation.exit(4) == EXIT


@pytest.mark.parametrize("country", ["Netherlands", "N", "12", "<b", "ÄÖ"])
def test_a_country_that_is_no_code_is_not_known(country: str) -> None:
    (place,) = read(body(ip="146.70.1.2", country=country), NOW).observation.places
    assert place.country is None


def test_an_ipv6_exit() -> None:
    seen = read(body(public_ip="2a0d:5600::2"), NOW).observation
    assert (seen.exit(4), seen.exit(6)) == (None, ip_address("2a0d:5600::2"))
    assert read(body(public_ip="::ffff:146.70.1.2"), NOW).observation.exit(4) == EXIT


@pytest.mark.parametrize(
    ("told", "address"),
    [
        ("146.70.1.2:51820", "146.70.1.2"), ('"146.70.1.2"', "146.70.1.2"), (" 146.70.1.2\n", "146.70.1.2"),
        ("[2a0d:5600::2]", "2a0d:5600::2"), ("[2a0d:5600::2]:443", "2a0d:5600::2"),
        ("2a0d:5600::2%wg0", "2a0d:5600::2"),
    ],
)  # fmt: skip
def test_an_address_counts_with_whatever_a_service_writes_beside_it(told: str, address: str) -> None:
    """Else a home address would be passed over, and the report's own way taken for the exit."""
    seen = read(body(public_ip=told), NOW).observation
    assert address in (str(seen.exit(4)), str(seen.exit(6)))


@pytest.mark.parametrize(
    ("said", "skew"),
    [
        (NOW, 0.0),
        (int(NOW) + 90, 90.0),
        ("2027-01-15T08:00:00", 0.0),  # without an offset, as the replaced server read it
        ("2027-01-15T08:00:00Z", 0.0),
        ("2027-01-15T09:00:00.5+01:00", 0.5),
        ("2027-01-15T07:58:00+00:00", -120.0),
        (None, None),
    ],
)
def test_the_clients_clock(said: Any, skew: float | None) -> None:
    assert read(body(timestamp=said), NOW).skew == skew


DEEP = b"[" * 100_000
NOT_JSON: dict[str, bytes] = {
    "nothing": b"",
    "words": b"hello",
    "half of it": b'{"client_id": "nl-1"',
    "two of them": b'{"client_id": "nl-1"}{}',
    "a trailing comma": b'{"client_id": "nl-1",}',
    "nested beyond reason": b'{"client_id": "nl-1", "x": ' + DEEP,
    "nested beyond reason, and closed": b'{"client_id": "nl-1", "x": ' + DEEP + b"]" * 100_000 + b"}",
    "half of it in UTF-16": '{"client_id": "nl-1"'.encode("utf-16"),
    "half a character in UTF-16": '{"client_id": "nl-1"}'.encode("utf-16")[:-1],
}


@pytest.mark.parametrize("said", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_what_is_not_json(said: bytes) -> None:
    with pytest.raises(msgspec.DecodeError) as refused:
        read(said, NOW)
    assert not isinstance(refused.value, msgspec.ValidationError)
    assert len(str(refused.value)) < 300


TEN_YEARS = 10 * 365.25 * 86400
NOBODY: dict[str, tuple[bytes, str]] = {
    "nested brackets alone": (DEEP, "object"),
    "no name": (b"{}", "client_id"),
    "a name that is null": (body(client_id=None), "client_id"),
    "an empty name": (body(client_id=""), "client_id"),
    "a name of 10,000 characters": (body(client_id="x" * 10_000), "client_id"),
    "a name of HTML": (body(client_id="<script>alert(1)</script>"), "client_id"),
    "a name of two lines": (body(client_id="nl\n1"), "client_id"),
    "a name of two lines, the second empty": (body(client_id="nl\n"), "client_id"),
    "a name with a path": (body(client_id="../etc"), "client_id"),
    "a name with a raw control character": (b'{"client_id": "nl-1\x01"}', "client_id"),
    "a name with bytes that are no text": (b'{"client_id": "\xff"}', "client_id"),
    "a name of half a surrogate pair": (b'{"client_id": "\\ud800"}', "client_id"),
    "a name without end that is a number": (b'{"client_id": ' + b"7" * 5000 + b"}", "client_id"),
    "a name that is NaN": (b'{"client_id": NaN}', "client_id"),
    "nobody, as Python writes it": (b'{"city": NaN}', "client_id"),
    "a list, as Python writes it": (b'[NaN, "\\ud800"]', "object"),
    "the same key twice, the last one wrong": (b'{"client_id": "nl-1", "client_id": "<b>"}', "client_id"),
}


@pytest.mark.parametrize(("said", "field"), NOBODY.values(), ids=NOBODY.keys())
def test_a_report_that_names_nobody_is_refused(said: bytes, field: str) -> None:
    with pytest.raises(ValueError, match=field) as refused:
        read(said, NOW)
    assert isinstance(refused.value, msgspec.ValidationError) or not isinstance(refused.value, msgspec.DecodeError)
    assert len(str(refused.value)) < 300
    assert str(refused.value).isprintable()


ODD: dict[str, tuple[bytes, str]] = {
    "an address that is none": (body(public_ip="999.1.2.3"), "public_ip"),
    "an address of a LAN": (body(public_ip="192.168.1.5"), "public_ip"),
    "an address of nobody": (body(ip="0.0.0.0"), "ip"),
    "an address of this host": (body(public_ip="::1"), "public_ip"),
    "an address in a list": (body(public_ip=["1.2.3.4"]), "public_ip"),
    "an address of 10,000 digits": (body(public_ip="9" * 10_000), "public_ip"),
    "an address with a zone": (body(public_ip="fe80::1%eth0"), "public_ip"),
    "the other address": (body(ip="nowhere"), "ip"),
    "a city with an escape": (body(city="\x1b[31mred"), "city"),
    "a city of two lines": (body(location={"city": "a\nb"}), "city"),
    "a region without end": (body(region="x" * 201), "region"),
    "a provider with a zero": (body(provider="a\x00b"), "org"),
    "a zone that turns the text around": (body(timezone="\u202e"), "timezone"),
    "a country of a novel": (body(country="x" * 5000), "country"),
    "a version with a bell": (body(client_version="\x07"), "client_version"),
    "a status without end": (body(status="x" * 201), "status"),
    "a resolver's place with a bell": (body(dns_test={"location": "\x07"}), "dns_loc"),
    "a resolver's airport with a bell": (body(dns_colo="\x07"), "dns_colo"),
    "a place that is a word": (body(location="Amsterdam"), "location"),
    "a DNS test that is a list": (body(dns_test=[]), "dns_test"),
    "a time ten years ahead": (body(timestamp=NOW + TEN_YEARS), "timestamp"),
    "a time ten years behind": (body(timestamp="2017-01-15T08:00:00Z"), "timestamp"),
    "a time at the world's beginning": (body(timestamp="0001-01-01T00:00:00+23:59"), "timestamp"),
    "a time at the world's end": (body(timestamp="9999-12-31T23:59:59-23:59"), "timestamp"),
    "a time in words": (body(timestamp="yesterday"), "timestamp"),
    "a time without end": (body(timestamp="2" * 10_000), "timestamp"),
    "a time that is true": (body(timestamp=True), "timestamp"),
    "a time of 400 digits": (b'{"client_id": "nl-1", "timestamp": 1' + b"0" * 400 + b"}", "timestamp"),
    "a time of 5,000 digits": (b'{"client_id": "nl-1", "timestamp": 1' + b"0" * 5000 + b"}", "timestamp"),
    "a time that is NaN": (b'{"client_id": "nl-1", "timestamp": NaN}', "timestamp"),
    "a time that is minus Infinity": (b'{"client_id": "nl-1", "timestamp": -Infinity}', "timestamp"),
    "a time beyond all numbers": (b'{"client_id": "nl-1", "timestamp": 1e999}', "timestamp"),
    "a city that is NaN": (b'{"client_id": "nl-1", "city": NaN}', "city"),
    "a city of bytes that are no text": (b'{"client_id": "nl-1", "city": "M\xfcnchen"}', "city"),
    "half a surrogate pair in UTF-8": (b'{"client_id": "nl-1", "city": "\xed\xa0\x80"}', "city"),
    "half a surrogate pair, escaped": (b'{"client_id": "nl-1", "city": "M\\udcfcnchen"}', "city"),
    "half a surrogate pair for an address": (b'{"client_id": "nl-1", "public_ip": "\\ud800"}', "public_ip"),
    "a city of two raw lines": (b'{"client_id": "nl-1", "city": "a\nb"}', "city"),
    "an address that is a number": (body(public_ip=7), "public_ip"),
    "an address that is a host": (body(public_ip="vpn.example.org"), "public_ip"),
    "a time in milliseconds": (body(timestamp=NOW * 1000), "timestamp"),
    "a country in a list": (body(country=["NL"]), "country"),
}


@pytest.mark.parametrize(("said", "field"), ODD.values(), ids=ODD.keys())
def test_a_field_that_is_not_understood_is_told_and_the_report_counts(said: bytes, field: str) -> None:
    reading = read(said, NOW, EXIT)
    assert reading.client_id
    assert reading.observation.reported_from == EXIT
    [(name, value)] = reading.odd
    assert name.endswith(field) or field in ("org", "dns_loc")
    assert len(value) < 400
    assert value.isprintable()


PYTHONS: dict[str, bytes] = {
    "NaN where nobody looks": b'{"client_id": "nl-1", "public_ip": "146.70.1.2", "latency": NaN}',
    "infinite ones": b'{"client_id": "nl-1", "public_ip": "146.70.1.2", "x": [Infinity, -Infinity, 1e999]}',
    "a number without end": b'{"client_id": "nl-1", "public_ip": "146.70.1.2", "x": ' + b"9" * 200_000 + b"}",
    "half a surrogate pair": b'{"client_id": "nl-1", "public_ip": "146.70.1.2", "x\\ud800": "\\ud800"}',
    "bytes that are no text": b'{"client_id": "nl-1", "public_ip": "146.70.1.2", "x": "\xff"}',
    "a raw line end": b'{"client_id": "nl-1", "public_ip": "146.70.1.2", "x": "\n"}',
    "a byte order mark": b'\xef\xbb\xbf{"client_id": "nl-1", "public_ip": "146.70.1.2"}',
    **{
        name: '{"client_id": "nl-1", "public_ip": "146.70.1.2"}'.encode(name)
        for name in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le")
    },
}


@pytest.mark.parametrize("said", PYTHONS.values(), ids=PYTHONS.keys())
def test_what_the_replaced_server_took_for_json_is_taken(said: bytes) -> None:
    reading = read(said, NOW, EXIT)
    assert (reading.client_id, reading.odd) == ("nl-1", ())
    assert reading.observation == read(body(public_ip="146.70.1.2"), NOW, EXIT).observation


def test_one_odd_field_spoils_no_other() -> None:
    reading = read(body(public_ip="N/A!", ip="146.70.1.2", city=7, location="x", timestamp=[]), NOW)
    assert reading.observation.exit(4) == EXIT
    assert reading.observation.places[0].city == "7"
    assert [name for name, _ in reading.odd] == ["location", "public_ip", "timestamp"]


@pytest.mark.parametrize("name", ["_nl", "-nl", "x" * 100, 7])
def test_the_names_that_the_replaced_server_took(name: object) -> None:
    assert read(body(client_id=name), NOW).client_id == str(name)


def test_a_year_is_a_wrong_clock_and_more_is_a_mistake() -> None:
    assert read(body(timestamp=NOW - limits.MAX_CLOCK_SKEW_S), NOW).skew == -limits.MAX_CLOCK_SKEW_S
    assert read(body(timestamp=NOW - limits.MAX_CLOCK_SKEW_S - 1), NOW).skew is None


def test_the_last_of_two_keys_counts() -> None:
    assert read(b'{"client_id": "a", "client_id": "b"}', NOW).client_id == "b"


def test_what_nobody_asked_for_is_passed_over() -> None:
    assert read(body(moon={"phase": [1, None]}), NOW).client_id == "synology-vpn"


def test_the_answer_is_the_replaced_servers() -> None:
    answer = msgspec.to_builtins(Received(server_time="2027-01-15T08:00:00+00:00"))
    assert answer == {
        "server_time": "2027-01-15T08:00:00+00:00", "status": "ok", "message": "Keepalive received",
    }  # fmt: skip


def read_or_refused(said: bytes) -> ParsedKeepalive | None:
    """What was read; None for one of the documented errors, and none of their kinds besides."""
    try:
        return read(said, NOW)
    except ValueError as refused:
        if type(refused) not in (ValueError, msgspec.DecodeError, msgspec.ValidationError):
            raise
        return None


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(),
    st.sampled_from(["nl-1", "146.70.1.2", "::1", "unknown", "2027-01-15T08:00:00Z", "NL", 1_800_000_000]),
)  # fmt: skip
values = st.recursive(leaves, lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)), max_leaves=8)
fields = st.sampled_from([f.name for f in msgspec.structs.fields(Keepalive)])
objects = st.dictionaries(fields, st.one_of(leaves, values)).map(lambda d: {"client_id": "nl-1", **d})


@settings(deadline=None, max_examples=150)
@given(st.one_of(objects, values).map(lambda v: json.dumps(v).encode()))
@example(b'{"client_id": "nl-1", "timestamp": "-"}')
def test_whatever_json_comes_is_read_or_refused(said: bytes) -> None:
    reading = read_or_refused(said)
    if reading is not None:
        assert reading.client_id
        assert reading.version.isprintable()
        assert all(p.city is None or p.city.isprintable() for p in reading.observation.places)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_whatever_bytes_come_are_read_or_refused(said: bytes) -> None:
    read_or_refused(said)
