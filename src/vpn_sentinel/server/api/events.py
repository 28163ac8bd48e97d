"""`/events`: what changed, as it changes, over server-sent events."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import msgspec
from sqlalchemy import Row

from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.store import queries
from vpn_sentinel.server.store.store import Store, StoreUnavailable
from vpn_sentinel.wire import rest

log = logging.getLogger(__name__)

# How soon a client comes back after its stream ended, in milliseconds.
_RETRY_MS: Final = 2000
_ENCODER: Final = msgspec.json.Encoder()


class Encoded:
    """Tunnels as JSON, encoded once for all streams: a row that is as it was gives the bytes it gave."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: dict[str, tuple[Row[Any], bytes]] = {}

    async def of(self, names: set[str]) -> rest.Changed:
        """The tunnels of those names as they are now. Raises StoreUnavailable."""
        rows = await queries.tunnel_rows(self._store, names)
        gone = sorted(names - {r.name for r in rows})
        for name in gone:
            self._kept.pop(name, None)
        return rest.Changed(tunnels=[msgspec.Raw(self._json(r)) for r in rows], gone=gone)

    def _json(self, row: Row[Any]) -> bytes:
        kept = self._kept.get(row.name)
        if kept is None or kept[0] != row:
            kept = self._kept[row.name] = (row, _ENCODER.encode(queries.tunnel_of(row)))
        return kept[1]


async def stream(
    hub: Hub, encoded: Encoded, may_read: Callable[[], Awaitable[bool]], idle: float = 15.0
) -> AsyncIterator[bytes]:
    """Frames until the hub closes: an event `tunnels` for what changed, a comment where nothing did for `idle` seconds.

    Nothing is sent of the time before: a client lists `/tunnels` once it is connected. When the database goes away the
    stream ends, and the client comes back by itself. Before each frame `may_read` is asked whether the key that opened
    the stream still does; the stream ends with it.
    """
    with hub.listen() as listener:
        yield b"retry: %d\n: connected\n\n" % _RETRY_MS
        async for names in listener.changes(idle=idle):
            try:
                changed = await encoded.of(names) if names else None
                allowed = await may_read()
            except StoreUnavailable as e:
                log.warning("event stream ended", extra={"reason": e.reason})
                return
            if not allowed:
                log.info("event stream ended", extra={"reason": "its key was revoked"})
                return
            if changed is None:
                yield b": still here\n\n"
            else:
                # JSON holds no line break of its own, so one data line carries it.
                yield b"event: tunnels\ndata: %b\n\n" % _ENCODER.encode(changed)
