"""The one transaction: read the tunnels' states, judge, advance, write what follows, all or nothing.

Reports that wait together are committed together (group commit), so durability costs one fsync a batch. Whatever
enters, a report or a passed deadline, goes through here; nothing else changes a tunnel's state.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import msgspec

from vpn_sentinel.domain.machine import Event, Memory, Moved, Revised, advance, overdue, silence_finding
from vpn_sentinel.domain.notice import Notice, notices
from vpn_sentinel.domain.observation import Observation, Place, Trigger
from vpn_sentinel.domain.policy import IPAddress, IPNetwork, Policy
from vpn_sentinel.domain.verdict import (
    HARM,
    Code,
    Finding,
    State,
    Verdict,
    agreed_country,
    judge,
    learned_home,
    worst,
)
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.store import rows
from vpn_sentinel.server.store.owing import ADD_DELIVERY, owed
from vpn_sentinel.server.store.store import Batch, Changes, Store, StoreUnavailable, TunnelRow
from vpn_sentinel.wire.codec import decoder, encode, encode_observation

log = logging.getLogger(__name__)

# A clock further off than this is told, in seconds.
CLOCK_SKEW: Final = 60.0
# Reports that one transaction takes at most: bounds how long a reader of the same rows waits.
_BATCH: Final = 256
# A tunnel whose row trips the program is looked at again after so many seconds.
_AGAIN: Final = 300.0
# Reports that wait at most; beyond it the server says "busy" rather than grow.
_WAITING: Final = 5000


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """One observation on its way into the database; `at` is when it was seen, by the server's clock."""

    seq: int
    at: float
    observation: Observation


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """What one message brought of one tunnel. `spool` is the agent's; a keepalive has none and is numbered here.

    `silent_after` is how many seconds without a further message make the tunnel silent. `caught_up` is False while the
    agent still holds later observations. `skew` is the sender's clock minus ours; `connected_at` is since when it has
    been able to send.
    """

    tunnel: str
    received_at: float
    observations: Sequence[Stored]
    silent_after: float
    interval: float
    version: str
    spool: str | None = None
    policy: Policy | None = None
    caught_up: bool = True
    thinned: int = 0
    skew: float | None = None
    connected_at: float = 0.0
    dns_loc: str = ""
    dns_colo: str = ""


class Busy(Exception):
    """More reports wait than can be taken; the sender tries again later."""


@dataclass(slots=True)
class _Waiting:
    delivery: Delivery
    done: "asyncio.Future[None]"


@dataclass(slots=True)
class _Writes:
    """What a transaction will write, gathered by statement."""

    tunnels: dict[int, TunnelRow] = field(default_factory=dict)
    touched: dict[int, TunnelRow] = field(default_factory=dict)
    observations: list[tuple[object, ...]] = field(default_factory=list)
    ordered: list[Batch] = field(default_factory=list)
    deliveries: list[tuple[object, ...]] = field(default_factory=list)

    def take(self, more: "_Writes") -> None:
        self.tunnels |= more.tunnels
        self.touched |= more.touched
        self.observations += more.observations
        self.ordered += more.ordered
        self.deliveries += more.deliveries

    def changes(self) -> Changes:
        batches: list[Batch] = [
            (rows.SAVE_TUNNEL, [rows.saved_tunnel(t) for t in self.tunnels.values()]),
            (rows.TOUCH_TUNNEL, [rows.touched_tunnel(t) for i, t in self.touched.items() if i not in self.tunnels]),
            (rows.ADD_OBSERVATION, self.observations),
            *self.ordered,
            (ADD_DELIVERY, self.deliveries),
        ]
        return Changes([b for b in batches if b[1]])


_memory: Final = decoder(Memory)
_place: Final = decoder(dict[str, str | int | None])


