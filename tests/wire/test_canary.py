"""The canary's names and answers: made by one side, read by the other, and by nobody else."""

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpn_sentinel.wire import canary
from vpn_sentinel.wire.echo import ident_for, key_for

SECRET = bytes(range(32))
IDENT = ident_for(SECRET, "home")
KEY = key_for(SECRET, IDENT)
NONCE = b"12345678"
SEEN = ip_address("198.51.100.7")


def test_a_label_is_read_back() -> None:
    label = canary.label(IDENT, NONCE, KEY)
    assert len(label) == canary.LABEL_LENGTH <= 63
    assert label == label.lower()
    assert canary.read_label(label.encode(), SECRET) == (NONCE, KEY)


def test_another_installation_reads_nothing() -> None:
    assert canary.read_label(canary.label(IDENT, NONCE, KEY).encode(), bytes(32)) is None


@given(st.binary(max_size=80))
def test_what_no_agent_made_is_not_genuine(text: bytes) -> None:
    assert canary.read_label(text, SECRET) is None


@pytest.mark.parametrize("text", [b"0" * 48, b"g" * 48, b" " * 48, b"00 " * 16, "é".encode() * 24])
def test_near_misses_are_not_genuine(text: bytes) -> None:
    assert len(text) == 48
    assert canary.read_label(text, SECRET) is None


@pytest.mark.parametrize("address", ["198.51.100.7", "2001:db8::7"])
def test_an_answer_is_read_back(address: str) -> None:
    strings = canary.answer(ip_address(address), NONCE, KEY)
    assert strings[0] == address
    assert canary.read_answer(strings, NONCE, KEY) == ip_address(address)


def test_an_answer_holds_for_one_question_one_agent_and_one_address() -> None:
    strings = canary.answer(SEEN, NONCE, KEY)
    assert canary.read_answer(strings, b"87654321", KEY) is None
    assert canary.read_answer(strings, NONCE, bytes(32)) is None
    assert canary.read_answer(("198.51.100.8", strings[1]), NONCE, KEY) is None


@given(st.lists(st.text(max_size=40), max_size=4))
def test_what_others_say_is_no_answer(strings: list[str]) -> None:
    assert canary.read_answer(tuple(strings), NONCE, KEY) is None
