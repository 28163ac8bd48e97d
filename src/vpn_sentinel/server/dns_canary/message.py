"""DNS messages (RFC 1035, RFC 6891), as far as one small zone needs them.

A query is parsed strictly: one question, no compression in it, and no bytes after what the header counts. A response is
four sections of plain records; only the question's name is compressed.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, NoReturn

A, NS, SOA, TXT, AAAA, OPT, IXFR, AXFR, ANY = 1, 2, 6, 16, 28, 41, 251, 252, 255
IN: Final = 1
NOERROR, FORMERR, NXDOMAIN, NOTIMP, REFUSED, BADVERS = 0, 1, 3, 4, 5, 16
HEADER: Final = struct.Struct("!6H")
UDP_PAYLOAD_BYTES: Final = 1232  # passes everywhere without fragmentation (DNS flag day 2020)

_RESPONSE, _AUTHORITATIVE, _TRUNCATED, _RECURSE, _OPCODE = 0x8000, 0x0400, 0x0200, 0x0100, 0x7800
_DNSSEC_OK: Final = 0x8000
_RECORD_HEADER: Final = struct.Struct("!HHIH")  # type, class, TTL and length of a record
_TYPE_AND_CLASS: Final = struct.Struct("!HH")
_QUESTION_NAME: Final = b"\xc0\x0c"  # a pointer to the name after the header
_MAX_LABELS: Final = 127
_MAX_ADDITIONAL: Final = 4  # an OPT, a TSIG, and some to spare


class BadQueryError(ValueError):
    """A message that is not a valid query. `reply` is a bare header with the error code; None: send no reply."""

    def __init__(self, problem: str, reply: bytes | None = None) -> None:
        super().__init__(problem)
        self.reply = reply


@dataclass(frozen=True, slots=True)
class Edns:
    """The client's OPT record: its version, the largest datagram in bytes that it accepts, and its DO bit."""

    version: int
    payload: int
    dnssec_ok: bool


@dataclass(frozen=True, slots=True)
class DnsQuery:
    """`question` is the section's bytes as received; `labels` the name in lower case, without the root."""

    ident: int
    recurse: bool
    question: bytes
    labels: tuple[bytes, ...]
    kind: int
    klass: int
    edns: Edns | None


@dataclass(frozen=True, slots=True)
class ResourceRecord:
    """`owner` in wire form; None stands for the question's name. `ttl` is seconds."""

    owner: bytes | None
    kind: int
    ttl: int
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DnsResponse:
    rcode: int
    authoritative: bool = True
    answers: Sequence[ResourceRecord] = ()
    authority: Sequence[ResourceRecord] = ()
    additional: Sequence[ResourceRecord] = ()


class Packed(NamedTuple):
    """A response; `truncated` says that it holds no records, since they did not fit."""

    data: bytes
    truncated: bool


def parse(data: bytes) -> DnsQuery:
    """Read one query. Raises BadQueryError and nothing else, whatever the bytes."""
    if len(data) < HEADER.size:
        raise BadQueryError("shorter than a header")
    ident, flags, questions, answers, authority, additional = HEADER.unpack_from(data)
    if flags & _RESPONSE:
        raise BadQueryError("a response")  # answering one could make two servers talk for ever
    if flags & _OPCODE:
        raise BadQueryError("not a query", _bare(ident, flags, NOTIMP))
    try:
        if questions != 1 or answers or authority or additional > _MAX_ADDITIONAL:
            _refuse("not one question alone")
        question, labels, kind, klass = _question(data)
        edns = _edns(data, HEADER.size + len(question), additional)
    except BadQueryError as e:
        raise BadQueryError(str(e), _bare(ident, flags, FORMERR)) from None
    return DnsQuery(ident, bool(flags & _RECURSE), question, labels, kind, klass, edns)