class Tracker:
    """Takes deliveries, answers when they are durable.

    `channels` are the names of the channels that every notice is owed to; `on_commit` is called after each commit that
    owes something. `own_address` gives the server's own public address, which stands for the home of old clients
    whose owner declared none, as the replaced system had it.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        hub: Hub,
        policy: Policy,
        channels: Sequence[str] = (),
        on_commit: Callable[[], None] = lambda: None,
        own_address: Callable[[], tuple[IPNetwork, ...]] = lambda: (),
    ) -> None:
        self._store = store
        self._clock = clock
        self._hub = hub
        self._default = policy
        self._channels = tuple(channels)
        self._on_commit = on_commit
        self._own_address = own_address
        self._keepalive_policy = policy
        # By tunnel: what its last keepalive said and left it in, and the verdict, where it moved nothing.
        self._steady: dict[str, tuple[int, str]] = {}
        self._waiting: list[_Waiting] = []
        self._arrived = asyncio.Event()

    async def submit(self, delivery: Delivery) -> None:
        """Return when `delivery` is committed. Raises StoreUnavailable, or Busy when too many wait."""
        if len(self._waiting) >= _WAITING:
            raise Busy
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(delivery, done))
        self._arrived.set()
        await done

    async def run(self) -> None:
        """Commit what waits, for ever. On cancellation whoever waits is told that the server is going."""
        try:
            while True:
                await self._arrived.wait()
                batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
                if not self._waiting:
                    self._arrived.clear()
                await self._commit(batch)
        finally:
            _settle(self._waiting, StoreUnavailable("closing", "the server is shutting down"))

    async def _commit(self, batch: list[_Waiting]) -> None:
        try:
            await self._take([w.delivery for w in batch])
        except StoreUnavailable as e:
            _settle(batch, e)
        except asyncio.CancelledError:
            _settle(batch, StoreUnavailable("closing", "the server is shutting down"))
            raise
        except Exception as e:
            if len(batch) == 1:
                log.exception("a report could not be judged", extra={"tunnel": batch[0].delivery.tunnel})
                _settle(batch, e)
                return
            # One report that trips the program must not take the others of its batch with it.
            for waiting in batch:
                await self._commit([waiting])
        else:
            _settle(batch, None)

    async def _take(self, deliveries: Sequence[Delivery]) -> None:
        now = self._clock.wall()
        debts = 0

        def decide(found: Mapping[str, TunnelRow]) -> Changes:
            nonlocal debts
            writes = _Writes()
            for delivery in deliveries:
                self._apply(found[delivery.tunnel], delivery, now, writes)
            debts = len(writes.deliveries)
            return writes.changes()

        names = list(dict.fromkeys(d.tunnel for d in deliveries))
        await self._store.transact(names, now, decide, create=True)
        self._committed(names, debts)

    async def sweep(self, names: Sequence[str], now: float) -> None:
        """Make those of the tunnels `names` silent whose deadline has really passed. Raises StoreUnavailable.

        The deadline is read again under the row's lock, so of many replicas exactly one makes the transition, and a
        report that came in between keeps the tunnel alive.
        """
        debts = 0
        changed: list[str] = []

        def decide(found: Mapping[str, TunnelRow]) -> Changes:
            nonlocal debts
            writes = _Writes()
            changed.clear()
            for row in found.values():
                if row.deadline is None or row.deadline > now:
                    continue
                writes.take(self._silenced(row, row.deadline, now))
                changed.append(row.name)
            debts = len(writes.deliveries)
            return writes.changes()

        await self._store.transact(names, now, decide, create=False)
        self._committed(changed, debts)

    def _silenced(self, row: TunnelRow, deadline: float, now: float) -> _Writes:
        writes = _Writes()
        try:
            before = _load(row)
            memory, events = overdue(before, deadline, silence_finding(row.last_seen, deadline))
            row.deadline = None
            self._follow(row, before, memory, events, now, writes, caught_up=True)
        except Exception:
            # One bad row, say of a newer version, must not keep the others from being watched.
            log.exception("a deadline could not be judged", extra={"tunnel": row.name})
            row.deadline = now + _AGAIN
            return _Writes(tunnels={row.id: row})
        return writes

    def _committed(self, names: Iterable[str], debts: int) -> None:
        self._hub.publish(set(names))
        if debts:
            self._on_commit()

    def _apply(self, row: TunnelRow, delivery: Delivery, now: float, writes: _Writes) -> None:
        policy = self._policy_for(delivery)
        if delivery.spool is None and self._same_again(row, delivery, writes):
            return
        was, before = row.memory, _load(row)
        memory, events = before, list[Event]()
        spool = delivery.spool if delivery.spool is not None else "keepalive"
        last = row.seq if row.spool == spool else 0
        row.source = "keepalive" if delivery.spool is None else "agent"
        for item in delivery.observations:
            # Milliseconds, so that the numbers go on where they were when a tunnel's other kind of sender stops.
            seq = item.seq if delivery.spool is not None else max(last + 1, int(1000 * item.at))
            if seq <= last:
                continue  # a replay of what the database holds changes nothing
            if delivery.spool is not None and seq == last + 1:
                memory, gap = _silence_between(memory, item.at, delivery.silent_after)
                events += gap
            last = seq
            seen = item.observation
            effective = learned_home(seen, policy.with_home(memory.home))
            verdict = _with_extras(judge(seen, effective), delivery)
            memory, more = advance(memory, verdict, item.at, effective, (seen.exit(4), seen.exit(6)))
            learned = tuple(n for n in effective.home_networks if n not in policy.home_networks)
            if learned != memory.home:
                memory = replace(memory, home=learned[-8:])
            events += more
            writes.observations.append(
                (
                    row.id,
                    spool,
                    seq,
                    item.at,
                    delivery.received_at,
                    verdict.state.value,
                    encode_observation(seen).decode(),
                )
            )
            _show(row, seen)
        row.spool, row.seq = spool, last
        row.version, row.interval = delivery.version, delivery.interval
        row.last_seen = delivery.received_at
        row.deadline = delivery.received_at + delivery.silent_after
        if delivery.spool is None:
            row.dns_loc, row.dns_colo = delivery.dns_loc, delivery.dns_colo
        # After a silence the first words are of the time before the agent could speak; how things stand now follows.
        stale = before.told is State.SILENT and memory.seen_at < delivery.connected_at
        self._follow(row, before, memory, events, now, writes, caught_up=delivery.caught_up and not stale)
        if delivery.spool is None:
            self._steady.pop(row.name, None)
            # The same again would move as little: what depends on time (a grace, a wrong clock) is not of this kind.
            if row.memory == was and memory.candidate is None and not _extras(delivery):
                self._steady[row.name] = (_mark(row, delivery, seen), verdict.state.value)

    def _same_again(self, row: TunnelRow, delivery: Delivery, writes: _Writes) -> bool:
        """Take a keepalive that says what the last one said, if that one moved nothing; else leave it to be judged.

        Most keepalives are of this kind, and judging them anew costs several times as much.
        """
        item, steady = delivery.observations[0], self._steady.get(row.name)
        if steady is None or _extras(delivery) or steady[0] != _mark(row, delivery, item.observation):
            return False
        row.seq = max(row.seq + 1, int(1000 * item.at))
        row.seen_at = max(row.seen_at, item.at)
        row.last_seen = delivery.received_at
        row.deadline = delivery.received_at + delivery.silent_after
        body = encode_observation(item.observation).decode()
        writes.observations.append((row.id, row.spool, row.seq, item.at, delivery.received_at, steady[1], body))
        writes.touched[row.id] = row
        return True

    def _policy_for(self, delivery: Delivery) -> Policy:
        """The server's policy and what the agent declared, together: networks add up, the agent's countries win."""
        own = self._default
        if delivery.policy is not None:
            said = delivery.policy
            return replace(
                own.with_home(said.home_networks),
                expected_countries=said.expected_countries or own.expected_countries,
                allowed_resolvers=(*own.allowed_resolvers, *said.allowed_resolvers),
            )
        policy = own if own.home_networks else own.with_home(self._own_address())
        if policy != self._keepalive_policy:
            self._keepalive_policy = policy
            self._steady.clear()
        return self._keepalive_policy

    def _follow(
        self,
        row: TunnelRow,
        before: Memory,
        memory: Memory,
        events: Sequence[Event],
        now: float,
        writes: _Writes,
        *,
        caught_up: bool,
    ) -> None:
        """Write what a step leads to: transitions, incidents, what is owed to people, and the row itself."""
        memory, told = notices(before, memory, events, caught_up=caught_up)
        for event in events:
            _record(row.id, event, now, writes)
        for notice in told:
            writes.deliveries += owed(_complete(notice, row), self._channels, now)
        row.seen_at = memory.seen_at
        if memory is not before or not row.memory:
            row.memory = encode(replace(memory, seen_at=0.0)).decode()
            if memory.findings != before.findings:
                row.findings = encode(memory.findings).decode()
        row.state, row.since = memory.state.value, memory.since or row.created_at
        writes.tunnels[row.id] = row


def _silence_between(memory: Memory, at: float, silent_after: float) -> tuple[Memory, list[Event]]:
    """The silence of an agent that did not run between its last observation and the one at `at`.

    A replay voids a silence that the agent merely could not break; this keeps the part in which it saw nothing. Only
    for observations that follow one another by number: where rounds were thinned, the agent ran.
    """
    deadline = memory.seen_at + silent_after
    if memory.state is State.SILENT or not memory.seen_at or at <= deadline:
        return memory, []
    return overdue(memory, deadline, silence_finding(memory.seen_at, deadline))


def _mark(row: TunnelRow, delivery: Delivery, seen: Observation) -> int:
    """Tells one keepalive, and the memory that it met, from another; costs less memory than keeping them."""
    said = (seen.exit(4), seen.exit(6), seen.reported_from, seen.places)
    return hash((row.spool, row.memory, said, delivery.version, delivery.dns_loc, delivery.dns_colo))


def _extras(delivery: Delivery) -> bool:
    """Whether `_with_extras` would add anything."""
    return bool(delivery.thinned) or (delivery.skew is not None and abs(delivery.skew) > CLOCK_SKEW)


def _load(row: TunnelRow) -> Memory:
    return replace(_memory(row.memory), seen_at=row.seen_at) if row.memory else Memory()


def _record(tunnel: int, event: Event, now: float, writes: _Writes) -> None:
    match event:
        case Revised():
            writes.ordered.append((rows.VOID_SILENCE, [(tunnel, event.at)]))
            # An incident that only the silence opened never was; one that was open before goes on.
            writes.ordered.append((rows.VOID_INCIDENT, [(tunnel, event.at)]))
        case Moved():
            findings = encode(event.findings).decode()
            moved = (tunnel, event.at, now, event.old.value, event.new.value, findings)
            writes.ordered.append((rows.ADD_TRANSITION, [moved]))
            if event.new is State.PROTECTED:
                writes.ordered.append((rows.CLOSE_INCIDENT, [(event.at, tunnel)]))
            elif event.old in (State.PROTECTED, State.PENDING):
                writes.ordered.append((rows.OPEN_INCIDENT, [(tunnel, event.at, event.new.value, findings)]))
            elif HARM.index(event.new) < HARM.index(event.old):
                writes.ordered.append((rows.WORSEN_INCIDENT, [(event.new.value, findings, tunnel)]))


def _with_extras(verdict: Verdict, delivery: Delivery) -> Verdict:
    """Add what only the receiver knows: a wrong clock, thinned rounds."""
    extra: list[Finding] = []
    if delivery.skew is not None and abs(delivery.skew) > CLOCK_SKEW:
        ahead = "ahead" if delivery.skew > 0 else "behind"
        message = f"The agent's clock is {abs(delivery.skew):.0f} s {ahead} of the server's."
        extra.append(Finding(Code.CLOCK_SKEW, message, {"seconds": f"{delivery.skew:.0f}"}))
    if delivery.thinned:
        message = f"The agent had no room for {delivery.thinned} routine observations while the server was away."
        extra.append(Finding(Code.OBSERVATIONS_LOST, message, {"count": str(delivery.thinned)}))
    if not extra:
        return verdict
    findings = (*verdict.findings, *extra)
    return Verdict(verdict.state if verdict.state is State.UNKNOWN else worst(findings), findings)


def _show(row: TunnelRow, seen: Observation) -> None:
    """Copy what surfaces show; what an observation does not know stays as it was."""
    exit4, exit6 = seen.exit(4), seen.exit(6)
    if seen.trigger is Trigger.KEEPALIVE and exit4 is None and exit6 is None and seen.reported_from is not None:
        exit4, exit6 = (seen.reported_from, None) if seen.reported_from.version == 4 else (None, seen.reported_from)
    if exit4 is not None or exit6 is not None:
        row.exit4 = str(exit4) if exit4 else None
        row.exit6 = str(exit6) if exit6 else None
        if (place := best_place(seen, exit4 or exit6)) is not None:
            row.place = encode(place).decode()
    egresses = dict.fromkeys(r.egress for r in seen.resolvers if r.egress)
    if egresses:
        row.resolvers = encode([_resolver(seen, e) for e in egresses]).decode()


def best_place(seen: Observation, ip: IPAddress | None) -> Place | None:
    """The fullest account of `ip` among those that name the country most sources agree on; None without any."""
    places = seen.places_of(ip)
    if len(places) < 2:
        return places[0] if places else None
    country = agreed_country(places)
    agreeing = [p for p in places if country is None or p.country == country]
    return max(
        agreeing, key=lambda p: sum(v is not None for v in (p.city, p.region, p.timezone, p.asn, p.org)), default=None
    )


def _resolver(seen: Observation, ip: IPAddress) -> dict[str, object]:
    place = best_place(seen, ip)
    return {"ip": ip, "country": place.country if place else None, "org": place.org if place else None}


def _complete(notice: Notice, row: TunnelRow) -> Notice:
    """Add what a reader wants to know beside the event: where the exit is and who resolves."""
    place = _place(row.place)
    if place.get("ip") != str(notice.exit):
        place = {}  # of another address, such as the one that leaks
    where = [str(place[k]) for k in ("city", "region", "country") if place.get(k)]
    provider = " ".join(str(v) for v in (place.get("org"), f"AS{place['asn']}" if place.get("asn") else None) if v)
    listed = decoder(list[dict[str, str | None]])(row.resolvers)
    resolvers = tuple(" ".join(str(r[k]) for k in ("ip", "country", "org") if r.get(k)) for r in listed)
    return replace(
        notice,
        tunnel=row.name,
        place=", ".join(dict.fromkeys(where)),
        provider=provider,
        timezone=str(place.get("timezone") or ""),
        resolvers=resolvers,
    )


def _settle(batch: Iterable[_Waiting], error: Exception | None) -> None:
    """Answer whoever waits; one that has gone meanwhile needs no answer."""
    for waiting in batch:
        if waiting.done.done():
            continue
        if error is None:
            waiting.done.set_result(None)
        else:
            waiting.done.set_exception(error)
