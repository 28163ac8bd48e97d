import asyncio
import socket
import ssl
import subprocess
from ipaddress import ip_address
from pathlib import Path

import pytest

from lab.certs import Authority, Pair
from tests.agent.doubles import http, reply, tcp
from tests.conftest import NEEDS_OPENSSL
from vpn_sentinel.agent.net.http import Client, HttpError, connected, read_response, reason, tls_context
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.agent.net.urls import split

CLIENT = Client(names=HostResolver())


async def test_get_and_post() -> None:
    async with http(lambda _: reply("hello", X_Rl="4")) as (port, got):
        found = await CLIENT.get(f"http://127.0.0.1:{port}/a?b=c", limit=2)
        assert (found.status, found.body, found.headers["x-rl"]) == (200, b"hello", "4")
        await CLIENT.post(
            f"http://sentinel.test:{port}/p", b"body", {"X-Key": "k"}, limit=2, at=ip_address("127.0.0.1")
        )
    assert got[0].startswith(f"GET /a?b=c HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n")
    assert "X-Key: k" in got[1]
    assert got[1].endswith("\r\n\r\nbody")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_both_sides_send_small_segments(host: str) -> None:
    """536 bytes, which every host takes (RFC 9293, 3.7.1): through any tunnel over a path that passes 700."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        mine = await connected(ip_address(host), listening.getsockname()[1])
        theirs, _ = listening.accept()
        with mine, theirs:
            sizes = [s.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG) for s in (mine, theirs)]
    assert all(0 < size <= 536 for size in sizes), sizes


async def test_a_redirect_is_not_followed() -> None:
    async with http(lambda _: reply("", 302, Location="http://192.0.2.1/")) as (port, _):
        assert (await CLIENT.get(f"http://127.0.0.1:{port}/", limit=2)).status == 302


async def fed(data: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=16 * 1024)
    reader.feed_data(data)
    reader.feed_eof()
    return reader


OK = {
    "with a length": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhixx", b"hi"),
    "until the end": (b"HTTP/1.0 200 OK\r\n\r\nall of it", b"all of it"),
    "in chunks": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nhi\r\n1\r\n!\r\n0\r\n\r\n", b"hi!"),
    "without a body": (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    "after an early hint": (
        b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx",
        b"x",
    ),
}


@pytest.mark.parametrize(("data", "body"), OK.values(), ids=OK.keys())
async def test_bodies(data: bytes, body: bytes) -> None:
    assert (await read_response(await fed(data))).body == body


BAD = {
    "no HTTP": b"SSH-2.0-x\r\n\r\n",
    "no status": b"HTTP/1.1 abc\r\n\r\n",
    "too large": b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    "a body without end": b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 70000,
    "a chunk too large": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffff\r\n",
    "a chunk of no size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a chunk longer than it says": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
    "cut off": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc",
    "headers without end": b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200,
    "a line without end": b"HTTP/1.1 200 OK\r\na: " + b"x" * 40000,
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD.keys())
async def test_what_is_no_usable_answer_is_refused(data: bytes) -> None:
    async with http(lambda _: data) as (port, _):
        with pytest.raises(HttpError):
            await CLIENT.get(f"http://127.0.0.1:{port}/", limit=5)


async def test_a_server_that_says_nothing_is_given_up() -> None:
    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async with tcp(silent) as port:
        with pytest.raises(HttpError, match="no answer"):
            await CLIENT.get(f"http://127.0.0.1:{port}/", limit=0.1)


async def test_nothing_of_a_request_that_was_given_up_arrives_later() -> None:
    """As at a server whose path comes back: what the kernel still held would be read as news."""
    given_up, arrived = asyncio.Event(), asyncio.Event()
    found = b""

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal found
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await given_up.wait()
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        try:
            found = await reader.read()
        except ConnectionResetError:
            found = b"reset"
        arrived.set()

    async with tcp(late) as port:
        with pytest.raises(HttpError, match="no answer"):
            await CLIENT.post(f"http://127.0.0.1:{port}/", b"x" * 8_000_000, {}, limit=0.5)
        given_up.set()
        await asyncio.wait_for(arrived.wait(), 10)
    assert found == b"reset"


async def test_nobody_there(free_port: int) -> None:
    with pytest.raises(HttpError):
        await CLIENT.get(f"http://127.0.0.1:{free_port}/", limit=2)


async def test_a_family_that_the_host_lacks() -> None:
    with pytest.raises(HttpError, match="no IPv6"):
        await CLIENT.get("http://127.0.0.1/", limit=2, family=6)


@pytest.mark.parametrize("url", ["ftp://x/", "http:///x", "nothing"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(ValueError, match="http"):
        split(url)


def test_an_address_is_taken_apart() -> None:
    assert split("https://a.example").authority == "a.example"
    assert split("http://[2001:db8::1]:81/x").authority == "[2001:db8::1]:81"
    assert split("https://a.example:444/x?y").path == "/x?y"


def test_reasons_are_short() -> None:
    assert reason(EOFError()) == "the connection was closed early"
    assert reason(OSError(111, "Connection refused")) == "Connection refused"
    assert reason(ValueError("x" * 500)) == "x" * 120
    assert reason(ssl.SSLError()) == "TLS failed: broken off"
    error = ssl.SSLCertVerificationError()
    error.verify_message = "self-signed"
    assert reason(error) == "its certificate is not trusted: self-signed"


def test_a_ca_file_without_certificates_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    with pytest.raises(OSError):  # noqa: PT011 - ssl words it
        tls_context(str(tmp_path / "ca.pem"))
    assert tls_context(None).check_hostname


@NEEDS_OPENSSL
def test_the_systems_authorities_are_read_when_they_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder by hashes will do, and authenticates as the whole list does; a file that is named comes first."""
    authority = Authority(tmp_path)
    pair = authority.issue("server", ["server.test"])
    folder = tmp_path / "certs"
    folder.mkdir()
    said = subprocess.run(
        ["openssl", "x509", "-hash", "-noout", "-in", authority.file], check=True, capture_output=True, text=True
    )
    (folder / f"{said.stdout.strip()}.0").symlink_to(authority.file)
    monkeypatch.setenv("SSL_CERT_DIR", str(folder))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    for n in range(40):
        (folder / f"{n:08x}.0").write_text("")
    context = tls_context(None)
    assert context.get_ca_certs() == []
    assert _is_trusted(context, pair)
    assert not _is_trusted(tls_context(None), Authority(tmp_path, "another").issue("other", ["server.test"]))
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))
    assert len(tls_context(None).get_ca_certs()) >= 1


def _is_trusted(context: ssl.SSLContext, pair: Pair) -> bool:
    """Whether a handshake with a server of this certificate, called server.test, comes about."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(pair.cert, pair.key)
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(back, there, server_hostname="server.test")
    server = serving.wrap_bio(there, back, server_side=True)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError:
                return False
    return client.version() is not None
