"""Parses a client's requests on one connection, enforces limits, and rewrites them for the server behind."""

import re
from typing import Final, NamedTuple, Protocol

import httptools

# Memory of a header in CPython in addition to its bytes: two objects, a tuple, and its place in a list. Thousands of
# tiny headers cost more than a long one.
_BYTES_PER_HEADER: Final = 144
_UPGRADE_HEADERS: Final = (b"upgrade", b"http2-settings")


# A plain head: POST or GET, a path, and headers that follow RFC 9112 to the letter.
_PLAIN_HEAD: Final = re.compile(
    rb"(?:POST|GET) /[!-~]* HTTP/1\.1(?:\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]+:[!-~\x80-\xff \t]*){0,64}"
)
# Any of these anywhere in a head requires the parser: chunked framing, another protocol, "100-continue".
_NOT_PLAIN: Final = (b"transfer-encoding", b"upgrade", b"expect")
_LENGTH: Final = b"\r\ncontent-length:"
_MAX_PLAIN_HEAD_BYTES: Final = 2048
_MAX_LENGTH_DIGITS: Final = 6


class BadRequest(Exception):
    """The bytes are no valid request, or exceed a limit. The text is for the client."""


class RequestHead(NamedTuple):
    """The head of a request. `size` is its memory in bytes, `text` what is forwarded to the server behind."""

    text: bytes
    size: int
    expects_continue: bool
    is_websocket: bool


def plain_request(data: bytes) -> RequestHead | None:
    """The head of `data`, if that is beyond doubt exactly one whole request; else None.

    Most requests are: an agent's client sends head and body at once, and waits for the answer. They need no parsing
    here before the server's own parser. Beyond doubt: there is one content length, in digits, and it matches (RFC 9112,
    6.3).
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
    """Gets each request, part by part. May raise BadRequest."""

    def request_began(self) -> None: ...
    def head_complete(self, head: RequestHead) -> None: ...
    def body_part(self, part: bytes) -> None: ...
    def request_complete(self, end: bytes) -> None: ...


class RequestStream:
    """Parses with llhttp, as strictly as the server behind, which uses it too. That server gets heads without an
    Upgrade that is declined, chunks without extensions, and no trailers.
    """

    def __init__(self, receiver: Receiver, *, head_bytes: int, parts: int, websockets: bool) -> None:
        """`head_bytes` bounds a head, and the bytes between two parts of a body; `parts` bounds the parts of a body."""
        self._receiver = receiver
        self._max_head_bytes, self._max_parts, self._websockets = head_bytes, parts, websockets
        self._parser = httptools.HttpRequestParser(self)
        # Bytes after a request with "connection: close" are ignored, and no error.
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._unframed = 0  # bytes since the last part of a body
        # The head of a request without its declined Upgrade, to be parsed again.
        self._declined_head: bytes | None = None
        self._start()

    def feed(self, data: bytes) -> None:
        """Raises BadRequest. Bytes after a WebSocket's head are not parsed: its client must wait (RFC 6455, 4.1)."""
        self._unframed += len(data)
        try:
            while data:
                data = self._parse(data)
        except httptools.HttpParserError as e:
            if isinstance(e.__context__, BadRequest):
                raise e.__context__ from None
            msg = "This is not an HTTP request."
            raise BadRequest(msg) from e
        if self._unframed > self._max_head_bytes:
            msg = "The head is too large."
            raise BadRequest(msg)

    def close(self) -> None:
        """Call it at the end: parser and stream refer to each other, and would stay until a full garbage collection."""
        del self._parser

    def _parse(self, data: bytes) -> bytes:
        """Parse `data`, and return what must be parsed again: the parser stops after a head with an Upgrade."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as e:
            if self._declined_head is not None:
                head, self._declined_head = self._declined_head, None
                return head + data[e.args[0] :]
        return b""

    def _start(self) -> None:
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_complete = self._chunked = self._expects_continue = False
        self._parts = self._head = 0

    # Called by the parser.

    def on_message_begin(self) -> None:
        self._start()
        self._unframed = 0
        self._receiver.request_began()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value) + _BYTES_PER_HEADER)
        if not self._head_complete:  # else it is a trailer
            name = name.lower()
            self._headers.append((name, value))
            if name == b"transfer-encoding":
                self._chunked = True  # else llhttp refuses the request, once its head is complete
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
            self._declined_head = self._text(method, _without_upgrade(self._headers))
            return
        self._head_complete = True
        self._count_head(len(self._url))
        head = RequestHead(self._text(method, self._headers), self._head, self._expects_continue, is_websocket)
        self._receiver.head_complete(head)

    def on_body(self, body: bytes) -> None:
        self._unframed = 0
        self._parts += 1
        if self._parts > self._max_parts:
            msg = "The body comes in too many parts."
            raise BadRequest(msg)
        self._receiver.body_part(b"%x\r\n%b\r\n" % (len(body), body) if self._chunked else body)

    def on_message_complete(self) -> None:
        if self._declined_head is not None:
            return
        self._unframed = 0
        self._receiver.request_complete(b"0\r\n\r\n" if self._chunked else b"")

    def _count_head(self, size: int) -> None:
        self._head += size
        if self._head > self._max_head_bytes:
            msg = "The head is too large."
            raise BadRequest(msg)

    def _is_handshake(self) -> bool:
        """Whether this is a WebSocket's handshake (RFC 6455, section 4.1), and not an Upgrade that some proxies add."""
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


def _without_upgrade(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Headers without the Upgrade (RFC 9110, section 7.8)."""
    kept = [(name, value) for name, value in headers if name not in _UPGRADE_HEADERS]
    for n, (name, value) in enumerate(kept):
        if name == b"connection":
            kept[n] = name, b",".join(v for v in value.split(b",") if v.strip().lower() not in _UPGRADE_HEADERS)
    return kept
