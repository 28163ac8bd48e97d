"""The UDP echo: genuine questions get genuine answers, everything else gets none."""

import json
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.wire.answering import reply
from vpn_sentinel.wire import echo

SECRET = b"s" * 32
IDENT = echo.ident_for(SECRET, "nl-1")
KEY = echo.key_for(SECRET, IDENT)
NONCE = b"12345678"
REQUEST = echo.request(IDENT, NONCE, KEY)
GOLDEN = json.loads((Path(__file__).parent / "golden" / "echo.json").read_text())


def answered(host: str) -> bytes:
    answer = reply(REQUEST, host, 40000, SECRET)
    assert answer is not None
    return answer


def test_the_bytes_are_what_they_ever_were() -> None:
    secret, nonce = bytes.fromhex(GOLDEN["secret"]), bytes.fromhex(GOLDEN["nonce"])
    ident = echo.ident_for(secret, GOLDEN["name"])
    key = echo.key_for(secret, ident)
    request = echo.request(ident, nonce, key)
    assert (ident.hex(), key.hex(), request.hex()) == (GOLDEN["id"], GOLDEN["key"], GOLDEN["request"])
    for host, answer in GOLDEN["replies"].items():
        assert reply(request, host, GOLDEN["port"], secret) == bytes.fromhex(answer)
        assert echo.read_reply(bytes.fromhex(answer), ident, nonce, key) == ip_address(host)


@pytest.mark.parametrize(
    ("host", "seen"),
    {
        "146.70.1.2": "146.70.1.2",
        "2a0d:5600::2": "2a0d:5600::2",
        "::ffff:146.70.1.2": "146.70.1.2",  # a socket that takes both versions shows IPv4 so
        "fe80::1%eth0": "fe80::1",
        "0.0.0.0": "0.0.0.0",
        "::": "::",
    }.items(),
)
def test_the_answer_holds_the_address_that_was_seen(host: str, seen: str) -> None:
    assert echo.read_reply(answered(host), IDENT, NONCE, KEY) == ip_address(seen)


def test_a_reply_is_no_larger_than_its_request() -> None:
    assert len(REQUEST) == len(answered("2a0d:5600::2")) == echo.SIZE_BYTES == 64


@pytest.mark.parametrize("position", range(64))
def test_a_request_with_one_changed_byte_has_no_reply(position: int) -> None:
    tampered = bytearray(REQUEST)
    tampered[position] ^= 1
    assert reply(bytes(tampered), "146.70.1.2", 1, SECRET) is None


@pytest.mark.parametrize("position", range(64))
def test_a_reply_with_one_changed_byte_is_none(position: int) -> None:
    tampered = bytearray(answered("146.70.1.2"))
    tampered[position] ^= 1
    assert echo.read_reply(bytes(tampered), IDENT, NONCE, KEY) is None


@pytest.mark.parametrize("size", [0, 1, 5, 48, 63, 65, 128, 1500])
def test_what_has_another_size_has_no_reply(size: int) -> None:
    assert reply((REQUEST * 24)[:size], "146.70.1.2", 1, SECRET) is None
    assert echo.read_reply((answered("146.70.1.2") * 24)[:size], IDENT, NONCE, KEY) is None


def test_a_key_of_another_agent_or_another_server_signs_nothing() -> None:
    other = echo.ident_for(SECRET, "nl-2")
    assert other != IDENT
    assert echo.key_for(SECRET, other) != KEY
    assert reply(echo.request(other, NONCE, KEY), "146.70.1.2", 1, SECRET) is None
    assert reply(REQUEST, "146.70.1.2", 1, b"t" * 32) is None


def test_an_answer_to_another_question_is_none() -> None:
    answer = answered("146.70.1.2")
    assert echo.read_reply(answer, IDENT, b"87654321", KEY) is None
    assert echo.read_reply(answer, b"\0" * 8, NONCE, KEY) is None


def test_a_question_is_no_answer_and_an_answer_no_question() -> None:
    assert echo.read_reply(REQUEST, IDENT, NONCE, KEY) is None
    assert reply(answered("146.70.1.2"), "146.70.1.2", 1, SECRET) is None


def signed(body: bytes) -> bytes:
    return body + echo.mac(body, KEY)


@pytest.mark.parametrize(
    "head", [b"VSE1\x02\x05", b"VSE1\x02\x00", b"VSE1\x03\x04", b"VSE2\x02\x04"], ids=lambda h: h.hex()
)
def test_a_signed_reply_that_makes_no_sense_is_none(head: bytes) -> None:
    body = answered("146.70.1.2")[6:48]
    assert echo.read_reply(signed(b"VSE1\x02\x04" + body), IDENT, NONCE, KEY) == ip_address("146.70.1.2")
    assert echo.read_reply(signed(head + body), IDENT, NONCE, KEY) is None


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=200), st.binary(min_size=59, max_size=59).map(lambda b: b"VSE1\x01" + b)))
@example(b"VSE1\x01" + b"\0" * 59)
def test_garbage_has_no_reply_and_trips_nobody(datagram: bytes) -> None:
    assert reply(datagram, "146.70.1.2", 1, SECRET) is None
    assert echo.read_reply(datagram, IDENT, NONCE, KEY) is None


@settings(deadline=None)
@given(st.ip_addresses(), st.integers(0, 65535), st.binary(min_size=8, max_size=8), st.text())
def test_every_address_comes_through(address: object, port: int, nonce: bytes, name: str) -> None:
    ident = echo.ident_for(SECRET, name)
    key = echo.key_for(SECRET, ident)
    answer = reply(echo.request(ident, nonce, key), str(address), port, SECRET)
    assert answer is not None
    assert len(answer) == echo.SIZE_BYTES
    seen = echo.read_reply(answer, ident, nonce, key)
    assert seen == (getattr(address, "ipv4_mapped", None) or ip_address(str(address).partition("%")[0]))
