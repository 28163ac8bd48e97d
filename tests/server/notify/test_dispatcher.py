"""Everything that is owed gets delivered: in order, at least once, and a failing channel delays no other."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import Executable, Row, insert, select, update

from tests.server.notify.standins import Time
from vpn_sentinel.domain.notice import Kind, Notice
from vpn_sentinel.domain.verdict import State
from vpn_sentinel.server.notify import outbox as outbox_module
from vpn_sentinel.server.notify import worker
from vpn_sentinel.server.notify.channel import Channel, PermanentError, SetupError, TransientError
from vpn_sentinel.server.notify.dispatcher import Dispatcher
from vpn_sentinel.server.notify.metrics import NotifyMetrics
from vpn_sentinel.server.notify.reasons import reason_text
from vpn_sentinel.server.store.outbox_rows import delivery_rows
from vpn_sentinel.server.store.schema import attempts, outbox
from vpn_sentinel.server.store.store import Store, StoreUnavailable


class Pager:
    """A channel that fails as told, in turn, and then works."""

    def __init__(self, name: str = "pager", *failures: Exception | None) -> None:
        self.name = name
        self.failures = list(failures)
        self.always: Exception | None = None
        self.told: list[tuple[str, str]] = []
        self.tried = 0
        self.ids: list[int] = []

    async def send(self, notice: Notice, delivery_id: int) -> None:
        self.tried += 1
        self.ids.append(delivery_id)
        failure = self.always or (self.failures.pop(0) if self.failures else None)
        if failure is not None:
            raise failure
        self.told.append((notice.tunnel, notice.kind.value))


class Slow(Pager):
    """A channel that takes one message a second, and keeps when it took them."""

    time: Time

    def __init__(self) -> None:
        super().__init__("pager")
        self.at: list[float] = []
        self.notices: list[Notice] = []

    async def send(self, notice: Notice, delivery_id: int) -> None:
        await self.time.sleep(1.0)
        await super().send(notice, delivery_id)
        self.at.append(self.time.now)
        self.notices.append(notice)


class Stuck(Pager):
    """A channel whose other side never answers."""

    def __init__(self, name: str = "stuck") -> None:
        super().__init__(name)
        self.entered = asyncio.Event()

    async def send(self, notice: Notice, delivery_id: int) -> None:
        self.tried += 1
        self.entered.set()
        await asyncio.Event().wait()


class Faulty(Store):
    """The real store, which goes away when told."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.away = False

    async def read(self, statement: Executable) -> Sequence[Row[Any]]:
        self._check()
        return await self.store.read(statement)

    async def write(self, *statements: Executable) -> list[Sequence[Row[Any]]]:
        self._check()
        return await self.store.write(*statements)

    def _check(self) -> None:
        if self.away:
            raise StoreUnavailable("unreachable", "no route")

    async def transact(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError

    async def ping(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


class Desk:
    """A dispatcher at work, with the time and the debts in the test's hands."""

    def __init__(self, store: Store, *pagers: Channel) -> None:
        self.store = store
        self.time = Time()
        self.registry = CollectorRegistry()
        self.channels: Mapping[str, Channel] = {p.name: p for p in pagers}
        metrics = NotifyMetrics(self.registry, self.channels)
        self.dispatcher = Dispatcher(
            store, self.channels, self.time, metrics, wait_for=self.time.wait_for, rng=random.Random(1)
        )
        self.sleepers = len(pagers) + 1

    async def owes(self, *told: tuple[str, Kind], channels: tuple[str, ...] = (), through: Store | None = None) -> None:
        for tunnel, kind in told:
            one = Notice(kind=kind, tunnel=tunnel, at=self.time.now)
            await (through or self.store).write(
                insert(outbox).values(delivery_rows(one, channels or tuple(self.channels), self.time.now))
            )
        self.dispatcher.wake()

    async def passes(self, seconds: float = 0.0) -> None:
        await self.time.pass_(seconds, self.sleepers)

    async def jumps(self, seconds: float) -> None:
        await self.time.jump(seconds, self.sleepers)

    async def outcomes(self) -> list[str | None]:
        return [row.outcome for row in await self.store.read(select(outbox.c.outcome).order_by(outbox.c.id))]

    async def reasons(self) -> list[tuple[str, str]]:
        found = await self.store.read(select(attempts.c.result, attempts.c.reason).order_by(attempts.c.id))
        return [tuple(row) for row in found]

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


@asynccontextmanager
async def at_work(desk: Desk) -> AsyncIterator[Desk]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(desk.dispatcher.run())
        await desk.time.quiet(desk.sleepers)
        yield desk
        task.cancel()


LEAK, OVER = ("nl-1", Kind.LEAKING), ("nl-1", Kind.RECOVERED)
# What one tunnel's key can make in a minute, backdated: each turn of a leak that comes and goes.
ROGUE = [("rogue", kind) for _ in range(290) for kind in (Kind.LEAKING, Kind.DOWN)]


def slow_desk(store: Store) -> tuple[Slow, Desk]:
    pager = Slow()
    desk = Desk(store, pager)
    pager.time = desk.time
    return pager, desk


async def test_a_notice_is_told_at_once_on_every_channel(store: Store) -> None:
    one, other = Pager("one"), Pager("other")
    async with at_work(Desk(store, one, other)) as desk:
        await desk.owes(LEAK, OVER)
        await desk.passes()
        assert one.told == other.told == [("nl-1", "leaking"), ("nl-1", "recovered")]
        assert await desk.outcomes() == ["done"] * 4
        assert desk.metric("vpn_sentinel_deliveries_total", channel="one", result="done", reason="") == 2


async def test_what_was_owed_before_the_start_is_told(store: Store) -> None:
    pager = Pager()
    desk = Desk(store, pager)
    await desk.owes(LEAK)
    async with at_work(desk):
        await desk.passes()
        assert pager.told == [("nl-1", "leaking")]


async def test_a_slow_channel_delays_no_other(store: Store) -> None:
    stuck, pager = Stuck("stuck"), Pager()
    desk = Desk(store, stuck, pager)
    async with at_work(desk):
        desk.sleepers -= 1  # the stuck one does not sleep, it waits for an answer
        await desk.owes(LEAK, OVER)
        await asyncio.wait_for(stuck.entered.wait(), 10)
        await desk.passes()
        assert pager.told == [("nl-1", "leaking"), ("nl-1", "recovered")]
        assert stuck.tried == 1


async def test_a_transient_failure_is_tried_again_with_growing_waits(store: Store) -> None:
    pager = Pager("pager", *(TransientError("timeout") for _ in range(6)))
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(LEAK)
        await desk.passes()
        assert (pager.tried, pager.told) == (1, [])
        await desk.passes(7)
        assert 2 <= pager.tried <= 4
        await desk.passes(120)
        assert pager.told == [("nl-1", "leaking")]
        assert await desk.reasons() == [("transient", "timeout")] * 6 + [("done", "")]
        assert len(set(pager.ids)) == 1


async def test_retry_after_is_obeyed_by_the_whole_channel(store: Store) -> None:
    pager = Pager("pager", TransientError("rate_limited", retry_after=120, binding=True))
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(LEAK)
        await desk.passes()
        await desk.owes(("nl-2", Kind.DOWN))
        await desk.passes(119)
        assert pager.tried == 1
        await desk.passes(2)
        assert pager.told == [("nl-1", "leaking"), ("nl-2", "down")]


async def test_advice_to_wait_holds_back_no_alarm(store: Store) -> None:
    """A receiver that is busy (503) says when to come back; a leak is told before, and the rest waits for it."""
    pager = Pager("pager", TransientError("server_error", retry_after=600))
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(("nl-1", Kind.CONNECTED))
        await desk.passes(2)
        await desk.owes(("nl-3", Kind.ADDRESS_CHANGED))
        await desk.passes(20)
        assert (pager.tried, pager.told) == (1, [])
        await desk.owes(("nl-2", Kind.LEAKING))
        await desk.passes()
        assert pager.told == [("nl-2", "leaking"), ("nl-1", "connected"), ("nl-3", "address_changed")]


async def test_nor_an_alarm_that_comes_after_what_was_refused(store: Store) -> None:
    pager = Pager("pager", TransientError("server_error", retry_after=600))
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(("nl-1", Kind.CONNECTED))
        await desk.passes(2)
        await desk.owes(LEAK)
        await desk.passes(worker.PROBE_INTERVAL_S)
        assert pager.told == [("nl-1", "connected"), ("nl-1", "leaking")]


async def test_a_busy_receiver_is_left_alone_while_nothing_is_urgent(store: Store) -> None:
    pager = Pager("pager", TransientError("server_error", retry_after=600))
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(("nl-1", Kind.CONNECTED))
        await desk.passes(595)
        assert pager.tried == 1
        await desk.passes(10)
        assert pager.told == [("nl-1", "connected")]


async def test_a_channel_that_works_again_is_found_out_soon(store: Store) -> None:
    """The owner let the bot in again: what is owed is told within half a minute, without a restart."""
    pager = Pager()
    pager.always = SetupError("forbidden")
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(LEAK)
        await desk.passes(95)
        pager.always = None
        await desk.passes(worker.PROBE_INTERVAL_S)
        assert pager.told == [("nl-1", "leaking")]


async def test_of_many_notices_one_at_a_time_asks_a_channel_that_fails(store: Store) -> None:
    pager = Pager()
    pager.always = SetupError("forbidden")
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(*((f"t{n}", Kind.DOWN) for n in range(50)))
        await desk.passes(10)
        before = pager.tried
        await desk.passes(600)
        assert pager.tried - before == 600 // worker.PROBE_INTERVAL_S


async def test_fresh_news_asks_a_failing_channel_again_at_once(store: Store) -> None:
    pager = Pager()
    pager.always = TransientError("unreachable")
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(LEAK)
        await desk.passes(3600)
        pager.always = None
        await desk.owes(("nl-2", Kind.LEAKING))
        await desk.passes()
        # The success proves the channel, so the old one does not wait out its five minutes.
        assert pager.told == [("nl-2", "leaking"), ("nl-1", "leaking")]


async def test_nobody_reads_recovered_before_leaking(store: Store) -> None:
    pager = Pager("pager", TransientError("timeout"), TransientError("timeout"))
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(LEAK)
        await desk.passes()
        await desk.owes(OVER)
        await desk.passes(60)
        assert pager.told == [("nl-1", "leaking"), ("nl-1", "recovered")]


async def test_a_tunnel_that_says_much_holds_up_no_other(store: Store) -> None:
    """One message a second, 580 of one tunnel: another's *down* waits for the message under way and for one leak."""
    pager, desk = slow_desk(store)
    async with at_work(desk):
        await desk.owes(*ROGUE)
        await desk.passes(5.5)
        assert pager.told[:2] == [("rogue", "leaking"), ("rogue", "down")]
        asked_at = desk.time.now
        await desk.owes(("nl-1", Kind.DOWN))
        await desk.passes(10)
        assert pager.at[pager.told.index(("nl-1", "down"))] - asked_at <= 2.5


async def test_a_tunnel_that_says_much_is_told_of_for_a_while_and_then_in_one_message(store: Store) -> None:
    pager, desk = slow_desk(store)
    async with at_work(desk):
        await desk.owes(*ROGUE)
        await desk.passes(outbox_module.MAX_NOTICES_PER_WINDOW + outbox_module.NOTICE_WINDOW_S - 5)
        assert len(pager.told) == outbox_module.MAX_NOTICES_PER_WINDOW
        await desk.passes(10)
        assert len(pager.told) == outbox_module.MAX_NOTICES_PER_WINDOW + 1
        assert pager.at[-1] - pager.at[-2] <= outbox_module.NOTICE_WINDOW_S + 1.0
        said = pager.notices[-1]
        assert (said.kind, said.tunnel, said.was) == (Kind.DOWN, "rogue", State.LEAKING)
        assert said.details == (
            "550 changes since the last message are summed up here: rogue changes too often to notify each.",
            "Of them 275 were leaks.",
        )
        await desk.passes(600)
        assert len(pager.told) == outbox_module.MAX_NOTICES_PER_WINDOW + 1
        outcomes = await desk.outcomes()
        assert (outcomes.count("done"), outcomes.count("summed")) == (outbox_module.MAX_NOTICES_PER_WINDOW + 1, 549)
        # It is calm now: what comes next is told at once.
        asked_at = desk.time.now
        await desk.owes(("rogue", Kind.LEAKING))
        await desk.passes(1)
        assert (pager.told[-1], pager.at[-1] - asked_at) == (("rogue", "leaking"), 1.0)


async def test_a_leak_that_stands_is_told_with_the_sum_at_the_latest(store: Store) -> None:
    pager, desk = slow_desk(store)
    async with at_work(desk):
        await desk.owes(*([OVER, LEAK] * (outbox_module.MAX_NOTICES_PER_WINDOW // 2)))
        await desk.passes(outbox_module.MAX_NOTICES_PER_WINDOW)
        assert len(pager.told) == outbox_module.MAX_NOTICES_PER_WINDOW
        last = pager.at[-1]
        await desk.owes(OVER, LEAK)
        await desk.passes(62)
        assert len(pager.told) == outbox_module.MAX_NOTICES_PER_WINDOW + 1
        said = pager.notices[-1]
        assert (said.kind, said.was) == (Kind.LEAKING, None)
        assert said.details[-1] == "Of them one was a leak."
        assert pager.at[-1] - last <= outbox_module.NOTICE_WINDOW_S + 1.0


async def test_one_change_that_waited_is_told_as_it_is(store: Store) -> None:
    pager, desk = slow_desk(store)
    async with at_work(desk):
        await desk.owes(*([OVER, LEAK] * (outbox_module.MAX_NOTICES_PER_WINDOW // 2)), OVER)
        await desk.passes(outbox_module.MAX_NOTICES_PER_WINDOW + outbox_module.NOTICE_WINDOW_S + 2)
        assert pager.told[-1] == OVER
        assert (len(pager.told), pager.notices[-1].details) == (outbox_module.MAX_NOTICES_PER_WINDOW + 1, ())


async def test_a_sum_that_could_not_be_sent_is_made_anew(store: Store) -> None:
    """Nothing is settled by a message that nobody got; what came meanwhile is in the next try."""
    pager = Pager()
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(*ROGUE[: outbox_module.MAX_NOTICES_PER_WINDOW + 10])
        await desk.passes(50)
        pager.always = TransientError("timeout")
        await desk.passes(15)
        assert (len(pager.told), pager.tried > outbox_module.MAX_NOTICES_PER_WINDOW) == (
            outbox_module.MAX_NOTICES_PER_WINDOW,
            True,
        )
        assert (await desk.outcomes()).count(None) == 10
        pager.always = None
        await desk.owes(("rogue", Kind.RECOVERED))
        await desk.passes(40)
        assert pager.told[outbox_module.MAX_NOTICES_PER_WINDOW :] == [("rogue", "recovered")]
        assert None not in await desk.outcomes()


async def test_the_cap_holds_after_a_restart_and_for_each_channel_by_itself(store: Store) -> None:
    one, other = Pager("one"), Pager("other")
    async with at_work(Desk(store, one)) as desk:
        await desk.owes(*ROGUE[: outbox_module.MAX_NOTICES_PER_WINDOW + 20], channels=("one", "other"))
        await desk.passes(1)
        assert len(one.told) == outbox_module.MAX_NOTICES_PER_WINDOW
    again = Desk(store, one, other)
    again.time.now = desk.time.now + 1
    async with at_work(again):
        await again.passes(1)
        assert (len(one.told), len(other.told)) == (
            outbox_module.MAX_NOTICES_PER_WINDOW,
            outbox_module.MAX_NOTICES_PER_WINDOW,
        )
        await again.passes(61)
        assert (len(one.told), len(other.told)) == (
            outbox_module.MAX_NOTICES_PER_WINDOW + 1,
            outbox_module.MAX_NOTICES_PER_WINDOW + 1,
        )


async def test_a_sum_whose_details_cannot_be_read_is_told_all_the_same(store: Store) -> None:
    pager = Pager()
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(*ROGUE[: outbox_module.MAX_NOTICES_PER_WINDOW + 20])
        await desk.passes(1)
        await store.write(
            update(outbox).where(outbox.c.settled_at.is_(None)).values(body='{"kind": "leaking", "exit": 5}')
        )
        await desk.passes(61)
        assert pager.told[outbox_module.MAX_NOTICES_PER_WINDOW :] == [("rogue", "down")]


async def test_a_clock_that_was_set_back_holds_no_alarm(store: Store) -> None:
    """What was told "in the future" says nothing of the last minute."""
    pager = Pager()
    desk = Desk(store, pager)
    async with at_work(desk):
        await desk.owes(*ROGUE[: outbox_module.MAX_NOTICES_PER_WINDOW])
        await desk.passes(1)
    back = Desk(store, pager)
    back.time.now = desk.time.now - 3600
    async with at_work(back):
        await back.owes(("rogue", Kind.LEAKING))
        await back.passes(1)
        assert len(pager.told) == outbox_module.MAX_NOTICES_PER_WINDOW + 1


async def test_a_rejected_notice_is_given_up_and_the_next_is_told(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    pager = Pager("pager", PermanentError("rejected"))
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(LEAK, OVER)
        await desk.passes()
        assert pager.told == [("nl-1", "recovered")]
        assert await desk.outcomes() == ["given_up", "done"]
        assert desk.metric("vpn_sentinel_deliveries_given_up_total", channel="pager") == 1
    assert [r.message for r in caplog.records if r.levelno == logging.ERROR] == ["notice given up"]


async def test_a_wrong_setup_keeps_what_it_owes_until_it_is_repaired(store: Store) -> None:
    pager = Pager()
    pager.always = SetupError("auth")
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(LEAK, OVER)
        await desk.passes(6000)
        assert 190 <= pager.tried <= 240  # each half a minute, and the other one every five
        await desk.jumps(2 * 86400)
        assert await desk.outcomes() == [None, None]
    pager.always = None
    again = Desk(store, pager)
    again.time.now = desk.time.now + 1
    async with at_work(again):  # the repair took a restart
        await again.passes()
        assert pager.told == [("nl-1", "leaking"), ("nl-1", "recovered")]


async def test_a_dead_channel_is_given_up_after_a_week(store: Store) -> None:
    pager = Pager()
    pager.always = TransientError("unreachable")
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(LEAK)
        await desk.passes(3000)
        await desk.jumps(7 * 86400 - 3600)
        assert await desk.outcomes() == [None]
        await desk.jumps(700)
        assert await desk.outcomes() == ["given_up"]
        await desk.passes(15)
        assert desk.metric("vpn_sentinel_outbox_depth", channel="pager") == 0


async def test_a_failure_is_said_when_it_begins_changes_and_ends(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    pager = Pager("pager", *[TransientError("timeout")] * 3, *[TransientError("server_error")] * 2)
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(LEAK)
        await desk.passes(300)
    said = [(r.levelname, r.message, r.__dict__.get("reason")) for r in caplog.records]
    assert said == [
        ("WARNING", "notice not delivered, will be tried again", "timeout"),
        ("WARNING", "notice not delivered, will be tried again", "server_error"),
        ("INFO", "notices are delivered again", None),
    ]


async def test_a_bug_in_a_channel_stops_neither_the_notice_nor_the_others(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    pager = Pager("pager", ValueError("https://api.telegram.org/bot123:SECRET/sendMessage"))
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(LEAK)
        await desk.passes(5)
        assert pager.told == [("nl-1", "leaking")]
        assert await desk.reasons() == [("transient", "bug_ValueError"), ("done", "")]
    assert "SECRET" not in caplog.text
    assert not any("SECRET" in str(r.__dict__) for r in caplog.records)


async def test_a_bug_in_a_channel_is_said_once_with_its_place(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    class Buggy(Pager):
        async def send(self, notice: Notice, delivery_id: int) -> None:
            if self.tried < 3:
                self.tried += 1
                dict[str, str]()["a secret"]
            await super().send(notice, delivery_id)

    pager = Buggy()
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(LEAK)
        await desk.passes(60)
        assert pager.told == [("nl-1", "leaking")]
    [said] = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert said.__dict__["reason"] == "bug_KeyError"
    line = Buggy.send.__code__.co_firstlineno + 3
    assert said.__dict__["place"] == f"{__file__}:{line}"
    assert "a secret" not in str(said.__dict__)


async def test_a_row_that_cannot_be_read_stops_no_other(store: Store) -> None:
    pager = Pager()
    async with at_work(Desk(store, pager)) as desk:
        [row] = delivery_rows(Notice(kind=Kind.LEAKING, tunnel="old", at=0), ("pager",), desk.time.now)
        await store.write(insert(outbox).values({**row, "body": "{", "kind": "of_the_future"}))
        await desk.owes(LEAK)
        await desk.passes()
        assert pager.told == [("nl-1", "leaking")]
        assert await desk.reasons() == [("done", ""), ("permanent", "unreadable")]


async def test_a_leak_whose_details_cannot_be_read_is_told_all_the_same(store: Store) -> None:
    pager = Pager()
    async with at_work(Desk(store, pager)) as desk:
        [row] = delivery_rows(Notice(kind=Kind.LEAKING, tunnel="old", at=0), ("pager",), desk.time.now)
        await store.write(insert(outbox).values({**row, "body": '{"kind": "leaking", "exit": 5}'}))
        await desk.passes(31)
        assert pager.told == [("old", "leaking")]


async def test_health_names_the_channel_that_fails_and_why(store: Store) -> None:
    pager = Pager()
    pager.always = SetupError("topic_closed")
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(LEAK)
        await desk.passes(1)
        said = f"pager fails: {reason_text('pager', 'topic_closed')}"
        assert desk.dispatcher.healthy() == (True, said)  # how much is owed was not looked at
        await desk.passes(20)
        assert desk.dispatcher.healthy()[1].endswith(f"; {said}")


async def test_a_lost_database_is_said_once_and_survived(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    faulty, pager = Faulty(store), Pager()
    async with at_work(Desk(faulty, pager)) as desk:
        faulty.away = True
        desk.dispatcher.wake()
        await desk.passes(300)
        assert desk.dispatcher.healthy()[0]
        faulty.away = False
        await desk.owes(LEAK)
        await desk.passes()
        assert pager.told == [("nl-1", "leaking")]
    assert [r.message for r in caplog.records] == ["no database, deliveries wait", "database is back, deliveries go on"]


async def test_a_message_that_was_told_is_not_told_again_while_the_database_is_away(store: Store) -> None:
    faulty = Faulty(store)

    class Vanishing(Pager):
        async def send(self, notice: Notice, delivery_id: int) -> None:
            await super().send(notice, delivery_id)
            faulty.away = True

    pager = Vanishing()
    async with at_work(Desk(faulty, pager)) as desk:
        await desk.owes(LEAK)
        await desk.passes(200)  # longer than the lease
        faulty.away = False
        await desk.passes(60)
        assert pager.tried == 1
        assert await desk.outcomes() == ["done"]


async def test_a_report_that_was_stored_shows_that_the_database_is_back(store: Store) -> None:
    """Its connections may be dead for a moment: the worker does not wait as long as it did for nothing."""
    faulty, pager = Faulty(store), Pager()
    async with at_work(Desk(faulty, pager)) as desk:
        faulty.away = True
        desk.dispatcher.wake()
        await desk.passes(300)
        await desk.owes(LEAK, through=store)
        await desk.passes()
        faulty.away = False
        await desk.passes(1)
        assert pager.told == [("nl-1", "leaking")]


async def test_a_dispatcher_that_dies_after_sending_repeats_and_loses_nothing(store: Store) -> None:
    sent = asyncio.Event()

    class Fatal(Pager):
        async def send(self, notice: Notice, delivery_id: int) -> None:
            await super().send(notice, delivery_id)
            sent.set()
            await asyncio.Event().wait()

    first, second = Fatal(), Pager()
    desk = Desk(store, first)
    await desk.owes(LEAK)
    running = asyncio.create_task(desk.dispatcher.run())
    await asyncio.wait_for(sent.wait(), 10)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    again = Desk(store, second)
    async with at_work(again):
        await again.passes(worker.LEASE_S - 5)
        assert second.told == []  # the dead one's lease still holds
        await again.passes(40)
        assert second.told == [("nl-1", "leaking")]
        assert first.ids == second.ids


async def test_two_dispatchers_on_one_database_tell_everything_once(store: Store) -> None:
    pagers = [Pager(), Pager()]
    desks = [Desk(store, p) for p in pagers]
    async with at_work(desks[0]), at_work(desks[1]):
        await desks[0].owes(*((f"t{n}", Kind.DOWN) for n in range(40)))
        desks[1].dispatcher.wake()
        await desks[0].passes(40)
        await desks[1].passes(40)
    told = pagers[0].told + pagers[1].told
    assert sorted(told) == sorted((f"t{n}", "down") for n in range(40))


async def test_what_is_owed_to_a_channel_that_was_taken_away_is_told_by_the_one_that_came(store: Store) -> None:
    pager = Pager()
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(LEAK, OVER, channels=("fax",))
        await desk.passes(30)
        assert pager.told == []  # another server may have it set up
        await desk.passes(60)
        assert pager.told == [("nl-1", "leaking"), ("nl-1", "recovered")]


async def test_what_is_owed_to_a_channel_that_was_taken_away(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    pager = Pager()
    async with at_work(Desk(store, pager)) as desk:
        await desk.owes(LEAK, channels=("pager", "fax"))
        await desk.jumps(6 * 86400)
        assert (pager.told, await desk.outcomes()) == ([("nl-1", "leaking")], ["done", None])
        await desk.jumps(86400 + 3600)
        assert await desk.outcomes() == ["done", "given_up"]
    said = [r.message for r in caplog.records]
    assert said == ["notices are pending for a channel that is not set up", "notices given up"]


async def test_health_tells_a_failing_channel_from_a_stuck_dispatcher(store: Store) -> None:
    stuck = Stuck("stuck")
    desk = Desk(store, stuck)
    async with at_work(desk):
        assert desk.dispatcher.healthy() == (True, "nothing is pending")
        await desk.owes(LEAK)
        await asyncio.wait_for(stuck.entered.wait(), 10)
        desk.sleepers = 1
        await desk.passes(30)
        assert desk.dispatcher.healthy() == (True, "1 pending, the oldest for 30 seconds")
        assert desk.metric("vpn_sentinel_outbox_depth", channel="stuck") == 1
        assert desk.metric("vpn_sentinel_outbox_oldest_due_seconds", channel="stuck") == 30
        await desk.passes(70)
        assert desk.dispatcher.healthy() == (False, "no delivery has been worked on for 1 minute 40 seconds")


async def test_shutdown_is_at_once(store: Store) -> None:
    desk = Desk(store, Stuck("stuck"), Pager())
    running = asyncio.create_task(desk.dispatcher.run())
    await desk.owes(LEAK)
    await desk.time.quiet(2)
    async with asyncio.timeout(1):
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running


async def test_waiting_ends_with_time_or_alarm() -> None:
    alarm = asyncio.Event()
    await worker.wait_for(alarm, 0.001)
    alarm.set()
    async with asyncio.timeout(5):
        await worker.wait_for(alarm, 3600)
