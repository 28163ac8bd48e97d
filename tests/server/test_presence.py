"""A process that did not run, and a loop that did not turn: told apart by a thread, and by what was used."""

import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import select

from tests.conftest import ManualClock
from vpn_sentinel.domain.notice import Notice
from vpn_sentinel.runtime.clock import SystemClock
from vpn_sentinel.server.store.schema import outbox
from vpn_sentinel.server.store.store import Store, StoreUnavailable
from vpn_sentinel.server.watch.overload import CALM_S, MAX_LATE_S, Overload
from vpn_sentinel.server.watch.presence import SAMPLE_INTERVAL_S, Presence
from vpn_sentinel.wire.codec import decoder


class Process:
    """One that a test lets run, work, wait for a processor, or stand still."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.used = 0.0
        self.presence = Presence(self.clock, lambda: self.used)

    def idles(self, seconds: float) -> None:
        for _ in range(round(seconds / SAMPLE_INTERVAL_S)):
            self.clock.now += SAMPLE_INTERVAL_S
            self.presence.sample()
            self.presence._due = self.clock.now + SAMPLE_INTERVAL_S

    def is_stopped(self, seconds: float) -> None:
        self.clock.now += seconds

    def works(self, seconds: float) -> None:
        """Its loop is busy; the thread gets its turn."""
        for _ in range(round(seconds / SAMPLE_INTERVAL_S)):
            self.clock.now += SAMPLE_INTERVAL_S
            self.used += SAMPLE_INTERVAL_S
            self.presence._read_clock()

    def holds_the_lock(self, seconds: float) -> None:
        """One call keeps even the thread from running."""
        self.clock.now += seconds
        self.used += seconds

    def starves(self, seconds: float) -> None:
        """Others take the processor: the thread gets a turn now and then."""
        for _ in range(round(seconds)):
            self.clock.now += 1.0
            self.used += 0.02
            self.presence._read_clock()


@pytest.mark.parametrize(
    ("what", "away", "late"),
    [
        (lambda p: p.idles(10), 0, 0),
        (lambda p: p.is_stopped(8), 8, 0),
        (lambda p: p.works(8), 0, 8),
        (lambda p: p.holds_the_lock(8), 0, 8),
        (lambda p: p.starves(8), 0, 8),
        (lambda p: (p.works(3), p.is_stopped(60), p.works(3)), 60, 6),
        (lambda p: (p.idles(3), p.is_stopped(5), p.idles(3), p.works(4)), 5, 4),
    ],
    ids=["idle", "stopped", "busy", "one long call", "starved", "stopped while busy", "one after the other"],
)
def test_what_kept_a_server_from_watching(what, away: float, late: float) -> None:
    process = Process()
    process.idles(1)
    what(process)
    missed = process.presence.sample()
    assert missed.away == pytest.approx(away, abs=2 * SAMPLE_INTERVAL_S)
    assert missed.late == pytest.approx(late, abs=2 * SAMPLE_INTERVAL_S)


async def test_a_real_loop_that_is_held_is_late_and_not_away() -> None:
    presence = Presence(SystemClock())
    running = asyncio.create_task(presence.run())
    await asyncio.sleep(0.1)
    time.sleep(3.0)  # noqa: ASYNC251 - holds the loop, and uses nothing
    await asyncio.sleep(0)
    missed = presence.sample()
    running.cancel()
    assert missed.away == 0.0
    assert missed.late > 2.0


class Watch:
    def __init__(self, store: Store) -> None:
        self.process = Process()
        self.registry = CollectorRegistry()
        self.woken = 0
        p = self.process
        self.overload = Overload(store, ("telegram",), p.clock, p.presence, self.registry, self.wake)
        self.store = store

    def wake(self) -> None:
        self.woken += 1

    async def passes(self, seconds: int, late: float = 0.0) -> None:
        """So many seconds, in each of which the loop is late by `late`."""
        for _ in range(seconds):
            self.process.works(late)
            self.process.presence.sample()
            self.process.clock.now += 1.0 - late
            self.process.presence._read_clock()
            self.process.presence._due = self.process.clock.now
            await self.overload.check()

    async def told(self) -> list[str]:
        return [r.kind for r in await self.store.read(select(outbox.c.kind).order_by(outbox.c.id))]

    def lag(self) -> float | None:
        return self.registry.get_sample_value("vpn_sentinel_loop_lag_seconds")


async def test_people_hear_of_an_overload_once_and_of_its_end(store: Store) -> None:
    watch = Watch(store)
    await watch.passes(60)
    assert await watch.told() == []
    await watch.passes(120, late=0.75)
    assert await watch.told() == ["server_overloaded"]
    assert watch.woken == 1
    await watch.passes(int(CALM_S))
    assert await watch.told() == ["server_overloaded"]
    await watch.passes(60)
    assert await watch.told() == ["server_overloaded", "server_recovered"]
    await watch.passes(600)
    assert len(await watch.told()) == 2


async def test_a_busy_moment_is_no_overload(store: Store) -> None:
    watch = Watch(store)
    for _ in range(5):
        await watch.passes(55)
        await watch.passes(5, late=0.75)
    assert await watch.told() == []


async def test_a_server_that_was_stopped_was_not_overloaded(store: Store) -> None:
    watch = Watch(store)
    await watch.passes(5)
    watch.process.is_stopped(600)
    await watch.passes(5)
    assert await watch.told() == []


async def test_the_longest_lag_of_the_last_minute_is_a_metric(store: Store) -> None:
    watch = Watch(store)
    await watch.passes(5)
    watch.process.holds_the_lock(7)
    await watch.passes(30)
    assert watch.lag() == pytest.approx(7, abs=2 * SAMPLE_INTERVAL_S)
    await watch.passes(60)
    assert watch.lag() == pytest.approx(0, abs=2 * SAMPLE_INTERVAL_S)


async def test_an_overload_is_told_once_the_database_takes_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    class Away:
        gone = True

        async def write(self, *statements):
            if self.gone:
                raise StoreUnavailable("unreachable", "no route")
            return await store.write(*statements)

    watch, away = Watch(store), Away()
    watch.overload._store = away  # type: ignore[assignment]
    await watch.passes(int(MAX_LATE_S) * 2, late=0.75)
    assert await watch.told() == []
    away.gone = False
    await watch.passes(1, late=0.75)
    assert await watch.told() == ["server_overloaded"]


async def test_a_clock_that_is_set_meanwhile_makes_an_overload_no_longer(store: Store) -> None:
    watch = Watch(store)
    await watch.passes(60, late=0.75)
    watch.process.clock.set_by -= 86_400
    await watch.passes(400)
    [over] = await store.read(select(outbox.c.body).where(outbox.c.kind == "server_recovered"))
    said = decoder(Notice)(over.body)
    assert said.outage == pytest.approx(400, abs=45)
