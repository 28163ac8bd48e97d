"""What is owed to whom: rows of `outbox`, each one notice for one channel, and the tries to deliver them in `attempts`.

A delivery is *due* when `due_at` and `leased_until` have passed, and stays in the table, unsettled, until a channel
took it or it was given up. At least once: a crash between sending and `settle` repeats one message a channel, and loses
none.

Order: a delivery waits for the earlier ones of its tunnel and channel, so nobody reads "recovered" before "leaking".
One that failed `MAX_TRIES_IN_ORDER` times (about half a minute) holds up the later ones no longer; a receiver that
stumbles over one message must not keep an alarm from being told.

Across tunnels the most urgent goes first: a receiver may take one message a second, and what one tunnel says at length
must not keep another's leak from being told. Within one urgency whose tunnel has waited for longest goes first: since
the notice was owed, or since the channel last told of that tunnel, whichever is later. So one that says much has one
turn between those of others, and new names do not push in before old ones. What an alarm of its tunnel waits for is as
urgent as that, or a leak would wait with its tunnel's "connected" behind those of all others; but no more once
`MAX_ALARMS_FIRST` were told of it within a minute, or one that alarms without end would keep back the alarms of others.

Of address changes only the newest is worth telling: the others are *superseded*, and so is one that a leak of its
tunnel would have to wait for. That is no try, so it adds nothing to `attempts`.

A channel tells at most `MAX_PER_WINDOW` notices of one tunnel within a minute. After that it tells nothing of it until
`WINDOW_S` seconds after the last of them, and then what waits as one: see `domain.notice.summed_up`. The rows that this
one stands for are settled with it, as *summed*. What is told is read from the settled rows, by an index of their own,
so it holds after a restart and for all servers of one database.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import (
    CTE,
    ColumnElement,
    Executable,
    Update,
    case,
    exists,
    func,
    insert,
    literal,
    literal_column,
    select,
    update,
)

from vpn_sentinel.domain.notice import STATELESS, Kind, Notice, summed_up
from vpn_sentinel.server.store.schema import attempts, outbox
from vpn_sentinel.server.store.store import Store
from vpn_sentinel.wire.codec import decoder

MAX_TRIES_IN_ORDER: Final = 5
# Notices of one tunnel that a channel tells within a minute. More than a tunnel makes that is repaired at once, again
# and again, as a recovery takes some seconds; and half of what a receiver takes that wants one a second.
MAX_PER_WINDOW: Final = 30
WINDOW_S: Final = 60.0
MAX_ALARMS_FIRST: Final = 5
# Most urgent first; every other kind comes after these.
URGENCY: Final[dict[str, int]] = {
    Kind.LEAKING: 0,
    Kind.DOWN: 1,
    Kind.SILENT: 1,
    Kind.UNVERIFIED: 1,
    Kind.SERVER_OVERLOADED: 1,
    Kind.RECOVERED: 2,
    Kind.SERVER_RECOVERED: 2,
    Kind.DEGRADED: 2,
}
_LEAST_URGENT: Final = 3
_ALARM: Final = 1  # and what is more urgent
# Rows of one notice are written together; looked for by id, as settled rows are many.
_MAX_ID_DISTANCE: Final = 256
# Bounds one statement, not what is superseded: the next lease goes on.
_MAX_SUPERSEDED_AT_ONCE: Final = 10_000

_notice: Callable[[str], Notice] = decoder(Notice)


class Result(StrEnum):
    """How one try ended, as `attempts.result` keeps it."""

    DONE = "done"
    TRANSIENT = "transient"
    PERMANENT = "permanent"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedDelivery:
    """A leased row. `attempt` counts this try too; `created_at` is seconds since the epoch.

    One that sums up `changes` rows, `leaks` of them leaks, stands for those of its tunnel up to the id `through`: it
    has the kind and the body of the last that tells a state, and `leak` and `port` are the last bodies of those kinds.
    """

    id: int
    channel: str
    tunnel: str
    kind: str
    body: str
    attempt: int
    created_at: float
    changes: int = 1
    leaks: int = 0
    through: int = 0
    leak: str | None = None
    port: str | None = None

    def notice(self) -> Notice:
        """The notice. Raises msgspec.MsgspecError when another version wrote it in a way that this one cannot read."""
        leak, port = (None if body is None else _notice(body) for body in (self.leak, self.port))
        return self._whole(_notice(self.body), leak, port)

    def outline(self) -> Notice | None:
        """What the row's own columns say of a notice that cannot be read; None when not even its kind is known here."""
        if self.kind not in set(Kind):
            return None
        said = ("The details were written by another version of VPN Sentinel, and cannot be read.",)
        return self._whole(Notice(kind=Kind(self.kind), tunnel=self.tunnel, at=self.created_at, details=said))

    def _whole(self, last: Notice, leak: Notice | None = None, port: Notice | None = None) -> Notice:
        return last if self.changes == 1 else summed_up(last, self.changes, self.leaks, leak, port)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryOutcome:
    """What becomes of a delivery after a try: due again at `due_at`, or settled when that is None."""

    result: Result
    reason: str = ""
    due_at: float | None = None

    @property
    def given_up(self) -> bool:
        return self.due_at is None and self.result is not Result.DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
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
) -> list[LeasedDelivery]:
    """Claim up to `limit` due deliveries until `until`, the most urgent first, then whose tunnel waits for longest.

    One of a tunnel of which enough was told comes summed up with all that waits behind it.

    `urgent` takes only what tells of a tunnel of which an alarm is owed, `early` also what is not due yet.

    Before, in the same transaction, address changes that nobody needs to hear any more are superseded. Raises
    StoreUnavailable.

    Survives the race of two dispatchers, in one process or many, for the same row: exactly one gets it. SQLite has one
    writer, so the second one's statement already sees the lease. On PostgreSQL the second skips rows that the first has
    locked (SKIP LOCKED), and checks `leased_until` again on the newest version of a row that was committed after its
    snapshot. The CTE keeps PostgreSQL from running the limited sub-select more than once; SQLite ignores FOR UPDATE.
    Superseding takes its rows in the same way, so that it settles none that another dispatcher is telling.
    """
    line = _lines(now, channel, early=early)
    due = select(outbox.c.id).select_from(line.join(outbox, _first_of_each(line)))
    due = due.where(outbox.c.leased_until <= now, line.c.held_until <= now)
    if not early:
        due = due.where(outbox.c.due_at <= now)
    if urgent:
        due = due.where(line.c.urgency <= _ALARM)
    # What comes summed up is as urgent as the most urgent in it.
    hurries = line.c.hurries | (line.c.held_until > outbox.c.created_at)
    urgency = case((hurries, line.c.urgency), else_=_urgency(outbox.c.kind))
    waits_since = case((line.c.told_at > outbox.c.created_at, line.c.told_at), else_=outbox.c.created_at)
    first = due.order_by(urgency, waits_since, outbox.c.id).limit(limit)
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
    leased = [LeasedDelivery(**row._mapping) for row in rows]  # noqa: SLF001 - SQLAlchemy's public name
    leased.sort(key=lambda d: (URGENCY.get(d.kind, _LEAST_URGENT), d.id))
    return [await _with_what_waits(store, d, now) for d in leased]


