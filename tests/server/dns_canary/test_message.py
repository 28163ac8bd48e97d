"""Reading any bytes and building answers; dnslib, which shares no code with it, reads them back."""

import struct
from ipaddress import ip_address

import pytest
from dnslib import AAAA as DNSLIB_AAAA
from dnslib import EDNS0, QTYPE, RR, TXT, DNSHeader, DNSLabel, DNSQuestion, DNSRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from vpn_sentinel.server.dns_canary import message
from vpn_sentinel.server.dns_canary.message import BadQueryError, DnsResponse, Edns, ResourceRecord, pack, parse, wire
from vpn_sentinel.server.dns_canary.zone import labels_of, texts


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
        return pack(parse(data), DnsResponse(rcode=message.NXDOMAIN), limit=len(data))[0]
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


def record(data: bytes = b"\x02hi", owner: bytes | None = None) -> ResourceRecord:
    return ResourceRecord(owner, message.TXT, 0, data)


def test_an_answer_echoes_the_question_byte_for_byte() -> None:
    asked = query(opt=EDNS0(udp_len=1232, flags="do"))
    more = record(owner=wire((b"other", b"org")))
    packed, truncated = pack(parse(asked), DnsResponse(rcode=0, answers=[record()], authority=[more]), limit=65535)
    assert not truncated
    assert packed[12 : 12 + 23] == asked[12 : 12 + 23]
    read = DNSRecord.parse(packed)
    assert (read.header.aa, read.header.rd, read.header.ra, read.header.tc) == (1, 1, 0, 0)
    assert [str(r.rname) for r in read.rr] == ["Probe.Example.ORG."]
    assert [str(r.rname) for r in read.auth] == ["other.org."]
    assert [(r.rtype, r.rclass, r.edns_do) for r in read.ar] == [(QTYPE.OPT, message.UDP_PAYLOAD_BYTES, 1)]


def test_what_does_not_fit_is_left_out_and_said() -> None:
    asked = query()
    packed, truncated = pack(parse(asked), DnsResponse(rcode=0, answers=[record()]), limit=len(asked))
    assert truncated
    assert len(packed) == len(asked)
    read = DNSRecord.parse(packed)
    assert (read.header.tc, read.header.aa, read.rr, read.auth) == (1, 1, [], [])


def test_only_who_speaks_edns_is_answered_so() -> None:
    assert DNSRecord.parse(pack(parse(query()), DnsResponse(rcode=0), limit=512)[0]).ar == []


def test_a_large_code_is_split_between_header_and_opt() -> None:
    packed, _ = pack(parse(query(opt=EDNS0(version=1))), DnsResponse(rcode=message.BADVERS), limit=512)
    read = DNSRecord.parse(packed)
    assert read.header.rcode == 0
    assert (read.ar[0].edns_rcode, read.ar[0].edns_ver) == (1, 0)


# --- both ways, whatever is asked and answered ------------------------------------------------------------------------

LABELS = st.lists(st.binary(min_size=1, max_size=20).filter(lambda raw: raw.lower() == raw), min_size=1, max_size=6)
# dnslib reads names of ASCII alone, though any byte may be in one (RFC 2181, section 11).
ASCII_LABELS = st.lists(
    st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20), min_size=1, max_size=6
).map(lambda names: [name.lower().encode() for name in names])
KINDS = st.sampled_from([message.A, message.NS, message.SOA, message.TXT, message.AAAA, message.ANY, 65, 257])
OPTS = st.none() | st.builds(Edns, st.integers(0, 255), st.integers(0, 65_535), st.booleans())


def asked_by_dnslib(labels: list[bytes], kind: int, edns: Edns | None, ident: int, *, recurse: bool) -> bytes:
    header = DNSHeader(id=ident, rd=int(recurse), bitmap=0x0100 if recurse else 0)
    made = DNSRecord(header, q=DNSQuestion(DNSLabel(tuple(labels)), kind))
    if edns is not None:
        made.add_ar(EDNS0(udp_len=edns.payload, version=edns.version, flags="do" if edns.dnssec_ok else ""))
    return bytes(made.pack())


