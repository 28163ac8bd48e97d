"""Reading any bytes and building answers; dnslib, which shares no code with it, reads them back."""

import struct

import pytest
from dnslib import EDNS0, QTYPE, RR, TXT, DNSHeader, DNSQuestion, DNSRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from vpn_sentinel.server.canary import message
from vpn_sentinel.server.canary.message import BadQueryError, Edns, Record, Reply, pack, parse, wire


def query(name: str = "Probe.Example.ORG", kind: str = "TXT", *, opt: EDNS0 | None = None, **header: int) -> bytes:
    made = DNSRecord(DNSHeader(id=4711, rd=1, **header), q=DNSQuestion(name, getattr(QTYPE, kind)))
    if opt is not None:
        made.add_ar(opt)
    return bytes(made.pack())


def test_a_question_is_read() -> None:
    read = parse(query())
    assert (read.ident, read.recurse, read.kind, read.klass, read.edns) == (4711, True, message.TXT, message.IN, None)
    assert read.labels == (b"probe", b"example", b"org")
    assert b"Probe" in read.question


def test_edns_is_read() -> None:
    assert parse(query(opt=EDNS0(udp_len=4096, flags="do", version=0))).edns == Edns(0, 4096, dnssec_ok=True)
    assert parse(query(opt=EDNS0(udp_len=512, version=1))).edns == Edns(1, 512, dnssec_ok=False)


def test_records_besides_edns_are_passed_over() -> None:
    made = DNSRecord.parse(query(opt=EDNS0(udp_len=1232)))
    made.add_ar(RR("key.example", QTYPE.TXT, rdata=TXT("x")))
    assert parse(bytes(made.pack())).edns == Edns(0, 1232, dnssec_ok=False)


def bare(data: bytes) -> DNSRecord:
    with pytest.raises(BadQueryError) as e:
        parse(data)
    assert e.value.reply is not None
    assert len(e.value.reply) == 12
    read = DNSRecord.parse(e.value.reply)
    assert (read.header.id, read.header.qr) == (4711, 1)
    return read


_NAME = b"\x03abc\x00\x00\x10\x00\x01"
_HEAD = struct.pack("!6H", 4711, 0x0100, 1, 0, 0, 0)
_WITH_ONE_MORE = struct.pack("!6H", 4711, 0x0100, 1, 0, 0, 1)
_WITH_TWO_MORE = struct.pack("!6H", 4711, 0x0100, 1, 0, 0, 2)
_EMPTY_OPT = b"\x00" + struct.pack("!HHIH", 41, 1232, 0, 0)

MALFORMED = {
    "no question": struct.pack("!6H", 4711, 0, 0, 0, 0, 0),
    "two questions": struct.pack("!6H", 4711, 0, 2, 0, 0, 0) + _NAME + _NAME,
    "an answer in a question": struct.pack("!6H", 4711, 0, 1, 1, 0, 0) + _NAME,
    "a name that does not end": _HEAD + b"\x03ab",
    "a name without type": _HEAD + b"\x03abc\x00\x00",
    "a pointer into itself": _HEAD + b"\xc0\x0c\x00\x10\x00\x01",
    "a label of an unknown kind": _HEAD + b"\x40abc\x00\x00\x10\x00\x01",
    "too long a name": _HEAD + (b"\x3f" + b"a" * 63) * 4 + b"\x00\x00\x10\x00\x01",
    "too many labels": _HEAD + b"\x01a" * 128 + b"\x00\x00\x10\x00\x01",
    "garbage behind": _HEAD + _NAME + b"x",
    "an OPT cut off": _WITH_ONE_MORE + _NAME + _EMPTY_OPT[:-1],
    "an OPT shorter than it says": _WITH_ONE_MORE + _NAME + b"\x00" + struct.pack("!HHIH", 41, 1232, 0, 9),
    "an OPT with a name": _WITH_ONE_MORE + _NAME + b"\x01a" + _EMPTY_OPT,
    "two OPTs": _WITH_TWO_MORE + _NAME + _EMPTY_OPT * 2,
    "thousands of records": struct.pack("!6H", 4711, 0, 1, 0, 0, 65535) + _NAME + _EMPTY_OPT,
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_no_question_is_told_so_in_a_bare_header(data: bytes) -> None:
    assert bare(data).header.rcode == message.FORMERR


def test_other_operations_are_not_known_here() -> None:
    assert bare(query(opcode=4)).header.rcode == message.NOTIMP


@pytest.mark.parametrize("data", [b"", b"x" * 11, query(qr=1)])
def test_what_deserves_no_answer_gets_none(data: bytes) -> None:
    with pytest.raises(BadQueryError) as e:
        parse(data)
    assert e.value.reply is None


def reply_to(data: bytes) -> bytes:
    """The shortest there is; empty for silence."""
    try:
        return pack(parse(data), Reply(rcode=message.NXDOMAIN), limit=len(data))[0]
    except BadQueryError as e:
        return e.reply or b""


@settings(max_examples=500)
@given(st.binary(max_size=600))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    assert len(reply_to(data)) <= len(data)


@settings(max_examples=500)
@given(st.integers(0, 200), st.binary(min_size=1, max_size=8))
def test_so_are_questions_with_damage(at: int, damage: bytes) -> None:
    data = bytearray(query(opt=EDNS0(udp_len=1232)))
    data[at : at + len(damage)] = damage
    assert len(reply_to(bytes(data))) <= len(data)


def record(data: bytes = b"\x02hi", owner: bytes | None = None) -> Record:
    return Record(owner, message.TXT, 0, data)


def test_an_answer_echoes_the_question_byte_for_byte() -> None:
    asked = query(opt=EDNS0(udp_len=1232, flags="do"))
    more = record(owner=wire((b"other", b"org")))
    packed, truncated = pack(parse(asked), Reply(rcode=0, answers=[record()], authority=[more]), limit=65535)
    assert not truncated
    assert packed[12 : 12 + 23] == asked[12 : 12 + 23]
    read = DNSRecord.parse(packed)
    assert (read.header.aa, read.header.rd, read.header.ra, read.header.tc) == (1, 1, 0, 0)
    assert [str(r.rname) for r in read.rr] == ["Probe.Example.ORG."]
    assert [str(r.rname) for r in read.auth] == ["other.org."]
    assert [(r.rtype, r.rclass, r.edns_do) for r in read.ar] == [(QTYPE.OPT, message.PAYLOAD, 1)]


def test_what_does_not_fit_is_left_out_and_said() -> None:
    asked = query()
    packed, truncated = pack(parse(asked), Reply(rcode=0, answers=[record()]), limit=len(asked))
    assert truncated
    assert len(packed) == len(asked)
    read = DNSRecord.parse(packed)
    assert (read.header.tc, read.header.aa, read.rr, read.auth) == (1, 1, [], [])


def test_only_who_speaks_edns_is_answered_so() -> None:
    assert DNSRecord.parse(pack(parse(query()), Reply(rcode=0), limit=512)[0]).ar == []


def test_a_large_code_is_split_between_header_and_opt() -> None:
    packed, _ = pack(parse(query(opt=EDNS0(version=1))), Reply(rcode=message.BADVERS), limit=512)
    read = DNSRecord.parse(packed)
    assert read.header.rcode == 0
    assert (read.ar[0].edns_rcode, read.ar[0].edns_ver) == (1, 0)
