"""The replaced system's report, from the door to the database."""

import json
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any

import pytest
from sqlalchemy import Executable, Row

from tests.server.ingest.conftest import EXIT, KEY, Build, House
from vpn_sentinel.runtime.settings import Source
from vpn_sentinel.server.access import create_token, revoke_token
from vpn_sentinel.server.ingest.admission import Admission
from vpn_sentinel.server.settings import ServerSettings
from vpn_sentinel.server.store.store import Store, StoreUnavailable
from vpn_sentinel.wire import limits

START = 1_800_000_000.0


async def test_a_keepalive_is_answered_as_ever_and_stored(house: House) -> None:
    answer = await house.keepalive(
        {"client_id": "nl", "public_ip": EXIT, "client_version": "1.0", "dns_test": {"location": "NL", "colo": "AMS"}}
    )
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert answer.json == {
        "status": "ok", "message": "Keepalive received", "server_time": "2027-01-15T08:00:00+00:00",
    }  # fmt: skip
    row = await house.tunnel()
    assert (row.source, row.version, row.exit4, row.dns_loc, row.dns_colo) == ("keepalive", "1.0", EXIT, "NL", "AMS")
    assert row.deadline == START + 15 * 60


async def test_where_it_came_from_is_seen_first_hand(build: Build) -> None:
    house = build(HOME_NETWORKS="91.10.20.0/24")
    assert (await house.keepalive(client=("91.10.20.30", 1))).status == 200
    assert (await house.tunnel()).state == "leaking"
    assert (await house.keepalive({"client_id": "lan", "public_ip": EXIT}, client=("192.168.1.7", 1))).status == 200
    assert (await house.tunnel("lan")).state == "protected"


async def test_a_wrong_clock_is_told(build: Build) -> None:
    house = build(HOME_NETWORKS="91.10.20.0/24")
    await house.keepalive({"client_id": "nl", "public_ip": EXIT, "timestamp": START - 7200})
    assert json.loads((await house.tunnel()).findings)[0]["code"] == "clock_skew"


# -- the door


async def test_without_a_key_nobody_comes_in(lobby: House) -> None:
    answer = await lobby.keepalive(key=None)
    assert (answer.status, answer.headers["content-type"]) == (401, "application/problem+json")
    assert answer.headers["vpn-sentinel"] == "1"  # by which an agent knows whose word it is
    assert answer.json == {
        "status": 401, "title": "Unauthorized", "detail": "a key is needed: send it in the header X-API-Key",
        "type": "about:blank",
    }  # fmt: skip


@pytest.mark.parametrize("key", ["wrong", KEY + "x", "vs_" + "x" * 43])
async def test_with_a_wrong_key_nobody_does(lobby: House, key: str) -> None:
    answer = await lobby.keepalive(key=key)
    assert (answer.status, answer.json["detail"]) == (403, "this key is not known here")
    assert key not in answer.body.decode()
    assert await lobby.stored() == []


async def test_a_bearer_token_is_a_key(house: House) -> None:
    assert (await house.keepalive(key=None, authorization=f"Bearer {KEY}")).status == 200


async def test_who_guesses_keys_is_slowed_down_and_cannot_tell_when_one_is_right(house: House) -> None:
    seen = [(await house.keepalive(key="wrong")).status for _ in range(21)]
    assert seen == [403] * 20 + [429]
    refused = await house.keepalive(key="wrong")
    assert refused.status == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert (await house.keepalive()).status == 429
    assert (await house.keepalive(client=("146.70.9.9", 1))).status == 200
    assert (await house.keepalive(key="wrong", client=("146.70.9.9", 1))).status == 403
    house.clock.now += 61
    assert (await house.keepalive()).status == 200


async def test_a_guessing_neighbour_locks_nobody_out(house: House, store: Store) -> None:
    token = await create_token(store, "nl", shared=False, now=START)
    assert (await house.keepalive()).status == 200
    assert (await house.keepalive(key=token)).status == 200
    assert [(await house.keepalive(key="wrong")).status for _ in range(30)][-1] == 429
    assert (await house.keepalive()).status == 200
    assert (await house.keepalive(key=token)).status == 200


