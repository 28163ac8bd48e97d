"""Telegram and the webhook against a real server on loopback that is in every mood."""

import asyncio
import gzip
import hashlib
import hmac
import json
import logging
import ssl
import traceback
import tracemalloc
from collections.abc import AsyncIterator
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from pathlib import Path

import httpx
import pytest

from tests.conftest import ManualClock
from tests.server.notify.standins import Answer, StandIn, Time, telegram_error, telegram_ok
from tests.server.notify.test_dispatcher import Faulty
from vpn_sentinel.domain.notice import STATELESS, Kind, Notice
from vpn_sentinel.domain.verdict import Code, Finding, State
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.runtime.settings import SettingError, Source
from vpn_sentinel.server.notify.channel import DeliveryError, SetupError, TransientError
from vpn_sentinel.server.notify.channels import build_channels
from vpn_sentinel.server.notify.channels.bot_api import MAX_ANSWER_BYTES, BotApi
from vpn_sentinel.server.notify.channels.moved_chats import MovedChats
from vpn_sentinel.server.notify.channels.telegram import TelegramChannel
from vpn_sentinel.server.notify.channels.webhook import WebhookChannel, body, signature
from vpn_sentinel.server.notify.failures import reason_of, retry_after
from vpn_sentinel.server.notify.guard import (
    ForbiddenAddressError,
    GuardedTransport,
    Resolve,
    guarded_client,
    is_forbidden,
    tls,
)
from vpn_sentinel.server.settings import ServerSettings, TelegramSettings, WebhookSettings
from vpn_sentinel.server.store.store import Store

TOKEN = "123456:SECRET-token_of_the_bot"
AT = 1_800_000_000.0
CLOCK = ManualClock()
NOTICE = Notice(
    kind=Kind.RECOVERED,
    tunnel="nl-1",
    at=AT,
    began=AT - 252.5,
    was=State.LEAKING,
    exit=ip_address("198.51.100.7"),
    old_exit=ip_address("203.0.113.9"),
    findings=(Finding(Code.KILLSWITCH_OPEN, "A packet <left>.", {"router": "10.0.0.1"}),),
    place="Amsterdam, NL",
    provider="Example AS64500",
    timezone="Europe/Amsterdam",
    resolvers=("198.51.100.53 NL",),
)


@pytest.fixture
async def server() -> AsyncIterator[StandIn]:
    async with StandIn(lambda asked: telegram_ok()) as standin:
        yield standin


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(trust_env=False) as client:
        yield client


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def api(server: StandIn, http: httpx.AsyncClient, time: Time) -> BotApi:
    async def sleep(seconds: float) -> None:
        time.now += seconds

    telegram = TelegramSettings(token=Secret(TOKEN), chat_id="42", api_url=server.url)
    return BotApi(http, telegram, time, sleep=sleep, timeout_s=3)


async def failure_of(channel: TelegramChannel | WebhookChannel) -> DeliveryError:
    with pytest.raises(DeliveryError) as caught:
        await channel.send(NOTICE, 7)
    assert_holds_no_secret(caught.value)
    return caught.value


def assert_holds_no_secret(error: BaseException) -> None:
    """Neither in its text, nor in a traceback with every local variable, nor in what it drags along."""
    assert error.__context__ is None
    assert error.__cause__ is None
    shown = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    ours = [line for line in shown.splitlines() if "SECRET" in line and "NOTICE" not in line]
    assert not [line for line in ours if "TOKEN" not in line and "URL" not in line], ours


async def test_telegram_sends_escaped_html_without_previews(api: BotApi, server: StandIn) -> None:
    await TelegramChannel(api, "42").send(NOTICE, 7)
    [asked] = server.asked
    assert (asked.method, asked.path) == ("POST", f"/bot{TOKEN}/sendMessage")
    assert asked.json["chat_id"] == "42"
    assert asked.json["parse_mode"] == "HTML"
    assert asked.json["link_preview_options"] == {"is_disabled": True}
    assert asked.json["text"].startswith(
        "<b>🟢 nl-1 is protected again after 4 minutes 12 seconds (it was leaking)</b>"
    )
    assert "A packet &lt;left&gt;." in asked.json["text"]


