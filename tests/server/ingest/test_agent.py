"""An agent's session: by WebSocket, by POST, and the UDP echo that it is told of."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select

from tests.conftest import until
from tests.server.ingest.conftest import EXIT, KEY, SECRET, Build, House, Socket
from tests.server.ingest.test_keepalive import Broken
from vpn_sentinel.server.access import create_token, revoke_token
from vpn_sentinel.server.ingest import router
from vpn_sentinel.server.ingest.pulse import PulseProtocol
from vpn_sentinel.server.ingest.pulse_registry import PulseRegistry
from vpn_sentinel.server.ingest.session import Sessions
from vpn_sentinel.server.rate_limit import RateLimit
from vpn_sentinel.server.store.schema import actions, observations
from vpn_sentinel.server.store.store import Store, StoreUnavailable
from vpn_sentinel.wire import echo, limits
from vpn_sentinel.wire.messages import fingerprint

Connect = Callable[..., Socket]
START = 1_800_000_000.0
DAY = 86400.0


def hello(**more: Any) -> dict[str, Any]:
    return {
        "type": "hello", "protocol": 1, "client_id": "nl", "spool": "s1", "version": "2.0.0", "interval": 30.0,
        "wall": START, **more,
    }  # fmt: skip


def saw(address: str = EXIT) -> dict[str, Any]:
    link = {"name": "wg0", "present": True, "up": True}
    canary = {"probe": "default", "target": "echo", "family": 4, "answer": "answered", "path": "tunnel"}
    return {"trigger": "timer", "link": link, "canaries": [{**canary, "address": address}]}


def reports(*seqs: int, age: float = 0.0, observation: Any = None, **more: Any) -> dict[str, Any]:
    items = [{"seq": s, "age": age, "observation": observation or saw()} for s in seqs]
    return {"type": "reports", "items": items, **more}


def exchange(*seqs: int, greeting: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"type": "exchange", "hello": greeting or hello(), "reports": reports(*seqs, **more)}


async def greeted(socket: Socket, **more: Any) -> Any:
    assert (await socket.next())["type"] == "websocket.accept"
    socket.say(hello(**more))
    return await socket.hears()


async def refused(socket: Socket) -> tuple[str, bool, int]:
    """Why the server closed, whether to come back, and the close code."""
    said = await socket.hears()
    closed = await socket.next()
    assert (said["type"], closed["type"]) == ("refused", "websocket.close")
    assert len(closed["reason"].encode()) <= 123
    return said["reason"], said["retry"], closed["code"]


class Noting(Sessions):
    """The real sessions, which note in which turn of the loop each message is taken."""

    def __init__(self, sessions: Sessions) -> None:
        self.__dict__.update(sessions.__dict__)
        self.turn = 0
        self.taken: list[int] = []

    async def store(self, *args: Any, **more: Any) -> Any:
        self.taken.append(self.turn)
        return await super().store(*args, **more)

    async def count(self) -> None:
        while True:
            self.turn += 1
            await asyncio.sleep(0)


async def test_of_large_messages_one_is_read_in_a_turn_of_the_loop(build: Build) -> None:
    """However many arrive at once: what else is due, a deadline or a leak's message, waits for one of them at most."""
    house = build(RATE_LIMIT_REQUESTS="1000")
    noting = house.router._sessions = Noting(house.router._sessions)
    counting = asyncio.create_task(noting.count())
    bodies = [exchange(*range(1, 101), greeting=hello(client_id=f"t{n}")) for n in range(20)]
    assert len(json.dumps(bodies[0])) > router.LARGE_MESSAGE_BYTES
    answers = await asyncio.gather(*(house.exchange(body) for body in bodies))
    counting.cancel()
    assert {a.status for a in answers} == {200}
    assert len(set(noting.taken)) == len(noting.taken) == 20


# -- by WebSocket


