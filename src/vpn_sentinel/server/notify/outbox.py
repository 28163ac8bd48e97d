"""What is owed to whom: rows of `outbox`, each one notice for one channel, and the tries to deliver them in `attempts`.

A delivery is *due* when `due_at` and `leased_until` have passed, and stays in the table, unsettled, until a channel
took it or it was given up. At least once: a crash between sending and `settle` repeats one message a channel, and loses
none.

Order: a delivery waits for the earlier ones of its tunnel and channel, so nobody reads "recovered" before "leaking".
One that failed `PATIENCE` times (about half a minute) holds up the later ones no longer; a receiver that stumbles over
one message must not keep an alarm from being told.

Across tunnels the most urgent goes first, then the oldest: a receiver may take one message a second, and what one
tunnel says at length must not keep another's leak from being told. Of address changes only the newest is worth telling:
the others are *superseded*, and so is one that a leak of its tunnel would have to wait for. That is no try, so it adds
nothing to `attempts`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, Subquery, Update, case, exists, func, insert, literal, select, update

from vpn_sentinel.domain.notice import Kind, Notice
from vpn_sentinel.server.store.schema import attempts, outbox
from vpn_sentinel.server.store.store import Store
from vpn_sentinel.wire.codec import decoder

PATIENCE: Final = 5
# Most urgent first; every other kind comes after these.
URGENCY: Final[dict[str, int]] = {
    Kind.LEAKING: 0,
    Kind.DOWN: 1,
    Kind.SILENT: 1,
    Kind.UNVERIFIED: 1,
    Kind.RECOVERED: 2,
    Kind.DEGRADED: 2,
}
_LEAST_URGENT: Final = 3
_ALARMS: Final = tuple(str(kind) for kind, rank in URGENCY.items() if rank <= 1)
# Rows of one notice are written together; looked for by id, as settled rows are many.
_APART: Final = 256
# Bounds one statement, not what is superseded: the next lease goes on.
_SUPERSEDED_AT_ONCE: Final = 10_000

_notice: Callable[[str], Notice] = decoder(Notice)


class Result(StrEnum):
    """How one try ended, as `attempts.result` keeps it."""

    DONE = "done"
    TRANSIENT = "transient"
    PERMANENT = "permanent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A leased row. `attempt` counts this try too; `created_at` is seconds since the epoch."""

    id: int
    channel: str
    tunnel: str
    kind: str
    body: str
    attempt: int
    created_at: float

    def notice(self) -> Notice:
        """The notice. Raises msgspec.MsgspecError when another version wrote it in a way that this one cannot read."""
        return _notice(self.body)

    def outline(self) -> Notice | None:
        """What the row's own columns say of a notice that cannot be read; None when not even its kind is known here."""
        if self.kind not in set(Kind):
            return None
        said = ("The details were written by another version of VPN Sentinel, and cannot be read.",)
        return Notice(kind=Kind(self.kind), tunnel=self.tunnel, at=self.created_at, details=said)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What becomes of a delivery after a try: due again at `due_at`, or settled when that is None."""

    result: Result
    reason: str = ""
    due_at: float | None = None

    @property
    def given_up(self) -> bool:
        return self.due_at is None and self.result is not Result.DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Owed:
    """What one channel has not been told yet: how many notices, and since when the oldest is owed."""

    channel: str
    count: int
    since: float


async def lease(
    store: Store,
    now: float,
    until: float,
    limit: int,
    channel: str | None = None,
    *,
    urgent: bool = False,
    early: bool = False,
) -> list[Delivery]:
    """Claim up to `limit` due deliveries until `until`, the most urgent first, then the oldest.

    `urgent` takes only what tells of a tunnel of which an alarm is owed, `early` also what is not due yet.

    Before, in the same transaction, address changes that nobody needs to hear any more are superseded. Raises
    StoreUnavailable.

    Survives the race of two dispatchers, in one process or many, for the same row: exactly one gets it. SQLite has one
    writer, so the second one's statement already sees the lease. On PostgreSQL the second skips rows that the first has
    locked (SKIP LOCKED), and checks `leased_until` again on the newest version of a row that was committed after its
    snapshot. The CTE keeps PostgreSQL from running the limited sub-select more than once; SQLite ignores FOR UPDATE.
    Superseding takes its rows in the same way, so that it settles none that another dispatcher is telling.
    """
    due = _not_held_up(outbox.c.id).where(outbox.c.leased_until <= now)
    if not early:
        due = due.where(outbox.c.due_at <= now)
    if channel is not None:
        due = due.where(outbox.c.channel == channel)
    if urgent:
        alarm = outbox.alias("alarm")
        owed = (alarm.c.settled_at.is_(None), alarm.c.channel == outbox.c.channel, alarm.c.tunnel == outbox.c.tunnel)
        due = due.where(exists().where(*owed, alarm.c.kind.in_(_ALARMS)))
    urgency = case({str(kind): rank for kind, rank in URGENCY.items()}, value=outbox.c.kind, else_=_LEAST_URGENT)
    first = due.order_by(urgency, outbox.c.id).limit(limit)
    claimed = first.with_for_update(skip_locked=True, of=outbox).cte("due")
    statement = (
        update(outbox)
        .where(outbox.c.id.in_(select(claimed.c.id)), outbox.c.settled_at.is_(None), outbox.c.leased_until <= now)
        .values(leased_until=until, attempt=outbox.c.attempt + 1)
        .returning(
            outbox.c.id,
            outbox.c.channel,
            outbox.c.tunnel,
            outbox.c.kind,
            outbox.c.body,
            outbox.c.attempt,
            outbox.c.created_at,
        )
    )
    _, rows = await store.write(_supersede(now, channel), statement)
    leased = (Delivery(**row._mapping) for row in rows)  # noqa: SLF001 - SQLAlchemy's public name
    return sorted(leased, key=lambda d: (URGENCY.get(d.kind, _LEAST_URGENT), d.id))


async def settle(store: Store, delivery: Delivery, outcome: Outcome, now: float) -> None:
    """Record a try and what follows from it, in one transaction. Raises StoreUnavailable.

    Survives a lease that ran out meanwhile: "done" and "given up" stand, because the try was made; "due later" changes
    nothing when another dispatcher holds the row now. A row that was deleted meanwhile gets no attempt.
    """
    row = update(outbox).where(outbox.c.id == delivery.id, outbox.c.settled_at.is_(None))
    if outcome.due_at is None:
        row = row.values(settled_at=now, outcome="given_up" if outcome.given_up else "done", leased_until=0.0)
    else:
        row = row.where(outbox.c.attempt == delivery.attempt).values(due_at=outcome.due_at, leased_until=0.0)
    tried = select(
        outbox.c.id, literal(delivery.attempt), literal(now), literal(str(outcome.result)), literal(outcome.reason)
    ).where(outbox.c.id == delivery.id)
    columns = ["delivery_id", "attempt", "at", "result", "reason"]
    await store.write(row, insert(attempts).from_select(columns, tried))


async def next_due(store: Store, channel: str) -> float | None:
    """When the channel's next delivery can be leased, None when nothing is owed. Raises StoreUnavailable."""
    ready = case((outbox.c.leased_until > outbox.c.due_at, outbox.c.leased_until), else_=outbox.c.due_at)
    statement = _not_held_up(func.min(ready)).where(outbox.c.channel == channel)
    [row] = await store.read(statement)
    return None if row[0] is None else float(row[0])


