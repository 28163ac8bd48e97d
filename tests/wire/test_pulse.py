"""Pulses on the wire: what goes in comes out, every size is held, and nothing forged is read."""

from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpn_sentinel.wire import echo, pulse

SECRET = b"s" * 32
IDENT = echo.ident_for(SECRET, "nl-1")
KEY = echo.key_for(SECRET, IDENT)
U32 = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(U32, U32, U32, U32, st.one_of(st.none(), st.integers(echo.SIZE_BYTES, pulse.MAX_SIZE_BYTES)))
def test_what_is_said_is_read(run: int, number: int, heard: int, silent: int, size: int | None) -> None:
    asked = pulse.request(IDENT, KEY, run=run, number=number, heard=heard, silent=silent, size=size)
    assert len(asked) == (size or 64)
    assert pulse.is_request(asked)
    assert echo.is_genuine(asked, KEY)
    assert pulse.ident_of(asked) == IDENT
    assert pulse.read(asked) == pulse.Pulse(IDENT, run, number, heard, silent, numbered=True, sized=size is not None)
    for address in ("185.65.134.10", "2a03:1b20:3::a"):
        answer = pulse.reply(asked, ip_address(address).packed, 40000, KEY)
        assert len(answer) == len(asked)
        assert pulse.read_reply(answer, IDENT, run, KEY) == (number, ip_address(address))


def test_the_layout_is_the_echos_with_more_in_it() -> None:
    asked = pulse.request(IDENT, KEY, run=7, number=1, heard=2, silent=3)
    assert asked[:8] == b"VSE1\x01\0\0\0"
    assert asked[8:16] == IDENT
    assert asked[16:36] == bytes.fromhex("00000007 00000001 01000000 00000002 00000003")
    assert asked[36:48] == bytes(12)
    address = ip_address("185.65.134.10")
    answer = pulse.reply(asked, address.packed, 1, KEY)
    assert echo.read_reply(answer, IDENT, asked[16:24], KEY) == address  # who knows no pulses reads it too


def test_a_plain_question_has_no_number() -> None:
    question = echo.request(IDENT, b"12345678", KEY)
    assert pulse.is_request(question)
    assert not pulse.read(question).numbered


@pytest.mark.parametrize("size", [0, 5, 63, 65, 1471, 1473, 2000])
def test_other_sizes_are_no_requests(size: int) -> None:
    assert not pulse.is_request((pulse.request(IDENT, KEY, run=1, number=1) * 40)[:size])
    sized = pulse.request(IDENT, KEY, run=1, number=1, size=1472)
    assert pulse.is_request((sized * 2)[:size]) is (64 <= size <= 1472)
    assert not echo.is_genuine((sized * 2)[:size], KEY)


def test_answers_to_others_are_none() -> None:
    asked = pulse.request(IDENT, KEY, run=7, number=1)
    answer = pulse.reply(asked, b"\1\2\3\4", 1, KEY)
    assert pulse.read_reply(answer, IDENT, 8, KEY) is None
    assert pulse.read_reply(answer, b"\0" * 8, 7, KEY) is None
    assert pulse.read_reply(answer, IDENT, 7, b"k" * 32) is None
    assert pulse.read_reply(asked, IDENT, 7, KEY) is None
    assert pulse.read_reply(answer[:-1], IDENT, 7, KEY) is None
    assert pulse.read_reply(b"", IDENT, 7, KEY) is None


@settings(deadline=None)
@given(st.binary(max_size=1600))
def test_garbage_is_nothing(data: bytes) -> None:
    assert pulse.read_reply(data, IDENT, 7, KEY) is None
    if pulse.is_request(data):
        assert not echo.is_genuine(data, KEY)
