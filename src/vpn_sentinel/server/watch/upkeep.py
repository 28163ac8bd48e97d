"""Checks the server's own SQLite database, notifies people of damage, and makes backups by schedule."""

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

# After the start, agents reconnect first: reading a large file keeps the disk busy.
_FIRST_CHECK_AFTER_S: Final = 20.0
_SCHEDULE_INTERVAL_S: Final = 60.0  # how often it is checked whether a backup is due
_RETRY_S: Final = 3600.0  # after a failed backup


class UpkeepMetrics:
    """One for each registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.damaged = Gauge(
            "vpn_sentinel_database_damaged", "1 when the last check of every page found damage.", registry=registry
        )
        self.newest = Gauge(
            "vpn_sentinel_backup_timestamp_seconds",
            "When the newest backup was made, in seconds since 1970; 0 without one.",
            registry=registry,
        )


class Upkeep:
    """Checks every page once after the start and before each backup, so that no good copy is replaced by a bad one."""

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
        """`hours` is the time between backups, 0 for none; `wake` is called after a notice was put into the outbox."""
        self._store = store
        self._clock = clock
        self._channels = channels
        self._wake = wake
        self._metrics = metrics
        self._folder = folder
        self._every = hours * 3600
        self._keep = keep
        self._last_failure = ""
        self._last_damage = ""
        self._retry_at = 0.0

    async def run(self) -> None:
        """Run until cancelled."""
        try:
            await self.notify_of_loss()
        except StoreUnavailable as e:
            log.warning("the notice of lost data cannot be stored now", extra={"reason": e.reason})
        await asyncio.sleep(_FIRST_CHECK_AFTER_S)
        await self.check()
        while True:
            await self.back_up_if_due()
            await asyncio.sleep(_SCHEDULE_INTERVAL_S)

    async def notify_of_loss(self) -> None:
        """Notify people of a loss that was recorded when the database was opened. Raises StoreUnavailable."""
        noted = await self._store.read(select(meta.c.value).where(meta.c.key == DAMAGE_KEY))
        if noted:
            await self._add_notice(noted[0].value, forget=True)

    async def check(self) -> bool:
        """Check every page; returns whether all are known to be intact."""
        try:
            wrong = await self._store.run_long(backup.integrity_problem)
        except StoreUnavailable as e:
            log.warning("the database could not be checked", extra={"reason": e})
            return False
        self._metrics.damaged.set(bool(wrong))
        if not wrong:
            self._last_damage = ""
            return True
        if wrong != self._last_damage:
            self._last_damage = wrong
            what, remedy = f"damage was found: {wrong}", await asyncio.to_thread(backup.remedy, self._folder)
            log.error("the database is damaged", extra={"found": wrong, "remedy": remedy})
            try:
                await self._add_notice(what, remedy)
            except StoreUnavailable as e:
                log.error("the notice of damage cannot be stored", extra={"reason": e.reason})  # noqa: TRY400
        return False

    async def back_up_if_due(self) -> None:
        """Make a backup if the newest is older than the schedule allows, and delete those beyond the number to keep."""
        now = self._clock.wall()
        try:
            kept = await asyncio.to_thread(backups, self._folder)
            newest = max((b.at for b in kept if b.at <= now), default=0.0)
            self._metrics.newest.set(newest)
            if not self._every or now - newest < self._every or self._clock.boottime() < self._retry_at:
                return
            self._retry_at = self._clock.boottime() + _RETRY_S
            if not await self.check():
                self._failed("the database is damaged, and the existing backups are not")
                return
            made = await self._store.run_long(lambda connection: backup.make_backup(connection, self._folder, now))
            await asyncio.to_thread(backup.prune, self._folder, self._keep, now)
        except (BackupError, StoreUnavailable) as e:
            self._failed(str(e))
            return
        self._last_failure, self._retry_at = "", 0.0
        self._metrics.newest.set(made.at)
        log.info("a backup was made", extra={"path": made.path})

    def _failed(self, why: str) -> None:
        if why != self._last_failure:
            self._last_failure = why
            log.error("no backup was made", extra={"reason": why})

    async def _add_notice(self, *details: str, forget: bool = False) -> None:
        """Put a notice into the outbox; with `forget`, delete the recorded loss in the same transaction."""
        now = self._clock.wall()
        deliveries = delivery_rows(Notice(kind=Kind.DATABASE_DAMAGED, at=now, details=details), self._channels, now)
        statements = [insert(outbox).values(deliveries)] if deliveries else []
        await self._store.write(*statements, *([delete(meta).where(meta.c.key == DAMAGE_KEY)] if forget else []))
        self._wake()
