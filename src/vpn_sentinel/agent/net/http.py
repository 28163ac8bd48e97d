"""A small HTTP/1.1 client: one request per connection, a bounded answer, a time limit, no redirects (RFC 9112).

The agent sends few and short requests and may use 25 MB in all; the usual clients cost 5 to 16 MB each.
"""

import asyncio
import json
import os
import re
import socket
import ssl
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from vpn_sentinel.agent.net.as_user import AS_USER
from vpn_sentinel.agent.net.own import OWN_SOCKETS
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.agent.net.urls import ParsedUrl, split
from vpn_sentinel.domain.policy import IPAddress

MAX_BODY_BYTES: Final = 64 * 1024  # of an answer
# TCP payload of a packet: every host accepts that much from the first packet on (RFC 9293, 3.7.1; 576 less two
# headers), and a path MTU of 700 bytes carries it through any tunnel. Reports are a few KB.
MAX_SEGMENT_BYTES: Final = 536
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # struct linger of socket(7): on, for 0 seconds
_MAX_HEADERS: Final = 100
_MIN_INDEXED_AUTHORITIES: Final = 32  # with fewer, somebody may have filled the folder by hand
_HASHED_NAME: Final = re.compile(r"[0-9a-f]{8}\.\d+")


class HttpError(OSError):
    """No usable answer: no connection, not HTTP, too large, too slow."""


@dataclass(frozen=True, slots=True)
class Response:
    """`headers` have lower-case names."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """`tls` verifies servers; one is shared, since its certificates cost memory."""

    names: HostResolver
    tls: ssl.SSLContext | None = None

    async def get(
        self, url: str, *, limit: float, family: int | None = None, headers: Mapping[str, str] | None = None
    ) -> Response:
        """GET `url` within `limit` seconds, over IPv4 or IPv6 only when `family` says so. Raises HttpError."""
        return await self._exchange("GET", url, headers or {}, b"", limit, family)

    async def post(
        self, url: str, body: bytes, headers: Mapping[str, str], *, limit: float, at: IPAddress | None = None
    ) -> Response:
        """POST `body`; `at` is the address to connect to if the caller knows it. Raises HttpError."""
        return await self._exchange("POST", url, headers, body, limit, None, at)

    async def send(
        self,
        method: str,
        url: str,
        *,
        limit: float,
        body: bytes = b"",
        headers: Mapping[str, str],
        max_bytes: int = MAX_BODY_BYTES,
    ) -> Response:
        """Any method; the body of the answer may have up to `max_bytes`. Raises HttpError."""
        return await self._exchange(method, url, headers, body, limit, None, max_bytes=max_bytes)

    async def _exchange(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        limit: float,
        family: int | None,
        at: IPAddress | None = None,
        *,
        max_bytes: int = MAX_BODY_BYTES,
    ) -> Response:
        try:
            async with asyncio.timeout(limit):
                where = split(url)
                addresses = (at,) if at else await self.names.addresses(where.host, patience=limit)
                chosen = next((a for a in addresses if family in (None, a.version)), None)
                if chosen is None:
                    raise HttpError(f"{where.host} has no IPv{family} address")
                return await self._ask(method, where, chosen, headers, body, max_bytes)
        except TimeoutError as e:
            raise HttpError(f"no answer within {limit:g} s") from e
        except (OSError, ValueError, EOFError, asyncio.LimitOverrunError) as e:
            raise e if isinstance(e, HttpError) else HttpError(reason(e)) from e

    async def _ask(
        self, method: str, where: ParsedUrl, at: IPAddress, headers: Mapping[str, str], body: bytes, max_bytes: int
    ) -> Response:
        # `_exchange` limits the time of all of it.
        sock = await connected(at, where.port)
        reader, writer = await asyncio.open_connection(
            sock=sock,
            ssl=self.tls if where.secure else None,
            server_hostname=where.host if where.secure else None,
            limit=16 * 1024,
        )
        try:
            fields = {
                "Accept": "*/*",
                "Connection": "close",
                **({"Content-Length": str(len(body))} if method in ("POST", "PUT") else {}),
                **headers,
            }
            writer.write(head(method, where, fields) + body)
            return await read_response(reader, max_bytes)
        finally:
            # Aborted, not closed: the TLS closing handshake with a peer that stopped answering would take long.
            writer.transport.abort()


async def connected(at: IPAddress, port: int) -> socket.socket:
    """A TCP connection whose segments are small, so that it also works where large packets vanish.

    A tunnel whose path MTU is below that of its interface is something that must be reported (situation 30),
    and Linux does not detect such a path by itself (net.ipv4.tcp_mtu_probing is 0).

    Closing it resets it (RFC 9293, 3.10.5: ABORT). Otherwise the kernel would go on sending what is left in the buffer
    for minutes, and once the path works again the server would read a report that was given up long ago: dated by its
    arrival, and before those that are sent anew with their true age. Raises OSError.
    """
    sock = AS_USER.socket(socket.AF_INET if at.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, MAX_SEGMENT_BYTES)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        # Bound first: the leak watch may read the first packet before the connection is established.
        sock.bind(("", 0))
        OWN_SOCKETS.add(sock, (at, port))
        await asyncio.get_running_loop().sock_connect(sock, (str(at), port))
    except BaseException:
        sock.close()
        raise
    return sock


def head(method: str, where: ParsedUrl, headers: Mapping[str, str]) -> bytes:
    """Request line and headers. Raises ValueError when a header is not Latin-1."""
    fields = {"Host": where.authority, "User-Agent": "vpn-sentinel", **headers}
    lines = [f"{method} {where.path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode("latin-1")


async def read_response(reader: asyncio.StreamReader, max_bytes: int = MAX_BODY_BYTES) -> Response:
    """Read status, headers and a body of at most `max_bytes`. After status 101 the reader is at the new protocol.

    Raises HttpError, or what the reader raises when the peer stops early.
    """
    while True:
        version, _, rest = (await _line(reader)).partition(" ")
        status_text = rest[:3]
        if not version.startswith("HTTP/1.") or not (status_text.isascii() and status_text.isdigit()):
            raise HttpError("the answer is not HTTP")
        headers: dict[str, str] = {}
        for _ in range(_MAX_HEADERS):
            line = await _line(reader)
            if not line:
                break
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        else:
            raise HttpError("too many headers")
        status = int(status_text)
        if status >= 200 or status == 101:
            return Response(status, await _body(reader, status, headers, max_bytes), headers)


async def _line(reader: asyncio.StreamReader) -> str:
    return (await reader.readuntil(b"\n")).decode("latin-1").rstrip("\r\n")


async def _body(reader: asyncio.StreamReader, status: int, headers: Mapping[str, str], max_bytes: int) -> bytes:
    if status in (101, 204, 304):
        return b""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return await _chunks(reader, max_bytes)
    length = headers.get("content-length")
    if length is not None:
        if not (length.isascii() and length.isdigit()) or int(length) > max_bytes:
            raise HttpError("the answer is too large")
        return await reader.readexactly(int(length))
    found = bytearray()
    while chunk := await reader.read(8192):
        found += chunk
        if len(found) > max_bytes:
            raise HttpError("the answer is too large")
    return bytes(found)


async def _chunks(reader: asyncio.StreamReader, max_bytes: int) -> bytes:
    found = bytearray()
    while True:
        size = int((await _line(reader)).partition(";")[0], 16)
        if size < 0 or len(found) + size > max_bytes:
            raise HttpError("the answer is too large")
        if size == 0:
            return bytes(found)
        found += await reader.readexactly(size)
        if await _line(reader):
            raise HttpError("a chunk is longer than it says")


def json_in(body: bytes) -> Any:
    """An answer's JSON. Raises ValueError, also for one that is nested too deep to be read."""
    try:
        return json.loads(body)
    except RecursionError as e:
        msg = "is nested too deep"
        raise ValueError(msg) from e


