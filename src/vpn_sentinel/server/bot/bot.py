"""The Telegram bot: one chat asks, and gets the answer at once."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Iterator
from datetime import tzinfo
from typing import Final

from vpn_sentinel.runtime.backoff import backoff
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.bot import commands, status
from vpn_sentinel.server.bot.poller_lease import PollerLease
from vpn_sentinel.server.notify.channel import DeliveryError, SetupError, TransientError
from vpn_sentinel.server.notify.channels.bot_api import BotApi, Chat, ConflictError, Message, Sleep
from vpn_sentinel.server.notify.split import split
from vpn_sentinel.server.store import queries
from vpn_sentinel.server.store.store import Store, StoreUnavailable

log = logging.getLogger(__name__)

POLL_S: Final = 25  # seconds that Telegram holds the question open
LEASE_S: Final = 45.0  # outlasts one poll and its time limit
STANDBY_S: Final = 15.0
STALE_S: Final = 600.0  # what was asked longer ago than this, nobody waits for any more
REPAIR_S: Final = 300.0
_TRIES: Final = 3
_MAX_STRANGERS_TOLD: Final = 100


class Bot:
    """Runs until cancelled. `chat_id` is the only chat it serves; `holder` names this server among those that share a
    database, and must be unique.
    """

    def __init__(
        self,
        api: BotApi,
        store: Store,
        clock: Clock,
        chat_id: str,
        holder: str,
        *,
        sleep: Sleep = asyncio.sleep,
        zone: tzinfo | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._api = api
        self._store = store
        self._clock = clock
        self._chat_id = chat_id
        self._lease = PollerLease(store, holder)
        self._sleep = sleep
        self._zone = zone
        self._rng = rng or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._username: str | None = None
        self._failing: str | None = None
        self._waits: Iterator[float] | None = None
        self._strangers: set[int] = set()
        # Only what piled up while nobody polled can be stale; later, an old date only means that a clock is wrong.
        self._caught_up = False

    async def run(self) -> None:
        try:
            while True:
                if (wait := await self._turn()) > 0:
                    await self._sleep(wait)
        finally:
            # Shutdown waits for nobody; who cannot be told in time finds it free when it has run out.
            with contextlib.suppress(StoreUnavailable, TimeoutError):
                async with asyncio.timeout(0.5):
                    await self._lease.leave()

    async def _turn(self) -> float:
        """Poll once and answer; how many seconds to wait before the next turn."""
        try:
            if not await self._hold():
                self._well()
                self._caught_up = False
                return min(max(self._lease.free_at - self._clock.wall(), 1.0), STANDBY_S)
            await self._poll()
        except StoreUnavailable as e:
            return self._ill(e.reason, "no database, the bot waits", 0.5, 15.0)
        except ConflictError as e:
            return 30.0 + self._ill(e.reason, "someone else polls with the bot's token, or set a webhook", 1.0, 240.0)
        except SetupError as e:
            self._ill(e.reason, "the bot cannot be reached as it is set up", REPAIR_S, REPAIR_S)
            return REPAIR_S
        except DeliveryError as e:
            wait = self._ill(e.reason, "Telegram does not answer the bot", 1.0, 60.0)
            asked = e.retry_after if isinstance(e, TransientError) else None
            return max(wait, asked or 0.0)
        return 0.0

    async def _poll(self) -> None:
        if self._username is None:
            self._username = (await self._api.get_me()).username
        updates = await self._api.get_updates(self._lease.offset, POLL_S)
        self._well()
        if not updates:
            # That confirmed all before. Asking from the same number on for ever would lose messages after a week of
            # quiet, when Telegram may begin to number anew.
            self._lease.offset, self._caught_up = None, True
        for update in updates:
            if update.message is not None:
                await self._hear(update.message)
            self._lease.offset = max(self._lease.offset or 0, update.update_id + 1)
            if not await self._hold():
                return  # another server has the lease now, and goes on from where the row says

    async def _hold(self) -> bool:
        now = self._clock.wall()
        return await self._lease.hold(now, now + LEASE_S)

    async def _hear(self, message: Message) -> None:
        if not self._is_served(message.chat):
            if message.chat.id not in self._strangers and len(self._strangers) < _MAX_STRANGERS_TOLD:
                self._strangers.add(message.chat.id)
                log.warning("a chat that is not served wrote to the bot", extra={"chat": message.chat.id})
            return
        if message.migrate_to_chat_id is not None:
            self._api.moved.note(self._chat_id, str(message.migrate_to_chat_id))
            await self._api.moved.keep(self._chat_id)
            return
        command = commands.parse(message.text, self._username or "")
        if command is None:
            return
        age = self._clock.wall() - message.date
        if not self._caught_up and age > STALE_S:
            log.info("command not answered, it is too old", extra={"command": command, "age": f"{age:.0f}"})
            return
        for part in split(await self._answer(command)):
            await self._reply(message, part)

    def _is_served(self, chat: Chat) -> bool:
        served = self._api.moved.current(self._chat_id).lower()
        return served == str(chat.id) or (chat.username != "" and served == f"@{chat.username}".lower())

    async def _answer(self, command: str) -> str:
        match command:
            case "ping":
                return commands.PONG
            case "status":
                try:
                    found = await queries.all_tunnels(self._store)
                except StoreUnavailable:
                    return "The database cannot be reached now."
                return status.render(found, self._clock.wall(), self._zone)
            case _:  # /help, Telegram's own /start, and what does not exist
                return commands.HELP

    async def _reply(self, asked: Message, text: str) -> None:
        """Answer where it was asked, with a few tries; who asked can ask again."""
        for attempt in range(1, _TRIES + 1):
            try:
                await self._api.send_message(str(asked.chat.id), text, html=True, topic=asked.topic)
            except TransientError as e:
                wait = min(e.retry_after or float(attempt), 30.0)
                reason = e.reason
            except DeliveryError as e:
                log.warning("answer not delivered", extra={"reason": e.reason})
                return
            else:
                return
            if attempt < _TRIES:
                await self._sleep(wait)
        log.warning("answer not delivered", extra={"reason": reason})

    def _ill(self, reason: str, words: str, first: float, most: float) -> float:
        """Say what is wrong when it changes; how long to wait."""
        self._caught_up = False
        if reason != self._failing:
            log.warning("%s", words, extra={"reason": reason})
            self._failing, self._waits = reason, backoff(first, most, rng=self._rng)
        return next(self._waits) if self._waits else first

    def _well(self) -> None:
        if self._failing is not None:
            log.info("the bot is back", extra={"after": self._failing})
            self._failing = self._waits = None
