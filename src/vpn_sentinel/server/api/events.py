"""`/events`: changes of tunnels as server-sent events."""

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

# A client reconnects after this time when its stream has ended.
_RETRY_MS: Final = 2000
_ENCODER: Final = msgspec.json.Encoder()


class TunnelEncoder:
    """Encodes tunnels as JSON, once for all streams: an unchanged row gives the same bytes again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: dict[str, tuple[Row[Any], bytes]] = {}

    async def changed(self, names: set[str]) -> rest.Changed:
        """The tunnels with these names in their present state. Raises StoreUnavailable."""
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
    hub: Hub, encoder: TunnelEncoder, may_read: Callable[[], Awaitable[bool]], idle: float = 15.0
) -> AsyncIterator[bytes]:
    """Frames until the hub closes: an event `tunnels` with what changed, a comment after `idle` seconds without any.

    Earlier changes are not sent: a client lists `/tunnels` once it is connected. When the database fails the stream
    ends, and the client reconnects by itself. Before each frame `may_read` says whether the key that opened the stream
    is still valid; otherwise the stream ends.
    """
    with hub.listen() as listener:
        yield b"retry: %d\n: connected\n\n" % _RETRY_MS
        async for names in listener.changes(idle=idle):
            try:
                changed = await encoder.changed(names) if names else None
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
                # The JSON has no line breaks, so it fits into one data line.
                yield b"event: tunnels\ndata: %b\n\n" % _ENCODER.encode(changed)