def reason(error: BaseException) -> str:
    """Why it failed, in a few words, with at most 120 characters of what the peer sent."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {getattr(error, 'reason', None) or 'broken off'}"  # some have no reason
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, EOFError):
        return "the connection was closed early"
    return str(error)[:120] or type(error).__name__


def tls_context(ca_file: str | None) -> ssl.SSLContext:
    """Verify against the system's authorities and those in `ca_file`. Raises OSError (ssl.SSLError is one)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    folder = _indexed()
    if folder is not None:
        context.load_verify_locations(capath=folder)
    else:
        context.load_default_certs()
    if ca_file is not None:
        context.load_verify_locations(cafile=ca_file)
    return context


def _indexed() -> str | None:
    """The folder of the system's authorities, where OpenSSL finds one by its name's hash (openssl-rehash(1)).

    OpenSSL then reads an authority when it is needed: all of them at once take almost a megabyte. None where no such
    folder has enough of them, or SSL_CERT_FILE names a file, which takes precedence.
    """
    paths = ssl.get_default_verify_paths()
    named = paths.cafile is not None and paths.cafile != paths.openssl_cafile
    if named or paths.capath is None:
        return None
    try:
        with os.scandir(paths.capath) as entries:
            found = sum(1 for entry in entries if _HASHED_NAME.fullmatch(entry.name))
    except OSError:
        return None
    return paths.capath if found >= _MIN_INDEXED_AUTHORITIES else None
