"""The server's own SQLite database: whether it is whole, said to people where not, and copies of it by schedule."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Gauge
from sqlalchemy import delete, insert, select

from vpn_sentinel.domain.notice import Kind, Notice
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.store import backup
from vpn_sentinel.server.store.backup import BackupError, backups
from vpn_sentinel.server.store.open import DAMAGE_KEY
from vpn_sentinel.server.store.outbox_rows import delivery_rows
from vpn_sentinel.server.store.schema import meta, outbox
from vpn_sentinel.server.store.sqlite import SqliteStore
from vpn_sentinel.server.store.store import StoreUnavailable

log = logging.getLogger(__name__)

_SETTLE_S: Final = (
    20.0  # seconds after the start, when agents have come back: reading a large file takes the disk's time
)
_LOOK_INTERVAL_S: Final = 60.0  # between two looks whether a backup is due
_RETRY_S: Final = 3600.0  # after one that failed


class UpkeepMetrics:
    """One registry takes one of these."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.damaged = Gauge(
            "vpn_sentinel_database_damaged", "1 when the last look at every page found damage.", registry=registry
        )
        self.newest = Gauge(
            "vpn_sentinel_backup_timestamp_seconds",
            "When the newest backup was made, in seconds since 1970; 0 without one.",
            registry=registry,
        )


class Upkeep:
    """Looks at every page once after the start and before each backup, so that no good copy gives way to a bad one."""

    def __init__(
        self,
        store: SqliteStore,
        clock: Clock,
        channels: tuple[str, ...],
        wake: Callable[[], None],
        metrics: UpkeepMetrics,
        *,
        folder: Path,
        hours: float,
        keep: int,
    ) -> None:
        """`hours` is the time from one backup to the next, 0 for none; `wake` is called when something is owed."""
        self._store = store
        self._clock = clock
        self._channels = channels
        self._wake = wake
        self._metrics = metrics
        self._folder = folder
        self._every = hours * 3600
        self._keep = keep
        self._said = ""
        self._told = ""
        self._again_at = 0.0

    async def run(self) -> None:
        """Until it is cancelled."""
        try:
            await self.tell_what_was_lost()
        except StoreUnavailable as e:
            log.warning("what the database lost cannot be told now", extra={"reason": e.reason})
        await asyncio.sleep(_SETTLE_S)
        await self.look()
        while True:
            await self.back_up_if_due()
            await asyncio.sleep(_LOOK_INTERVAL_S)

    async def tell_what_was_lost(self) -> None:
        """Owe people what was noted when the database was opened. Raises StoreUnavailable."""
        noted = await self._store.read(select(meta.c.value).where(meta.c.key == DAMAGE_KEY))
        if noted:
            await self._tell(noted[0].value, forget=True)

    async def look(self) -> bool:
        """Look at every page; whether all are whole, as far as can be told."""
        try:
            wrong = await self._store.run_long(backup.integrity_problem)
        except StoreUnavailable as e:
            log.warning("the database could not be looked at", extra={"reason": e})
            return False
        self._metrics.damaged.set(bool(wrong))
        if not wrong:
            self._told = ""
            return True
        if wrong != self._told:
            self._told = wrong
            what, remedy = f"damage was found: {wrong}", await asyncio.to_thread(backup.remedy, self._folder)
            log.error("the database is damaged", extra={"found": wrong, "remedy": remedy})
            try:
                await self._tell(what, remedy)
            except StoreUnavailable as e:
                log.error("and people cannot be told", extra={"reason": e.reason})  # noqa: TRY400 - said without a trace
        return False

    async def back_up_if_due(self) -> None:
        """Make a backup where the newest is older than the schedule wants, and delete those beyond the number."""
        now = self._clock.wall()
        try:
            kept = await asyncio.to_thread(backups, self._folder)
            newest = max((b.at for b in kept if b.at <= now), default=0.0)
            self._metrics.newest.set(newest)
            if not self._every or now - newest < self._every or self._clock.boottime() < self._again_at:
                return
            self._again_at = self._clock.boottime() + _RETRY_S
            if not await self.look():
                self._failed("the database is not whole, and the copies that are there are")
                return
            made = await self._store.run_long(lambda connection: backup.make_backup(connection, self._folder, now))
            await asyncio.to_thread(backup.prune, self._folder, self._keep, now)
        except (BackupError, StoreUnavailable) as e:
            self._failed(str(e))
            return
        self._said, self._again_at = "", 0.0
        self._metrics.newest.set(made.at)
        log.info("a backup was made", extra={"path": made.path})

    def _failed(self, why: str) -> None:
        if why != self._said:
            self._said = why
            log.error("no backup was made", extra={"reason": why})

    async def _tell(self, *details: str, forget: bool = False) -> None:
        """Owe a notice; with `forget`, in the same transaction that strikes what was noted."""
        now = self._clock.wall()
        deliveries = delivery_rows(Notice(kind=Kind.DATABASE_DAMAGED, at=now, details=details), self._channels, now)
        statements = [insert(outbox).values(deliveries)] if deliveries else []
        await self._store.write(*statements, *([delete(meta).where(meta.c.key == DAMAGE_KEY)] if forget else []))
        self._wake()