async def test_an_agent_is_greeted_and_its_reports_acknowledged(house: House, connect: Connect) -> None:
    socket = connect(house)
    welcome = await greeted(socket)
    assert (welcome["type"], welcome["ack"], welcome["wall"], welcome["seen_from"]) == ("welcome", 0, START, EXIT)
    ident = echo.ident_for(SECRET, "nl")
    assert welcome["echo"] == {"port": 5000, "id": ident.hex(), "key": echo.key_for(SECRET, ident).hex()}
    socket.say(reports(1, 2))
    assert await socket.hears() == {"type": "ack", "seq": 2}
    assert await house.stored() == [1, 2]
    socket.say(reports(3, 7), binary=True)
    assert await socket.hears() == {"type": "ack", "seq": 7}
    row = await house.tunnel()
    assert (row.state, row.seq, row.deadline) == ("protected", 7, START + 91)


async def test_an_agent_that_comes_back_is_told_what_is_stored(house: House, connect: Connect) -> None:
    assert (await house.exchange(exchange(1, 2))).status == 200
    assert (await greeted(connect(house)))["ack"] == 2
    assert (await greeted(connect(house), spool="s2"))["ack"] == 0
    assert (await greeted(connect(house), client_id="se"))["ack"] == 0


async def test_of_too_many_connections_of_one_tunnel_the_oldest_ends(house: House, connect: Connect) -> None:
    other = connect(house)
    await greeted(other, client_id="se")
    sockets = [connect(house) for _ in range(router.MAX_SOCKETS_PER_TUNNEL + 1)]
    for socket in sockets:
        await greeted(socket)
    assert await refused(sockets[0]) == ("too many connections of this tunnel", True, 1013)
    for seq, socket in enumerate((*sockets[1:], other), 1):
        socket.say(reports(seq))
        assert await socket.hears() == {"type": "ack", "seq": seq}
    sockets[1].sent.put_nowait({"type": "websocket.disconnect", "code": 1006})
    await until(lambda: len(house.router._sockets_by_tunnel["nl"]) < router.MAX_SOCKETS_PER_TUNNEL)
    await greeted(connect(house))  # for which nobody has to go
    sockets[2].say(reports(100))
    assert await sockets[2].hears() == {"type": "ack", "seq": 100}