async def hasten(store: Store, channel: str, now: float) -> None:
    """Make everything owed to a channel due now: it works again, or a restart may have repaired it."""
    waiting = (outbox.c.channel == channel, outbox.c.settled_at.is_(None), outbox.c.due_at > now)
    await store.write(update(outbox).where(*waiting).values(due_at=now))


async def owed(store: Store) -> list[Owed]:
    """What is owed, a channel each. Raises StoreUnavailable."""
    statement = (
        select(outbox.c.channel, func.count().label("debts"), func.min(outbox.c.created_at).label("since"))
        .where(outbox.c.settled_at.is_(None))
        .group_by(outbox.c.channel)
        .order_by(outbox.c.channel)
    )
    return [Owed(channel=r.channel, count=int(r.debts), since=float(r.since)) for r in await store.read(statement)]


async def readdress(store: Store, channels: Iterable[str], before: float, now: float) -> int:
    """Hand what has been owed since before `before` to channels that are no longer set up to one of `channels` that was
    never owed the same notice; how many that was. Raises StoreUnavailable.
    """
    channels = list(channels)
    stranded = (outbox.c.settled_at.is_(None), outbox.c.channel.not_in(channels), outbox.c.created_at < before)
    twin = outbox.alias("twin")
    same = [getattr(twin.c, name) == getattr(outbox.c, name) for name in ("tunnel", "kind", "created_at", "body")]
    same.append(twin.c.id.between(outbox.c.id - _APART, outbox.c.id + _APART))
    moved = [
        update(outbox)
        .where(*stranded, outbox.c.leased_until <= now, ~exists().where(*same, twin.c.channel == channel))
        .values(channel=channel, due_at=now)
        .returning(outbox.c.id)
        for channel in channels
    ]
    return sum(len(rows) for rows in await store.write(*moved)) if moved else 0