async def test_every_line_of_a_proxy_counts(house: House) -> None:
    admission = Admission(
        ServerSettings.read(Source(env={"VPN_SENTINEL_API_KEY": KEY, "VPN_SENTINEL_TRUSTED_PROXIES": "172.17.0.0/16"})),
        house.access,
        house.clock,
    )
    scope = house.scope("http", "/api/v1/keepalive", ("172.17.0.2", 1), KEY, x_forwarded_for="1.2.3.4, 146.70.1.7")
    scope["headers"].append((b"x-forwarded-for", b"172.17.0.9"))
    assert (await admission.admit(scope)).address == ip_address("146.70.1.7")
    scope["headers"].append((b"x-forwarded-for", b"146.70.1.8"))
    assert (await admission.admit(scope)).address == ip_address("146.70.1.8")


async def test_who_reports_too_often_is_told_when_to_come_back(build: Build) -> None:
    house = build(SERVER_RATE_LIMIT_REQUESTS="3")
    assert [(await house.keepalive()).status for _ in range(4)] == [200, 200, 200, 429]
    refused = await house.keepalive()
    assert refused.headers["retry-after"] == "20"
    assert refused.json["detail"] == "more than 3 reports a minute from here"
    assert (await house.keepalive(client=("146.70.9.9", 1))).status == 200
    house.clock.now += 21
    assert (await house.keepalive()).status == 200


async def test_who_has_no_key_does_not_use_up_the_rate(build: Build) -> None:
    house = build(SERVER_RATE_LIMIT_REQUESTS="1")
    for _ in range(5):
        await house.keepalive(key=None)
        await house.keepalive(key="wrong")
    assert (await house.keepalive()).status == 200


async def test_the_allow_list_comes_before_the_key(build: Build) -> None:
    house = build(SERVER_ALLOWED_IPS="10.0.0.0/8, 2a0d::/16")
    for client, status in (("146.70.1.2", 403), ("10.1.2.3", 200), ("::ffff:10.1.2.3", 200), ("2a0d::7", 200)):
        assert (await house.keepalive(client=(client, 1))).status == status
    refused = await house.keepalive(key=None)
    assert (refused.status, refused.json["detail"]) == (403, "the address 146.70.1.2 is not on the allow-list")


async def test_a_proxy_is_believed_only_when_it_is_ours(build: Build) -> None:
    house = build(SERVER_ALLOWED_IPS="146.70.1.0/24", TRUSTED_PROXIES="172.17.0.0/16")
    via: dict[str, Any] = {"x_forwarded_for": "1.2.3.4, 146.70.1.7"}
    assert (await house.keepalive(client=("172.17.0.2", 1), **via)).status == 200
    assert (await house.keepalive(client=("172.18.0.2", 1), **via)).status == 403
    assert (await house.keepalive(client=("172.17.0.2", 1), x_forwarded_for="146.70.1.7, 1.2.3.4")).status == 403


async def test_a_leak_is_seen_behind_a_proxy_that_adds_the_port(build: Build) -> None:
    house = build(HOME_NETWORKS="83.46.112.0/24", TRUSTED_PROXIES="172.17.0.0/16")
    await house.keepalive(client=("172.17.0.2", 1), x_forwarded_for="83.46.112.77:51008")
    assert (await house.tunnel()).state == "leaking"


@pytest.mark.parametrize(
    "header",
    [{}, {"x_forwarded_for": ""}, {"x_forwarded_for": ","}, {"forwarded": "for=83.46.112.77"}],
    ids=["none", "empty", "a comma", "another"],
)
async def test_a_proxy_that_names_nobody_is_not_the_tunnels_exit(build: Build, header: dict[str, str]) -> None:
    house = build(HOME_NETWORKS="83.46.112.77", TRUSTED_PROXIES="185.1.2.3", SERVER_RATE_LIMIT_REQUESTS="1")
    proxy = ("185.1.2.3", 1)
    assert (await house.keepalive({"client_id": "nl"}, client=proxy, **header)).status == 200
    row = await house.tunnel()
    assert (row.state, row.exit4) == ("pending", None)
    assert (await house.keepalive({"client_id": "de"}, client=proxy, **header)).status == 200
    assert (await house.keepalive({"client_id": "de"}, client=proxy, **header)).status == 429


async def test_an_ipv4_address_in_ipv6s_form_means_the_address_in_every_setting(build: Build) -> None:
    house = build(
        HOME_NETWORKS="::ffff:83.46.112.77",
        SERVER_ALLOWED_IPS="::ffff:83.46.112.0/120, ::ffff:146.70.1.2",
        TRUSTED_PROXIES="::ffff:172.17.0.2",
    )
    assert (await house.keepalive(client=("::ffff:83.46.112.77", 1))).status == 200
    assert (await house.tunnel()).state == "leaking"
    said = {"client_id": "de", "public_ip": EXIT}
    assert (await house.keepalive(said, client=("172.17.0.2", 1), x_forwarded_for="83.46.112.77")).status == 200
    assert (await house.tunnel("de")).state == "leaking"


