"""The uploader against a real server: WebSockets and HTTP over the loopback."""

import asyncio
import gzip
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.utils import accept_key

from tests.agent.doubles import http, reply, tcp
from tests.conftest import until
from vpn_sentinel.agent.net.http import Client
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.agent.spool.spool import Spool
from vpn_sentinel.agent.uplink.answers import decompressed
from vpn_sentinel.agent.uplink.connection import ReportTarget, Routes, Wakeup
from vpn_sentinel.agent.uplink.uploader import Uploader, read_list
from vpn_sentinel.domain.observation import Observation, Trigger
from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.wire import codec
from vpn_sentinel.wire.messages import (
    PROTOCOL,
    Ack,
    Exchange,
    FromAgent,
    Hello,
    Refused,
    Reports,
    Welcome,
    fingerprint,
)
from vpn_sentinel.wire.problem import CONTENT_TYPE, MARK, problem

read = codec.decoder(FromAgent)
BODY = codec.encode(Observation(trigger=Trigger.TIMER))


class Server:
    """Greets, stores, acknowledges; what it does instead is set by the test."""

    def __init__(self) -> None:
        self.stored: list[int] = []
        self.hellos: list[Hello] = []
        self.keys: list[str | None] = []
        self.thinned = 0
        self.silent = False
        self.status: int | None = None
        self.refuse: Callable[[Reports], Refused | None] = lambda _: None
        self.open: set[ServerConnection] = set()
        self.ack: int | None = None

    @property
    def last(self) -> int:
        return max(self.stored, default=0)

    def check(self, connection: ServerConnection, request: Request) -> Response | None:
        self.keys.append(request.headers.get("X-API-Key"))
        if self.status is None:
            return None
        response = connection.respond(HTTPStatus(self.status), "")
        response.body = codec.encode(problem(self.status, "no"))
        response.headers[MARK[0]] = MARK[1]
        for name, value in (("Content-Type", CONTENT_TYPE), ("Content-Length", str(len(response.body)))):
            del response.headers[name]
            response.headers[name] = value
        return response

    async def talk(self, connection: ServerConnection) -> None:
        self.open.add(connection)
        try:
            async for data in connection:
                if (answer := self.answer(read(data))) is not None:
                    await connection.send(codec.encode(answer).decode())
        except ConnectionClosed:
            pass
        finally:
            self.open.discard(connection)

    def answer(self, said: object) -> Welcome | Ack | Refused | None:
        if self.silent:
            return None
        match said:
            case Hello():
                self.hellos.append(said)
                known = [h.spool for h in self.hellos[:-1]]
                ack = self.ack if self.ack is not None and said.spool in (known or [said.spool]) else self.last
                return Welcome(ack=ack, wall=0.0)
            case Reports():
                if (refused := self.refuse(said)) is not None:
                    return refused
                self.stored += [r.seq for r in said.items]
                self.thinned += said.thinned
                return Ack(seq=said.items[-1].seq)
        return None

    @asynccontextmanager
    async def listening(self, port: int = 0) -> AsyncIterator[str]:
        async with serve(self.talk, "127.0.0.1", port, process_request=self.check, close_timeout=0.1) as server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    made = Spool(tmp_path / "agent.sqlite", SystemClock())
    yield made
    made.close()