TELEGRAM_FAILURES = {
    "rate limit": (telegram_error(429, "Too Many Requests", retry_after=17), TransientError, "rate_limited", 17),
    "rate limit without a number": (telegram_error(429), TransientError, "rate_limited", None),
    "server error": (Answer(502, b"<html>bad gateway</html>"), TransientError, "server_error", None),
    "garbage": (Answer(200, b"\xff\xfenot json"), TransientError, "garbage", None),
    "json of another kind": (Answer(200, b"[]"), TransientError, "garbage", None),
    "no http at all": (Answer(raw=b"SSH-2.0-OpenSSH\r\n"), TransientError, "garbage", None),
    "closed at once": (Answer(raw=b""), TransientError, "garbage", None),
    "never an answer": (Answer(None), TransientError, "timeout", None),
    "wrong token": (telegram_error(401, "Unauthorized"), SetupError, "auth", None),
    "no such bot": (telegram_error(404, "Not Found"), SetupError, "auth", None),
    "blocked by the user": (telegram_error(403, "Forbidden: bot was blocked"), SetupError, "forbidden", None),
    "no such chat": (telegram_error(400, "Bad Request: chat not found"), SetupError, "chat_not_found", None),
    "html that says bad request": (Answer(400, b"<html>Bad Request"), SetupError, "unexpected_status", None),
    **{
        words: (telegram_error(status, words), SetupError, reason, None)
        for status, words, reason in (
            (400, "Bad Request: TOPIC_CLOSED", "topic_closed"),
            (400, "Bad Request: TOPIC_DELETED", "topic_gone"),
            (400, "Bad Request: message thread not found", "topic_gone"),
            (400, "Bad Request: not enough rights to send text messages to the chat", "no_right_to_write"),
            (400, "Bad Request: have no rights to send a message", "no_right_to_write"),
            (400, "Bad Request: CHAT_WRITE_FORBIDDEN", "no_right_to_write"),
            (400, "Bad Request: need administrator rights in the channel chat", "no_right_to_write"),
            (400, "Bad Request: group chat was upgraded to a supergroup chat", "chat_moved"),
            (400, "Bad Request: chat_id is empty", "chat_not_found"),
            (400, "Bad Request: a sentence of next year", "refused"),
            (403, "Forbidden: bot was kicked from the supergroup chat", "forbidden"),
            (402, "Payment Required", "unexpected_status"),
        )
    },
    "a stranger's page": (
        Answer(302, b"", {"Location": "https://example.org/"}),
        SetupError,
        "unexpected_status",
        None,
    ),
}


BOMB = gzip.compress(b'{"ok": true, "result": "' + b"x" * (64 * 1024 * 1024) + b'"}')
TOO_LARGE = {
    "unpacks to 64 MB": Answer(200, BOMB, {"Content-Encoding": "gzip"}),
    "long": Answer(200, b'{"ok": true, "result": "' + b"x" * MAX_ANSWER_BYTES + b'"}'),
    "without an end": Answer(raw=b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (MAX_ANSWER_BYTES + 65536)),
    "damaged": Answer(200, BOMB[:5000], {"Content-Encoding": "gzip"}),
}


@pytest.mark.parametrize("answer", TOO_LARGE.values(), ids=TOO_LARGE.keys())
async def test_an_answer_of_telegram_is_bounded_unpacked_too(
    http: httpx.AsyncClient, time: Time, answer: Answer
) -> None:
    async with StandIn() as server:
        server.answers = [answer]
        telegram = TelegramSettings(token=Secret(TOKEN), chat_id="42", api_url=server.url)
        tracemalloc.start()
        try:
            failure = await failure_of(TelegramChannel(BotApi(http, telegram, time, timeout_s=10.0), "42"))
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert (type(failure), failure.reason) == (TransientError, "garbage")
    assert most < 6 * MAX_ANSWER_BYTES


async def test_an_answer_of_telegram_that_a_proxy_packed_is_read(api: BotApi, server: StandIn) -> None:
    said = telegram_ok().body
    server.answers = [Answer(200, gzip.compress(said), {"Content-Encoding": "gzip"})]
    await TelegramChannel(api, "42").send(NOTICE, 7)
    assert server.asked[0].headers["accept-encoding"] == "identity"


