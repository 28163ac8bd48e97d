"""The bot answers its chat, once, whatever happens to the network, the database and its twin."""

import asyncio
import json
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from sqlalchemy import insert, select, update

from tests.server.notify.standins import Answer, Asked, StandIn, Time, telegram_error, telegram_ok
from tests.server.notify.test_dispatcher import Faulty
from vpn_sentinel.runtime.secret import Secret
from vpn_sentinel.server.bot import bot as subject
from vpn_sentinel.server.bot import commands, poller_lease
from vpn_sentinel.server.bot.bot import Bot
from vpn_sentinel.server.bot.poller_lease import PollerLease
from vpn_sentinel.server.notify.channel import TransientError
from vpn_sentinel.server.notify.channels.bot_api import BotApi
from vpn_sentinel.server.notify.channels.moved_chats import MovedChats
from vpn_sentinel.server.settings import TelegramSettings
from vpn_sentinel.server.store.schema import meta
from vpn_sentinel.server.store.store import Store

TOKEN = "123456:SECRET-token_of_the_bot"
CHAT = 42


class TelegramSide:
    """Telegram's side of one bot: keeps what was not confirmed, and holds a question open until something comes."""

    def __init__(self, time: Time) -> None:
        self.time = time
        self.pending: list[dict[str, Any]] = []
        self.sent: list[dict[str, Any]] = []
        self.polls: list[dict[str, Any]] = []
        self.failures: list[Answer] = []
        self.poll_failures: list[Answer] = []
        self.next_id = 1000
        self.changed = asyncio.Event()
        self.idle = asyncio.Event()
        self.moved = asyncio.Event()

    async def __call__(self, asked: Asked) -> Answer:
        assert asked.path.startswith(f"/bot{TOKEN}/")
        match asked.path.rsplit("/", 1)[1]:
            case "getMe":
                return self.failures.pop(0) if self.failures else telegram_ok({"id": 1, "username": "SentinelBot"})
            case "getUpdates":
                return await self._updates(asked.json)
            case "sendMessage":
                if self.failures:
                    return self.failures.pop(0)
                self.sent.append(asked.json)
                self._tell()
                return telegram_ok({})
        return Answer(404)

    async def _updates(self, params: dict[str, Any]) -> Answer:
        self.polls.append(params)
        self._tell()
        if self.poll_failures:
            return self.poll_failures.pop(0)
        if (offset := params.get("offset")) is not None:
            self.pending = [u for u in self.pending if u["update_id"] >= offset]
        while not self.pending:
            self.idle.set()
            self.moved.set()
            self.changed.clear()
            await self.changed.wait()
            if self.idle.is_set() and not self.pending and self.ended:
                self.ended = False
                break
        self.idle.clear()
        return Answer(body=json.dumps({"ok": True, "result": self.pending[: params["limit"]]}).encode())

    ended = False

    def end_poll(self) -> None:
        """The long poll's time is over without a message."""
        self.ended = True
        self._tell()

    def says(
        self, text: str, chat: int = CHAT, age: float = 0.0, *, topic: int = 0, thread_of_replies: int = 0,
        migrate_to: int = 0, **more: Any,
    ) -> None:  # fmt: skip
        self.next_id += 1
        message = {"chat": {"id": chat, **more}, "date": int(self.time.now - age), "text": text}
        if topic or thread_of_replies:
            message["message_thread_id"] = topic or thread_of_replies
            message["is_topic_message"] = bool(topic)
        if migrate_to:
            message["migrate_to_chat_id"] = migrate_to
        self.pending.append({"update_id": self.next_id, "message": message})
        self._tell()

    def _tell(self) -> None:
        self.changed.set()
        self.moved.set()

    async def reaches(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self.moved.clear()
                await self.moved.wait()

    async def until(self, sent: int) -> list[str]:
        """What the bot sent, once it sent so many and asked for more."""
        await self.reaches(lambda: len(self.sent) >= sent and self.idle.is_set())
        return [m["text"] for m in self.sent]


class Desk:
    def __init__(self, telegram: TelegramSide, url: str, http: httpx.AsyncClient, time: Time) -> None:
        self.telegram, self.url, self.http, self.time = telegram, url, http, time

    def bot(self, store: Store, holder: str = "one", chat: str = str(CHAT), moved: MovedChats | None = None) -> Bot:
        async def at_once(seconds: float) -> None:
            self.time.now += seconds

        settings = TelegramSettings(token=Secret(TOKEN), chat_id=chat, api_url=self.url)
        api = BotApi(self.http, settings, self.time, moved=moved or MovedChats(store), sleep=at_once)
        return Bot(api, store, self.time, chat, holder, sleep=self.time.sleep, rng=random.Random(1))

    async def restarted(self, store: Store, chat: str) -> Bot:
        moved = MovedChats(store)
        await moved.load(chat)
        return self.bot(store, "two", chat, moved)


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    time = Time()
    telegram = TelegramSide(time)
    async with StandIn(telegram) as server, httpx.AsyncClient(trust_env=False) as http:
        yield Desk(telegram, server.url, http, time)


@asynccontextmanager
async def running(bot: Bot) -> AsyncIterator[None]:
    task = asyncio.create_task(bot.run())
    try:
        yield
    finally:
        async with asyncio.timeout(1):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def the_lease(store: Store) -> dict[str, Any]:
    [row] = await store.read(select(meta.c.value).where(meta.c.key == poller_lease.KEY))
    return dict(json.loads(row.value))


async def test_ping(store: Store, desk: Desk) -> None:
    async with running(desk.bot(store)):
        desk.telegram.says("/ping")
        assert await desk.telegram.until(1) == [commands.PONG]
        assert desk.telegram.sent[0]["chat_id"] == "42"
        assert desk.telegram.polls[0] == {"timeout": 25, "limit": 20, "allowed_updates": ["message"]}


async def test_what_nobody_knows_is_answered_with_help(store: Store, desk: Desk) -> None:
    async with running(desk.bot(store)):
        desk.telegram.says("/selfdestruct now")
        desk.telegram.says("/help")
        desk.telegram.says("good morning")
        desk.telegram.says("/ping")
        assert await desk.telegram.until(3) == [commands.HELP, commands.HELP, commands.PONG]
    for command in commands.COMMANDS:
        assert f"/{command}: " in commands.HELP


PARSED = {
    "/ping": "ping",
    "/PING": "ping",
    "/status@sentinelbot please": "status",
    "/status@OtherBot": None,
    "ping": None,
    "/": None,
    "see /ping": None,
    "/ping-pong": None,
    "/" + "x" * 40: None,
    "": None,
}


@pytest.mark.parametrize(("text", "name"), PARSED.items())
def test_parse(text: str, name: str | None) -> None:
    assert commands.parse(text, "SentinelBot") == name


async def test_status(store: Store, desk: Desk) -> None:
    async with running(desk.bot(store)):
        desk.telegram.says("/status")
        assert await desk.telegram.until(1) == ["No tunnel has reported yet."]


async def test_strangers_get_no_answer_and_one_line(store: Store, desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    async with running(desk.bot(store)):
        for _ in range(3):
            desk.telegram.says("/status", chat=666)
        desk.telegram.says("/status", chat=667)
        desk.telegram.says("/ping")
        assert await desk.telegram.until(1) == [commands.PONG]
    said = [r.__dict__["chat"] for r in caplog.records if "not served" in r.message]
    assert said == [666, 667]


async def test_the_answer_is_given_in_the_topic_where_it_was_asked(store: Store, desk: Desk) -> None:
    async with running(desk.bot(store)):
        desk.telegram.says("/ping", topic=45)
        desk.telegram.says("/ping")
        desk.telegram.says("/ping", thread_of_replies=7)  # in a group without topics, which takes no such number
        await desk.telegram.until(3)
        assert [m.get("message_thread_id") for m in desk.telegram.sent] == [45, None, None]


async def test_a_group_that_moves_is_served_at_once_and_after_a_restart(store: Store, desk: Desk) -> None:
    async with running(desk.bot(store, chat="-777")):
        desk.telegram.says("", chat=-777, migrate_to=-100777)
        desk.telegram.says("/ping", chat=-100777)
        assert await desk.telegram.until(1) == [commands.PONG]
    async with running(await desk.restarted(store, chat="-777")):
        desk.telegram.says("/ping", chat=-100777)
        await desk.telegram.until(2)
    assert [m["chat_id"] for m in desk.telegram.sent] == ["-100777"] * 2


async def test_a_chat_can_be_named(store: Store, desk: Desk) -> None:
    async with running(desk.bot(store, chat="@OurChannel")):
        desk.telegram.says("/ping", chat=-1, username="stranger")
        desk.telegram.says("/ping", chat=-2, username="ourchannel")
        await desk.telegram.until(1)
        assert [m["chat_id"] for m in desk.telegram.sent] == ["-2"]


async def test_a_restart_answers_nothing_twice_and_loses_nothing(store: Store, desk: Desk) -> None:
    async with running(desk.bot(store, "first")):
        desk.telegram.says("/ping")
        await desk.telegram.until(1)
        # Stopped before the next poll could confirm it; Telegram offers it again.
        again = list(desk.telegram.pending)
    desk.telegram.pending = again
    desk.telegram.says("/help")
    async with running(desk.bot(store, "second")):
        assert await desk.telegram.until(2) == [commands.PONG, commands.HELP]


async def test_a_crash_after_the_answer_is_remembered_in_the_database(store: Store, desk: Desk) -> None:
    async with running(desk.bot(store, "first")):
        desk.telegram.says("/ping")
        await desk.telegram.until(1)
        assert (await the_lease(store))["offset"] == desk.telegram.next_id + 1
        desk.telegram.end_poll()
        await desk.telegram.until(1)
        await desk.telegram.reaches(lambda: len(desk.telegram.polls) >= 3)
        # All is confirmed: the bot asks without a number, for Telegram may count anew after a quiet week.
        assert "offset" not in desk.telegram.polls[2]


async def test_commands_from_before_a_downtime_are_not_answered(store: Store, desk: Desk) -> None:
    desk.telegram.says("/ping", age=601)
    desk.telegram.says("/help", age=599)
    async with running(desk.bot(store)):
        assert await desk.telegram.until(1) == [commands.HELP]


async def test_a_wrong_clock_does_not_silence_the_bot(store: Store, desk: Desk) -> None:
    async with running(desk.bot(store)):
        await desk.telegram.until(0)
        desk.telegram.end_poll()
        await desk.telegram.reaches(lambda: len(desk.telegram.polls) >= 2)
        desk.telegram.says("/ping", age=86400)
        assert await desk.telegram.until(1) == [commands.PONG]


async def test_two_servers_take_turns(store: Store, desk: Desk) -> None:
    async with running(desk.bot(store, "first")):
        await desk.telegram.until(0)
        async with running(desk.bot(store, "second")):
            await desk.time.quiet(1)
            assert len(desk.telegram.polls) == 1
            assert (await the_lease(store))["holder"] == "first"
    assert (await the_lease(store))["holder"] == ""


async def test_the_twin_takes_over_when_the_lease_is_over(store: Store, desk: Desk) -> None:
    dead = PollerLease(store, "dead")
    assert await dead.acquire(desk.time.now, desk.time.now + subject.LEASE_S)
    async with running(desk.bot(store, "alive")):
        await desk.time.quiet(1)
        assert desk.telegram.polls == []
        await desk.time.pass_(subject.LEASE_S - 1, 1)
        assert desk.telegram.polls == []
        desk.telegram.says("/ping")
        task = asyncio.create_task(desk.time.pass_(30, 1))
        assert await desk.telegram.until(1) == [commands.PONG]
        task.cancel()


async def test_a_stranger_who_polls_is_said_once_and_left_alone(
    store: Store, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    desk.telegram.poll_failures = [telegram_error(409, "Conflict: terminated by other getUpdates request")] * 3
    async with running(desk.bot(store)):
        for count in (1, 2, 3):
            await desk.time.quiet(1)
            await desk.time.pass_(29, 1)
            assert len(desk.telegram.polls) == count
            if count < 3:
                await desk.time.jump(300, 1)
        desk.telegram.says("/ping")
        task = asyncio.create_task(desk.time.jump(300, 1))
        assert await desk.telegram.until(1) == [commands.PONG]
        task.cancel()
    said = [r.message for r in caplog.records if r.name.endswith("bot.bot")]
    assert said == ["another program polls with the bot's token, or has set a webhook", "the bot is back"]
    assert "SECRET" not in caplog.text


async def test_a_wrong_token_is_said_once_and_tried_slowly(
    store: Store, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    desk.telegram.failures = [telegram_error(401, "Unauthorized")] * 3
    async with running(desk.bot(store)):
        await desk.time.quiet(1)
        assert [until - desk.time.now for until, _, _ in desk.time.asleep] == [subject.SETUP_RETRY_S]
        await desk.time.pass_(subject.SETUP_RETRY_S, 1)
    assert [r.__dict__["reason"] for r in caplog.records] == ["auth"]
    assert "SECRET" not in caplog.text


async def test_an_answer_is_tried_again_when_telegram_asks_to_wait(store: Store, desk: Desk) -> None:
    async with running(desk.bot(store)):
        await desk.telegram.until(0)
        desk.telegram.failures = [telegram_error(429, retry_after=7)]
        desk.telegram.says("/ping")
        await desk.time.quiet(1)
        task = asyncio.create_task(desk.time.pass_(7, 1))
        assert await desk.telegram.until(1) == [commands.PONG]
        task.cancel()


async def test_an_answer_that_telegram_never_takes_is_dropped_with_a_line(
    store: Store, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(desk.bot(store)):
        await desk.telegram.until(0)
        desk.telegram.failures = [telegram_error(400, "Bad Request: no"), *[telegram_error(500)] * 3]
        desk.telegram.says("/ping")
        desk.telegram.says("/ping")
        await desk.time.quiet(1)
        task = asyncio.create_task(desk.time.pass_(10, 1))
        await desk.telegram.reaches(lambda: len(desk.telegram.polls) == 2 and desk.telegram.idle.is_set())
        task.cancel()
        desk.telegram.says("/help")
        assert await desk.telegram.until(1) == [commands.HELP]
    said = [r.__dict__["reason"] for r in caplog.records if r.message == "answer not delivered"]
    assert said == ["refused", "server_error"]


async def test_a_telegram_that_is_down_is_asked_again_with_growing_waits(
    store: Store, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    desk.telegram.poll_failures = [Answer(502, b"<html>"), telegram_error(429, retry_after=90), telegram_error(500)]
    waits = []
    async with running(desk.bot(store)):
        for _ in range(3):
            await desk.time.quiet(1)
            [(wakes, _, _)] = desk.time.asleep
            waits.append(wakes - desk.time.now)
            task = asyncio.create_task(desk.time.jump(waits[-1], 1))
            await desk.telegram.reaches(lambda: len(desk.telegram.polls) == len(waits) + 1)
            task.cancel()
        desk.telegram.says("/ping")
        assert await desk.telegram.until(1) == [commands.PONG]
    assert waits[0] < 2
    assert waits[1] == 90
    assert waits[2] < 60
    assert "SECRET" not in caplog.text


async def test_an_update_that_is_no_text_is_stepped_over(store: Store, desk: Desk) -> None:
    body = b'{"ok":true,"result":[{"update_id":7,"message":{"chat":{"id":1},"date":1,"text":"\xff"}}]}'
    desk.telegram.poll_failures = [Answer(body=body)]
    async with running(desk.bot(store)):
        desk.telegram.says("/ping")
        assert await desk.telegram.until(1) == [commands.PONG]
    assert desk.telegram.polls[1]["offset"] == 8


async def test_an_answer_that_is_nested_too_deep_makes_no_sense(store: Store, desk: Desk) -> None:
    body = b'{"ok":true,"result":' + b"[" * 3000
    desk.telegram.poll_failures = [Answer(body=body)]
    with pytest.raises(TransientError, match="garbage"):
        await desk.bot(store)._api.get_updates(None, 0)


async def test_a_lost_database_stops_the_polling_and_nothing_else(
    store: Store, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    faulty = Faulty(store)
    faulty.away = True
    async with running(desk.bot(faulty)):
        await desk.time.quiet(1)
        await desk.time.pass_(60, 1)
        assert desk.telegram.polls == []
        faulty.away = False
        desk.telegram.says("/ping")
        task = asyncio.create_task(desk.time.pass_(30, 1))
        assert await desk.telegram.until(1) == [commands.PONG]
        task.cancel()
    assert [r.message for r in caplog.records] == ["no database, the bot waits"]


async def test_one_of_many_gets_the_free_seat(store: Store) -> None:
    first = PollerLease(store, "first")
    assert await first.acquire(100.0, 200.0)
    await first.release()
    seats = [PollerLease(store, str(n)) for n in range(8)]
    won = await asyncio.gather(*(s.acquire(100.0, 145.0) for s in seats))
    assert won.count(True) == 1
    winner = seats[won.index(True)]
    assert await winner.acquire(110.0, 155.0)
    losers = [s for s in seats if s is not winner]
    assert [await s.acquire(110.0, 200.0) for s in losers] == [False] * 7
    assert {s.free_at for s in seats} == {155.0}


async def test_a_seat_that_was_taken_away_is_given_up(store: Store) -> None:
    slow, fast = PollerLease(store, "slow"), PollerLease(store, "fast")
    assert await slow.acquire(0.0, 45.0)
    slow.offset = 8
    assert await fast.acquire(50.0, 95.0)
    assert not await slow.acquire(51.0, 96.0)
    assert not await slow.acquire(52.0, 97.0)
    assert slow.free_at == 95.0
    assert await fast.acquire(60.0, 105.0)


ODD = ["", "null", "{", '{"until": "soon"}', '{"holder": "x", "until": 1e300}', '{"holder": "x", "until": 5000}']


@pytest.mark.parametrize("value", ODD)
async def test_a_row_that_makes_no_sense_blocks_nobody(store: Store, value: str) -> None:
    await store.write(insert(meta).values(key=poller_lease.KEY, value=value))
    assert await PollerLease(store, "me").acquire(100.0, 145.0)


async def test_the_offset_travels_with_the_seat(store: Store) -> None:
    first, second = PollerLease(store, "first"), PollerLease(store, "second")
    assert await first.acquire(0.0, 45.0)
    first.offset = 77
    assert await first.acquire(1.0, 46.0)
    await first.release()
    assert await second.acquire(2.0, 47.0)
    assert second.offset == 77
    await store.write(update(meta).where(meta.c.key == poller_lease.KEY).values(value="{}"))
    assert not await second.acquire(3.0, 48.0)
