"""The deliveries: rows of `outbox`, each one notice for one channel, and the attempts to deliver them in `attempts`.

A delivery is *due* when `due_at` and `leased_until` have passed. It stays in the table, unsettled, until the channel
accepted it or it was given up. Delivery is at least once: a crash between sending and `settle` repeats at most one
message of a channel, and loses none.

Order: a delivery waits for the earlier ones of its tunnel and channel, so nobody reads "recovered" before "leaking".
After `MAX_ATTEMPTS_IN_ORDER` failures (about half a minute) the later ones no longer wait for it: a receiver that
rejects one message must not keep an alarm back.

Across tunnels the most urgent goes first: a receiver may accept one message a second, and many notices of one tunnel
must not delay another's leak. Within one urgency, the tunnel that has waited longest goes first: since its notice was
written, or since the channel last delivered one of that tunnel, whichever is later. So a tunnel with many notices takes
turns with the others, and new names do not go before old ones. A delivery that an alarm of its tunnel waits for is as
urgent as the alarm: otherwise a leak would wait with its tunnel's "connected" behind those of all others. That ends
once `MAX_ALARMS_FIRST` notices of the tunnel were delivered within a minute, or a tunnel with endless alarms would
keep back the alarms of others.

Of several address changes only the newest is sent: the others are *superseded*, and so is one that a leak of its tunnel
would have to wait for. That is no attempt, so it adds nothing to `attempts`.

A channel delivers at most `MAX_NOTICES_PER_WINDOW` notices of one tunnel within a minute. After that the tunnel is held
until `NOTICE_WINDOW_S` after the last of them, and then all that waits is sent as one notice: see
`domain.notice.summed_up`. The rows that it stands for are settled with it, as *summed*. What was delivered is read from
the settled rows, by an index for it, so these limits hold after a restart and for all servers of one database.
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

MAX_ATTEMPTS_IN_ORDER: Final = 5
# Notices of one tunnel that a channel delivers within a minute. That is more than a tunnel produces that fails and is
# repaired at once again and again, as a recovery takes some seconds; and half of what a receiver accepts that allows
# one a second.
MAX_NOTICES_PER_WINDOW: Final = 30
NOTICE_WINDOW_S: Final = 60.0
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
_ALARM_URGENCY: Final = 1  # alarms have this rank or a lower one
# Rows of one notice are written together, so they are searched by near ids: there are many settled rows.
_MAX_ID_DISTANCE: Final = 256
# Bounds one statement; the next lease supersedes the rest.
_MAX_SUPERSEDED_AT_ONCE: Final = 10_000

_notice: Callable[[str], Notice] = decoder(Notice)


class Result(StrEnum):
    """The result of one attempt, as in `attempts.result`."""

    DONE = "done"
    TRANSIENT = "transient"
    PERMANENT = "permanent"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedDelivery:
    """A leased row. `attempt` includes this one; `created_at` is in seconds since the epoch.

    One that sums up `changes` rows, `leaks` of them leaks, stands for those of its tunnel up to the id `through_id`: it
    has the kind and body of the last one with a state, and `leak` and `port` are the last bodies of those kinds.
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
    through_id: int = 0
    leak: str | None = None
    port: str | None = None

    def notice(self) -> Notice:
        """The notice. Raises msgspec.MsgspecError when another version wrote it in a form that cannot be read here."""
        leak, port = (None if body is None else _notice(body) for body in (self.leak, self.port))
        return self._summed(_notice(self.body), leak, port)

    def outline(self) -> Notice | None:
        """A notice made from the row's other columns, for one that cannot be read; None when its kind is unknown."""
        if self.kind not in set(Kind):
            return None
        details = ("The details were written by another version of VPN Sentinel, and cannot be read.",)
        return self._summed(Notice(kind=Kind(self.kind), tunnel=self.tunnel, at=self.created_at, details=details))

    def _summed(self, last: Notice, leak: Notice | None = None, port: Notice | None = None) -> Notice:
        return last if self.changes == 1 else summed_up(last, self.changes, self.leaks, leak, port)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryOutcome:
    """The state of a delivery after an attempt: due again at `due_at`, or settled when that is None."""

    result: Result
    reason: str = ""
    due_at: float | None = None

    @property
    def given_up(self) -> bool:
        return self.due_at is None and self.result is not Result.DONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Pending:
    """The unsettled deliveries of one channel: their number, and the time at which the oldest was written."""

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
    """Lease up to `limit` due deliveries until `until`, the most urgent first, then by how long their tunnel waits.

    A delivery of a tunnel that was held is summed up with all that waits behind it.

    `urgent` leases only deliveries of a tunnel with a pending alarm, `early` also some that are not due yet.

    Before that, in the same transaction, outdated address changes are superseded. Raises StoreUnavailable.

    Survives the race of two dispatchers, in one process or many, for the same row: exactly one gets it. SQLite has one
    writer, so the second one's statement already sees the lease. On PostgreSQL the second skips rows that the first has
    locked (SKIP LOCKED), and checks `leased_until` again on the newest version of a row that was committed after its
    snapshot. The CTE keeps PostgreSQL from running the limited sub-select more than once; SQLite ignores FOR UPDATE.
    Superseding locks its rows in the same way, so that it settles none that another dispatcher is sending.
    """
    queue = _queues(now, channel, early=early)
    due = select(outbox.c.id).select_from(queue.join(outbox, _leasable(queue)))
    due = due.where(outbox.c.leased_until <= now, queue.c.held_until <= now)
    if not early:
        due = due.where(outbox.c.due_at <= now)
    if urgent:
        due = due.where(queue.c.urgency <= _ALARM_URGENCY)
    # A summed-up delivery is as urgent as the most urgent one in it.
    all_urgent = queue.c.all_urgent | (queue.c.held_until > outbox.c.created_at)
    urgency = case((all_urgent, queue.c.urgency), else_=_urgency(outbox.c.kind))
    waits_since = case((queue.c.delivered_at > outbox.c.created_at, queue.c.delivered_at), else_=outbox.c.created_at)
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
    return [await _summed_if_held(store, d, now) for d in leased]