async def test_where_a_proxy_hides_them_each_tunnel_has_its_own_rate_and_no_list_lets_them_in(build: Build) -> None:
    house = build(SERVER_RATE_LIMIT_REQUESTS="1", TRUSTED_PROXIES="172.17.0.0/16")
    hidden: dict[str, Any] = {"client": ("172.17.0.2", 1), "x_forwarded_for": "unknown"}
    said = [{"client_id": name, "public_ip": EXIT} for name in ("nl", "nl", "de")]
    assert [(await house.keepalive(one, **hidden)).status for one in said] == [200, 429, 200]
    closed = build(SERVER_ALLOWED_IPS="172.16.0.0/12", TRUSTED_PROXIES="172.17.0.0/16")
    assert (await closed.keepalive(**hidden)).status == 403


async def test_a_tunnels_token_reports_as_that_tunnel(house: House, store: Store) -> None:
    token = await create_token(store, "nl", shared=False, now=START)
    assert (await house.keepalive(key=token)).status == 200
    refused = await house.keepalive({"client_id": "se"}, key=token)
    assert (refused.status, refused.json["detail"]) == (403, "this token may only report as nl")
    await revoke_token(store, "nl", START)
    house.clock.now += 6
    assert (await house.keepalive(key=token)).status == 403


@pytest.mark.parametrize(("client", "status"), [(None, 400), (("", 0), 500), (("unix:", 0), 500)])
async def test_a_connection_without_an_address_is_not_taken(lobby: House, client: Any, status: int) -> None:
    assert (await lobby.keepalive(client=client)).status == status


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD"])
async def test_the_route_takes_post(lobby: House, method: str) -> None:
    answer = await lobby.keepalive(method=method)
    assert (answer.status, answer.headers["allow"]) == (405, "POST")


async def test_every_other_path_is_the_frameworks(lobby: House) -> None:
    for path in ("/", "/api/v1/status", "/api/v1/keepalive/", "/keepalive", "/api/v1/agentx"):
        assert (await lobby.post(path, b"")).status == 404
    await lobby.router({"type": "websocket", "path": "/api/v1/keepalive"}, None, None)
    await lobby.router({"type": "lifespan"}, None, None)
    assert lobby.passed_on == [
        "http /", "http /api/v1/status", "http /api/v1/keepalive/", "http /keepalive", "http /api/v1/agentx",
        "websocket /api/v1/keepalive", "lifespan ",
    ]  # fmt: skip


async def test_the_path_is_the_owners(build: Build) -> None:
    house = build(API_PATH="/sentinel")
    assert (await house.post("/sentinel/keepalive", {"client_id": "nl"})).status == 200
    assert (await house.keepalive()).status == 404


# -- the body


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "application/jsonp"])
async def test_another_kind_of_body(lobby: House, kind: str) -> None:
    assert (await lobby.keepalive(content_type=kind)).status == 415


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
async def test_json_by_another_spelling(house: House, kind: str) -> None:
    assert (await house.keepalive(content_type=kind)).status == 200


async def test_a_body_that_is_too_large_is_not_even_read(lobby: House) -> None:
    answer = await lobby.keepalive([], content_length=str(limits.MAX_BODY_BYTES + 1))  # type: ignore[arg-type]
    assert answer.status == 413


async def test_a_body_that_is_larger_than_it_said_is_not_read_to_its_end(lobby: House) -> None:
    part = b" " * 100_000
    answer = await lobby.keepalive([part] * 3, content_length="10")  # type: ignore[arg-type]
    assert answer.status == 413


@pytest.mark.parametrize("length", ["-1", "x", "\xb2", ""])
async def test_a_length_that_is_none_is_counted(house: House, length: str) -> None:
    assert (await house.keepalive(content_length=length)).status == 200


async def test_a_body_in_parts(house: House) -> None:
    assert (await house.keepalive([b'{"client', b"", b'_id": "nl"}'])).status == 200  # type: ignore[arg-type]


