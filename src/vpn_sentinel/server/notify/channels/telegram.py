"""Telegram: the notice as a message in the owner's chat."""

from datetime import tzinfo

from vpn_sentinel.domain.notice import Notice
from vpn_sentinel.server.notify import text
from vpn_sentinel.server.notify.channel import PermanentError, SetupError
from vpn_sentinel.server.notify.channels.bot_api import BotApi
from vpn_sentinel.server.notify.split import split


class TelegramChannel:
    """`topic` is the one of the chat that is told, None in a chat without. `zone` is where times are told, None the
    process's own.
    """

    name = "telegram"

    def __init__(self, api: BotApi, chat_id: str, zone: tzinfo | None = None, *, topic: int | None = None) -> None:
        self._api = api
        self._chat_id = chat_id
        self._topic = topic
        self._zone = zone

    async def send(self, notice: Notice, delivery_id: int) -> None:  # noqa: ARG002 - Telegram knows no idempotency key
        """Raises a DeliveryError. A message too long for one comes as several; a failure repeats them all."""
        forms = (
            (text.html(notice, self._zone), True),
            (text.plain(notice, self._zone), False),
            (text.brief(notice, self._zone), False),
        )
        for message, html in forms:
            try:
                await self._send(message, html=html)
            except PermanentError:
                continue  # whatever was wrong with it: an ugly alarm is better than none
            else:
                return
        raise SetupError("rejected")

    async def _send(self, message: str, *, html: bool) -> None:
        for part in split(message):
            await self._api.send_message(self._chat_id, part, html=html, topic=self._topic)