async def _summed_if_held(store: Store, delivery: LeasedDelivery, now: float) -> LeasedDelivery:
    """`delivery`, summed up with what waits behind it if its tunnel was held. No other lease can take these rows."""
    queue = _queues(now, delivery.channel, delivery.tunnel)
    held = queue.c.held_until > delivery.created_at
    if not (found := await store.read(select(queue).where(held, queue.c.changes > 1))):
        return delivery
    [waiting] = found
    wanted = (waiting.state_id or waiting.last_id, waiting.leak_id, waiting.port_id)
    c = outbox.c
    bodies = {r.id: r for r in await store.read(select(c.id, c.kind, c.body).where(c.id.in_([i for i in wanted if i])))}
    last, leak, port = (bodies.get(i) for i in wanted)
    if last is None:  # deleted meanwhile by hand
        return delivery
    return replace(
        delivery,
        kind=last.kind,
        body=last.body,
        changes=int(waiting.changes),
        leaks=int(waiting.leaks),
        through_id=int(waiting.last_id),
        leak=None if leak is None else leak.body,
        port=None if port is None else port.body,
    )


async def settle(store: Store, delivery: LeasedDelivery, outcome: DeliveryOutcome, now: float) -> None:
    """Record an attempt and its outcome, in one transaction. Raises StoreUnavailable.

    A summed-up delivery that succeeded settles all rows that it stands for; otherwise they wait, to be summed up again.

    Survives a lease that expired meanwhile: "done" and "given up" are recorded, because the attempt was made; "due
    later" changes nothing when another dispatcher has leased the row. A row that was deleted meanwhile gets no attempt.
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
        rest = (outbox.c.settled_at.is_(None), outbox.c.leased_until <= now, outbox.c.id <= delivery.through_id)
        statements.append(update(outbox).where(*same, *rest).values(settled_at=now, outcome="summed"))
    await store.write(*statements)


async def next_due(store: Store, channel: str, now: float) -> float | None:
    """When the channel's next delivery can be leased, None when none is pending. Raises StoreUnavailable."""
    queue = _queues(now, channel)
    free = case((outbox.c.leased_until > outbox.c.due_at, outbox.c.leased_until), else_=outbox.c.due_at)
    ready = [case((queue.c.held_until > at, queue.c.held_until), else_=at) for at in (free, queue.c.stuck_until)]
    # An outer join: a queue whose deliveries all failed too often, and of which none is due, has no row to lease.
    [row] = await store.read(select(*map(func.min, ready)).select_from(queue.outerjoin(outbox, _leasable(queue))))
    return min((float(at) for at in row if at is not None), default=None)


async def make_due_now(store: Store, channel: str, now: float) -> None:
    """Make all pending deliveries of a channel due now: it works again, or a restart may have repaired it."""
    waiting = (outbox.c.channel == channel, outbox.c.settled_at.is_(None), outbox.c.due_at > now)
    await store.write(update(outbox).where(*waiting).values(due_at=now))


async def pending(store: Store) -> list[Pending]:
    """The pending deliveries, by channel. Raises StoreUnavailable."""
    statement = (
        select(outbox.c.channel, func.count().label("rows"), func.min(outbox.c.created_at).label("since"))
        .where(outbox.c.settled_at.is_(None))
        .group_by(outbox.c.channel)
        .order_by(outbox.c.channel)
    )
    return [Pending(channel=r.channel, count=int(r.rows), since=float(r.since)) for r in await store.read(statement)]