def pack(query: DnsQuery, reply: DnsResponse, *, limit: int) -> Packed:
    """Build the response, at most `limit` bytes. If it does not fit, the response has no records and the TC bit, so
    that the client asks again over TCP.
    """
    records = b"".join(_record(r) for part in (reply.answers, reply.authority, reply.additional) for r in part)
    counts = len(reply.answers), len(reply.authority), len(reply.additional)
    opt = _opt(query.edns, reply.rcode)
    size = HEADER.size + len(query.question) + len(opt)
    truncated = size + len(records) > limit
    if truncated:
        records, counts = b"", (0, 0, 0)
    flags = _RESPONSE | (reply.rcode & 0xF) | (_RECURSE if query.recurse else 0)
    flags |= (_AUTHORITATIVE if reply.authoritative else 0) | (_TRUNCATED if truncated else 0)
    head = HEADER.pack(query.ident, flags, 1, counts[0], counts[1], counts[2] + bool(opt))
    return Packed(head + query.question + records + opt, truncated)


def wire(labels: Sequence[bytes]) -> bytes:
    """A name in wire form."""
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def _bare(ident: int, flags: int, rcode: int) -> bytes:
    return HEADER.pack(ident, _RESPONSE | flags & (_OPCODE | _RECURSE) | rcode, 0, 0, 0, 0)


def _refuse(problem: str) -> NoReturn:
    raise BadQueryError(problem)


def _question(data: bytes) -> tuple[bytes, tuple[bytes, ...], int, int]:
    """The question's bytes, its name, type and class."""
    labels, end = _name(data, HEADER.size)
    if end + _TYPE_AND_CLASS.size > len(data):
        _refuse("the question is cut off")
    kind, klass = _TYPE_AND_CLASS.unpack_from(data, end)
    return data[HEADER.size : end + _TYPE_AND_CLASS.size], labels, kind, klass


def _edns(data: bytes, offset: int, count: int) -> Edns | None:
    """The OPT record among the additional ones, which are the rest of the message."""
    edns = None
    for _ in range(count):
        found, offset = _additional(data, offset)
        if found is not None and edns is not None:
            _refuse("two OPT records")
        edns = found or edns
    if offset != len(data):
        _refuse("more than the header counts")
    return edns


def _name(data: bytes, offset: int) -> tuple[tuple[bytes, ...], int]:
    """A name and the offset after it; anything but plain labels, such as a pointer, is refused."""
    labels: list[bytes] = []
    start = offset
    while True:
        if offset >= len(data):
            _refuse("a name that does not end")
        length = data[offset]
        offset += 1
        if length == 0:
            break
        if length > 63 or len(labels) == _MAX_LABELS:
            _refuse("not a plain name")
        labels.append(data[offset : offset + length].lower())
        offset += length
    if offset - start > 255:
        _refuse("the name is too long")
    return tuple(labels), offset


def _additional(data: bytes, offset: int) -> tuple[Edns | None, int]:
    """One additional record: its content when it is an OPT, and the offset after it."""
    labels, offset = _name(data, offset)
    if offset + _RECORD_HEADER.size > len(data):
        _refuse("a record is cut off")
    kind, payload, flags, length = _RECORD_HEADER.unpack_from(data, offset)
    offset += _RECORD_HEADER.size + length
    if offset > len(data):
        _refuse("a record is cut off")
    if kind != OPT:
        return None, offset
    if labels:
        _refuse("an OPT record with a name")
    return Edns(version=flags >> 16 & 0xFF, payload=payload, dnssec_ok=bool(flags & _DNSSEC_OK)), offset


def _opt(asked: Edns | None, rcode: int) -> bytes:
    """Only a query with an OPT gets one (RFC 6891, section 7); ours has no options, so it is never larger."""
    if asked is None:
        return b""
    flags = (rcode >> 4) << 24 | (_DNSSEC_OK if asked.dnssec_ok else 0)
    return b"\0" + _RECORD_HEADER.pack(OPT, UDP_PAYLOAD_BYTES, flags, 0)


def _record(record: ResourceRecord) -> bytes:
    owner = _QUESTION_NAME if record.owner is None else record.owner
    return owner + _RECORD_HEADER.pack(record.kind, IN, record.ttl, len(record.data)) + record.data