async def test_a_sender_that_hangs_up(lobby: House) -> None:
    answer = await lobby.keepalive([])  # type: ignore[arg-type]
    assert (answer.status, answer.json["detail"]) == (400, "the connection closed before the body was complete")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"client_id=nl", b'{"client_id": NaN', b'{"client_id": "a", "x": ' + b"[" * 100_000]
)
async def test_what_is_not_json(lobby: House, body: bytes) -> None:
    answer = await lobby.keepalive(body)
    assert answer.status == 400
    assert answer.json["detail"].startswith("the body is not JSON: ")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"[]", "object"),
        ({"client_id": "<script>"}, "client_id"),
        ({"client_id": "x" * 10_000}, "client_id"),
        (b'{"client_id": "\xff"}', "client_id"),
        (b'{"client_id": "\\ud800"}', "client_id"),
    ],
)
async def test_what_cannot_be_is_refused_by_the_name_of_its_field(lobby: House, body: Any, field: str) -> None:
    answer = await lobby.keepalive(body)
    assert answer.status == 422
    assert field in answer.json["detail"]
    assert await lobby.stored() == []


async def test_a_field_that_nobody_needs_refuses_no_report_and_is_said_once(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    house = build(HOME_NETWORKS="83.46.112.0/24")
    name = "_" + "n" * 99
    for _ in range(3):
        said = {"client_id": name, "public_ip": "vpn.example.org", "location": "Amsterdam", "timestamp": "yesterday"}
        assert (await house.keepalive(said, client=("83.46.112.77", 1))).status == 200
    assert (await house.tunnel(name)).state == "leaking"
    told = [(r.__dict__["field"], r.__dict__["value"]) for r in caplog.records if "not understood" in r.message]
    assert told == [("location", "Amsterdam"), ("public_ip", "vpn.example.org"), ("timestamp", "yesterday")]


@pytest.mark.parametrize("ip", ["0.0.0.0", "127.0.0.1", "10.8.0.2", "192.168.1.5", "100.64.0.1", "224.0.0.1"])
async def test_an_address_that_the_internet_cannot_see_shows_nothing(build: Build, ip: str) -> None:
    house = build(HOME_NETWORKS="83.46.112.77")
    assert (await house.keepalive({"client_id": "nl", "public_ip": ip}, client=("192.168.1.5", 1))).status == 200
    assert ((row := await house.tunnel()).state, row.exit4) == ("pending", None)


async def test_a_leak_is_told_though_the_client_writes_json_as_python_does(
    build: Build, caplog: pytest.LogCaptureFixture
) -> None:
    house = build(HOME_NETWORKS="83.46.112.0/24")
    for name, rest in (("nan", b'"timestamp": NaN'), ("city", b'"city": "M\\udcfcnchen"'), ("far", b'"x": 1e999')):
        said = b'{"client_id": "%s", "public_ip": "83.46.112.77", %s}' % (name.encode(), rest)
        assert (await house.keepalive(said)).status == 200
        assert (await house.tunnel(name)).state == "leaking"
    told = [(r.__dict__["field"], r.__dict__["value"]) for r in caplog.records if "not understood" in r.message]
    assert told == [("timestamp", "nan"), ("city", "M\\udcfcnchen")]
    assert (await house.keepalive(b'{"city": NaN}')).status == 400


# -- what goes wrong behind the door


class Broken:
    """A store whose transactions fail as a test says."""

    def __init__(self, store: Store, failure: Exception) -> None:
        self._store, self.failure = store, failure
        self.broken = True
        self.write = store.write

    async def read(self, statement: Executable) -> Sequence[Row[Any]]:
        return await self._store.read(statement)

    async def transact(self, *args: Any, **more: Any) -> Any:
        if self.broken:
            raise self.failure
        return await self._store.transact(*args, **more)


async def test_a_database_that_is_gone_is_said_once_and_its_return_too(
    build: Build, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    broken = Broken(store, StoreUnavailable("disk_full", "no space left"))
    house = build(broken)
    for _ in range(3):
        answer = await house.keepalive()
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert answer.json["detail"] == "the database does not take reports now; nothing was stored"
    broken.broken = False
    assert [(await house.keepalive()).status for _ in range(2)] == [200, 200]
    assert [r.message for r in caplog.records] == ["reports cannot be stored", "reports are stored again"]


async def test_what_nobody_foresaw_is_a_500_without_its_reason(
    build: Build, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    house = build(Broken(store, RuntimeError("a secret thing")))
    answer = await house.keepalive()
    assert (answer.status, answer.json["detail"]) == (500, "the server failed on this report; nothing was stored")
    assert "a secret thing" in caplog.text


async def test_a_report_that_names_nobody_is_a_400_as_it_always_was(house: House) -> None:
    answer = await house.keepalive({"public_ip": EXIT})
    assert answer.status == 400
    assert b"client_id" in answer.body
