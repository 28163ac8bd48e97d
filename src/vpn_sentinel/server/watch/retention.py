"""Deletes old rows, a few at a time, so that the database stays small and reports do not wait."""

import asyncio
import logging
from typing import Final

from sqlalchemy import Column, Executable, Table, delete, func, select

from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.store.schema import actions, incidents, observations, outbox, transitions
from vpn_sentinel.server.store.store import Store, StoreUnavailable
from vpn_sentinel.server.watch.timekeeper import moved_so_far

log = logging.getLogger(__name__)

_INTERVAL_S: Final = 300.0
ROWS_PER_DELETE: Final = 500  # reports wait while these are deleted
_PAUSE_S: Final = 0.05
# The history (transitions, actions, incidents) is kept longer than the observations that it was judged from.
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
                log.warning("old rows were not deleted", extra={"reason": e.reason})
            await asyncio.sleep(_INTERVAL_S)

    async def prune(self) -> int:
        """Delete what is too old; returns the number of deleted rows. Raises StoreUnavailable."""
        observed, history = await self._before(self._seconds), await self._before(self._seconds * _HISTORY_FACTOR)
        gone = 0
        for statement in (
            _oldest_observations(observed),
            _oldest(transitions, transitions.c.at, history),
            _oldest(actions, actions.c.at, history),
            # An open incident is never too old.
            _oldest(incidents, incidents.c.closed_at, history),
            # A pending delivery is never too old.
            _oldest(outbox, outbox.c.settled_at, history),
        ):
            while True:
                count = len((await self._store.write(statement))[0])
                gone += count
                if count < ROWS_PER_DELETE:
                    break
                await asyncio.sleep(_PAUSE_S)
        return gone

    async def _before(self, seconds: float) -> float:
        """The time before which rows are older than `seconds`: a clock that was set forward makes none older."""
        before = self._clock.wall() - seconds
        by, at = await moved_so_far(self._store)
        return before - max(by, 0.0) if at > before else before


def _oldest(table: Table, when: Column[float], before: float) -> Executable:
    chosen = select(table.c.id).where(when < before).limit(ROWS_PER_DELETE)
    return delete(table).where(table.c.id.in_(chosen)).returning(table.c.id)


def _oldest_observations(before: float) -> Executable:
    """By the latest time among the oldest rows: their key has three columns, and SQLite compares a set of such keys
    with every row of the table, while reports wait.
    """
    received_at = observations.c.received_at
    oldest = select(received_at).where(received_at < before).order_by(received_at).limit(ROWS_PER_DELETE).subquery()
    upto = select(func.max(oldest.c.received_at)).scalar_subquery()
    return delete(observations).where(received_at <= upto).returning(observations.c.seq)
