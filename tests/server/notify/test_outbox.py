"""What is owed is claimed by one, settled once, and never lost; on both engines."""

import asyncio
import random
from typing import Any

import pytest
from sqlalchemy import delete, insert, select, text, update

from vpn_sentinel.domain.notice import Kind, Notice
from vpn_sentinel.domain.verdict import Code, Finding, State
from vpn_sentinel.server.notify import outbox as subject
from vpn_sentinel.server.notify import retry
from vpn_sentinel.server.notify.channel import DeliveryError, PermanentError, SetupError, TransientError
from vpn_sentinel.server.notify.outbox import DeliveryOutcome, LeasedDelivery, Pending, Result, lease, next_due, settle
from vpn_sentinel.server.store.open import open_store
from vpn_sentinel.server.store.outbox_rows import delivery_rows
from vpn_sentinel.server.store.schema import attempts, outbox
from vpn_sentinel.server.store.store import Store

NOW = 1_800_000_000.0
DONE = DeliveryOutcome(result=Result.DONE)


def notice(tunnel: str = "nl-1", kind: Kind = Kind.LEAKING) -> Notice:
    return Notice(
        kind=kind, tunnel=tunnel, at=NOW, findings=(Finding(Code.IP_LEAK, "leaks", {"address": "203.0.113.9"}),)
    )


async def owed_rows(store: Store, *notices: Notice, channels: tuple[str, ...] = ("telegram",), at: float = NOW) -> None:
    for one in notices:
        await store.write(*(insert(outbox).values(row) for row in delivery_rows(one, channels, at)))


async def rows(store: Store) -> list[Any]:
    return list(await store.read(select(outbox).order_by(outbox.c.id)))


async def tries(store: Store) -> list[tuple[int, int, str, str]]:
    c = attempts.c
    found = await store.read(select(c.delivery_id, c.attempt, c.result, c.reason).order_by(c.id))
    return [tuple(row) for row in found]


async def test_a_notice_comes_back_as_it_was_owed(store: Store) -> None:
    await owed_rows(store, notice(), channels=("telegram", "webhook"))
    [delivery] = await lease(store, NOW, NOW + 60, 10, "webhook")
    assert (delivery.channel, delivery.tunnel, delivery.kind, delivery.attempt) == ("webhook", "nl-1", "leaking", 1)
    assert delivery.notice() == notice()
    assert len(await lease(store, NOW, NOW + 60, 10)) == 1


async def test_a_lease_holds_until_it_runs_out(store: Store) -> None:
    await owed_rows(store, notice())
    assert len(await lease(store, NOW, NOW + 60, 10)) == 1
    assert await lease(store, NOW + 59, NOW + 119, 10) == []
    assert await next_due(store, "telegram", NOW) == NOW + 60
    [again] = await lease(store, NOW + 60, NOW + 120, 10)
    assert again.attempt == 2


async def test_what_is_not_due_is_not_leased(store: Store) -> None:
    await owed_rows(store, notice(), at=NOW + 5)
    assert await lease(store, NOW, NOW + 60, 10) == []
    assert await next_due(store, "telegram", NOW) == NOW + 5
    assert await next_due(store, "webhook", NOW) is None


async def test_many_dispatchers_race_and_each_delivery_has_one_winner(database_url: str) -> None:
    """Two servers' stores and forty claims at once, for one row each."""
    first, second = await open_store(database_url), await open_store(database_url)
    try:
        await owed_rows(first, *(notice(f"t{n}") for n in range(30)))
        claims = [lease(store, NOW, NOW + 60, 1) for store in (first, second) for _ in range(20)]
        won = [delivery.id for claimed in await asyncio.gather(*claims) for delivery in claimed]
        # A claim may come back empty although rows are left, for those it saw were locked; none is won twice.
        assert len(won) == len(set(won))
        while claimed := await lease(second, NOW, NOW + 60, 7):
            won += [delivery.id for delivery in claimed]
        assert sorted(won) == [row.id for row in await rows(first)]
    finally:
        await first.close()
        await second.close()


