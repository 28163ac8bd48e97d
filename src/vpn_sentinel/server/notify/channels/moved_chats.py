"""The new numbers of groups that became supergroups, kept in the database, so that they survive a restart.

One row of `meta` for each, `telegram_moved:<number in the settings>`, with the current number.
"""

import logging
from typing import Final

from sqlalchemy import select, text

from vpn_sentinel.server.store.schema import meta
from vpn_sentinel.server.store.store import Store, StoreUnavailable

log = logging.getLogger(__name__)

KEY_PREFIX: Final = "telegram_moved:"
_SAVE: Final = text(
    "INSERT INTO meta (key, value) VALUES (:key, :value) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
)


class MovedChats:
    """The current numbers of chats, by the number in the settings. Without a `store` they are kept in memory only."""

    def __init__(self, store: Store | None = None) -> None:
        self._store = store
        self._current: dict[str, str] = {}

    def current(self, chat_id: str) -> str:
        """The current number of a chat that may have moved since the settings were written."""
        return self._current.get(chat_id, chat_id)

    async def load(self, chat_id: str) -> None:
        """Read the chat's current number from the database. Raises StoreUnavailable."""
        if self._store is not None:
            rows = await self._store.read(select(meta.c.value).where(meta.c.key == KEY_PREFIX + chat_id))
            self._current.update((chat_id, row.value) for row in rows)

    def set_current(self, chat_id: str, new: str) -> None:
        """From now on `chat_id` means `new`; `save` writes it to the database."""
        self._current[chat_id] = new
        log.warning("the chat moved: set TELEGRAM_CHAT_ID to its new number", extra={"chat": new})

    async def save(self, chat_id: str) -> None:
        """Write the new number; if that fails, Telegram's answer gives it again after a restart."""
        if self._store is None:
            return
        try:
            await self._store.write(_SAVE.bindparams(key=KEY_PREFIX + chat_id, value=self._current[chat_id]))
        except StoreUnavailable as e:
            log.warning("the chat's new number could not be stored", extra={"reason": e.reason})
