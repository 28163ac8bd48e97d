import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpn_sentinel.agent.probes import dnswire
from vpn_sentinel.agent.probes.dnswire import BadMessageError, parse, query

ASKED = query(0x1234, "whoami.cloudflare", dnswire.TXT, dnswire.CHAOS)
NAME = struct.pack("!H", 0xC00C)


def answer(asked: bytes, *records: bytes, flags: int = 0x8180, count: int | None = None) -> bytes:
    head = asked[:2] + struct.pack("!5H", flags, 1, len(records) if count is None else count, 0, 0)
    return head + asked[12:] + b"".join(records)


def record(kind: int, data: bytes, klass: int = 1, name: bytes = NAME) -> bytes:
    return name + struct.pack("!HHIH", kind, klass, 60, len(data)) + data


def text(*strings: bytes) -> bytes:
    return record(dnswire.TXT, b"".join(bytes([len(s)]) + s for s in strings))


def test_a_query_is_packed_as_rfc_1035_says() -> None:
    assert query(0x1234, "a.bc.", dnswire.A) == bytes.fromhex(
        "1234 0100 0001 0000 0000 0000 01 61 02 6263 00 0001 0001"
    )


@pytest.mark.parametrize("name", ["", "a..b", "x" * 64 + ".com", ".".join(["abcdefgh"] * 30), "é.com"])
def test_what_is_no_domain_name_is_not_asked(name: str) -> None:
    with pytest.raises(ValueError, match=r"domain name|ascii"):
        query(1, name, dnswire.A)


def test_texts_and_addresses_are_read() -> None:
    reply = parse(
        answer(
            ASKED, text(b"ns", b"192.0.2.1"), record(dnswire.A, b"\x01\x02\x03\x04"), record(dnswire.AAAA, bytes(16))
        ),
        ASKED,
    )
    assert reply.texts == (("ns", "192.0.2.1"),)
    assert [str(a) for a in reply.addresses] == ["1.2.3.4", "::"]
    assert (reply.ident, reply.rcode) == (0x1234, dnswire.NOERROR)


def test_a_refusal_is_an_answer() -> None:
    assert parse(answer(ASKED, flags=0x8185), ASKED).rcode == dnswire.REFUSED


def test_a_refusal_may_come_without_its_question() -> None:
    assert parse(ASKED[:2] + struct.pack("!5H", 0x8185, 0, 0, 0, 0), ASKED).rcode == dnswire.REFUSED


def test_letters_may_change_their_case_on_the_way() -> None:
    assert parse(answer(ASKED).replace(b"whoami", b"WhoAmI"), ASKED).rcode == 0


def test_what_is_cut_off_by_truncation_is_left_out() -> None:
    whole = text(b"first")
    assert parse(answer(ASKED, whole, whole[:5], flags=0x8380), ASKED).texts == (("first",),)


def test_records_of_other_kinds_are_skipped() -> None:
    reply = parse(answer(ASKED, record(5, b"\x01x\x00"), record(dnswire.A, b"\x00" * 3), text(b"x")), ASKED)
    assert (reply.addresses, reply.texts) == ((), (("x",),))


BAD = {
    "too short": b"\x12\x34",
    "another id": b"\x99\x99" + answer(ASKED)[2:],
    "a query": ASKED,
    "another question": answer(query(0x1234, "other.name", dnswire.TXT, dnswire.CHAOS)),
    "no question": ASKED[:2] + struct.pack("!5H", 0x8180, 0, 0, 0, 0),
    "two questions": ASKED[:2] + struct.pack("!5H", 0x8180, 2, 0, 0, 0) + ASKED[12:] * 2,
    "a record that is not there": answer(ASKED, count=1),
    "a record cut off in its head": answer(ASKED, text(b"abc")[:6]),
    "a record cut off in its data": answer(ASKED, text(b"abc")[:-1]),
    "a text longer than its record": answer(ASKED, record(dnswire.TXT, b"\x09abc")),
    "a name that never ends": answer(ASKED, record(dnswire.TXT, b"", name=b"\x01a" * 200)),
    "a label of a kind that is not": answer(ASKED, record(dnswire.TXT, b"", name=b"\x80")),
}


@pytest.mark.parametrize("message", BAD.values(), ids=BAD.keys())
def test_broken_messages_are_refused(message: bytes) -> None:
    with pytest.raises(BadMessageError):
        parse(message, ASKED)


def test_a_pointer_to_itself_does_not_loop() -> None:
    here = len(answer(ASKED))
    assert parse(answer(ASKED, record(dnswire.TXT, b"\x01x", name=struct.pack("!H", 0xC000 | here))), ASKED).texts == (
        ("x",),
    )


@given(st.binary(max_size=300))
def test_no_bytes_do_more_than_be_refused(data: bytes) -> None:
    for message in (data, answer(ASKED, data, count=3), ASKED[:2] + b"\x81\x80" + data):
        try:
            parse(message, ASKED)
        except BadMessageError:
            continue


@given(
    st.lists(
        st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=30).map(str.encode),
        min_size=1,
        max_size=5,
    )
)
def test_texts_survive_the_way(strings: list[bytes]) -> None:
    assert parse(answer(ASKED, text(*strings)), ASKED).texts == (tuple(s.decode() for s in strings),)