@settings(deadline=None)
@given(labels=LABELS, kind=KINDS, edns=OPTS, ident=st.integers(0, 65_535), recurse=st.booleans())
def test_what_dnslib_asks_is_read_as_it_was_meant(
    labels: list[bytes], kind: int, edns: Edns | None, ident: int, recurse: bool
) -> None:
    read = parse(asked_by_dnslib(labels, kind, edns, ident, recurse=recurse))
    assert (read.ident, read.recurse, read.labels) == (ident, recurse, tuple(labels))
    assert (read.kind, read.klass, read.edns) == (kind, message.IN, edns)


@st.composite
def records(draw: st.DrawFn) -> tuple[ResourceRecord, str]:
    """A record of ours, and its data as dnslib writes it."""
    owner = draw(st.none() | ASCII_LABELS.map(wire))
    kind = draw(st.sampled_from([message.A, message.AAAA, message.NS, message.TXT, message.SOA]))
    ttl = draw(st.integers(0, 2**31 - 1))
    if kind in (message.A, message.AAAA):
        size = 4 if kind == message.A else 16
        address = ip_address(draw(st.binary(min_size=size, max_size=size)))
        shown = str(address) if kind == message.A else str(DNSLIB_AAAA(str(address)))
        return ResourceRecord(owner, kind, ttl, address.packed), shown
    name = draw(HOSTS)
    if kind == message.NS:
        return ResourceRecord(owner, kind, ttl, wire(labels_of(name))), f"{name}."
    if kind == message.TXT:
        strings = draw(st.lists(st.text("abc 123=", max_size=255), min_size=1, max_size=3))
        return ResourceRecord(owner, kind, ttl, texts(strings)), ",".join(f'"{each}"' for each in strings)
    numbers = draw(st.lists(st.integers(0, 2**32 - 1), min_size=5, max_size=5))
    data = wire(labels_of(name)) * 2 + b"".join(n.to_bytes(4) for n in numbers)
    return ResourceRecord(owner, kind, ttl, data), f"{name}. {name}. {' '.join(map(str, numbers))}"


HOSTS = st.lists(st.text("abcxyz019", min_size=1, max_size=12), min_size=1, max_size=4).map(".".join)
SECTION = st.lists(records(), max_size=4)


def seen(found: list[RR]) -> list[tuple[bytes, int, int, str]]:
    return [(wire(tuple(r.rname.label)), r.rtype, r.ttl, str(r.rdata)) for r in found if r.rtype != QTYPE.OPT]


@settings(deadline=None)
@given(
    labels=ASCII_LABELS,
    edns=st.none() | st.builds(Edns, st.just(0), st.integers(512, 4096), st.booleans()),
    answers=SECTION,
    authority=SECTION,
    additional=SECTION,
    rcode=st.sampled_from([0, 3, 5]),
    authoritative=st.booleans(),
)
def test_what_is_answered_dnslib_reads_as_it_was_meant(
    labels: list[bytes],
    edns: Edns | None,
    answers: list[tuple[ResourceRecord, str]],
    authority: list[tuple[ResourceRecord, str]],
    additional: list[tuple[ResourceRecord, str]],
    rcode: int,
    authoritative: bool,
) -> None:
    query = parse(asked_by_dnslib(labels, message.TXT, edns, 4711, recurse=True))
    sections = [[record for record, _ in part] for part in (answers, authority, additional)]
    reply = DnsResponse(
        rcode=rcode, authoritative=authoritative, answers=sections[0], authority=sections[1], additional=sections[2]
    )
    packed, truncated = pack(query, reply, limit=65_535)
    assert not truncated
    read = DNSRecord.parse(packed)
    assert (read.header.id, read.header.rcode, read.header.aa, read.header.rd) == (4711, rcode, authoritative, 1)
    assert wire(tuple(read.q.qname.label)) == wire(tuple(labels))
    for found, meant in ((read.rr, answers), (read.auth, authority), (read.ar, additional)):
        assert seen(found) == [
            (wire(tuple(labels)) if r.owner is None else r.owner, r.kind, r.ttl, shown) for r, shown in meant
        ]
    opts = [(r.edns_ver, r.rclass, r.edns_do) for r in read.ar if r.rtype == QTYPE.OPT]
    assert opts == ([] if edns is None else [(0, message.UDP_PAYLOAD_BYTES, int(edns.dnssec_ok))])
