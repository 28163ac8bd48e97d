"""Old rows go, a few at a time, so that the database stays small and no report waits for it."""

import asyncio
import logging
from typing import Final

from sqlalchemy import Column, Executable, Table, and_, delete, select

from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.store.schema import actions, incidents, observations, outbox, transitions
from vpn_sentinel.server.store.store import Store, StoreUnavailable

log = logging.getLogger(__name__)

_EVERY: Final = 300.0
_AT_ONCE: Final = 2000
_PAUSE: Final = 0.2
# What the history page tells (transitions, actions, incidents) is kept longer than what it was judged from.
_HISTORY_FACTOR: Final = 12


class Retention:
    """Deletes observations older than `days`, and the rest of the history after twelve times that."""

    def __init__(self, store: Store, clock: Clock, days: float) -> None:
        self._store = store
        self._clock = clock
        self._seconds = days * 86400

    async def run(self) -> None:
        while True:
            try:
                await self.prune()
            except StoreUnavailable as e:
                log.warning("old rows stay for now", extra={"reason": e.reason})
            await asyncio.sleep(_EVERY)

    async def prune(self) -> int:
        """Delete what is too old; returns how many rows went. Raises StoreUnavailable."""
        now = self._clock.wall()
        gone = 0
        history = now - self._seconds * _HISTORY_FACTOR
        for statement in (
            _oldest_observations(now - self._seconds),
            _oldest(transitions, transitions.c.at, history),
            _oldest(actions, actions.c.at, history),
            # An incident that lasts is never too old.
            _oldest(incidents, incidents.c.closed_at, history),
            # A delivery that is still owed is never too old.
            _oldest(outbox, outbox.c.settled_at, history),
        ):
            while True:
                count = len((await self._store.write(statement))[0])
                gone += count
                if count < _AT_ONCE:
                    break
                await asyncio.sleep(_PAUSE)
        return gone


def _oldest(table: Table, when: Column[float], before: float) -> Executable:
    chosen = select(table.c.id).where(when < before).limit(_AT_ONCE)
    return delete(table).where(table.c.id.in_(chosen)).returning(table.c.id)


def _oldest_observations(before: float) -> Executable:
    o = observations.alias()
    chosen = select(o.c.tunnel_id, o.c.spool, o.c.seq).where(o.c.received_at < before).limit(_AT_ONCE).subquery()
    same = and_(
        observations.c.tunnel_id == chosen.c.tunnel_id,
        observations.c.spool == chosen.c.spool,
        observations.c.seq == chosen.c.seq,
    )
    return delete(observations).where(select(chosen.c.seq).where(same).exists()).returning(observations.c.seq)