async def abandon(store: Store, channels: Iterable[str], before: float, now: float) -> int:
    """Give up what has been owed since before `before` to channels that are no longer set up; how many that was."""
    stranded = (outbox.c.settled_at.is_(None), outbox.c.channel.not_in(list(channels)), outbox.c.created_at < before)
    record = select(outbox.c.id, outbox.c.attempt, literal(now), literal(str(Result.PERMANENT)), literal("no_channel"))
    _, rows = await store.write(
        insert(attempts).from_select(["delivery_id", "attempt", "at", "result", "reason"], record.where(*stranded)),
        update(outbox).where(*stranded).values(settled_at=now, outcome="given_up").returning(outbox.c.id),
    )
    return len(rows)


def _supersede(now: float, channel: str | None) -> Update:
    """Settle waiting address changes that are older than their tunnel's newest address change or leak.

    The newest are found in one pass over what is owed, not once for each row: a storm is thousands of rows.
    """
    newer = outbox.alias("newer")
    newest = (
        select(newer.c.channel, newer.c.tunnel, func.max(newer.c.id).label("id"))
        .where(newer.c.settled_at.is_(None), newer.c.kind.in_([Kind.ADDRESS_CHANGED.value, Kind.LEAKING.value]))
        .group_by(newer.c.channel, newer.c.tunnel)
        .subquery("newest")
    )
    same = (outbox.c.channel == newest.c.channel) & (outbox.c.tunnel == newest.c.tunnel)
    waiting = (outbox.c.settled_at.is_(None), outbox.c.leased_until <= now)
    stale = (
        select(outbox.c.id)
        # The sum keeps SQLite from a scan of the settled rows too, by id, for each of the newest.
        .join(newest, same & (outbox.c.id + 0 < newest.c.id))
        .where(*waiting, outbox.c.kind == Kind.ADDRESS_CHANGED.value)
    )
    if channel is not None:
        stale = stale.where(outbox.c.channel == channel)
    taken = stale.limit(_SUPERSEDED_AT_ONCE).with_for_update(skip_locked=True, of=outbox).cte("stale")
    return (
        update(outbox)
        .where(outbox.c.id.in_(select(taken.c.id)), *waiting)
        .values(settled_at=now, outcome="superseded", leased_until=0.0)
    )


def _heads() -> Subquery:
    """Of each channel and tunnel the earliest delivery that is still to come and not yet out of patience: `id` of it.

    One pass over what is owed. Asked for each row instead, a storm of n rows would cost n² of it.
    """
    first = outbox.alias("first")
    return (
        select(first.c.channel, first.c.tunnel, func.min(first.c.id).label("id"))
        .where(first.c.settled_at.is_(None), first.c.attempt < PATIENCE)
        .group_by(first.c.channel, first.c.tunnel)
        .subquery("head")
    )


def _not_held_up(*columns: ColumnElement[Any]) -> Select[Any]:
    """`columns` of what is owed and waits for no earlier delivery of its tunnel and channel."""
    head = _heads()
    same = (outbox.c.channel == head.c.channel) & (outbox.c.tunnel == head.c.tunnel)
    return (
        select(*columns)
        .select_from(outbox.outerjoin(head, same))
        .where(outbox.c.settled_at.is_(None), head.c.id.is_(None) | (outbox.c.id <= head.c.id))
    )