async def test_the_loser_of_a_race_waits_for_no_lock_and_gets_nothing(database_url: str, request: Any) -> None:
    """The winner's claim is held open, uncommitted, while the loser asks."""
    if not database_url.startswith("postgresql"):
        pytest.skip("SQLite has one writer: a claim is never open while another is made")
    import asyncpg

    store = await open_store(database_url)
    winner = await asyncpg.connect(database_url)
    try:
        await owed_rows(store, notice("a"), notice("b"))
        transaction = winner.transaction()
        await transaction.start()
        await winner.execute("UPDATE outbox SET leased_until = $1, attempt = 1 WHERE tunnel = 'a'", NOW + 60)
        async with asyncio.timeout(30):
            assert [d.tunnel for d in await lease(store, NOW, NOW + 60, 10)] == ["b"]
        await transaction.commit()
        assert await lease(store, NOW, NOW + 60, 10) == []
    finally:
        await winner.close()
        await store.close()


async def test_done_is_settled_with_its_attempt(store: Store) -> None:
    await owed_rows(store, notice())
    [delivery] = await lease(store, NOW, NOW + 60, 1)
    await settle(store, delivery, DONE, NOW + 1)
    [row] = await rows(store)
    assert (row.settled_at, row.outcome) == (NOW + 1, "done")
    assert await tries(store) == [(delivery.id, 1, "done", "")]
    assert await lease(store, NOW + 999, NOW + 1059, 1) == []


async def test_due_later_frees_the_lease(store: Store) -> None:
    await owed_rows(store, notice())
    [delivery] = await lease(store, NOW, NOW + 60, 1)
    await settle(store, delivery, DeliveryOutcome(result=Result.TRANSIENT, reason="timeout", due_at=NOW + 8), NOW + 4)
    assert await lease(store, NOW + 7, NOW + 67, 1) == []
    assert [d.attempt for d in await lease(store, NOW + 8, NOW + 68, 1)] == [2]
    assert await tries(store) == [(delivery.id, 1, "transient", "timeout")]


async def test_given_up_is_settled_with_its_reason(store: Store) -> None:
    await owed_rows(store, notice())
    [delivery] = await lease(store, NOW, NOW + 60, 1)
    await settle(store, delivery, DeliveryOutcome(result=Result.PERMANENT, reason="rejected"), NOW)
    [row] = await rows(store)
    assert row.outcome == "given_up"
    assert await tries(store) == [(delivery.id, 1, "permanent", "rejected")]


async def test_a_crash_between_send_and_mark_repeats(store: Store) -> None:
    await owed_rows(store, notice())
    [first] = await lease(store, NOW, NOW + 60, 1)
    # The process dies here. Its successor:
    [second] = await lease(store, NOW + 61, NOW + 121, 1)
    assert second.id == first.id


async def test_a_lease_that_ran_out_cannot_undo_the_next_holders(store: Store) -> None:
    await owed_rows(store, notice())
    [late] = await lease(store, NOW, NOW + 60, 1)
    [holder] = await lease(store, NOW + 61, NOW + 121, 1)
    await settle(store, late, DeliveryOutcome(result=Result.TRANSIENT, reason="timeout", due_at=NOW + 62), NOW + 62)
    assert await lease(store, NOW + 63, NOW + 123, 1) == []
    await settle(store, holder, DONE, NOW + 64)
    await settle(store, late, DeliveryOutcome(result=Result.PERMANENT, reason="rejected"), NOW + 65)
    [row] = await rows(store)
    assert (row.settled_at, row.outcome) == (NOW + 64, "done")


async def test_a_row_that_is_gone_leaves_no_attempt(store: Store) -> None:
    await owed_rows(store, notice())
    [delivery] = await lease(store, NOW, NOW + 60, 1)
    await store.write(delete(outbox))
    await settle(store, delivery, DONE, NOW)
    assert await tries(store) == []


