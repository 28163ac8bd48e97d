"""Groups that became supergroups, which have another number: kept in the database, so that a restart knows it too.

One row of `meta` for each, `telegram_moved:<number in the settings>`, with the number of today.
"""

import logging
from typing import Final

from sqlalchemy import select, text

from vpn_sentinel.server.store.schema import meta
from vpn_sentinel.server.store.store import Store, StoreUnavailable

log = logging.getLogger(__name__)

KEY: Final = "telegram_moved:"
_KEEP: Final = text(
    "INSERT INTO meta (key, value) VALUES (:key, :value) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
)


class MovedChats:
    """Without a `store` it lasts as long as the process."""

    def __init__(self, store: Store | None = None) -> None:
        self._store = store
        self._now: dict[str, str] = {}

    def current(self, chat_id: str) -> str:
        """The number of a chat that may have moved since the settings were written."""
        return self._now.get(chat_id, chat_id)

    async def load(self, chat_id: str) -> None:
        """Raises StoreUnavailable."""
        if self._store is not None:
            rows = await self._store.read(select(meta.c.value).where(meta.c.key == KEY + chat_id))
            self._now.update((chat_id, row.value) for row in rows)

    def note(self, chat_id: str, now: str) -> None:
        """From here on `chat_id` is `now`; `keep` writes it down."""
        self._now[chat_id] = now
        log.warning("the chat moved: set TELEGRAM_CHAT_ID to its new number", extra={"chat": now})

    async def keep(self, chat_id: str) -> None:
        """What cannot be written is found out again after a restart, by Telegram's answer."""
        if self._store is None:
            return
        try:
            await self._store.write(_KEEP.bindparams(key=KEY + chat_id, value=self._now[chat_id]))
        except StoreUnavailable as e:
            log.warning("the chat's new number could not be kept", extra={"reason": e.reason})
