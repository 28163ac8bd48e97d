"""The Telegram bot: answers the commands of one chat."""

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

POLL_TIMEOUT_S: Final = 25  # of a long poll
LEASE_S: Final = 45.0  # outlasts one poll and its time limit
STANDBY_INTERVAL_S: Final = 15.0
MAX_COMMAND_AGE_S: Final = 600.0  # nobody waits for the answer to an older command any more
SETUP_RETRY_S: Final = 300.0
_MAX_REPLY_ATTEMPTS: Final = 3
_MAX_LOGGED_CHATS: Final = 100


class Bot:
    """Runs until cancelled. `chat_id` is the only chat that it serves; `holder` is a unique name of this server among
    those that share a database.
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
        self._backoff: Iterator[float] | None = None
        self._logged_chats: set[int] = set()
        # Only commands that waited while no server polled can be too old; later, an old date means a wrong clock.
        self._caught_up = False

    async def run(self) -> None:
        try:
            while True:
                if (wait := await self._step()) > 0:
                    await self._sleep(wait)
        finally:
            # Bounded, so that shutdown does not wait; otherwise the lease is free once it has expired.
            with contextlib.suppress(StoreUnavailable, TimeoutError):
                async with asyncio.timeout(0.5):
                    await self._lease.release()

    async def _step(self) -> float:
        """Poll once and answer. Returns the seconds to wait before the next step."""
        try:
            if not await self._keep_lease():
                self._recovered()
                self._caught_up = False
                return min(max(self._lease.free_at - self._clock.wall(), 1.0), STANDBY_INTERVAL_S)
            await self._poll()
        except StoreUnavailable as e:
            return self._failed(e.reason, "no database, the bot waits", 0.5, 15.0)
        except ConflictError as e:
            text = "another program polls with the bot's token, or has set a webhook"
            return 30.0 + self._failed(e.reason, text, 1.0, 240.0)
        except SetupError as e:
            self._failed(e.reason, "the bot does not work as it is set up", SETUP_RETRY_S, SETUP_RETRY_S)
            return SETUP_RETRY_S
        except DeliveryError as e:
            wait = self._failed(e.reason, "Telegram does not answer the bot", 1.0, 60.0)
            asked = e.retry_after if isinstance(e, TransientError) else None
            return max(wait, asked or 0.0)
        return 0.0

    async def _poll(self) -> None:
        if self._username is None:
            self._username = (await self._api.get_me()).username
        updates = await self._api.get_updates(self._lease.offset, POLL_TIMEOUT_S)
        self._recovered()
        if not updates:
            # All earlier updates are confirmed. Keeping the offset for ever would lose messages after a week without
            # updates, when Telegram may start with new numbers.
            self._lease.offset, self._caught_up = None, True
        for update in updates:
            if update.message is not None:
                await self._handle(update.message)
            self._lease.offset = max(self._lease.offset or 0, update.update_id + 1)
            if not await self._keep_lease():
                return  # another server has the lease now, and continues from the offset in the row

    async def _keep_lease(self) -> bool:
        now = self._clock.wall()
        return await self._lease.acquire(now, now + LEASE_S)

    async def _handle(self, message: Message) -> None:
        if not self._is_served(message.chat):
            if message.chat.id not in self._logged_chats and len(self._logged_chats) < _MAX_LOGGED_CHATS:
                self._logged_chats.add(message.chat.id)
                log.warning("a chat that is not served wrote to the bot", extra={"chat": message.chat.id})
            return
        if message.migrate_to_chat_id is not None:
            self._api.moved.set_current(self._chat_id, str(message.migrate_to_chat_id))
            await self._api.moved.save(self._chat_id)
            return
        command = commands.parse(message.text, self._username or "")
        if command is None:
            return
        age = self._clock.wall() - message.date
        if not self._caught_up and age > MAX_COMMAND_AGE_S:
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
            case _:  # /help, Telegram's own /start, and unknown commands
                return commands.HELP

    async def _reply(self, asked: Message, text: str) -> None:
        """Answer in the chat and topic of the command, with a few attempts; the user can ask again."""
        for attempt in range(1, _MAX_REPLY_ATTEMPTS + 1):
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
            if attempt < _MAX_REPLY_ATTEMPTS:
                await self._sleep(wait)
        log.warning("answer not delivered", extra={"reason": reason})

    def _failed(self, reason: str, text: str, first: float, longest: float) -> float:
        """Log a failure when its reason changes. Returns the seconds to wait."""
        self._caught_up = False
        if reason != self._failing:
            log.warning("%s", text, extra={"reason": reason})
            self._failing, self._backoff = reason, backoff(first, longest, rng=self._rng)
        return next(self._backoff) if self._backoff else first

    def _recovered(self) -> None:
        if self._failing is not None:
            log.info("the bot is back", extra={"after": self._failing})
            self._failing = self._backoff = None
