"""gluetun, qBittorrent and Transmission: stand-ins on the loopback that speak as the programs do."""

import asyncio
import base64
import json
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.agent.doubles import http, reply
from vpn_sentinel.agent.net.http import Client
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.agent.remedies import gluetun
from vpn_sentinel.agent.remedies.failure import RemedyError
from vpn_sentinel.agent.remedies.qbittorrent import QBittorrent
from vpn_sentinel.agent.remedies.transmission import Transmission
from vpn_sentinel.runtime.secret import Secret

PASSWORD = Secret("pa55&word=")


def client() -> Client:
    return Client(names=HostResolver())


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: str


def parse(text: str) -> Request:
    head, _, body = text.partition("\r\n\r\n")
    first, *lines = head.split("\r\n")
    method, target, _ = first.split(" ")
    headers = {k.lower(): v for k, _, v in (line.partition(": ") for line in lines)}
    url = urlsplit(target)
    return Request(method, url.path, parse_qs(url.query), headers, body)


# --- gluetun ----------------------------------------------------------------------------------------------------------


async def no_wait(_: float) -> None:
    await asyncio.sleep(0)


async def test_gluetun_is_stopped_and_started() -> None:
    def respond(text: str) -> bytes:
        asked = parse(text)
        if asked.headers.get("x-api-key") != "k":
            return reply("Unauthorized", 401)
        return reply(json.dumps({"outcome": json.loads(asked.body)["status"]}))

    async with http(respond) as (port, got):
        at = f"http://127.0.0.1:{port}"
        await gluetun.restart(client(), at, {"X-API-Key": "k"}, no_wait)
        asked = [parse(g) for g in got]
        assert [(a.method, a.path, json.loads(a.body)) for a in asked] == [
            ("PUT", "/v1/vpn/status", {"status": "stopped"}),
            ("PUT", "/v1/vpn/status", {"status": "running"}),
        ]
        with pytest.raises(RemedyError, match="PUT /v1/vpn/status"):
            await gluetun.restart(client(), at, {}, no_wait)


async def test_gluetun_that_is_not_there_or_fails() -> None:
    async with http(lambda _: reply("no", 500)) as (port, _):
        with pytest.raises(RemedyError, match="status 500"):
            await gluetun.restart(client(), f"http://127.0.0.1:{port}", {}, no_wait)
    with pytest.raises(RemedyError, match="gluetun: "):
        await gluetun.restart(client(), f"http://127.0.0.1:{port}", {}, no_wait)


# --- qBittorrent ------------------------------------------------------------------------------------------------------


@dataclass
class QBit:
    """Version 4 or 5, with or without a login."""

    version: int
    login: bool
    torrents: dict[str, str] = field(default_factory=dict)

    def respond(self, text: str) -> bytes:
        asked = parse(text)
        form = parse_qs(asked.body)
        if asked.path == "/api/v2/auth/login":
            well = form == {"username": ["admin"], "password": [PASSWORD.reveal()]}
            return reply("Ok.", Set_Cookie="SID=abc123; HttpOnly; path=/") if well else reply("Fails.")
        if self.login and asked.headers.get("cookie") != "SID=abc123":
            return reply("Forbidden", 403)
        stop, start = (("stop", "start"), ("pause", "resume"))[self.version == 4]
        match asked.path.removeprefix("/api/v2/torrents/"):
            case "info":
                first, most = int(asked.query["offset"][0]), int(asked.query["limit"][0])
                page = list(self.torrents.items())[first : first + most]
                return reply(json.dumps([{"hash": h, "state": s, "name": "n" * 300} for h, s in page]))
            case verb if verb in (stop, start) and asked.method == "POST":
                chosen = self.torrents if form["hashes"] == ["all"] else form["hashes"][0].split("|")
                rest = "stoppedUP" if self.version == 5 else "pausedUP"
                self.torrents.update(dict.fromkeys(chosen, rest if verb == stop else "uploading"))
                return reply("")
        return reply("Not Found", 404)


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("login", [True, False])
async def test_qbittorrent_pauses_all_and_resumes_those_that_ran(version: int, login: bool) -> None:
    rest = "stoppedDL" if version == 5 else "pausedDL"
    program = QBit(version, login, {f"{n:040x}": "stalledUP" if n % 3 else rest for n in range(450)})
    before = {h for h, state in program.torrents.items() if state != rest}
    async with http(program.respond) as (port, _):
        bit = QBittorrent(client(), f"http://127.0.0.1:{port}", "admin" if login else "", PASSWORD)
        running = await bit.pause()
        assert set(running) == before
        assert {s.removesuffix("UP").removesuffix("DL") for s in program.torrents.values()} <= {"stopped", "paused"}
        await bit.resume(running)
        assert {h for h, state in program.torrents.items() if state == "uploading"} == before