async def test_the_messages_of_one_tunnel_keep_their_order(store: Store) -> None:
    await owed_rows(store, notice("a"), notice("b"), notice("a", Kind.RECOVERED))
    [leak] = await lease(store, NOW, NOW + 60, 1)
    assert [d.tunnel for d in await lease(store, NOW, NOW + 60, 10)] == ["b"]
    await settle(store, leak, DeliveryOutcome(result=Result.TRANSIENT, reason="timeout", due_at=NOW + 30), NOW)
    assert await lease(store, NOW, NOW + 60, 10) == []  # "recovered" waits for "leaking"
    assert await next_due(store, "telegram", NOW) == NOW + 30
    [leak] = await lease(store, NOW + 30, NOW + 90, 10)
    await settle(store, leak, DONE, NOW + 31)
    assert [d.kind for d in await lease(store, NOW + 31, NOW + 91, 10)] == ["recovered"]


async def test_a_message_that_always_fails_holds_up_the_next_for_a_while_only(store: Store) -> None:
    await owed_rows(store, notice("a"), notice("a", Kind.RECOVERED))
    for attempt in range(1, subject.MAX_ATTEMPTS_IN_ORDER + 1):
        [stuck] = await lease(store, NOW, NOW + 60, 10)
        assert (stuck.kind, stuck.attempt) == ("leaking", attempt)
        later = NOW if attempt < subject.MAX_ATTEMPTS_IN_ORDER else NOW + 100
        await settle(store, stuck, DeliveryOutcome(result=Result.TRANSIENT, reason="server_error", due_at=later), NOW)
    assert [d.kind for d in await lease(store, NOW, NOW + 60, 10)] == ["recovered"]


async def storm(store: Store, tunnel: str, *kinds: Kind, count: int = 3000, channel: str = "telegram") -> None:
    """`count` notices of one tunnel, the `kinds` in turn, as one token can make them in a few seconds."""
    debts = [delivery_rows(notice(tunnel, kinds[n % len(kinds)]), (channel,), NOW)[0] for n in range(count)]
    for start in range(0, count, 1000):
        await store.write(insert(outbox).values(debts[start : start + 1000]))


async def told(store: Store, count: int) -> list[tuple[str, str]]:
    """What goes out next, told one after another."""
    out = []
    for _ in range(count):
        for delivery in await lease(store, NOW, NOW + 60, 1, "telegram"):
            out.append((delivery.tunnel, delivery.kind))
            await settle(store, delivery, DONE, NOW)
    return out


async def test_a_storm_of_one_tunnel_does_not_delay_anothers_leak(store: Store) -> None:
    await storm(store, "evil", Kind.ADDRESS_CHANGED)
    await owed_rows(store, notice("nl-1"))
    assert await told(store, 3) == [("nl-1", "leaking"), ("evil", "address_changed")]


async def test_a_storm_that_cannot_be_shortened_does_not_either(store: Store) -> None:
    await storm(store, "evil", Kind.DOWN, Kind.RECOVERED)
    await owed_rows(store, notice("nl-1"))
    async with asyncio.timeout(30):
        assert await told(store, 2) == [("nl-1", "leaking"), ("evil", "down")]


async def test_a_leak_does_not_wait_behind_its_own_tunnels_address_changes(store: Store) -> None:
    await storm(store, "evil", Kind.ADDRESS_CHANGED)
    await owed_rows(store, notice("evil"), notice("other", Kind.CONNECTED))
    assert ("evil", "leaking") in await told(store, 2)


async def test_a_leak_does_not_wait_with_what_its_own_tunnel_was_owed_before(store: Store) -> None:
    """A thousand tunnels connect, or recover, at once; one of them leaks before it was its turn."""
    for n in range(50):
        await owed_rows(store, notice(f"t{n}", Kind.RECOVERED), at=NOW - 100)
    await owed_rows(store, notice("nl-1", Kind.CONNECTED), notice("nl-1", Kind.RECOVERED), notice("nl-1"))
    assert await told(store, 3) == [("nl-1", "connected"), ("nl-1", "recovered"), ("nl-1", "leaking")]


async def test_who_was_hurried_enough_keeps_no_alarm_of_others_back(store: Store) -> None:
    await owed_rows(store, *[notice("loud")] * subject.MAX_ALARMS_FIRST)
    assert len(await told(store, subject.MAX_ALARMS_FIRST)) == subject.MAX_ALARMS_FIRST
    await owed_rows(store, notice("loud", Kind.RECOVERED), notice("loud"))
    await owed_rows(store, notice("b", Kind.DOWN))
    assert await told(store, 3) == [("b", "down"), ("loud", "recovered"), ("loud", "leaking")]


