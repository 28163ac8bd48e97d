"""gluetun's control and health servers are the test's, over real sockets."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Any

import pytest

from tests.agent.doubles import http, reply, tcp
from tests.conftest import until
from vpn_sentinel.agent.introspect.gluetun import Gluetun, Login, found_here, port_in, word
from vpn_sentinel.agent.net.http import Client
from vpn_sentinel.agent.net.resolver import HostResolver
from vpn_sentinel.domain.observation import Observation, Trigger
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.wire.codec import check_observation

CLIENT = Client(names=HostResolver())
GOOD = {
    "/v1/vpn/status": {"status": "running"},
    "/v1/publicip/ip": {"public_ip": "185.65.134.10", "country": "Netherlands"},
    "/v1/portforward": {"port": 45678, "ports": [45678]},
    "/v1/dns/status": {"status": "running"},
}


def says(said: dict[str, Any]) -> Callable[[str], bytes]:
    def respond(request: str) -> bytes:
        method, path = request.split()[:2]
        assert method == "GET"
        found = said.get(path, 404)
        return reply("", found) if isinstance(found, int) else reply(json.dumps(found))

    return respond


def at(port: int, login: Login | None = None, rang: list[None] | None = None, health: str | None = None) -> Gluetun:
    noticed: list[None] = [] if rang is None else rang
    return Gluetun(
        CLIENT, f"http://127.0.0.1:{port}", login or Login(), lambda: noticed.append(None),
        health=health, every=(0.01, 0.01), retry_after=0.0,
    )  # fmt: skip


async def test_an_answer_that_is_nested_too_deep_makes_no_sense() -> None:
    async with http(lambda _: reply("[" * 60_000)) as (port, _):
        gluetun = at(port)
        await gluetun.look()
        claim = gluetun.claim()
        assert claim is not None
        assert claim.status.startswith("error: ")
        assert not await found_here(CLIENT, control=f"http://127.0.0.1:{port}", health="http://127.0.0.1:1/")


async def test_it_tells_status_address_and_port() -> None:
    async with http(says(GOOD)) as (port, got):
        gluetun = at(port)
        assert gluetun.claim() is None
        await gluetun.look()
    claim = gluetun.claim()
    assert claim is not None
    assert (claim.source, claim.status, claim.address) == ("gluetun", "running", ip_address("185.65.134.10"))
    assert gluetun.port == 45678
    assert {r.split()[1] for r in got} == set(GOOD)


async def test_an_older_release_tells_its_port_by_the_other_route() -> None:
    said = {**GOOD, "/v1/portforward": 404, "/v1/openvpn/portforwarded": {"port": 1234}}
    async with http(says(said)) as (port, got):
        gluetun = at(port)
        await gluetun.look()
        await gluetun.look()
    assert gluetun.port == 1234
    assert [r.split()[1] for r in got].count("/v1/portforward") == 1


LOGINS = {
    "a key": (Login(key=Secret("k-s3cret")), "X-API-Key: k-s3cret"),
    "a login": (Login(user="anna", password=Secret("p1")), "Authorization: Basic YW5uYTpwMQ=="),
}


@pytest.mark.parametrize(("login", "header"), LOGINS.values(), ids=LOGINS.keys())
async def test_it_shows_its_login(login: Login, header: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with http(says({**GOOD, "/v1/vpn/status": 401})) as (port, got):
        gluetun = at(port, login)
        await gluetun.look()
        await gluetun.look()
    assert header in got[0]
    assert "s3cret" not in repr(login) + repr(gluetun) + caplog.text
    claim = gluetun.claim()
    assert claim is not None
    assert claim.status == "error: it refuses to show its status"
    told = [r.message for r in caplog.records if "VPN_SENTINEL_GLUETUN_API_KEY" in r.message]
    assert len(told) == 1


async def test_one_that_runs_without_an_address_is_connecting() -> None:
    async with http(says({**GOOD, "/v1/publicip/ip": {"public_ip": ""}})) as (port, _):
        gluetun = at(port)
        await gluetun.look()
    claim = gluetun.claim()
    assert claim is not None
    assert (claim.status, claim.address) == ("running (no public address yet)", None)


async def test_whatever_it_says_can_be_reported() -> None:
    long = {"status": "\x1b" + "running" * 99}
    async with (
        http(says({**GOOD, "/v1/vpn/status": long, "/v1/dns/status": long})) as (port, _),
        http(lambda _: reply("\n" + "failed " * 99, 500)) as (health, _),
    ):
        gluetun = at(port, health=f"http://127.0.0.1:{health}/")
        await gluetun.look()
    claim = gluetun.claim()
    assert claim is not None
    check_observation(Observation(trigger=Trigger.TIMER, claims=(claim,), forwarded_port=gluetun.port))


async def test_a_route_that_is_refused_leaves_the_others() -> None:
    async with http(says({**GOOD, "/v1/portforward": 401, "/v1/dns/status": 401})) as (port, got):
        gluetun = at(port)
        await gluetun.look()
    claim = gluetun.claim()
    assert claim is not None
    assert (claim.status, claim.address, gluetun.port) == ("running", ip_address("185.65.134.10"), None)
    assert "/v1/openvpn/portforwarded" not in {r.split()[1] for r in got}


async def test_a_change_rings_and_an_outage_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    said = dict(GOOD)
    rang: list[None] = []
    async with http(says(said)) as (port, got), running(at(port, rang=rang)) as gluetun:
        await until(lambda: len(got) > 8)
        assert len(rang) == 1  # a port is known now
        rang.clear()
        said["/v1/portforward"] = {"port": 45999, "ports": [45999]}
        await until(lambda: len(rang) == 1)
        assert gluetun.port == 45999
        said["/v1/vpn/status"] = {"status": "stopped"}
        said["/v1/publicip/ip"] = {"public_ip": ""}
        await until(lambda: len(rang) == 2)
        claim = gluetun.claim()
        assert claim is not None
        assert (claim.status, claim.address) == ("stopped", None)
        said["/v1/vpn/status"] = 500
        await until(lambda: len(rang) == 3)
        asked = len(got)
        await until(lambda: len(got) > asked + 2)
    assert len([r for r in caplog.records if "does not serve" in r.message]) == 1


@asynccontextmanager
async def running(gluetun: Gluetun) -> AsyncIterator[Gluetun]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(gluetun.run())
        try:
            yield gluetun
        finally:
            task.cancel()


async def test_what_its_health_says_stands_behind_the_status() -> None:
    async with (
        http(says({**GOOD, "/v1/dns/status": {"status": "stopped"}})) as (port, _),
        http(lambda _: reply("lookup failed:\n i/o timeout", 500)) as (health, _),
    ):
        gluetun = at(port, health=f"http://127.0.0.1:{health}/")
        await gluetun.look()
    claim = gluetun.claim()
    assert claim is not None
    assert claim.status == "running (unhealthy: lookup failed:  i/o timeout; DNS stopped)"


BROKEN = {
    "no JSON": reply("<html>"),
    "no object": reply("[1]"),
    "no text": reply('{"status": 7}'),
    "huge": reply(b"x" * 200_000),
    "no HTTP": b"hello\r\n\r\n",
    "nothing": b"",
}


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN.keys())
async def test_a_broken_answer_is_an_error(raw: bytes) -> None:
    async with http(lambda _: raw) as (port, _):
        gluetun = at(port)
        await gluetun.look()
    claim = gluetun.claim()
    assert claim is not None
    assert claim.status.startswith("error: ")


async def test_one_that_is_slow_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vpn_sentinel.agent.introspect.gluetun.ANSWER_TIMEOUT_S", 0.05)

    async def hang(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read()

    async with tcp(hang) as port:
        gluetun = at(port)
        await gluetun.look()
    claim = gluetun.claim()
    assert claim is not None
    assert claim.status == "error: no answer within 0.05 s"


PORTS = {
    "the port": ({"port": 45678}, 45678),
    "the first of several": ({"port": 0, "ports": [45678, 45679]}, 45678),
    "none": ({"port": 0}, None),
    "too large": ({"port": 70000}, None),
    "a text": ({"port": "45678"}, None),
    "true": ({"port": True, "ports": 5}, None),
}


@pytest.mark.parametrize(("said", "port"), PORTS.values(), ids=PORTS.keys())
def test_ports(said: dict[str, Any], port: int | None) -> None:
    assert port_in(said) == port


def test_words_are_short_and_printable() -> None:
    assert word("run\x1b[31mning" + "x" * 200) == ("run [31mning" + "x" * 200)[:80]
    assert (word(""), word("\n"), word(7)) == (None, None, None)


async def test_one_that_nobody_named_is_only_found(free_port: int) -> None:
    nobody = f"http://127.0.0.1:{free_port}"
    assert not await found_here(CLIENT, control=nobody, health=nobody)
    async with http(says({"/v1/vpn/status": 401})) as (port, _):
        assert await found_here(CLIENT, control=f"http://127.0.0.1:{port}", health=nobody)
    async with http(lambda _: reply("", 200)) as (port, _):
        assert await found_here(CLIENT, control=nobody, health=f"http://127.0.0.1:{port}")