async def _with_what_waits(store: Store, delivery: LeasedDelivery, now: float) -> LeasedDelivery:
    """`delivery`, summed up with what waits behind it if it was held back. No other lease can take that meanwhile."""
    line = _lines(now, delivery.channel, delivery.tunnel)
    held = line.c.held_until > delivery.created_at
    if not (found := await store.read(select(line).where(held, line.c.changes > 1))):
        return delivery
    [waiting] = found
    wanted = (waiting.state_id or waiting.last_id, waiting.leak_id, waiting.port_id)
    c = outbox.c
    bodies = {r.id: r for r in await store.read(select(c.id, c.kind, c.body).where(c.id.in_([i for i in wanted if i])))}
    last, leak, port = (bodies.get(i) for i in wanted)
    if last is None:  # pruned meanwhile, by an owner's hand
        return delivery
    return replace(
        delivery,
        kind=last.kind,
        body=last.body,
        changes=int(waiting.changes),
        leaks=int(waiting.leaks),
        through=int(waiting.last_id),
        leak=None if leak is None else leak.body,
        port=None if port is None else port.body,
    )


async def settle(store: Store, delivery: LeasedDelivery, outcome: DeliveryOutcome, now: float) -> None:
    """Record a try and what follows from it, in one transaction. Raises StoreUnavailable.

    Told, a summed-up delivery settles all that it stands for; else these wait on, to be summed up anew.

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
    statements: list[Executable] = [row, insert(attempts).from_select(columns, tried)]
    if outcome.result is Result.DONE and delivery.changes > 1:
        same = (outbox.c.channel == delivery.channel, outbox.c.tunnel == delivery.tunnel)
        theirs = (outbox.c.settled_at.is_(None), outbox.c.leased_until <= now, outbox.c.id <= delivery.through)
        statements.append(update(outbox).where(*same, *theirs).values(settled_at=now, outcome="summed"))
    await store.write(*statements)


async def next_due(store: Store, channel: str, now: float) -> float | None:
    """When the channel's next delivery can be leased, None when nothing is owed. Raises StoreUnavailable."""
    line = _lines(now, channel)
    free = case((outbox.c.leased_until > outbox.c.due_at, outbox.c.leased_until), else_=outbox.c.due_at)
    ready = [case((line.c.held_until > at, line.c.held_until), else_=at) for at in (free, line.c.stuck_until)]
    # An outer join: where all of a line are out of patience and none is due, it has no row to be leased.
    [row] = await store.read(select(*map(func.min, ready)).select_from(line.outerjoin(outbox, _first_of_each(line))))
    return min((float(at) for at in row if at is not None), default=None)


