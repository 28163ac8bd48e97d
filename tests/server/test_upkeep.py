"""What a server does about its own SQLite file: damage is told to people, copies are made when they are due."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import insert, select

from tests.conftest import ManualClock
from tests.server.test_backup import full, rot
from vpn_sentinel.server.store.backup import backups
from vpn_sentinel.server.store.open import DAMAGE_KEY, open_store
from vpn_sentinel.server.store.schema import meta, outbox
from vpn_sentinel.server.store.sqlite import SqliteStore
from vpn_sentinel.server.watch.upkeep import Upkeep, UpkeepMetrics

HOUR = 3600.0


class Server:
    """As much of one as the upkeep needs."""

    def __init__(self, path: Path, clock: ManualClock) -> None:
        self.path, self.clock, self.woken = path, clock, 0
        self.registry = CollectorRegistry()
        self.metrics = UpkeepMetrics(self.registry)

    async def start(self) -> None:
        store = await open_store(f"sqlite:///{self.path}", serving=True)
        assert isinstance(store, SqliteStore)
        self.store = store

    def upkeep(self, *, hours: float = 24.0, keep: int = 2) -> Upkeep:
        return Upkeep(
            self.store, self.clock, ("telegram", "webhook"), self.wake, self.metrics,
            folder=self.path.parent / "backups", hours=hours, keep=keep,
        )  # fmt: skip

    def wake(self) -> None:
        self.woken += 1

    async def told(self) -> list[tuple[str, tuple[str, ...]]]:
        rows = await self.store.read(select(outbox).order_by(outbox.c.id))
        assert all(row.kind == "database_damaged" for row in rows)
        return [(row.channel, tuple(json.loads(row.body)["details"])) for row in rows]

    def shown(self, name: str) -> float | None:
        return self.registry.get_sample_value(f"vpn_sentinel_{name}")

    @property
    def kept(self) -> list[float]:
        return [b.at for b in backups(self.path.parent / "backups")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sentinel.db"


@pytest.fixture
async def server(path: Path, clock: ManualClock) -> AsyncIterator[Server]:
    made = Server(path, clock)
    await made.start()
    yield made
    await made.store.close()


async def test_a_backup_is_made_when_it_is_due_and_the_newest_are_kept(server: Server) -> None:
    upkeep, start = server.upkeep(), server.clock.now
    await upkeep.back_up_if_due()
    assert server.shown("backup_timestamp_seconds") == start
    for _ in range(60):
        server.clock.now += HOUR
        await upkeep.back_up_if_due()
    assert server.kept == [start + 48 * HOUR, start + 24 * HOUR]
    assert await server.told() == []


async def test_a_restart_makes_none_before_its_time(server: Server) -> None:
    await server.upkeep().back_up_if_due()
    server.clock.now += 23 * HOUR
    await server.upkeep().back_up_if_due()
    assert len(server.kept) == 1
    assert server.shown("backup_timestamp_seconds") == server.clock.now - 23 * HOUR


async def test_a_clock_that_was_set_back_keeps_none_waiting_and_none_too_many(server: Server) -> None:
    upkeep, right = server.upkeep(), server.clock.now
    for ahead in (1000 * HOUR, 1100 * HOUR):
        server.clock.now = right + ahead
        await upkeep.back_up_if_due()
    assert server.kept == [right + 1100 * HOUR, right + 1000 * HOUR]
    for minute in range(25 * 60):
        server.clock.now = right + minute * 60
        await upkeep.back_up_if_due()
    assert server.kept == [right + 24 * HOUR, right]


async def test_none_are_made_where_none_are_wanted(server: Server) -> None:
    await server.upkeep(hours=0).back_up_if_due()
    assert server.kept == []
    assert server.shown("backup_timestamp_seconds") == 0


async def test_one_that_fails_is_said_once_and_tried_again_after_an_hour(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = server.path.parent / "backups"
    blocked.write_text("a file in its way")
    upkeep = server.upkeep()
    for _ in range(180):
        await upkeep.back_up_if_due()
        server.clock.now += 60
    assert caplog.text.count("no backup was made") == 1
    assert f"{blocked}: Not a directory" in [getattr(r, "reason", "") for r in caplog.records]
    blocked.unlink()
    await upkeep.back_up_if_due()
    assert len(server.kept) == 1


async def test_damage_is_told_once_and_the_good_copies_stay(path: Path, clock: ManualClock) -> None:
    await asyncio.to_thread(full, path)
    server = Server(path, clock)
    await server.start()
    await server.upkeep().back_up_if_due()
    good = server.kept
    assert server.shown("database_damaged") == 0
    await server.store.close()
    rot(path)
    await server.start()
    upkeep = server.upkeep(hours=1)
    for _ in range(5):
        server.clock.now += 2 * HOUR
        await upkeep.back_up_if_due()
    assert server.kept == good
    assert server.shown("database_damaged") == 1
    told = await server.told()
    assert [channel for channel, _ in told] == ["telegram", "webhook"]
    what, remedy = told[0][1]
    assert what.startswith("damage was found: ")
    assert remedy.startswith("stop the server, then `vpn-sentinel db restore` puts back ")
    assert server.woken == 1
    await server.store.close()


async def test_what_the_log_lost_is_told_once(server: Server) -> None:
    await server.store.write(insert(meta).values(key=DAMAGE_KEY, value="the newest writes are lost"))
    await server.upkeep().notify_of_loss()
    await server.upkeep().notify_of_loss()
    assert await server.told() == [(c, ("the newest writes are lost",)) for c in ("telegram", "webhook")]
    assert server.woken == 1
