"""A client's requests on one connection: counted while they are parsed, and written anew for the server behind."""

import re
from typing import Final, NamedTuple, Protocol

import httptools

# Bytes that CPython keeps of a header beside those that came: two objects, a pair of them, and its place in a list.
# Thousands of tiny ones are dearer than a long one.
_BYTES_PER_HEADER: Final = 144
_OF_AN_OFFER: Final = (b"upgrade", b"http2-settings")


# A head that is plain: a method without rules of its own, a path, and headers by the letter of RFC 9112.
_PLAIN_HEAD: Final = re.compile(
    rb"(?:POST|GET) /[!-~]* HTTP/1\.1(?:\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]+:[!-~\x80-\xff \t]*){0,64}"
)
# In a plain head, wherever it stands, any of these has the parser look: another framing, a promise, another protocol.
_NOT_PLAIN: Final = (b"transfer-encoding", b"upgrade", b"expect")
_LENGTH: Final = b"\r\ncontent-length:"
_MAX_PLAIN_HEAD_BYTES: Final = 2048
_MAX_LENGTH_DIGITS: Final = 6


class BadRequest(Exception):
    """What came is no request, or more than is granted. Its text is for the client."""


class RequestHead(NamedTuple):
    """The head of a request. `size` is bytes that it takes in memory, `text` what the server behind is to read."""

    text: bytes
    size: int
    expects_continue: bool
    is_websocket: bool


def plain_request(data: bytes) -> RequestHead | None:
    """The head of `data`, where that is one whole request and nothing else, beyond doubt; else None.

    Most are: an agent's client sends head and body at once, and waits for the answer. To be counted they need no parser
    of ours before the server's own. Beyond doubt: the length is told once, in digits, and is what came (RFC 9112, 6.3).
    """
    end = data.find(b"\r\n\r\n", 0, _MAX_PLAIN_HEAD_BYTES)
    if end < 0 or _PLAIN_HEAD.fullmatch(data, 0, end) is None:
        return None
    head = data[:end].lower()
    length, start = b"0", head.find(_LENGTH)
    if start >= 0:
        length = head[start + len(_LENGTH) :].partition(b"\r\n")[0].strip(b" \t")
    if head.count(b"content-length") != (start >= 0) or any(word in head for word in _NOT_PLAIN):
        return None
    if not length.isdigit() or len(length) > _MAX_LENGTH_DIGITS or len(data) != end + 4 + int(length):
        return None
    size = end + head.count(b"\r\n") * _BYTES_PER_HEADER
    return RequestHead(data, size, expects_continue=False, is_websocket=False)


class Receiver(Protocol):
    """Told of each request, piece by piece. May raise BadRequest."""

    def request_began(self) -> None: ...
    def head_complete(self, head: RequestHead) -> None: ...
    def body_part(self, part: bytes) -> None: ...
    def request_complete(self, end: bytes) -> None: ...


class RequestStream:
    """Parses by llhttp, whose strictness is the server's behind. That one gets a head without offers of another
    protocol that are not taken, chunks without extensions, and no trailers.
    """

    def __init__(self, receiver: Receiver, *, head_bytes: int, parts: int, websockets: bool) -> None:
        """`head_bytes` bounds a head, and what comes between two parts of a body, which `parts` bounds."""
        self._receiver = receiver
        self._most_bytes, self._most_parts, self._websockets = head_bytes, parts, websockets
        self._parser = httptools.HttpRequestParser(self)
        # Bytes behind a request that ends the connection are nobody's, and no fault.
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._unframed = 0  # bytes since the last that were a body's
        self._declined: bytes | None = None  # the head of a request whose offer of another protocol is not taken
        self._start()

    def feed(self, data: bytes) -> None:
        """Raises BadRequest. Nothing is read behind the head of a WebSocket: its client has to wait (RFC 6455, 4.1)."""
        self._unframed += len(data)
        try:
            while data:
                data = self._rest_of(data)
        except httptools.HttpParserError as e:
            if isinstance(e.__context__, BadRequest):
                raise e.__context__ from None
            msg = "This is not an HTTP request."
            raise BadRequest(msg) from e
        if self._unframed > self._most_bytes:
            msg = "The head is too large."
            raise BadRequest(msg)

    def close(self) -> None:
        """Nothing more is fed. The parser refers to whom it calls: both would stay until there is a full collection."""
        del self._parser

    def _rest_of(self, data: bytes) -> bytes:
        """What is to be parsed once more. The parser stops behind a head that offers another protocol."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as e:
            if self._declined is not None:
                head, self._declined = self._declined, None
                return head + data[e.args[0] :]
        return b""

    def _start(self) -> None:
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._headed = self._chunked = self._expects_continue = False
        self._parts = self._head = 0

    # What the parser calls.

    def on_message_begin(self) -> None:
        self._start()
        self._unframed = 0
        self._receiver.request_began()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._weigh(len(name) + len(value) + _BYTES_PER_HEADER)
        if not self._headed:  # else it is a trailer
            name = name.lower()
            self._headers.append((name, value))
            if name == b"transfer-encoding":
                self._chunked = True  # llhttp takes no request that has this header and is not chunked
            elif name == b"expect":
                self._expects_continue = value.lower() == b"100-continue"

    def on_headers_complete(self) -> None:
        method = self._parser.get_method()
        offered = self._parser.should_upgrade()
        if method == b"CONNECT":
            msg = "This is not an HTTP request."
            raise BadRequest(msg)
        is_websocket = offered and self._is_handshake()
        if offered and not is_websocket:
            self._declined = self._text(method, _without_offer(self._headers))
            return
        self._headed = True
        self._weigh(len(self._url))
        head = RequestHead(self._text(method, self._headers), self._head, self._expects_continue, is_websocket)
        self._receiver.head_complete(head)

    def on_body(self, body: bytes) -> None:
        self._unframed = 0
        self._parts += 1
        if self._parts > self._most_parts:
            msg = "The body comes in too many parts."
            raise BadRequest(msg)
        self._receiver.body_part(b"%x\r\n%b\r\n" % (len(body), body) if self._chunked else body)

    def on_message_complete(self) -> None:
        if self._declined is not None:
            return
        self._unframed = 0
        self._receiver.request_complete(b"0\r\n\r\n" if self._chunked else b"")

    def _weigh(self, size: int) -> None:
        self._head += size
        if self._head > self._most_bytes:
            msg = "The head is too large."
            raise BadRequest(msg)

    def _is_handshake(self) -> bool:
        """Whether this is a WebSocket's (RFC 6455, section 4.1), and not what some proxies write on all."""
        headers = dict(self._headers)
        return (
            self._websockets
            and self._parser.get_method() == b"GET"
            and b"upgrade" in (token.strip().lower() for token in headers[b"connection"].split(b","))
            and headers[b"upgrade"].lower() == b"websocket"
            and b"sec-websocket-key" in headers
        )

    def _text(self, method: bytes, headers: list[tuple[bytes, bytes]]) -> bytes:
        lines = [method + b" " + self._url + b" HTTP/" + self._parser.get_http_version().encode()]
        lines += [name + b": " + value for name, value in headers]
        return b"\r\n".join(lines) + b"\r\n\r\n"


def _without_offer(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers without the protocol that they offer (RFC 9110, section 7.8)."""
    kept = [(name, value) for name, value in headers if name not in _OF_AN_OFFER]
    for n, (name, value) in enumerate(kept):
        if name == b"connection":
            kept[n] = name, b",".join(v for v in value.split(b",") if v.strip().lower() not in _OF_AN_OFFER)
    return kept
