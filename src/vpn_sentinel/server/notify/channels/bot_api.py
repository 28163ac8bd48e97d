"""The three methods of the Telegram Bot API that are needed (https://core.telegram.org/bots/api).

The token is part of every URL, and an httpx exception carries its request. So no httpx exception leaves this module,
not even as the context of another: failures are turned into words, and raised after the `except` block.
"""

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Final, TypeVar

import httpx
import msgspec

from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.notify.channel import DeliveryError, PermanentError, SetupError, TransientError
from vpn_sentinel.server.notify.channels.moved_chats import MovedChats
from vpn_sentinel.server.notify.failures import UNCOMPRESSED, connection_error, keep_urls_out_of_the_log, read_body
from vpn_sentinel.server.settings import TelegramSettings

# One message a second in a chat is what Telegram recommends (https://core.telegram.org/bots/faq#broadcasting-to-users).
MIN_INTERVAL_S: Final = 1.0
CALL_TIMEOUT_S: Final = 15.0
# Twenty updates, each with a message of 4,096 characters and one that it replies to, escaped.
MAX_ANSWER_BYTES: Final = 2 * 1024 * 1024

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]


class Parameters(msgspec.Struct, frozen=True):
    retry_after: float | None = None
    migrate_to_chat_id: int | None = None


class Reply(msgspec.Struct, frozen=True):
    """The answer of every method. `description` is for people, and holds no secret."""

    ok: bool = False
    result: msgspec.Raw = msgspec.Raw(b"null")
    description: str = ""
    parameters: Parameters = Parameters()


class User(msgspec.Struct, frozen=True):
    username: str = ""


class Chat(msgspec.Struct, frozen=True):
    id: int
    username: str = ""


class Message(msgspec.Struct, frozen=True):
    """`date` is in seconds since the epoch; `migrate_to_chat_id` the new number of a group that became a supergroup."""

    chat: Chat
    date: int
    text: str = ""
    message_thread_id: int | None = None
    is_topic_message: bool = False
    migrate_to_chat_id: int | None = None

    @property
    def topic(self) -> int | None:
        """The topic that it was written in. In groups without topics replies have a thread too, but no topic."""
        return self.message_thread_id if self.is_topic_message else None


class Update(msgspec.Struct, frozen=True):
    update_id: int
    message: Message | None = None


class UpdateId(msgspec.Struct, frozen=True):
    """Only the number of an update, for one that cannot be read."""

    update_id: int


class ChatMovedError(SetupError):
    """The group became a supergroup, with another number."""

    def __init__(self, chat_id: int) -> None:
        super().__init__("chat_moved")
        self.chat_id = str(chat_id)


class ConflictError(TransientError):
    """Another program polls with this token, or a webhook is set on it (409)."""

    def __init__(self) -> None:
        super().__init__("conflict")


# Telegram's errors about the message itself, from telegram-bot-api (Client.cpp) and
# https://core.telegram.org/method/messages.sendMessage. Short on purpose: after any other error the notice is kept.
_MESSAGE_ERRORS: Final = (
    "can't parse entities",
    "can't parse message text",
    "message is too long",
    "message_too_long",
    "message text is empty",
    "message_empty",
    "text must be non-empty",
    "text must be encoded in utf-8",
    "strings must be encoded in utf-8",
    "entities_too_long",
    "entity_bounds_invalid",
)
# Telegram's errors about the chat, and our reason for each.
_CHAT_ERRORS: Final = (
    ("topic_closed", "topic_closed"),
    ("topic_deleted", "topic_gone"),
    ("message thread not found", "topic_gone"),
    ("upgraded to a supergroup", "chat_moved"),
    ("not enough rights", "no_right_to_write"),
    ("have no rights", "no_right_to_write"),
    ("need administrator rights", "no_right_to_write"),
    ("chat_write_forbidden", "no_right_to_write"),
    ("chat_restricted", "no_right_to_write"),
    ("forbidden", "forbidden"),
    ("kicked", "forbidden"),
    ("blocked", "forbidden"),
    ("chat", "chat_not_found"),
    ("peer_id_invalid", "chat_not_found"),
)

# What decoding can raise: for invalid UTF-8 and too deep nesting, msgspec raises Python's own exceptions.
_DECODE_ERRORS: Final = (ValueError, RecursionError)
_reply = msgspec.json.Decoder(Reply).decode
_user = msgspec.json.Decoder(User).decode
_updates = msgspec.json.Decoder(list[msgspec.Raw]).decode
_update = msgspec.json.Decoder(Update).decode
_update_id = msgspec.json.Decoder(UpdateId).decode