class Waits(Wakeup):
    """Remembers how long was to be waited: whoever pauses has done all that came before."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0.0

    async def wait(self, seconds: float | None) -> None:
        self.longest = max(self.longest, seconds or 0.0)
        await super().wait(seconds)

    @property
    def slowly(self) -> bool:
        return self.longest > 50.0


def fill(spool: Spool, count: int) -> None:
    for _ in range(count):
        spool.append(BODY, routine=False)


@asynccontextmanager
async def carrying(spool: Spool, *urls: str, **more: Any) -> AsyncIterator[Uploader]:
    hello = Hello(protocol=PROTOCOL, client_id="nl-1", spool="", version="2", interval=30.0, wall=0.0)
    to = ReportTarget(urls=urls, api_path="/api/v1", key=Secret("the-key"), allow_insecure=False, hello=hello)
    names = more.pop("names", None) or HostResolver()
    uploader = Uploader(to, spool, Client(names=names), SystemClock(), **more)
    task = asyncio.get_running_loop().create_task(uploader.run())
    try:
        yield uploader
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def test_everything_arrives_in_order_and_is_forgotten(spool: Spool) -> None:
    fill(spool, 250)
    server = Server()
    async with server.listening() as url, carrying(spool, url) as uploader:
        await until(lambda: spool.pending == 0)
        fill(spool, 1)
        uploader.wake()
        await until(lambda: spool.pending == 0)
    assert server.stored == list(range(1, 252))
    assert server.keys == ["the-key"]
    assert server.hellos[0].spool == spool.identity
    assert uploader.acked_at is not None


async def test_what_the_server_has_is_not_sent_again(spool: Spool) -> None:
    fill(spool, 5)
    server = Server()
    server.stored = [1, 2, 3]
    async with server.listening() as url, carrying(spool, url):
        await until(lambda: spool.pending == 0)
    assert server.stored == [1, 2, 3, 4, 5]


async def test_a_server_that_restarts_gets_the_rest(spool: Spool, free_port: int) -> None:
    server = Server()
    url = f"http://127.0.0.1:{free_port}"
    async with carrying(spool, url) as uploader:
        async with server.listening(free_port):
            fill(spool, 2)
            uploader.wake()
            await until(lambda: spool.pending == 0)
        fill(spool, 3)
        uploader.wake()
        async with server.listening(free_port):
            await until(lambda: spool.pending == 0, 10)
    assert server.stored == [1, 2, 3, 4, 5]


async def test_an_acknowledgement_that_stays_away_ends_the_connection(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    async with server.listening() as url, carrying(spool, url, answer_timeout_s=0.1) as uploader:
        await until(lambda: server.hellos)
        server.silent = True
        fill(spool, 1)
        uploader.wake()
        await until(lambda: len(server.keys) >= 2)
        server.silent = False
        await until(lambda: spool.pending == 0)
    assert "the server does not answer" in [r.__dict__.get("reason") for r in caplog.records]


async def test_a_way_that_changed_is_left_at_once(spool: Spool) -> None:
    way = ["wg0"]
    server = Server()
    routes = Routes(route_to=lambda _a, _p: way[0])
    async with server.listening() as url, carrying(spool, url, routes=routes) as uploader:
        await until(lambda: len(server.hellos) == 1)
        uploader.network_changed()
        fill(spool, 1)  # is sent only after the kick was looked into
        await until(lambda: spool.pending == 0)
        assert len(server.keys) == 1  # nothing changed: nothing is dropped
        way[0] = "eth0"
        uploader.network_changed()
        await until(lambda: len(server.hellos) == 2, 1.0)


async def test_an_address_that_is_gone_is_left_at_once(spool: Spool) -> None:
    server = Server()
    gone: list[bool] = []
    routes = Routes(owns=lambda _: not gone)
    async with server.listening() as url, carrying(spool, url, routes=routes) as uploader:
        await until(lambda: len(server.hellos) == 1)
        gone.append(True)
        uploader.network_changed()
        await until(lambda: len(server.hellos) >= 2, 2.0)


async def test_a_change_while_connecting_begins_anew(spool: Spool) -> None:
    """A SYN on its way keeps the address of the tunnel that is gone."""
    way, begun = ["wg0"], asyncio.Event()
    server = Server()

    async def slow(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        begun.set()
        await reader.read()

    routes = Routes(route_to=lambda _a, _p: way[0])
    async with (
        tcp(slow) as port,
        server.listening() as url,
        carrying(spool, f"http://127.0.0.1:{port}", url, routes=routes) as uploader,
    ):
        await begun.wait()
        way[0] = "eth0"
        uploader.network_changed()
        await until(lambda: server.hellos, 1.0)


async def test_a_pause_ends_when_the_network_changes(spool: Spool) -> None:
    server, waits = Server(), Waits()
    server.status = 401  # the longest pause there is
    async with server.listening() as url, carrying(spool, url, wakeup=waits) as uploader:
        await until(lambda: waits.slowly)
        server.status = None
        uploader.network_changed()
        await until(lambda: server.hellos)


async def test_the_second_way_serves_when_the_first_is_shut(spool: Spool, free_port: int) -> None:
    server = Server()
    fill(spool, 1)
    async with server.listening() as url, carrying(spool, f"http://127.0.0.1:{free_port}", url):
        await until(lambda: spool.pending == 0)


async def test_from_the_second_way_it_goes_back_to_the_first(spool: Spool, free_port: int) -> None:
    first, second = Server(), Server()
    shut = f"http://127.0.0.1:{free_port}"
    async with second.listening() as url, carrying(spool, shut, url, switch_back_after_s=0.05):
        await until(lambda: second.hellos)
        async with first.listening(free_port):
            await until(lambda: first.hellos)


@pytest.mark.parametrize("status", [401, 403])
async def test_a_key_that_is_not_accepted_is_said_once_and_tried_slowly(
    spool: Spool, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    server, waits = Server(), Waits()
    server.status = status
    async with server.listening() as url, carrying(spool, url, wakeup=waits):
        await until(lambda: waits.slowly)
    assert len(server.keys) == 1
    assert [r.getMessage() for r in caplog.records].count("cannot report") == 1


async def test_a_busy_server_is_tried_again(spool: Spool) -> None:
    server = Server()
    server.status = 503
    async with server.listening() as url, carrying(spool, url):
        await until(lambda: server.keys)
        server.status = None
        await until(lambda: server.hellos)


async def test_a_server_that_greets_and_cannot_store_is_said_once_and_told_when_over(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    fill(spool, 1)
    server = Server()
    full = Refused(reason="the database does not take reports now; nothing was stored", retry=True)
    server.refuse = lambda _: full
    async with server.listening() as url, carrying(spool, url) as uploader:
        await until(lambda: len(server.hellos) >= 3)
        assert uploader.acked_at is None
        assert [r.message for r in caplog.records if "report" in r.message] == ["cannot report"]
        server.refuse = lambda _: None
        await until(lambda: server.stored)
        await until(lambda: uploader.acked_at is not None)
        said = [r.message for r in caplog.records if r.name.endswith("uploader")]
    assert said == ["connected", "cannot report", "connected"]


def pushed(uploader: Uploader, spool: Spool) -> bool:
    uploader.network_changed()  # instead of waiting between the tries
    return spool.pending == 0


async def test_one_refused_report_does_not_hold_up_the_others(spool: Spool) -> None:
    fill(spool, 4)
    server = Server()
    server.refuse = lambda said: (
        Refused(reason="no", of=fingerprint(codec.encode(said))) if any(r.seq == 2 for r in said.items) else None
    )
    async with server.listening() as url, carrying(spool, url) as uploader:
        await until(lambda: pushed(uploader, spool), 20)
        fill(spool, 1)
        uploader.wake()
        await until(lambda: spool.pending == 0)
    assert server.stored == [1, 3, 4, 5]
    assert server.thinned == 1


async def test_what_something_on_the_way_alters_is_kept_and_said_once(
    spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    """The server refuses what reached it, which is not what was sent."""
    fill(spool, 2)
    server = Server()
    server.refuse = lambda said: Refused(reason="no `age`", of=fingerprint(codec.encode(said) + b" "))
    async with server.listening() as url, carrying(spool, url) as uploader:
        await until(lambda: pushed(uploader, spool) or len(server.hellos) > 6)
        assert spool.pending == 2
        warned = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert warned == ["cannot report"]
        server.refuse = lambda _: None
        await until(lambda: pushed(uploader, spool), 20)
    assert (server.stored, server.thinned) == ([1, 2], 0)


@pytest.mark.parametrize(("altered", "kept"), [(b" ", True), (b"", False)], ids=["altered", "as it was sent"])
async def test_by_post_only_the_very_reports_that_the_server_refuses_are_given_up(
    spool: Spool, altered: bytes, kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    fill(spool, 1)
    got: list[int] = []
    respond, refusals = stores(got), iter(range(4))

    def gate(request: str) -> bytes:
        if request.startswith("GET"):
            return reply("", 405)
        if next(refusals, None) is None:
            return respond(request)
        of = fingerprint(request.partition("\r\n\r\n")[2].encode() + altered)
        more = {"Content_Type": CONTENT_TYPE, "VPN_Sentinel": "1", "VPN_Sentinel_Refused": of}
        return reply(codec.encode(problem(422, "no `age`")), 422, **more)

    async with http(gate) as (port, _), carrying(spool, f"http://127.0.0.1:{port}") as uploader:
        await until(lambda: pushed(uploader, spool), 20)
    assert got == ([1] if kept else [])
    assert any("dropped" in r.getMessage() for r in caplog.records) is not kept


async def test_by_post_a_refused_greeting_costs_no_report(spool: Spool) -> None:
    fill(spool, 1)
    waits = Waits()
    said = problem(422, "interval takes 0.1 to 86400 seconds")
    refusal = reply(codec.encode(said), 422, Content_Type=CONTENT_TYPE, VPN_Sentinel="1")
    gate = lambda r: reply("", 405) if r.startswith("GET") else refusal  # noqa: E731
    async with http(gate) as (port, _), carrying(spool, f"http://127.0.0.1:{port}", wakeup=waits):
        await until(lambda: waits.slowly)
    assert spool.pending == 1


async def test_a_refused_greeting_is_tried_slowly(spool: Spool) -> None:
    server, waits = Server(), Waits()
    server.answer = lambda said: Refused(reason="protocol 1 is too old")  # type: ignore[method-assign]
    async with server.listening() as url, carrying(spool, url, wakeup=waits):
        await until(lambda: waits.slowly)
    assert len(server.keys) == 1


async def test_a_spool_of_which_the_server_knows_more_is_named_anew(spool: Spool) -> None:
    fill(spool, 2)
    old = spool.identity
    server = Server()
    server.ack = 99
    async with server.listening() as url, carrying(spool, url):
        await until(lambda: spool.pending == 0)
    assert spool.identity != old
    assert server.stored == [1, 2]


async def test_nonsense_from_the_server_does_no_harm(spool: Spool) -> None:
    fill(spool, 1)
    server = Server()
    good = server.answer
    server.answer = lambda said: Ack(seq=77)  # type: ignore[method-assign]
    async with server.listening() as url, carrying(spool, url):
        await until(lambda: server.keys)
        server.answer = good  # type: ignore[method-assign]
        await until(lambda: spool.pending == 0)


def stores(got: list[int]) -> Callable[[str], bytes]:
    def respond(request: str) -> bytes:
        head, _, body = request.partition("\r\n\r\n")
        if head.startswith("GET"):
            return reply("not found", 404)
        assert "x-api-key: the-key" in head.lower()
        said = read(body)
        assert isinstance(said, Exchange)
        got.extend(r.seq for r in said.reports.items)
        return reply(codec.encode(Welcome(ack=max(got, default=0), wall=0.0)))

    return respond


async def test_without_websocket_reports_go_by_post(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fill(spool, 120)
    got: list[int] = []
    async with http(stores(got)) as (port, requests), carrying(spool, f"http://127.0.0.1:{port}") as uploader:
        await until(lambda: spool.pending == 0)
        fill(spool, 1)
        uploader.wake()
        await until(lambda: spool.pending == 0)
    assert got == list(range(1, 122))
    assert [r.split(" ")[0] for r in requests].count("GET") == 1
    assert sum("go by POST" in r.getMessage() for r in caplog.records) == 1


BETWEEN = {
    "a proxy with a login": reply("<html>", 401, WWW_Authenticate="Basic"),
    "a firewall": reply("<html>denied</html>", 403, Content_Type="text/html"),
    "a login page": reply("", 302, Location="https://login.example/"),
    "a page": reply("<html>Welcome to the hotel</html>", 200, Content_Type="text/html"),
    "a proxy that wants an upgrade": reply("", 426),
    "a gateway": reply("<html>bad gateway</html>", 502),
    "a gateway whose backend is busy": reply("", 503, Retry_After="5"),
    "problem details of another status": reply(
        '{"status": 401, "title": "x", "detail": "x"}', 403, Content_Type="application/problem+json"
    ),
    "problem details that are cut off": reply('{"status": 403, "ti', 403, Content_Type="application/problem+json"),
    "a gateway that writes problem details": reply(
        codec.encode(problem(403, "Policy")), 403, Content_Type="application/problem+json"
    ),
    "the server, behind one that takes the offer out": reply(
        codec.encode(problem(405, "this route takes POST")),
        405,
        Content_Type="application/problem+json",
        VPN_Sentinel="1",
    ),
    "no HTTP": b"SSH-2.0-x\r\n\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("answer", BETWEEN.values(), ids=BETWEEN.keys())
async def test_what_stops_only_the_websocket_is_gone_round_by_post(
    spool: Spool, answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    fill(spool, 1)
    got: list[int] = []
    respond, waits = stores(got), Waits()
    async with (
        http(lambda r: answer if r.startswith("GET") else respond(r)) as (port, _),
        carrying(spool, f"http://127.0.0.1:{port}", wakeup=waits),
    ):
        await until(lambda: spool.pending == 0)
    assert got == [1]
    assert not any("key" in str(r.__dict__.get("reason", "")) for r in caplog.records)


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_no_observation_is_given_up_on_a_gateways_word(
    spool: Spool, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    fill(spool, 3)
    got: list[int] = []
    respond = stores(got)
    blocked = reply(codec.encode(problem(status, "blocked")), status, Content_Type="application/problem+json")
    answers = iter([blocked] * 4)
    gate = lambda r: reply("", 405) if r.startswith("GET") else next(answers, None) or respond(r)  # noqa: E731
    async with http(gate) as (port, _), carrying(spool, f"http://127.0.0.1:{port}") as uploader:
        async with asyncio.timeout(20):
            while spool.pending:
                uploader.network_changed()  # no pause is waited for
                await asyncio.sleep(0.01)
    assert got == [1, 2, 3]
    assert not any("dropped" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("opened", [False, True], ids=["unanswered", "opened, and silent for ever"])
async def test_a_websocket_that_is_held_without_a_word_is_left_for_post(
    spool: Spool, opened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vpn_sentinel.agent.uplink.connection.CONNECT_TIMEOUT_S", 0.3)
    fill(spool, 1)
    got: list[int] = []
    respond = stores(got)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head.splitlines())}
        if head.startswith("POST"):
            writer.write(respond(head + (await reader.readexactly(int(fields["content-length"]))).decode()))
            return
        if opened:
            accept = accept_key(fields["sec-websocket-key"])
            writer.write(f"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                         f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode())  # fmt: skip
        while await reader.read(4096):
            pass

    async with tcp(talk) as port, carrying(spool, f"http://127.0.0.1:{port}", answer_timeout_s=0.3):
        await until(lambda: spool.pending == 0)
    assert got == [1]


async def test_an_address_that_says_nothing_is_left_for_the_other_family(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where all that is large, or all of one family, vanishes on the way: no report waits for a POST there."""
    monkeypatch.setattr("vpn_sentinel.agent.uplink.connection.CONNECT_TIMEOUT_S", 0.3)
    fill(spool, 1)
    server, held = Server(), []

    async def swallow(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        held.append(await reader.readline())
        while await reader.read(4096):
            pass

    names = HostResolver(lambda _: (ip_address("127.0.0.1"), ip_address("::1")))
    async with (
        tcp(swallow) as port,
        serve(server.talk, "::1", port, close_timeout=0.1),
        carrying(spool, f"http://sentinel.test:{port}", names=names, answer_timeout_s=30.0),
    ):
        await until(lambda: spool.pending == 0)
    assert (server.stored, [line.split()[0] for line in held]) == ([1], [b"GET"])


async def test_where_no_address_lets_a_websocket_through_every_one_is_posted_to(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vpn_sentinel.agent.uplink.connection.CONNECT_TIMEOUT_S", 0.3)
    fill(spool, 1)
    got: list[int] = []
    respond = stores(got)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head.splitlines())}
        if head.startswith("POST"):
            writer.write(respond(head + (await reader.readexactly(int(fields["content-length"]))).decode()))
            return
        while await reader.read(4096):
            pass

    names = HostResolver(lambda _: (ip_address("::1"), ip_address("127.0.0.1")))
    async with tcp(talk) as port, carrying(spool, f"http://sentinel.test:{port}", names=names, answer_timeout_s=0.3):
        await until(lambda: spool.pending == 0)
    assert got == [1]


