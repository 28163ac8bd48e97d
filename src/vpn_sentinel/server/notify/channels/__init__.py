"""Builds the channels from the settings. A new one is a module like `webhook.py` and a few lines here."""

import httpx

from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.runtime.settings import PREFIX, SettingError
from vpn_sentinel.server.notify.channel import Channel
from vpn_sentinel.server.notify.channels.bot_api import BotApi
from vpn_sentinel.server.notify.channels.telegram import TelegramChannel
from vpn_sentinel.server.notify.channels.webhook import SEND_TIMEOUT_S, WebhookChannel
from vpn_sentinel.server.notify.guard import guarded_client, tls
from vpn_sentinel.server.settings import ServerSettings


def build_channels(
    settings: ServerSettings, http: httpx.AsyncClient, *, clock: Clock, api: BotApi | None = None
) -> dict[str, Channel]:
    """The channels that are set up, by name. Raises SettingError.

    `http` is used for Telegram, and the caller closes it. Pass the bot's `api`, so that replies and notices share one
    rate limit.
    """
    channels: dict[str, Channel] = {}
    if settings.telegram is not None:
        api = api or BotApi(http, settings.telegram, clock)
        channels[TelegramChannel.name] = TelegramChannel(api, settings.telegram.chat_id, topic=settings.telegram.topic)
    if settings.webhook is not None:
        try:
            httpx.URL(settings.webhook.url.reveal())
        except httpx.InvalidURL:
            raise SettingError(PREFIX + "WEBHOOK_URL", "is not a usable address") from None
        client = guarded_client(tls(settings.ca_file), private=settings.webhook_private, timeout_s=SEND_TIMEOUT_S)
        channels[WebhookChannel.name] = WebhookChannel(client, settings.webhook, clock)
    return channels
