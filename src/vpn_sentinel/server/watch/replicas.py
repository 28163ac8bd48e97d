"""Publishes what other replicas wrote to this server's listeners, so that any server can serve a browser.

Only on PostgreSQL, where there can be other replicas.
"""

import asyncio
import logging
from typing import Final

from sqlalchemy import or_, select

from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.store.schema import tunnels
from vpn_sentinel.server.store.store import Store, StoreUnavailable

log = logging.getLogger(__name__)

_INTERVAL_S: Final = 1.0
# Replicas' clocks may differ by this; a change that is published twice does no harm.
_OVERLAP_S: Final = 5.0


class ReplicaPoller:
    def __init__(self, store: Store, hub: Hub, clock: Clock) -> None:
        self._store = store
        self._hub = hub
        self._clock = clock

    async def run(self) -> None:
        since = self._clock.wall()
        while True:
            await asyncio.sleep(_INTERVAL_S)
            if not self._hub.listeners:
                since = self._clock.wall()
                continue
            try:
                now = self._clock.wall()
                lately = or_(tunnels.c.last_seen > since - _OVERLAP_S, tunnels.c.since > since - _OVERLAP_S)
                found = await self._store.read(select(tunnels.c.name).where(lately))
            except StoreUnavailable as e:
                log.debug("other replicas' changes were not read", extra={"reason": e.reason})
                continue
            self._hub.publish({r.name for r in found})
            since = now