CAPTIVE = {name: answer for name, answer in BETWEEN.items() if not name.startswith("problem")}


@pytest.mark.parametrize("answer", CAPTIVE.values(), ids=CAPTIVE.keys())
async def test_a_portal_acknowledges_nothing_and_says_nothing_of_the_key(
    spool: Spool, answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    fill(spool, 1)
    asked = 0

    def count(request: str) -> bytes:
        nonlocal asked
        asked += request.startswith("POST")
        return answer

    async with http(count) as (port, _), carrying(spool, f"http://127.0.0.1:{port}"):
        await until(lambda: asked >= 2)  # soon again: it may let us pass any moment
    assert spool.pending == 1
    assert not any("key" in str(r.__dict__.get("reason", "")) for r in caplog.records)


async def test_an_answer_that_was_compressed_on_the_way_is_read(spool: Spool) -> None:
    fill(spool, 1)
    got: list[int] = []
    respond = stores(got)

    def squeeze(request: str) -> bytes:
        answer = respond(request)
        if request.startswith("GET"):
            return answer
        return reply(gzip.compress(answer.partition(b"\r\n\r\n")[2]), Content_Encoding="gzip")

    async with http(squeeze) as (port, _), carrying(spool, f"http://127.0.0.1:{port}"):
        await until(lambda: spool.pending == 0)
    assert got == [1]


def test_a_compressed_answer_is_bounded_and_whole() -> None:
    packed = {"content-encoding": "gzip"}
    bomb, cut, bad = gzip.compress(b" " * 10_000_000), gzip.compress(b"{}" * 100)[:-9], b"{}"
    for body in (bomb, cut, bad):
        with pytest.raises(ValueError, match="a compressed response is"):
            decompressed(packed, body)


@pytest.mark.parametrize("code", [1003, 1008, 1009])
async def test_a_code_without_a_word_gives_no_report_up(spool: Spool, code: int) -> None:
    fill(spool, 1)
    closings = 0

    async def talk(connection: ServerConnection) -> None:
        nonlocal closings
        await connection.recv()
        await connection.send(codec.encode(Welcome(ack=0, wall=0.0)).decode())
        await connection.recv()
        closings += 1
        await connection.close(code)

    async with serve(talk, "127.0.0.1", 0, close_timeout=0.1) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with carrying(spool, url):
            await until(lambda: closings >= 3, 10.0)
    assert spool.pending == 1


@pytest.mark.parametrize("status", [200, 400, 401, 426, 500])
async def test_whatever_a_post_meets_the_reports_stay(spool: Spool, status: int) -> None:
    fill(spool, 1)
    waits = Waits()
    async with (
        http(lambda r: reply("x", 404 if r.startswith("GET") else status)) as (port, got),
        carrying(spool, f"http://127.0.0.1:{port}", wakeup=waits),
    ):
        await until(lambda: waits.longest)
    assert any(r.startswith("POST") for r in got)
    assert spool.pending == 1


async def test_a_proxy_that_strips_the_upgrade_leads_to_post(spool: Spool) -> None:
    fill(spool, 1)
    got: list[int] = []
    respond = stores(got)
    async with (
        http(lambda r: reply("hi") if r.startswith("GET") else respond(r)) as (port, _),
        carrying(spool, f"http://127.0.0.1:{port}"),
    ):
        await until(lambda: spool.pending == 0)
    assert got == [1]


async def test_the_key_is_not_sent_in_clear_to_a_public_address(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    names = HostResolver(lambda _: (ip_address("8.8.8.8"),))
    async with carrying(spool, "http://sentinel:5000", names=names):
        await until(lambda: caplog.records)
    assert "not sent there in clear" in str(caplog.records[0].__dict__["reason"])


async def test_the_servers_address_outlives_a_restart(spool: Spool) -> None:
    server = Server()
    async with server.listening() as url:
        port = url.rsplit(":", 1)[1]
        async with carrying(spool, f"http://sentinel:{port}", names=HostResolver(lambda _: (ip_address("127.0.0.1"),))):
            await until(lambda: server.hellos)
        assert json.loads(spool.fact("addresses:sentinel") or "") == ["127.0.0.1"]

        def dead(_: str) -> tuple:  # type: ignore[type-arg]
            raise OSError("no resolver")

        async with carrying(spool, f"http://sentinel:{port}", names=HostResolver(dead)):
            await until(lambda: len(server.hellos) == 2)


async def test_a_name_that_is_not_found_is_said(spool: Spool, caplog: pytest.LogCaptureFixture) -> None:
    spool.keep("addresses:sentinel", '["nonsense"]')
    async with carrying(spool, "http://sentinel:5000", names=HostResolver(lambda _: ())):
        await until(lambda: caplog.records)
    assert caplog.records[0].__dict__["reason"] == "no address found for sentinel"


def test_a_fact_that_is_no_list_is_an_empty_one() -> None:
    assert read_list('["a", 1, "b"]') == ["a", "b"]
    assert read_list(None) == read_list("{") == read_list("{}") == []


async def test_bad_news_that_gets_no_answer_goes_the_other_way(spool: Spool) -> None:
    first, second = Server(), Server()
    async with first.listening() as one, second.listening() as two, carrying(spool, one, two) as uploader:
        fill(spool, 1)
        uploader.wake()
        await until(lambda: first.stored == [1])
        first.silent = True  # as behind a tunnel that died: the connection stands, nothing comes back
        fill(spool, 1)
        uploader.hurry()
        began = SystemClock().boottime()
        await until(lambda: spool.pending == 0)
        assert second.stored == [2]
        assert SystemClock().boottime() - began < 3  # sooner than an acknowledgement is waited for else


async def test_bad_news_waits_where_there_is_no_other_way(spool: Spool) -> None:
    server = Server()
    async with server.listening() as url, carrying(spool, url, answer_timeout_s=30.0) as uploader:
        fill(spool, 1)
        uploader.wake()
        await until(lambda: server.stored == [1])
        server.silent = True
        fill(spool, 1)
        uploader.hurry()
        await until(lambda: len(server.open) == 1)
        await asyncio.sleep(1.0)
        assert len(server.hellos) == 1  # the same connection still


async def test_a_way_that_is_merely_slow_is_come_back_to(spool: Spool, free_port: int) -> None:
    server = Server()
    async with server.listening() as url, carrying(spool, f"http://127.0.0.1:{free_port}", url) as uploader:
        fill(spool, 2)
        uploader.hurry()
        await until(lambda: spool.pending == 0)
        assert server.stored == [1, 2]