async def reassign(store: Store, channels: Iterable[str], before: float, now: float) -> int:
    """Move deliveries older than `before` from channels that are no longer set up to one of `channels` that does not
    have the same notice already. Returns their number. Raises StoreUnavailable.
    """
    channels = list(channels)
    unconfigured = (outbox.c.settled_at.is_(None), outbox.c.channel.not_in(channels), outbox.c.created_at < before)
    twin = outbox.alias("twin")
    same = [getattr(twin.c, name) == getattr(outbox.c, name) for name in ("tunnel", "kind", "body")]
    same.append(twin.c.id.between(outbox.c.id - _MAX_ID_DISTANCE, outbox.c.id + _MAX_ID_DISTANCE))
    moved = [
        update(outbox)
        .where(*unconfigured, outbox.c.leased_until <= now, ~exists().where(*same, twin.c.channel == channel))
        .values(channel=channel, due_at=now)
        .returning(outbox.c.id)
        for channel in channels
    ]
    return sum(len(rows) for rows in await store.write(*moved)) if moved else 0


async def expire(store: Store, channels: Iterable[str], before: float, now: float) -> int:
    """Give up deliveries older than `before` of channels that are no longer set up. Returns their number."""
    unconfigured = (
        outbox.c.settled_at.is_(None),
        outbox.c.channel.not_in(list(channels)),
        outbox.c.created_at < before,
    )
    record = select(outbox.c.id, outbox.c.attempt, literal(now), literal(str(Result.PERMANENT)), literal("no_channel"))
    _, rows = await store.write(
        insert(attempts).from_select(["delivery_id", "attempt", "at", "result", "reason"], record.where(*unconfigured)),
        update(outbox).where(*unconfigured).values(settled_at=now, outcome="given_up").returning(outbox.c.id),
    )
    return len(rows)


def _supersede(now: float, channel: str | None) -> Update:
    """Settle pending address changes that are older than their tunnel's newest address change or leak.

    The newest are found in one pass over the pending rows, not once for each row: there may be thousands.
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
        # "+ 0" keeps SQLite from using the index of ids, by which it would scan the settled rows for each newest one.
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


def _queues(now: float, channel: str | None = None, tunnel: str | None = None, *, early: bool = False) -> CTE:
    """The queue of pending deliveries of each tunnel and channel, or of the one `tunnel`, of the one `channel`.

    `head` is the earliest delivery that has not failed too often to keep the order; `stuck` the earliest due one that
    has (`early`: due or not), and `stuck_until` when the first such one is due: each None where there is none.
    `delivered_at` is when the channel last delivered a notice of that tunnel; `held_until` until when the tunnel is
    held, 0.0 when it is not. `urgency` is the most urgent rank in it, `all_urgent` whether that rank counts for all in
    it, `changes` their number, `leaks` how many of them are leaks, and `last_id`, `state_id`, `leak_id`, `port_id` are
    the last of all, and of those with a state, a leak, a port.

    It costs one pass over the pending rows, and two index lookups for each queue. With lookups for each row instead,
    n rows would cost n².
    """
    c = outbox.alias("waiting").c
    stateless, port = [str(kind) for kind in STATELESS], Kind.PORT_CHANGED.value
    conditions: list[ColumnElement[bool]] = [c.settled_at.is_(None)]
    conditions += [
        column == wanted for column, wanted in ((c.channel, channel), (c.tunnel, tunnel)) if wanted is not None
    ]
    stuck = c.attempt >= MAX_ATTEMPTS_IN_ORDER
    free = case((c.leased_until > c.due_at, c.leased_until), else_=c.due_at)
    queue = (
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
        .subquery("queue")
    )
    sent = outbox.alias("sent").c
    # A literal, as in the index's condition; a parameter would keep both engines from using it. Rows later than `now`
    # were settled before the clock was set back.
    same = (sent.channel == queue.c.channel, sent.tunnel == queue.c.tunnel, sent.outcome == literal_column("'done'"))
    delivered_at = select(func.max(sent.settled_at)).where(*same, sent.settled_at <= now).scalar_subquery()
    # Materialized: otherwise both engines inline the CTE at each reference, and run it for each row there.
    with_last = select(*queue.c, delivered_at.label("delivered_at")).cte("with_last").prefix_with("MATERIALIZED")
    same = (sent.channel == with_last.c.channel, sent.tunnel == with_last.c.tunnel, same[2])
    last = with_last.c.delivered_at
    minute = (sent.settled_at > last - NOTICE_WINDOW_S, sent.settled_at <= last)
    count = select(func.count()).where(*same, *minute).scalar_subquery()
    counted = select(*with_last.c, count.label("delivered")).cte("counted").prefix_with("MATERIALIZED")
    enough = (counted.c.tunnel != "") & (counted.c.delivered >= MAX_NOTICES_PER_WINDOW)
    held = case((enough, counted.c.delivered_at + NOTICE_WINDOW_S), else_=0.0)
    # Without an earlier delivery, `delivered` is 0.
    all_urgent = (counted.c.delivered_at <= now - NOTICE_WINDOW_S) | (counted.c.delivered < MAX_ALARMS_FIRST)
    whole = select(*counted.c, held.label("held_until"), all_urgent.label("all_urgent"))
    return whole.cte("lines").prefix_with("MATERIALIZED")


def _leasable(queue: CTE) -> ColumnElement[bool]:
    """A row that waits for no earlier delivery of its tunnel and channel: by id, which costs one lookup each."""
    return outbox.c.id.in_([queue.c.head, queue.c.stuck])