async def test_who_comes_again_and_again_with_a_tunnels_token_waits(
    house: House, connect: Connect, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(house.router, "_connections", RateLimit(3))
    mine, other = [await create_token(store, name, shared=False, now=START) for name in ("nl", "se")]
    for _ in range(3):
        await greeted(connect(house, key=mine))
    denied = await connect(house, key=mine, denial=True).next()
    assert (denied["type"], denied["status"]) == ("websocket.http.response.start", 429)
    assert dict(denied["headers"])[b"retry-after"] == b"20"
    await greeted(connect(house, key=other), client_id="se")
    for _ in range(5):  # by a shared key, behind which are many
        await greeted(connect(house))


async def test_what_is_remembered_of_a_tunnel_goes_back_to_its_agent_and_to_no_other(
    house: House, connect: Connect
) -> None:
    """A stack that was made anew without its volume: the agent starts with an empty folder, and another spool."""
    beside = {"probe": "physical", "target": "echo", "family": 4, "answer": "answered", "path": "outside"}
    through = {"probe": "default", "target": "echo", "family": 4, "answer": "answered", "path": "tunnel"}
    worked = {
        "trigger": "timer",
        "link": {"name": "wg0", "present": True, "up": True},
        "interfaces": ["eth0", "wg0"],
        "canaries": [{**through, "address": EXIT}, {**beside, "address": "91.10.20.30"}],
    }
    assert (await house.exchange(exchange(1, observation=worked))).status == 200
    known = (await greeted(connect(house), spool="s2"))["known"]
    assert known == {"device": "wg0", "beside": ["eth0"], "home": ["91.10.20.30/32"]}
    assert (await greeted(connect(house), client_id="se"))["known"] is None
    assert (await greeted(connect(house), role="reference", site="berlin"))["known"] is None


async def test_an_ack_follows_the_commit(build: Build, store: Store, connect: Connect) -> None:
    broken = Broken(store, StoreUnavailable("disk_full", "no space left"))
    socket = connect(build(broken))
    await greeted(socket)
    socket.say(reports(1))
    assert await refused(socket) == ("the database does not take reports now; nothing was stored", True, 1013)


async def test_a_message_of_no_reports_is_acknowledged_as_such(house: House, connect: Connect) -> None:
    socket = connect(house)
    await greeted(socket)
    socket.say(reports())
    assert await socket.hears() == {"type": "ack", "seq": 0}
    assert await house.stored() == []


@pytest.mark.parametrize("key", [None, "wrong"])
@pytest.mark.parametrize("denial", [True, False])
async def test_without_its_key_no_agent_comes_in(lobby: House, connect: Connect, key: str | None, denial: bool) -> None:
    socket = connect(lobby, key=key, denial=denial)
    if denial:
        start, body = await socket.next(), await socket.next()
        assert (start["type"], start["status"]) == ("websocket.http.response.start", 401 if key is None else 403)
        assert json.loads(body["body"])["status"] == start["status"]
    else:
        closed = await socket.next()
        assert (closed["type"], closed["code"]) == ("websocket.close", 1008)


async def test_a_connection_that_is_gone_before_it_began_is_left(lobby: House) -> None:
    async def receive() -> Any:
        return {"type": "websocket.disconnect"}

    scope = lobby.scope("websocket", "/api/v1/agent", (EXIT, 1), KEY)
    await lobby.router(scope, receive, None)


async def test_an_agent_that_hangs_up_before_its_hello_is_left(lobby: House, connect: Connect) -> None:
    socket = connect(lobby)
    assert (await socket.next())["type"] == "websocket.accept"
    socket.sent.put_nowait({"type": "websocket.disconnect", "code": 1006})


async def test_an_agent_that_hangs_up_before_its_answer_harms_nobody(house: House, connect: Connect) -> None:
    socket = connect(house, broken=True)
    assert (await socket.next())["type"] == "websocket.accept"
    socket.say(hello())
    socket.say(reports(1))
    async with asyncio.timeout(5):
        while await house.stored() != [1]:  # noqa: ASYNC110 - the database has no event for it
            await asyncio.sleep(0)


async def test_a_tunnels_token_speaks_for_that_tunnel(house: House, connect: Connect, store: Store) -> None:
    token = await create_token(store, "nl", shared=False, now=START)
    assert (await greeted(connect(house, key=token)))["type"] == "welcome"
    socket = connect(house, key=token)
    assert (await socket.next())["type"] == "websocket.accept"
    socket.say(hello(client_id="se"))
    assert await refused(socket) == ("this token may only report as nl", False, 1008)


async def test_a_tunnels_own_token_speaks_for_no_other_site(house: House, store: Store) -> None:
    token = await create_token(store, "nl", shared=False, now=START)
    for site, key, status in (("attic", token, 403), ("nl", token, 200), ("attic", KEY, 200)):
        beside = hello(role="reference", site=site)
        assert (await house.exchange(exchange(1, greeting=beside), key=key)).status == status
    assert (await house.exchange(exchange(2, greeting=hello(site="attic")), key=token)).status == 200


async def test_a_token_that_is_revoked_ends_the_session(house: House, connect: Connect, store: Store) -> None:
    token = await create_token(store, "nl", shared=False, now=START)
    socket = connect(house, key=token)
    await greeted(socket)
    socket.say(reports(1))
    assert (await socket.hears())["seq"] == 1
    await revoke_token(store, "nl", START)
    house.clock.now += 6
    socket.say(reports(2))
    assert await refused(socket) == ("this key is not known here any more", False, 1008)
    assert await house.stored() == [1]


FIRST_WORDS: dict[str, tuple[Any, str, int]] = {
    "not JSON": ("{", "the message is not JSON", 1008),
    "nothing": ("", "the message is not JSON", 1008),
    "nested beyond reason": ('{"type": "hello", "x": ' + "[" * 100_000, "the message is not JSON", 1008),
    "reports first": (reports(1), "a hello comes first", 1008),
    "an exchange": (exchange(1), "a hello comes first", 1008),
    "a server's word": ({"type": "ack", "seq": 1}, "Invalid value", 1008),
    "too large": (" " * (limits.MAX_BODY_BYTES + 1), "a message takes at most", 1009),
    "a wrong word without end": ({"type": "日" * 10_000}, "Invalid value", 1008),
}


@pytest.mark.parametrize(("said", "reason", "code"), FIRST_WORDS.values(), ids=FIRST_WORDS.keys())
async def test_an_agent_that_begins_wrongly(lobby: House, connect: Connect, said: Any, reason: str, code: int) -> None:
    socket = connect(lobby)
    assert (await socket.next())["type"] == "websocket.accept"
    socket.say(said)
    why, retry, closed = await refused(socket)
    assert why.startswith(reason)
    assert len(why) <= 300
    assert (retry, closed) == (False, code)


async def test_after_the_hello_come_only_reports(lobby: House, connect: Connect) -> None:
    socket = connect(lobby)
    await greeted(socket)
    socket.say(hello())
    assert await refused(socket) == ("after the hello only reports are expected", False, 1008)


# -- what a hello and reports may say, by either way

BAD_HELLOS: dict[str, tuple[dict[str, Any], str]] = {
    "a name of markup": ({"client_id": "<b>"}, "a name takes"),
    "an empty name": ({"client_id": ""}, "a name takes"),
    "a version with an escape": ({"version": "\x1b"}, "version"),
    "a version without end": ({"version": "9" * 65}, "version"),
    "a spool with a zero": ({"spool": "a\x00"}, "spool"),
    "a spool without end": ({"spool": "x" * 65}, "spool"),
    "a protocol from the future": ({"protocol": 2}, "protocol 2 is not known here"),
    "a protocol from before": ({"protocol": 0}, "protocol 0"),
    "no interval": ({"interval": 0.0}, "interval"),
    "an interval below zero": ({"interval": -30.0}, "interval"),
    "an interval of weeks": ({"interval": 7 * DAY}, "interval"),
    "a clock beyond all calendars": ({"wall": 1e300}, "wall is not a time"),
    "a clock before all of them": ({"wall": -1.0}, "wall is not a time"),
    "a grace of days": ({"policy": {"grace_down": 1e6}}, "grace"),
    "too many homes": ({"policy": {"home_networks": ["10.0.0.0/8"] * 65}}, "home_networks"),
    "a home that is none": ({"policy": {"home_networks": ["10.0.0.1/8"]}}, "home_networks"),
}


@pytest.mark.parametrize(("more", "reason"), BAD_HELLOS.values(), ids=BAD_HELLOS.keys())
async def test_a_hello_that_cannot_be(lobby: House, connect: Connect, more: dict[str, Any], reason: str) -> None:
    socket = connect(lobby)
    assert (await socket.next())["type"] == "websocket.accept"
    socket.say(hello(**more))
    why, retry, _ = await refused(socket)
    assert reason in why
    assert not retry
    answer = await lobby.exchange(exchange(1, greeting=hello(**more)))
    assert answer.status == 422
    assert reason in answer.json["detail"]


BAD_REPORTS: dict[str, tuple[dict[str, Any], str]] = {
    "more than a message takes": (reports(*range(1, 202)), "a message takes at most 200 reports"),
    "a number twice": (reports(1, 1), "seq 1 does not follow 1"),
    "numbers that fall": (reports(2, 1), "seq 1 does not follow 2"),
    "a number of zero": (reports(0), "seq 0 does not follow 0"),
    "a number beyond the database": (reports(2**63), "does not follow"),
    "an age below zero": (reports(1, age=-1.0), "age is not a duration"),
    "pending below zero": (reports(1, pending=-1), "pending and thinned"),
    "thinned below zero": (reports(1, thinned=-1), "pending and thinned"),
    "too many canaries": (reports(1, observation={**saw(), "canaries": saw()["canaries"] * 65}), "canaries"),
    "an interface of two lines": (reports(1, observation={**saw(), "interfaces": ["a\nb"]}), "interface"),
    "a family of 5": (
        reports(1, observation={"trigger": "timer", "canaries": [{**saw()["canaries"][0], "family": 5}]}),
        "family is 4 or 6",
    ),
}


@pytest.mark.parametrize(("said", "reason"), BAD_REPORTS.values(), ids=BAD_REPORTS.keys())
async def test_reports_that_cannot_be(lobby: House, connect: Connect, said: dict[str, Any], reason: str) -> None:
    socket = connect(lobby)
    await greeted(socket)
    socket.say(said)
    why, retry, code = await refused(socket)
    assert reason in why
    assert (retry, code) == (False, 1008)
    assert await lobby.stored() == []


async def test_a_full_message_is_taken(house: House) -> None:
    assert (await house.exchange(exchange(*range(1, 201)))).json["ack"] == 200


async def test_an_absurd_age_is_taken_as_a_year(house: House) -> None:
    """An agent whose clock began in 1970 must not be stuck with what it cannot report, nor date it before all times."""
    await house.exchange(exchange(1, age=1e300))
    (row,) = await house.store.read(select(observations.c.at))
    assert row.at == START - 366 * DAY


async def test_an_action_before_all_times_is_taken_as_a_year_old(house: House) -> None:
    absurd = {"name": "hook", "outcome": "done", "age": 9e11}
    await house.exchange(exchange(1, observation={**saw(), "actions": [absurd]}))
    (row,) = await house.store.read(select(actions.c.at))
    assert row.at == START - 366 * DAY


async def test_what_only_the_server_may_say_is_not_taken_from_an_agent(build: Build) -> None:
    house = build(HOME_NETWORKS="91.10.20.0/24")
    claimed = {"reported_from": "91.10.20.30", "reference_up": False, "unheard": True}
    claimed["port_check"] = {"address": "91.10.20.30", "port": 1, "answer": "lost"}
    await house.exchange(exchange(1, observation={**saw(), **claimed}))
    assert (await house.tunnel()).state == "protected"
    (row,) = await house.store.read(select(observations.c.body))
    assert not json.loads(row.body).keys() & claimed.keys()


async def test_an_agent_cannot_speak_with_the_servers_own_sight(house: House) -> None:
    answer = await house.exchange(exchange(1, observation={**saw(), "trigger": "pulse"}))
    assert answer.status == 422


async def test_a_wrong_clock_and_lost_rounds_are_told(house: House) -> None:
    await house.exchange(exchange(1, thinned=3, greeting=hello(wall=START + 3600)))
    codes = [f["code"] for f in json.loads((await house.tunnel()).findings)]
    assert codes == ["clock_skew", "observations_lost"]


# -- by POST


async def test_an_exchange_brings_reports_and_takes_the_welcome(house: House) -> None:
    answer = await house.exchange(exchange(1, 2, 5))
    assert answer.status == 200
    assert (answer.json["type"], answer.json["ack"], answer.json["seen_from"]) == ("welcome", 5, EXIT)
    assert answer.json["echo"]["port"] == 5000
    assert (await house.exchange(exchange())).json["ack"] == 5  # a question, no report
    assert (await house.exchange(exchange(1, 2))).json["ack"] == 5  # a replay
    assert await house.stored() == [1, 2, 5]


@pytest.mark.parametrize("said", [hello(), reports(1)])
async def test_by_post_only_an_exchange_is_taken(lobby: House, said: dict[str, Any]) -> None:
    answer = await lobby.exchange(said)
    assert (answer.status, answer.json["detail"]) == (422, "an exchange is needed")


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"key": None}, 401),
        ({"key": "wrong"}, 403),
        ({"content_type": "text/plain"}, 415),
        ({"content_length": "999999999"}, 413),
        ({"method": "PUT"}, 405),
        ({"body": b"{"}, 400),
        ({"body": b'{"type": "exchange"}'}, 422),
    ],
)
async def test_what_an_exchange_is_refused_for(lobby: House, more: dict[str, Any], status: int) -> None:
    assert (await lobby.exchange(**{"body": exchange(1), **more})).status == status