async def test_the_most_urgent_goes_first_then_the_oldest(store: Store) -> None:
    kinds = [k for k in Kind for _ in range(2)]
    await owed_rows(store, *(notice(f"t{n}", kind) for n, kind in enumerate(kinds)))
    ranks = [
        [Kind.LEAKING],
        [Kind.SERVER_OVERLOADED, Kind.DOWN, Kind.SILENT, Kind.UNVERIFIED],
        [Kind.SERVER_RECOVERED, Kind.DEGRADED, Kind.RECOVERED],
        [
            Kind.SERVER_STARTED,
            Kind.DATABASE_DAMAGED,
            Kind.CONNECTED,
            Kind.ADDRESS_CHANGED,
            Kind.PORT_CHANGED,
            Kind.TEST,
        ],
    ]
    assert sum(len(rank) for rank in ranks) == len(Kind)
    expected = [(f"t{n}", str(kind)) for rank in ranks for n, kind in enumerate(kinds) if kind in rank]
    together = await lease(store, NOW, NOW + 60, 100)
    assert [(d.tunnel, d.kind) for d in together] == expected
    await store.write(update(outbox).values(leased_until=0.0))
    assert await told(store, 100) == expected


async def test_of_one_urgency_whose_tunnel_waits_for_longest_goes_first(store: Store) -> None:
    """Since it was owed, or since its tunnel was told of last: neither much said before nor a new name gains a turn."""
    await owed_rows(store, notice("loud", Kind.DOWN), notice("loud", Kind.SILENT), at=NOW - 20)
    [first] = await lease(store, NOW, NOW + 60, 1, "telegram")
    await settle(store, first, DONE, NOW - 5)
    await owed_rows(store, notice("old", Kind.DOWN), at=NOW - 10)
    await owed_rows(store, notice("new", Kind.DOWN), at=NOW - 4)
    assert await told(store, 4) == [("old", "down"), ("loud", "silent"), ("new", "down")]


async def test_what_another_channel_told_takes_no_turn(store: Store) -> None:
    await owed_rows(store, notice("a", Kind.DOWN), channels=("telegram", "webhook"), at=NOW - 20)
    await owed_rows(store, notice("b", Kind.DOWN), at=NOW - 10)
    [first] = await lease(store, NOW, NOW + 60, 1, "webhook")
    await settle(store, first, DONE, NOW - 5)
    assert await told(store, 3) == [("a", "down"), ("b", "down")]


async def test_a_leak_in_what_was_held_back_is_as_urgent_as_a_leak(store: Store) -> None:
    await owed_rows(store, *[notice("loud", Kind.DOWN)] * subject.MAX_NOTICES_PER_WINDOW, at=NOW - 60)
    for _ in range(subject.MAX_NOTICES_PER_WINDOW):
        [one] = await lease(store, NOW - 60, NOW, 1, "telegram")
        await settle(store, one, DONE, NOW - 60)
    await owed_rows(store, notice("loud", Kind.RECOVERED), notice("loud"), at=NOW - 30)
    await owed_rows(store, notice("b", Kind.DOWN), at=NOW - 40)
    assert await lease(store, NOW - 0.1, NOW + 60, 10, "telegram", urgent=True) != []
    await store.write(update(outbox).values(leased_until=0.0))
    assert await next_due(store, "telegram", NOW) == NOW - 40
    [both] = await lease(store, NOW, NOW + 60, 1, "telegram")
    assert (both.tunnel, both.notice().kind, both.changes) == ("loud", Kind.LEAKING, 2)


async def test_what_the_server_says_of_itself_is_never_held_back(store: Store) -> None:
    for _ in range(subject.MAX_NOTICES_PER_WINDOW + 5):
        await owed_rows(store, notice("", Kind.SERVER_STARTED))
    assert len(await told(store, 99)) == subject.MAX_NOTICES_PER_WINDOW + 5