async def make_due_now(store: Store, channel: str, now: float) -> None:
    """Make everything owed to a channel due now: it works again, or a restart may have repaired it."""
    waiting = (outbox.c.channel == channel, outbox.c.settled_at.is_(None), outbox.c.due_at > now)
    await store.write(update(outbox).where(*waiting).values(due_at=now))


async def pending(store: Store) -> list[Pending]:
    """What is owed, a channel each. Raises StoreUnavailable."""
    statement = (
        select(outbox.c.channel, func.count().label("rows"), func.min(outbox.c.created_at).label("since"))
        .where(outbox.c.settled_at.is_(None))
        .group_by(outbox.c.channel)
        .order_by(outbox.c.channel)
    )
    return [Pending(channel=r.channel, count=int(r.rows), since=float(r.since)) for r in await store.read(statement)]


async def reassign(store: Store, channels: Iterable[str], before: float, now: float) -> int:
    """Hand what has been owed since before `before` to channels that are no longer set up to one of `channels` that was
    never owed the same notice; how many that was. Raises StoreUnavailable.
    """
    channels = list(channels)
    stranded = (outbox.c.settled_at.is_(None), outbox.c.channel.not_in(channels), outbox.c.created_at < before)
    twin = outbox.alias("twin")
    same = [getattr(twin.c, name) == getattr(outbox.c, name) for name in ("tunnel", "kind", "body")]
    same.append(twin.c.id.between(outbox.c.id - _MAX_ID_DISTANCE, outbox.c.id + _MAX_ID_DISTANCE))
    moved = [
        update(outbox)
        .where(*stranded, outbox.c.leased_until <= now, ~exists().where(*same, twin.c.channel == channel))
        .values(channel=channel, due_at=now)
        .returning(outbox.c.id)
        for channel in channels
    ]
    return sum(len(rows) for rows in await store.write(*moved)) if moved else 0


async def expire(store: Store, channels: Iterable[str], before: float, now: float) -> int:
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
    taken = stale.limit(_MAX_SUPERSEDED_AT_ONCE).with_for_update(skip_locked=True, of=outbox).cte("stale")
    return (
        update(outbox)
        .where(outbox.c.id.in_(select(taken.c.id)), *waiting)
        .values(settled_at=now, outcome="superseded", leased_until=0.0)
    )


def _urgency(kind: ColumnElement[Any]) -> ColumnElement[Any]:
    return case({str(kind): rank for kind, rank in URGENCY.items()}, value=kind, else_=_LEAST_URGENT)