@pytest.mark.parametrize(("answer", "kind", "reason", "wait"), TELEGRAM_FAILURES.values(), ids=TELEGRAM_FAILURES.keys())
async def test_telegram_failures(
    api: BotApi, server: StandIn, answer: Answer, kind: type[DeliveryError], reason: str, wait: float | None
) -> None:
    server.answers = [answer]
    failure = await failure_of(TelegramChannel(api, "42"))
    assert (type(failure), failure.reason, getattr(failure, "retry_after", None)) == (kind, reason, wait)


async def test_telegram_unreachable(api: BotApi, server: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    await server.__aexit__()
    failure = await failure_of(TelegramChannel(api, "42"))
    assert (type(failure), failure.reason) == (TransientError, "unreachable")
    assert "SECRET" not in caplog.text


async def test_rejected_markup_is_sent_again_as_plain_text(api: BotApi, server: StandIn) -> None:
    server.answers = [telegram_error(400, "Bad Request: can't parse entities")]
    await TelegramChannel(api, "42").send(NOTICE, 7)
    assert [a.json.get("parse_mode") for a in server.asked] == ["HTML", None]
    assert "A packet <left>." in server.asked[1].json["text"]


@pytest.mark.parametrize(
    "words", ["message is too long", "can't parse entities: x", "text must be non-empty", "message text is empty"]
)
async def test_a_message_that_is_not_taken_is_told_in_two_plain_lines(api: BotApi, server: StandIn, words: str) -> None:
    server.answers = [telegram_error(400, f"Bad Request: {words}")] * 2
    await TelegramChannel(api, "42").send(NOTICE, 7)
    told = server.asked[2].json["text"].splitlines()
    assert (len(told), "nl-1 is protected again" in told[0], "parse_mode" in server.asked[2].json) == (2, True, False)


async def test_what_is_refused_even_at_its_shortest_is_kept(api: BotApi, server: StandIn) -> None:
    server.answers = [telegram_error(400, "Bad Request: message is too long")] * 3
    with pytest.raises(SetupError, match="rejected"):
        await TelegramChannel(api, "42").send(NOTICE, 7)


async def test_a_group_that_became_a_supergroup_is_followed(api: BotApi, server: StandIn) -> None:
    server.answers = [telegram_error(400, "Bad Request: group chat was upgraded", migrate_to_chat_id=-100777)]
    channel = TelegramChannel(api, "-777")
    await channel.send(NOTICE, 7)
    await channel.send(NOTICE, 8)
    assert [a.json["chat_id"] for a in server.asked] == ["-777", "-100777", "-100777"]


async def test_a_moved_chat_is_known_after_a_restart(
    http: httpx.AsyncClient, server: StandIn, time: Time, store: Store
) -> None:
    async def sleep(seconds: float) -> None:
        time.now += seconds

    async def started() -> TelegramChannel:
        moved = MovedChats(store)
        await moved.load("-777")
        telegram = TelegramSettings(token=Secret(TOKEN), chat_id="-777", api_url=server.url)
        return TelegramChannel(BotApi(http, telegram, time, moved=moved, sleep=sleep), "-777")

    server.answers = [telegram_error(400, "Bad Request: group chat was upgraded", migrate_to_chat_id=-100777)]
    await (await started()).send(NOTICE, 7)
    await (await started()).send(NOTICE, 8)
    assert [a.json["chat_id"] for a in server.asked] == ["-777", "-100777", "-100777"]
    server.answers = [telegram_error(400, "Bad Request: group chat was upgraded", migrate_to_chat_id=-100778)]
    await (await started()).send(NOTICE, 9)  # once more
    await (await started()).send(NOTICE, 10)
    assert [a.json["chat_id"] for a in server.asked[3:]] == ["-100777", "-100778", "-100778"]


async def test_an_alarm_goes_out_though_the_new_number_cannot_be_kept(
    http: httpx.AsyncClient, server: StandIn, time: Time, store: Store
) -> None:
    away = Faulty(store)
    away.away = True
    telegram = TelegramSettings(token=Secret(TOKEN), chat_id="-777", api_url=server.url)
    api = BotApi(http, telegram, time, moved=MovedChats(away), sleep=lambda _: asyncio.sleep(0))
    server.answers = [telegram_error(400, "Bad Request: group chat was upgraded", migrate_to_chat_id=-100777)]
    await TelegramChannel(api, "-777").send(NOTICE, 7)
    assert [a.json["chat_id"] for a in server.asked] == ["-777", "-100777"]


async def test_a_topic_is_told_where_one_is_set(api: BotApi, server: StandIn) -> None:
    await TelegramChannel(api, "-100777", topic=45).send(NOTICE, 7)
    await TelegramChannel(api, "-100777").send(NOTICE, 8)
    assert [a.json.get("message_thread_id") for a in server.asked] == [45, None]


CHATS = {
    "42": ("42", None),
    "-1001234567890": ("-1001234567890", None),
    "-1001234567890:45": ("-1001234567890", 45),
    "-1001234567890:1": ("-1001234567890", None),  # the General topic, whose number Telegram does not take
    "@ours:45": ("@ours", 45),
}


@pytest.mark.parametrize(("said", "meant"), CHATS.items(), ids=CHATS.keys())
def test_a_topic_stands_behind_the_chats_number(said: str, meant: tuple[str, int | None]) -> None:
    telegram = settings(TELEGRAM_BOT_TOKEN=TOKEN, TELEGRAM_CHAT_ID=said).telegram
    assert telegram is not None
    assert (telegram.chat_id, telegram.topic) == meant


@pytest.mark.parametrize("said", ["-100:", "-100:x", "-100:-1", ":45", "-100/45", "-100:45:1"])
def test_what_is_no_topic_is_named(said: str) -> None:
    with pytest.raises(SettingError, match=r"^TELEGRAM_CHAT_ID: .* neither a chat's number nor"):
        settings(TELEGRAM_BOT_TOKEN=TOKEN, TELEGRAM_CHAT_ID=said)


async def test_messages_are_a_second_apart(api: BotApi, server: StandIn, time: Time) -> None:
    begun = time.now
    channel = TelegramChannel(api, "42")
    await asyncio.gather(*(channel.send(NOTICE, n) for n in range(4)))
    assert len(server.asked) == 4
    assert time.now - begun == 3


async def test_a_long_text_comes_in_parts_of_whole_lines(api: BotApi, server: StandIn) -> None:
    long = replace(
        NOTICE,
        findings=tuple(
            Finding(Code.NO_TRAFFIC, f"{n} " + "🔴" * 290, {"a": "&" * 99, "b": "<" * 99}) for n in range(8)
        ),
    )
    await TelegramChannel(api, "42").send(long, 7)
    parts = [a.json["text"] for a in server.asked]
    assert len(parts) > 1
    for part in parts:
        assert len(part.encode("utf-16-le")) // 2 <= 4096
        assert part.count("<b>") == part.count("</b>")


async def webhook_for(
    server: StandIn, time: Time, *, secret: str | None = None, path: str = "/hook?key=SECRET", private: bool = True
) -> WebhookChannel:
    client = guarded_client(tls(None), private=private, timeout_s=3)
    settings = WebhookSettings(url=Secret(server.url + path), secret=Secret(secret) if secret else None)
    return WebhookChannel(client, settings, time, timeout_s=3)


async def test_webhook_posts_the_documented_body(server: StandIn, time: Time) -> None:
    await (await webhook_for(server, time)).send(NOTICE, 7)
    [asked] = server.asked
    assert (asked.method, asked.path) == ("POST", "/hook?key=SECRET")
    assert asked.headers["host"] == f"127.0.0.1:{server.port}"
    assert asked.headers["content-type"] == "application/json"
    assert asked.headers["x-sentinel-delivery"] == "7"
    assert "x-sentinel-signature" not in asked.headers
    got = asked.json
    assert got.pop("text").startswith("🟢 nl-1 is protected again")
    assert got == {
        "kind": "recovered",
        "tunnel": "nl-1",
        "state": "protected",
        "was": "leaking",
        "at": "2027-01-15T08:00:00.000Z",
        "began": "2027-01-15T07:55:47.500Z",
        "outage_seconds": 252.5,
        "exit": "198.51.100.7",
        "old_exit": "203.0.113.9",
        "port": None,
        "old_port": None,
        "role": "tunnel",
        "site": "",
        "place": "Amsterdam, NL",
        "provider": "Example AS64500",
        "timezone": "Europe/Amsterdam",
        "resolvers": ["198.51.100.53 NL"],
        "findings": [
            {
                "code": "killswitch_open",
                "severity": "warning",
                "message": "A packet <left>.",
                "evidence": {"router": "10.0.0.1"},
                "advice": "Switch the VPN's kill switch on: without one, traffic leaks when the tunnel goes away.",
            }
        ],
        "details": [],
    }


async def test_webhook_signature_can_be_checked_as_documented(server: StandIn, time: Time) -> None:
    await (await webhook_for(server, time, secret="shared")).send(NOTICE, 7)
    [asked] = server.asked
    given = dict(part.split("=") for part in asked.headers["x-sentinel-signature"].split(","))
    expected = hmac.new(b"shared", given["t"].encode() + b"." + asked.body, hashlib.sha256).hexdigest()
    assert given == {"t": str(int(time.wall())), "v1": expected}


def test_signature_depends_on_all_it_covers() -> None:
    assert (
        len({signature("s", b"x", 1), signature("t", b"x", 1), signature("s", b"y", 1), signature("s", b"x", 2)}) == 4
    )


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_has_a_body(kind: Kind) -> None:
    state = body(Notice(kind=kind, at=AT))["state"]
    assert (state is None) == (kind in STATELESS)


WEBHOOK_FAILURES = {
    "rate limit": (Answer(429, b"", {"Retry-After": "17"}), TransientError, "rate_limited", 17),
    "busy until a date": (
        Answer(503, b"", {"Retry-After": "Fri, 15 Jan 2027 08:00:30 GMT"}),
        TransientError,
        "server_error",
        30,
    ),
    "server error": (Answer(500, b"SECRET stack trace"), TransientError, "server_error", None),
    "no http at all": (Answer(raw=b"hello\r\n\r\n"), TransientError, "garbage", None),
    "never an answer": (Answer(None), TransientError, "timeout", None),
    "unauthorised": (Answer(401), SetupError, "auth", None),
    "gone": (Answer(410), SetupError, "not_found", None),
    **{
        f"status {status}": (Answer(status, b"<html>SECRET</html>"), SetupError, f"http_{status}", None)
        for status in (402, 406, 409, 411, 415, 418, 421, 424, 426, 428, 431, 451, 499)
    },
    "too early": (Answer(425), TransientError, "server_error", None),
    "a number that nobody knows": (Answer(599), TransientError, "server_error", None),
    "no number": (Answer(raw=b"HTTP/1.1 OK fine\r\n\r\n"), TransientError, "garbage", None),
    "nothing": (Answer(raw=b""), TransientError, "garbage", None),
}


@pytest.mark.parametrize(("answer", "kind", "reason", "wait"), WEBHOOK_FAILURES.values(), ids=WEBHOOK_FAILURES.keys())
async def test_webhook_failures(
    server: StandIn, time: Time, answer: Answer, kind: type[DeliveryError], reason: str, wait: float | None
) -> None:
    server.answers = [answer]
    failure = await failure_of(await webhook_for(server, time))
    assert (type(failure), failure.reason, getattr(failure, "retry_after", None)) == (kind, reason, wait)


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_webhook_that_refuses_the_body_gets_a_short_one(server: StandIn, time: Time, status: int) -> None:
    server.answers = [Answer(status, b"<html>SECRET</html>")]
    await (await webhook_for(server, time)).send(NOTICE, 7)
    long, short = server.asked
    assert long.json.keys() == short.json.keys()
    assert (short.json["kind"], short.json["tunnel"], short.json["findings"]) == ("recovered", "nl-1", [])
    assert len(short.json["text"].splitlines()) == 2
    assert short.headers["x-sentinel-delivery"] == "7"


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_webhook_that_refuses_the_short_body_too_is_set_up_wrongly(
    server: StandIn, time: Time, status: int
) -> None:
    server.answers = [Answer(status)] * 2
    failure = await failure_of(await webhook_for(server, time))
    assert (type(failure), failure.reason) == (SetupError, f"http_{status}")


async def test_webhook_follows_no_redirect(server: StandIn, time: Time) -> None:
    server.answers = [Answer(307, b"", {"Location": server.url + "/elsewhere"})]
    failure = await failure_of(await webhook_for(server, time))
    assert (type(failure), failure.reason) == (SetupError, "redirect")
    assert len(server.asked) == 1


async def test_webhook_does_not_wait_for_an_endless_body(server: StandIn, time: Time) -> None:
    server.answers = [Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\nx")]
    await (await webhook_for(server, time)).send(NOTICE, 7)


async def test_webhook_on_a_private_address_is_refused_before_connecting(server: StandIn, time: Time) -> None:
    failure = await failure_of(await webhook_for(server, time, private=False))
    assert (type(failure), failure.reason) == (SetupError, "private_address")
    assert server.asked == []


FORBIDDEN = [
    *("127.0.0.1", "0.0.0.0", "10.1.2.3", "172.31.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.100"),
    *("224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fec0::1", "ff02::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2002:7f00:1::"),
    *("2002:c0a8:101::1", "2001:0:4136:e378:8000:63bf:80ff:fffe", "not an address", ""),
]
# IANA's IPv4 and IPv6 Special-Purpose Address Registries as of 2025: what is not "Globally Reachable", and multicast.
SPECIAL = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
    *("192.0.2.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "240.0.0.0/4"),
    *("255.255.255.255/32", "224.0.0.0/4", "::1/128", "::/128", "::ffff:0:0/96", "64:ff9b:1::/48", "100::/64"),
    *("100:0:0:1::/64", "2001::/23", "2001::/32", "2001:2::/48", "2001:10::/28", "2001:db8::/32", "3fff::/20"),
    *("5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8", "::ffff:0:0:0/96"),
)
ALLOWED = [
    *("1.1.1.1", "172.32.0.1", "100.128.0.1", "198.20.0.1", "192.0.1.1", "223.255.255.255", "2606:4700::1111"),
    *("2001:4860:4860::8888", "2a00:1450::1", "3ffe::1", "64:ff9b::101:101", "2002:101:101::1"),
]


@pytest.mark.parametrize("block", [ip_network(block) for block in SPECIAL], ids=str)
def test_networks_of_no_host_are_forbidden_from_end_to_end(block: IPv4Network | IPv6Network) -> None:
    assert is_forbidden(str(block[0]))
    assert is_forbidden(str(block[-1]))


def test_what_python_knows_as_not_global_is_forbidden() -> None:
    """Of each /16 its first host; what a version of Python does not know, or knows better, is in the table above."""
    hosts = [ip_address((part << 16) + 1) for part in range(1 << 16)]
    hosts += [ip_address((part << 112) + 1) for part in range(1 << 16)]
    wrapping = ip_network("2002::/16")
    missed = [h for h in hosts if not h.is_global and not is_forbidden(str(h)) and h not in wrapping]
    assert missed == []


@pytest.mark.parametrize("address", FORBIDDEN)
def test_forbidden(address: str) -> None:
    assert is_forbidden(address)


@pytest.mark.parametrize("address", ALLOWED)
def test_allowed(address: str) -> None:
    assert not is_forbidden(address)


@pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f.1", "[::ffff:127.0.0.1]", "[::1]", "0"])
async def test_every_way_to_write_loopback_is_refused(host: str) -> None:
    client = guarded_client(tls(None), private=False, timeout_s=1)
    with pytest.raises(ForbiddenAddressError):
        await client.post(f"http://{host}:9/")


async def connected_to(resolve: Resolve) -> list[str]:
    """Where a guarded client goes for a name that `resolve` knows; nothing leaves this machine."""
    went: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        went.append(request.url.host)
        return httpx.Response(200)

    async with httpx.AsyncClient(transport=GuardedTransport(httpx.MockTransport(answer), resolve=resolve)) as client:
        await client.post("http://name.example/")
    return went


async def test_a_name_that_changes_its_mind_is_connected_where_it_was_judged() -> None:
    """DNS rebinding: the first answer is public, the second is loopback."""
    answers = [["1.1.1.1"], ["127.0.0.1"]]

    async def rebinding(host: str, port: int) -> list[str]:
        return answers.pop(0)

    assert await connected_to(rebinding) == ["1.1.1.1"]
    assert len(answers) == 1


async def test_private_addresses_of_a_mixed_name_are_left_out() -> None:
    async def mixed(host: str, port: int) -> list[str]:
        return ["127.0.0.1", "1.1.1.1", "198.51.100.7"]

    assert await connected_to(mixed) == ["1.1.1.1"]


async def test_the_next_address_of_a_name_is_tried_and_the_name_is_sent(server: StandIn) -> None:
    async def two(host: str, port: int) -> list[str]:
        return ["127.0.0.2", "127.0.0.1"]

    client = guarded_client(tls(None), private=True, timeout_s=2, resolve=two)
    answer = await client.post(f"http://hook.example:{server.port}/", content=b"body")
    assert answer.status_code == 200
    [asked] = server.asked
    assert asked.headers["host"] == f"hook.example:{server.port}"
    assert asked.body == b"body"


async def test_a_name_that_does_not_resolve_is_transient(time: Time) -> None:
    async def nothing(host: str, port: int) -> list[str]:
        raise OSError

    client = guarded_client(tls(None), private=False, timeout_s=1, resolve=nothing)
    channel = WebhookChannel(client, WebhookSettings(url=Secret("https://hook.example/SECRET")), time)
    failure = await failure_of(channel)
    assert (type(failure), failure.reason) == (TransientError, "unreachable")


def test_reasons_are_words() -> None:
    wrapped = httpx.ConnectError("x")
    wrapped.__cause__ = ssl.SSLCertVerificationError("https://SECRET/")
    assert reason_of(wrapped) == "tls"
    assert reason_of(httpx.InvalidURL("SECRET")) == "bad_url"
    assert reason_of(httpx.ReadError("SECRET")) == "broken_off"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        *((None, None), ("5", 5), ("-5", 0), ("nan", None), ("inf", None), ("soon", None), ("1e400", None)),
        (f"Fri, 15 Jan 2027 08:{'0' * 50}9{'0' * 50}:30 GMT", None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_retry_after(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, AT) == seconds


def settings(**env: str) -> ServerSettings:
    return ServerSettings.read(
        Source(env={"VPN_SENTINEL_" + k if k[:8] != "TELEGRAM" else k: v for k, v in env.items()})
    )


async def test_channels_come_from_the_settings(http: httpx.AsyncClient) -> None:
    assert build_channels(settings(), http, clock=CLOCK) == {}
    both = settings(TELEGRAM_BOT_TOKEN=TOKEN, TELEGRAM_CHAT_ID="42", WEBHOOK_URL="https://hook.example/x")
    assert [(name, c.name) for name, c in build_channels(both, http, clock=CLOCK).items()] == [
        ("telegram", "telegram"),
        ("webhook", "webhook"),
    ]


async def test_an_address_that_no_client_takes_stops_the_start(http: httpx.AsyncClient) -> None:
    with pytest.raises(SettingError, match="VPN_SENTINEL_WEBHOOK_URL") as caught:
        build_channels(settings(WEBHOOK_URL="https://-.é/SECRET"), http, clock=CLOCK)
    assert "SECRET" not in str(caught.value)


async def test_a_ca_file_that_is_none_stops_the_start(http: httpx.AsyncClient, tmp_path: Path) -> None:
    wrong = tmp_path / "ca.pem"
    wrong.write_text("no certificate")
    with pytest.raises(SettingError, match="VPN_SENTINEL_CA_FILE"):
        build_channels(settings(WEBHOOK_URL="https://hook.example/", CA_FILE=str(wrong)), http, clock=CLOCK)


async def test_updates_that_cannot_be_read_are_stepped_over(api: BotApi, server: StandIn) -> None:
    raw = [{"update_id": 5, "message": {"chat": "odd"}}, {"update_id": 6}]
    server.answers = [Answer(body=json.dumps({"ok": True, "result": raw}).encode())]
    assert [u.update_id for u in await api.get_updates(None, 0)] == [5, 6]


async def test_no_address_with_a_credential_is_logged(
    api: BotApi, server: StandIn, time: Time, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    await TelegramChannel(api, "42").send(NOTICE, 7)
    await (await webhook_for(server, time)).send(NOTICE, 7)
    assert len(server.asked) == 2
    assert "SECRET" not in caplog.text