async def test_a_port_and_a_leak_that_is_over_are_in_the_sum(store: Store) -> None:
    changed = Notice(kind=Kind.PORT_CHANGED, tunnel="loud", at=NOW, port=51820, old_port=41234)
    last = Notice(kind=Kind.RECOVERED, tunnel="loud", at=NOW, began=NOW - 3, was=State.DOWN)
    await owed_rows(store, *[notice("loud", Kind.DOWN)] * subject.MAX_NOTICES_PER_WINDOW)
    assert len(await told(store, subject.MAX_NOTICES_PER_WINDOW)) == subject.MAX_NOTICES_PER_WINDOW
    await owed_rows(store, notice("loud"), last, changed)
    assert await lease(store, NOW, NOW + 60, 1) == []
    assert await next_due(store, "telegram", NOW) == NOW + subject.NOTICE_WINDOW_S
    [sum_] = await lease(store, NOW + subject.NOTICE_WINDOW_S, NOW + 120, 1)
    said = sum_.notice()
    assert (said.kind, said.was, said.port, said.old_port) == (Kind.RECOVERED, State.LEAKING, 51820, None)
    assert said.details == (
        "3 changes since the last message are summed up here: loud changes too often to notify each.",
        "Of them one was a leak.",
        "Seen during the last leak: leaks",
    )


async def test_only_the_newest_address_change_is_told(store: Store) -> None:
    """Of each tunnel and channel; what a worker is telling stays its own, and no try is recorded that was not made."""
    changed = notice("a", Kind.ADDRESS_CHANGED)
    await owed_rows(store, changed, channels=("telegram", "webhook"))
    [held] = await lease(store, NOW, NOW + 60, 1, "telegram")
    down = notice("a", Kind.DOWN)
    await owed_rows(store, changed, changed, down, notice("b", Kind.ADDRESS_CHANGED))
    assert [d.tunnel for d in await lease(store, NOW, NOW + 60, 1, "telegram")] == ["b"]
    assert [r.outcome for r in await rows(store)] == [None, None, "superseded", None, None, None]
    await settle(store, held, DONE, NOW)
    assert await told(store, 3) == [("a", "address_changed"), ("a", "down")]
    found = [(r.channel, r.outcome) for r in await rows(store)]
    assert found[:4] == [("telegram", "done"), ("webhook", None), ("telegram", "superseded"), ("telegram", "done")]
    superseded = (await rows(store))[2]
    assert superseded.settled_at == NOW
    assert superseded.id not in [t[0] for t in await tries(store)]


async def test_dispatchers_race_through_a_storm_and_nothing_is_won_twice(database_url: str) -> None:
    """Each of them supersedes and claims at once; none settles what another was given."""
    first, second = await open_store(database_url), await open_store(database_url)
    try:
        for n in range(5):
            await storm(first, f"t{n}", Kind.ADDRESS_CHANGED, count=100)
        claims = [lease(store, NOW, NOW + 60, 2) for store in (first, second) for _ in range(10)]
        won = [d.id for claimed in await asyncio.gather(*claims) for d in claimed]
        while claimed := await lease(second, NOW, NOW + 60, 7):
            won += [d.id for d in claimed]
        assert len(won) == len(set(won)) == 5
        left = {r.id for r in await rows(first) if r.settled_at is None}
        assert left == set(won)
    finally:
        await first.close()
        await second.close()


async def test_a_repaired_channel_is_told_at_once(store: Store) -> None:
    await owed_rows(store, notice(), channels=("telegram", "webhook"), at=NOW + 300)
    await subject.make_due_now(store, "telegram", NOW)
    assert await next_due(store, "telegram", NOW) == NOW
    assert await next_due(store, "webhook", NOW) == NOW + 300


async def test_what_is_owed_to_a_channel_that_is_gone_is_given_up_in_the_end(store: Store) -> None:
    await owed_rows(store, notice(), channels=("telegram", "pager"))
    await owed_rows(store, notice(), channels=("pager",), at=NOW + 50)
    assert await subject.pending(store) == [
        Pending(channel="pager", count=2, since=NOW),
        Pending(channel="telegram", count=1, since=NOW),
    ]
    assert await subject.expire(store, ["telegram"], NOW + 10, NOW + 100) == 1
    assert [(r.channel, r.outcome) for r in await rows(store)] == [
        ("telegram", None),
        ("pager", "given_up"),
        ("pager", None),
    ]
    assert [t[2:] for t in await tries(store)] == [("permanent", "no_channel")]