ALTERED = json.dumps(exchange(1)).encode().replace(b'"age"', b'"agx"')


@pytest.mark.parametrize(
    "body",
    [ALTERED, b"{", json.dumps(exchange(1, age=-1.0)).encode()],
    ids=["another field", "no JSON", "an age that is none"],
)
async def test_what_is_refused_is_named_so_that_its_sender_knows_it_again(lobby: House, body: bytes) -> None:
    answer = await lobby.exchange(body)
    assert answer.headers["vpn-sentinel-refused"] == fingerprint(body)


@pytest.mark.parametrize(
    "greeting", [hello(interval=0), hello(policy={"home_networks": ["10.0.0.1/8"]})], ids=["a value", "a shape"]
)
async def test_a_refused_greeting_is_no_word_on_the_reports(lobby: House, greeting: dict[str, Any]) -> None:
    answer = await lobby.exchange(exchange(1, greeting=greeting))
    assert (answer.status, "vpn-sentinel-refused" in answer.headers) == (422, False)


async def test_by_websocket_too_what_is_refused_is_named(lobby: House, connect: Connect) -> None:
    socket = connect(lobby)
    await greeted(socket)
    altered = json.dumps(reports(1)).replace('"age"', '"agx"')
    socket.sent.put_nowait({"type": "websocket.receive", "text": altered})
    assert (await socket.hears())["of"] == fingerprint(altered.encode())


