"""What a client sends reaches the server behind as the same requests, however it was cut and framed."""

import random
from collections.abc import Callable
from itertools import islice
from typing import Any

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.fuzz.mutate import mutated
from vpn_sentinel.server.request_stream import BadRequest, RequestHead, RequestStream, plain_request


class Requests:
    """All that came, as bytes that a server would read."""

    def __init__(self) -> None:
        self.heads: list[RequestHead] = []
        self.sent = b""
        self.complete = 0

    def request_began(self) -> None: ...

    def head_complete(self, head: RequestHead) -> None:
        self.heads.append(head)
        self.sent += head.text

    def body_part(self, part: bytes) -> None:
        self.sent += part

    def request_complete(self, end: bytes) -> None:
        self.sent += end
        self.complete += 1


class Read:
    """What llhttp makes of bytes: method, target, headers and body of each request."""

    def __init__(self, data: bytes) -> None:
        self.requests: list[list[Any]] = []
        self._url, self._headers, self._headed = b"", list[tuple[bytes, bytes]](), False
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url, self._headers, self._headed = b"", [], False

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._headed:
            self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._headed = True
        self.requests.append([self._parser.get_method(), self._url, self._headers, b""])

    def on_body(self, body: bytes) -> None:
        self.requests[-1][3] += body


TOKENS = st.text("abcxyzABC-_09", min_size=1, max_size=12).map(lambda name: b"x-" + name.encode())
VALUES = st.binary(max_size=30).map(lambda value: bytes(b for b in value if b == 9 or 32 <= b != 127).strip(b"\t "))
BODIES = st.binary(max_size=300)


@st.composite
def requests(draw: Callable[[Any], Any]) -> bytes:
    """One request, whole or in chunks with extensions and trailers."""
    body, chunked = draw(BODIES), draw(st.booleans())
    headers = [*draw(st.lists(st.tuples(TOKENS, VALUES), max_size=5)), (b"Host", b"a")]
    if not chunked:
        headers.append((b"Content-Length", b"%d" % len(body)))
    else:
        headers.append((b"Transfer-Encoding", draw(st.sampled_from([b"chunked", b"Chunked", b"gzip, chunked"]))))
        cuts = sorted(draw(st.lists(st.integers(0, len(body)), max_size=4)))
        pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True) if a < b]
        body = b"".join(b"%X;name=x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\nX-Late: 1\r\n\r\n"
    start: bytes = b"POST /%b HTTP/1.1\r\n" % draw(st.sampled_from([b"", b"a?b=%20c", b"%2F"]))
    head = b"".join(b"%b:%b%b\r\n" % (name, draw(st.sampled_from([b"", b" "])), value) for name, value in headers)
    return b"%b%b\r\n%b" % (start, head, body)


@settings(deadline=None)
@given(sent=st.lists(requests(), min_size=1, max_size=3), size=st.integers(1, 400))
def test_the_same_requests_come_out(sent: list[bytes], size: int) -> None:
    data, came = b"".join(sent), Requests()
    stream = RequestStream(came, head_bytes=65536, parts=1000, websockets=True)
    for at in range(0, len(data), size):
        stream.feed(data[at : at + size])
    assert came.complete == len(sent)
    assert Read(came.sent).requests == Read(data).requests
    assert b"x-late" not in came.sent.lower()


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_whatever_comes_out_is_a_request(tail: bytes) -> None:
    came = Requests()
    stream = RequestStream(came, head_bytes=65536, parts=1000, websockets=False)
    try:
        stream.feed(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + tail + b"\r\n\r\n")
    except BadRequest:
        return
    assert len(Read(came.sent).requests) == len(came.heads)


ODD = {
    "no HTTP": b"\x16\x03\x01 nonsense\r\n\r\n",
    "a folded header": b"GET / HTTP/1.1\r\nX: a\r\n b\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "a length and chunks": b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "an encoding that is none": b"POST / HTTP/1.1\r\nTransfer-Encoding: identity\r\n\r\nabc",
    "a tunnel": b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n",
}


@pytest.mark.parametrize("sent", ODD.values(), ids=ODD.keys())
def test_what_is_no_request_is_refused(sent: bytes) -> None:
    stream = RequestStream(Requests(), head_bytes=65536, parts=1000, websockets=True)
    with pytest.raises(BadRequest, match=r"^This is not an HTTP request\.$"):
        stream.feed(sent)


PLAIN = (
    b"POST /api/v1/keepalive HTTP/1.1\r\nHost: a\r\nX-API-Key: k\r\nContent-Length: 5\r\n\r\nhello",
    b"GET /api/v1/tunnels?x=1 HTTP/1.1\r\nhost: a:5000\r\nAccept: */*\r\n\r\n",
    b"GET / HTTP/1.1\r\nConnection: keep-alive\r\nContent-Length:\t0 \r\n\r\n",
)
NOT_PLAIN = {
    "chunks": b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx",
    "a length and a list": b"POST / HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\nx",
    "a space before the colon": b"POST / HTTP/1.1\r\nContent-Length : 1\r\n\r\nx",
    "a sign": b"POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\nx",
    "a folded line": b"POST / HTTP/1.1\r\nContent-Length:\r\n 1\r\n\r\nx",
    "a bare line feed": b"POST / HTTP/1.1\r\nA: b\nContent-Length: 1\r\n\r\nx",
    "a bare carriage return": b"POST / HTTP/1.1\r\nA: b\rContent-Length: 1\r\n\r\nx",
    "more than the length": b"POST / HTTP/1.1\r\nContent-Length: 1\r\n\r\nxGET / HTTP/1.1\r\n\r\n",
    "less": b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nx",
    "two requests": b"GET / HTTP/1.1\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    "a body without a length": b"GET / HTTP/1.1\r\nHost: a\r\n\r\nx",
    "an older version": b"GET / HTTP/1.0\r\nHost: a\r\n\r\n",
    "another protocol": b"GET / HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "a promise": b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\nx",
    "a method of rules of its own": b"CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n",
    "a line before it": b"\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "many lines": b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 65 + b"\r\n",
    "a long head": b"GET / HTTP/1.1\r\na: " + b"x" * 4096 + b"\r\n\r\n",
}


@pytest.mark.parametrize("data", PLAIN)
def test_a_plain_request_needs_no_parser(data: bytes) -> None:
    assert (head := plain_request(data)) is not None
    assert head.text == data
    assert len(Read(data).requests) == 1


@pytest.mark.parametrize("data", NOT_PLAIN.values(), ids=NOT_PLAIN.keys())
def test_what_is_not_plain_beyond_doubt_is_parsed(data: bytes) -> None:
    assert plain_request(data) is None


def test_what_is_called_plain_is_one_whole_request_to_the_parser() -> None:
    """If these two ever differed, a client could hide a second request behind the first, uncounted."""
    seeds, plain = (*PLAIN, *NOT_PLAIN.values()), 0
    for data in islice(mutated(seeds, random.Random("plain"), 4096), 60_000):
        if plain_request(data) is None:
            continue
        plain += 1
        came = Requests()
        RequestStream(came, head_bytes=65536, parts=4, websockets=True).feed(data)
        assert (came.complete, len(came.heads)) == (1, 1), data
        assert came.heads[0].is_websocket is False, data
        method, url, headers, body = Read(data).requests[0]
        assert data.startswith(method + b" " + url)
        assert data.endswith(b"\r\n\r\n" + body)
        assert len(Read(data).requests) == 1, headers
    assert plain > 1000