async def test_the_claim_uses_the_index(store: Store, database_url: str) -> None:
    """A year of settled rows must not slow down an alarm."""
    settled = [
        {**delivery_rows(notice(f"t{n}"), ("telegram",), NOW)[0], "settled_at": NOW, "outcome": "done"}
        for n in range(3000)
    ]
    await store.write(insert(outbox).values(settled))
    await store.write(text("ANALYZE"))
    await owed_rows(store, notice("a"))
    assert [d.tunnel for d in await lease(store, NOW, NOW + 60, 1)] == ["a"]
    explain = "EXPLAIN" if database_url.startswith("postgresql") else "EXPLAIN QUERY PLAN"
    written = select(subject._queues(NOW, "telegram")).compile(compile_kwargs={"literal_binds": True})
    plan = "\n".join(str(tuple(row)) for row in await store.read(text(f"{explain} {written}")))
    assert plan.count("ix_outbox_told") >= 2
    assert "SCAN sent" not in plan
    assert "Seq Scan" not in plan
    assert "ix_outbox_due" in plan


def a_delivery(attempt: int = 1, age: float = 0.0) -> LeasedDelivery:
    return LeasedDelivery(id=1, channel="c", tunnel="t", kind="down", body="", attempt=attempt, created_at=NOW - age)


def due_in(failure: DeliveryError, delivery: LeasedDelivery) -> float | None:
    due = retry.after(failure, delivery, NOW, random.Random(1)).due_at
    return None if due is None else due - NOW


DAY = 86400.0
RETRIES = {
    "the first failure": (TransientError("timeout"), a_delivery(1), 0.5, 1.5),
    "the fourth": (TransientError("timeout"), a_delivery(4), 4, 12),
    "the fiftieth": (TransientError("timeout"), a_delivery(50), 150, 300),
    "the ten-thousandth": (TransientError("timeout"), a_delivery(10_000), 150, 300),
    "asked to wait": (TransientError("rate_limited", retry_after=37), a_delivery(9), 37, 37),
    "asked to wait for no time": (TransientError("rate_limited", retry_after=0), a_delivery(1), 1, 1),
    "asked to wait for a year": (TransientError("rate_limited", retry_after=3e7), a_delivery(1), 3600, 3600),
    "a wrong token": (SetupError("auth"), a_delivery(1), 240, 360),
    "a wrong token for two days": (SetupError("auth"), a_delivery(500, 2 * DAY), 240, 360),
    "an old notice of a server that was off": (TransientError("timeout"), a_delivery(1, 2 * DAY), 0.5, 1.5),
}


@pytest.mark.parametrize(("failure", "delivery", "least", "most"), RETRIES.values(), ids=RETRIES.keys())
def test_tried_again(failure: DeliveryError, delivery: LeasedDelivery, least: float, most: float) -> None:
    wait = due_in(failure, delivery)
    assert wait is not None
    assert least <= wait <= most


GIVEN_UP = {
    "malformed": (PermanentError("rejected"), a_delivery(1)),
    "after a week": (TransientError("timeout"), a_delivery(2000, 7 * DAY)),
    "a wrong token for a week": (SetupError("auth"), a_delivery(2000, 7 * DAY)),
}


@pytest.mark.parametrize(("failure", "delivery"), GIVEN_UP.values(), ids=GIVEN_UP.keys())
def test_given_up(failure: DeliveryError, delivery: LeasedDelivery) -> None:
    outcome = retry.after(failure, delivery, NOW, random.Random(1))
    assert outcome.given_up
    assert outcome.reason == failure.reason


async def test_an_unreadable_row_is_no_exception_of_another_kind(store: Store) -> None:
    await owed_rows(store, notice())
    await store.write(update(outbox).values(body='{"kind":"from the future"}'))
    [delivery] = await lease(store, NOW, NOW + 60, 1)
    with pytest.raises(ValueError, match="kind"):  # msgspec.ValidationError is one
        delivery.notice()