async def test_each_agent_behind_one_address_has_its_own_rate(build: Build) -> None:
    house = build(SERVER_RATE_LIMIT_REQUESTS="2")
    assert [(await house.exchange(exchange(n))).status for n in (1, 2, 3)] == [200, 200, 429]
    assert (await house.exchange(exchange(1, greeting=hello(client_id="se")))).status == 200


async def test_one_customer_of_ipv6_has_the_rate_of_one_address(build: Build) -> None:
    house = build(SERVER_RATE_LIMIT_REQUESTS="2")

    async def from_address(n: int) -> int:
        return (await house.exchange(exchange(n), client=(f"2001:db8:0:1::{n}", 40000))).status

    assert [await from_address(n) for n in (1, 2, 3)] == [200, 200, 429]
    answer = await house.exchange(exchange(3), client=("2001:db8:0:2::1", 40000))
    assert answer.status == 200


async def test_each_agent_has_its_own_rate_of_bytes(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "BURST_BYTES", len(json.dumps(exchange(1))) + 10)
    house = build()
    assert (await house.exchange(exchange(1))).status == 200
    answer = await house.exchange(exchange(2))
    assert (answer.status, answer.json["detail"]) == (429, "too many bytes a minute from this tunnel")
    assert (await house.exchange(exchange(1, greeting=hello(client_id="se")))).status == 200
    house.clock.now += float(answer.headers["retry-after"])
    assert (await house.exchange(exchange(2))).status == 200


