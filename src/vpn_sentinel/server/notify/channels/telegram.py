"""Telegram: a notice as a message in the owner's chat."""

from datetime import tzinfo

from vpn_sentinel.domain.notice import Notice
from vpn_sentinel.server.notify import text
from vpn_sentinel.server.notify.channel import PermanentError, SetupError
from vpn_sentinel.server.notify.channels.bot_api import BotApi
from vpn_sentinel.server.notify.split import split


class TelegramChannel:
    """`topic` is the chat's topic for notices, None without topics. `zone` is the time zone, None for the process's."""

    name = "telegram"

    def __init__(self, api: BotApi, chat_id: str, zone: tzinfo | None = None, *, topic: int | None = None) -> None:
        self._api = api
        self._chat_id = chat_id
        self._topic = topic
        self._zone = zone

    async def send(self, notice: Notice, delivery_id: int) -> None:  # noqa: ARG002 - Telegram knows no idempotency key
        """Raises a DeliveryError. A text too long for one message is sent as several; a failure repeats all of them."""
        forms = (
            (text.html(notice, self._zone), True),
            (text.plain(notice, self._zone), False),
            (text.brief(notice, self._zone), False),
        )
        for message, html in forms:
            try:
                await self._send(message, html=html)
            except PermanentError:
                continue  # a plainer form may be accepted: an ugly alarm is better than none
            else:
                return
        raise SetupError("rejected")

    async def _send(self, message: str, *, html: bool) -> None:
        for part in split(message):
            await self._api.send_message(self._chat_id, part, html=html, topic=self._topic)