async def test_qbittorrent_says_what_is_wrong() -> None:
    program = QBit(5, True)
    async with http(program.respond) as (port, _):
        at = f"http://127.0.0.1:{port}"
        with pytest.raises(RemedyError, match="refuses user or password"):
            await QBittorrent(client(), at, "admin", Secret("wrong")).pause()
        with pytest.raises(RemedyError, match="wants a login"):
            await QBittorrent(client(), at, "", Secret("")).pause()
    with pytest.raises(RemedyError, match=f"127.0.0.1:{port}") as failed:
        await QBittorrent(client(), at, "admin", PASSWORD).pause()
    assert PASSWORD.reveal() not in str(failed.value)


@pytest.mark.parametrize("body", ["", "{}", "[1]", "<html>", "[" * 100_000, '[{"state": []}]'])
async def test_qbittorrent_stops_even_when_its_list_is_nonsense(body: str) -> None:
    asked: list[str] = []

    def respond(text: str) -> bytes:
        asked.append(parse(text).path)
        return reply(body if asked[-1].endswith("info") else "")

    async with http(respond) as (port, _):
        assert await QBittorrent(client(), f"http://127.0.0.1:{port}", "", Secret("")).pause() == ()
    assert asked[-1] == "/api/v2/torrents/stop"


# --- Transmission -----------------------------------------------------------------------------------------------------


@dataclass
class Daemon:
    torrents: dict[str, int]
    session: str = "s1"

    def respond(self, text: str) -> bytes:
        asked = parse(text)
        login = "Basic " + base64.b64encode(f"anna:{PASSWORD.reveal()}".encode()).decode()
        if asked.headers.get("authorization") != login:
            return reply("Unauthorized", 401)
        if asked.headers.get("x-transmission-session-id") != self.session:
            return reply("Conflict", 409, X_Transmission_Session_Id=self.session)
        call = json.loads(asked.body)
        found: dict[str, object] = {}
        ids = call["arguments"].get("ids", list(self.torrents))
        match call["method"]:
            case "torrent-get":
                found = {"torrents": [{"hashString": h, "status": s} for h, s in self.torrents.items()]}
            case "torrent-stop":
                self.torrents.update(dict.fromkeys(ids, 0))
            case "torrent-start":
                self.torrents.update(dict.fromkeys(ids, 4))
        return reply(json.dumps({"result": "success", "arguments": found}))


async def test_transmission_pauses_all_and_resumes_those_that_ran() -> None:
    daemon = Daemon({"a": 6, "b": 0, "c": 4})
    async with http(daemon.respond) as (port, got):
        program = Transmission(client(), f"http://127.0.0.1:{port}", "anna", PASSWORD)
        assert await program.pause() == ("a", "c")
        assert daemon.torrents == {"a": 0, "b": 0, "c": 0}
        daemon.session = "s2"  # it runs out now and then
        await program.resume(("a", "c"))
        assert daemon.torrents == {"a": 4, "b": 0, "c": 4}
        before = len(got)
        await program.resume(())
        assert len(got) == before, "an empty list of ids would start all"
        assert {parse(g).path for g in got} == {"/transmission/rpc"}


async def test_transmission_says_what_is_wrong() -> None:
    async with http(Daemon({}).respond) as (port, _):
        with pytest.raises(RemedyError, match="refuses user or password"):
            await Transmission(client(), f"http://127.0.0.1:{port}", "anna", Secret("x")).pause()
    async with http(lambda _: reply("Conflict", 409, X_Transmission_Session_Id="never")) as (port, got):
        with pytest.raises(RemedyError, match="status 409"):
            await Transmission(client(), f"http://127.0.0.1:{port}/rpc", "", Secret("")).pause()
        assert parse(got[0]).path == "/rpc"
    for body in ("", "[]", '{"result": "no"}'):
        async with http(lambda _, body=body: reply(body)) as (port, _):
            with pytest.raises(RemedyError, match="Transmission"):
                await Transmission(client(), f"http://127.0.0.1:{port}", "", Secret("")).pause()