class BotApi:
    """Every method raises a DeliveryError. Messages are at least a second apart, across all callers.

    `timeout_s` is the time that one call may take, in addition to the wait of a long poll.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        telegram: TelegramSettings,
        clock: Clock,
        *,
        moved: MovedChats | None = None,
        sleep: Sleep = asyncio.sleep,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> None:
        keep_urls_out_of_the_log()
        self._http = http
        self._telegram = telegram
        self._clock = clock
        self._sleep = sleep
        self._timeout_s = timeout_s
        self._send_lock = asyncio.Lock()
        self._sent_at = float("-inf")
        self.moved = MovedChats() if moved is None else moved

    async def get_me(self) -> User:
        return _parsed(_user, await self._call("getMe", {}))

    async def send_message(self, chat_id: str, text: str, *, html: bool, topic: int | None = None) -> None:
        """Send at most 4,096 UTF-16 code units, counted after entities are parsed."""
        try:
            await self._send(self.moved.current(chat_id), text, html=html, topic=topic)
        except ChatMovedError as moved:
            self.moved.set_current(chat_id, moved.chat_id)
        else:
            return
        # An alarm must wait neither for a change of the setting nor for the database.
        try:
            await self._send(self.moved.current(chat_id), text, html=html, topic=topic)
        finally:
            await self.moved.save(chat_id)

    async def get_updates(self, offset: int | None, wait: int) -> list[Update]:
        """Updates from `offset` on, which confirms the earlier ones; waits up to `wait` seconds for the first.

        An update that cannot be read is returned with its number alone, so that it can be confirmed; otherwise it would
        come back for ever.
        """
        params: dict[str, object] = {"timeout": wait, "limit": 20, "allowed_updates": ["message"]}
        if offset is not None:
            params["offset"] = offset
        found = _parsed(_updates, await self._call("getUpdates", params, wait=wait))
        return [_readable(item) for item in found]

    async def _send(self, chat_id: str, text: str, *, html: bool, topic: int | None) -> None:
        params: dict[str, object] = {"chat_id": chat_id, "text": text, "link_preview_options": {"is_disabled": True}}
        if topic is not None:
            params["message_thread_id"] = topic
        if html:
            params["parse_mode"] = "HTML"
        async with self._send_lock:
            if (wait := self._sent_at + MIN_INTERVAL_S - self._clock.boottime()) > 0:
                await self._sleep(wait)
            try:
                await self._call("sendMessage", params)
            finally:
                self._sent_at = self._clock.boottime()

    async def _call(self, method: str, params: Mapping[str, object], wait: float = 0.0) -> msgspec.Raw:
        timeout_s = wait + self._timeout_s
        status, body = 0, b""
        broken: DeliveryError | None = None
        try:
            async with asyncio.timeout(timeout_s):
                async with self._http.stream(
                    "POST", f"{self._telegram.api_url}/bot{self._telegram.token.reveal()}/{method}",
                    json=params, headers=UNCOMPRESSED, timeout=timeout_s,
                ) as answer:  # fmt: skip
                    status, body = answer.status_code, await read_body(answer, MAX_ANSWER_BYTES)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, UnicodeError) as e:
            broken = connection_error(e)
        if broken is not None:
            raise broken
        reply = _read(body)
        if reply is not None and reply.ok and status == HTTPStatus.OK:
            return reply.result
        raise _failure(status, reply)


def _parsed(decode: Callable[[msgspec.Raw], T], raw: msgspec.Raw) -> T:
    with contextlib.suppress(*_DECODE_ERRORS):
        return decode(raw)
    raise TransientError("garbage")


def _readable(raw: msgspec.Raw) -> Update:
    with contextlib.suppress(*_DECODE_ERRORS):
        return _update(raw)
    return Update(_parsed(_update_id, raw).update_id)


def _read(body: bytes) -> Reply | None:
    with contextlib.suppress(*_DECODE_ERRORS):
        return _reply(body)
    return None


def _failure(status: int, reply: Reply | None) -> DeliveryError:
    """The error for an answer other than "ok"."""
    answer = reply or Reply()
    match status:
        case HTTPStatus.TOO_MANY_REQUESTS:
            return TransientError("rate_limited", retry_after=_seconds(answer.parameters.retry_after), binding=True)
        case HTTPStatus.CONFLICT:
            return ConflictError()
        case HTTPStatus.UNAUTHORIZED | HTTPStatus.NOT_FOUND:  # a token that is revoked or malformed
            return SetupError("auth")
        case HTTPStatus.FORBIDDEN:  # blocked by the user, removed from the group, no right to write
            return SetupError("forbidden")
        case HTTPStatus.BAD_REQUEST if answer.parameters.migrate_to_chat_id is not None:
            return ChatMovedError(answer.parameters.migrate_to_chat_id)
        case HTTPStatus.BAD_REQUEST if reply is not None:
            return _refused(answer.description.lower())
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            return PermanentError("too_large")
        case _ if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.REQUEST_TIMEOUT:
            return TransientError("server_error")
        case HTTPStatus.OK:
            return TransientError("garbage")
        case _:  # a redirect or another page: TELEGRAM_API_URL leads somewhere else
            return SetupError("unexpected_status")


def _refused(description: str) -> DeliveryError:
    """The error for a 400, by Telegram's description in lower case."""
    if any(phrase in description for phrase in _MESSAGE_ERRORS):
        return PermanentError("rejected")
    return SetupError(next((reason for phrase, reason in _CHAT_ERRORS if phrase in description), "refused"))


def _seconds(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) and value >= 0 else None