def _lines(now: float, channel: str | None = None, tunnel: str | None = None, *, early: bool = False) -> CTE:
    """The line of what is owed of each tunnel to each channel, or of the one `tunnel`, to the one `channel`.

    `head` is the earliest delivery that is not yet out of patience; `stuck` the earliest due one that is (`early`: due
    or not), and `stuck_until` when the first such one is ready: all None where there is none. `told_at` is when the
    channel last told of that tunnel; `held_until` until when it tells no more of it, 0.0 when it does. `urgency` is the
    most urgent in it, `hurries` whether all in it is as urgent as that, `changes` how many there are, `leaks` how many
    of them leaks, and `last_id`, `state_id`, `leak_id`, `port_id` are the last of all and of those that tell a state, a
    leak, a port.

    One pass over what is owed, and two looks into an index for each line. Asked for each row instead, a storm of n rows
    would cost n² of it.
    """
    c = outbox.alias("waiting").c
    stateless, port = [str(kind) for kind in STATELESS], Kind.PORT_CHANGED.value
    conditions: list[ColumnElement[bool]] = [c.settled_at.is_(None)]
    conditions += [
        column == wanted for column, wanted in ((c.channel, channel), (c.tunnel, tunnel)) if wanted is not None
    ]
    stuck = c.attempt >= MAX_TRIES_IN_ORDER
    free = case((c.leased_until > c.due_at, c.leased_until), else_=c.due_at)
    line = (
        select(
            c.channel,
            c.tunnel,
            func.min(case((~stuck, c.id))).label("head"),
            func.min(case((stuck & ((c.leased_until if early else free) <= now), c.id))).label("stuck"),
            func.min(case((stuck, free))).label("stuck_until"),
            func.min(_urgency(c.kind)).label("urgency"),
            func.count().label("changes"),
            func.sum(case((c.kind == Kind.LEAKING.value, 1), else_=0)).label("leaks"),
            func.max(c.id).label("last_id"),
            func.max(case((c.kind.not_in(stateless), c.id))).label("state_id"),
            func.max(case((c.kind == Kind.LEAKING.value, c.id))).label("leak_id"),
            func.max(case((c.kind == port, c.id))).label("port_id"),
        )
        .where(*conditions)
        .group_by(c.channel, c.tunnel)
        .subquery("line")
    )
    told = outbox.alias("told").c
    # As it stands in the index's own condition; a parameter would keep both engines from using it. What lies ahead was
    # told before the clock was set back.
    same = (told.channel == line.c.channel, told.tunnel == line.c.tunnel, told.outcome == literal_column("'done'"))
    told_at = select(func.max(told.settled_at)).where(*same, told.settled_at <= now).scalar_subquery()
    # Materialized, or both engines write what is in it into each place that names it, and run it for each row there.
    with_last = select(*line.c, told_at.label("told_at")).cte("with_last").prefix_with("MATERIALIZED")
    same = (told.channel == with_last.c.channel, told.tunnel == with_last.c.tunnel, same[2])
    minute = (told.settled_at > with_last.c.told_at - WINDOW_S, told.settled_at <= with_last.c.told_at)
    count = select(func.count()).where(*same, *minute).scalar_subquery()
    counted = select(*with_last.c, count.label("told")).cte("counted").prefix_with("MATERIALIZED")
    enough = (counted.c.tunnel != "") & (counted.c.told >= MAX_PER_WINDOW)
    held = case((enough, counted.c.told_at + WINDOW_S), else_=0.0)
    # Never told is none told.
    hurries = (counted.c.told_at <= now - WINDOW_S) | (counted.c.told < MAX_ALARMS_FIRST)
    whole = select(*counted.c, held.label("held_until"), hurries.label("hurries"))
    return whole.cte("lines").prefix_with("MATERIALIZED")


def _first_of_each(line: CTE) -> ColumnElement[bool]:
    """What waits for no earlier delivery of its tunnel and channel: by id, which costs one look each."""
    return outbox.c.id.in_([line.c.head, line.c.stuck])