async def test_too_many_that_wait_are_sent_away_with_a_time(lobby: House) -> None:
    class Full:
        def __len__(self) -> int:
            return 5000

    waiting, lobby.tracker._commits._reports = lobby.tracker._commits._reports, Full()  # type: ignore[assignment]
    answer = await lobby.exchange(exchange(1))
    lobby.tracker._commits._reports = waiting
    assert (answer.status, answer.headers["retry-after"]) == (503, "2")
    assert answer.json["detail"] == "too many reports wait; nothing was stored"


# -- the echo


class Wire:
    """What a datagram transport would send."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, tuple[str, int]]] = []

    def sendto(self, data: bytes, addr: tuple[str, int]) -> None:
        self.sent.append((data, addr))


def test_the_echo_answers_what_is_genuine_and_nothing_else() -> None:
    pulse_registry = PulseRegistry(SECRET)
    wire, protocol = Wire(), PulseProtocol(pulse_registry, lambda: 0.0)
    pulse_registry.greet("nl", "key")
    ident = echo.ident_for(SECRET, "nl")
    key = echo.key_for(SECRET, ident)
    question = echo.request(ident, b"12345678", key)
    protocol.datagram_received(question, (EXIT, 4711))  # before there is a way to answer
    protocol.connection_made(wire)  # type: ignore[arg-type]
    for garbage in (b"", b"x" * 64, question[:-1], question + b"x"):
        protocol.datagram_received(garbage, (EXIT, 4711))
    assert wire.sent == []
    protocol.datagram_received(question, (EXIT, 4711))
    ((answer, to),) = wire.sent
    assert to == (EXIT, 4711)
    assert str(echo.read_reply(answer, ident, b"12345678", key)) == EXIT
