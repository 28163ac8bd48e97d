"""Runs the one transaction: queues inputs, has them decided and committed, and applies the effects.

Everything that changes a tunnel's state goes through here: reports, pulses, passed deadlines. `decision` decides what
follows from them.
"""

import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import select

from vpn_sentinel.domain.machine import Revised, StateChanged
from vpn_sentinel.domain.policy import IPNetwork, Policy
from vpn_sentinel.domain.verdict import State
from vpn_sentinel.runtime.clock import Clock
from vpn_sentinel.server.live.hub import Hub
from vpn_sentinel.server.store.schema import tunnels
from vpn_sentinel.server.store.store import Store, TunnelRow
from vpn_sentinel.server.tracking import inputs
from vpn_sentinel.server.tracking.decision import Context, Decision, Effects, decide, decide_silences
from vpn_sentinel.server.tracking.group_commit import GroupCommit
from vpn_sentinel.server.tracking.inputs import Input, ReportBatch
from vpn_sentinel.server.tracking.knowledge import ForwardedAddress, Knowledge
from vpn_sentinel.server.tracking.sites import REFERENCE, Sites

log = logging.getLogger(__name__)

# Where a report could not be stored because another session held the tunnel's row, the tunnel does not become silent
# within this time: its sender may wait half a minute before it tries again.
_UNSTORED_GRACE_S: Final = 45.0


class Tracker:
    """Takes inputs, and returns when they are durable.

    `channels` are the names of the channels that every notice goes to; `on_commit` is called after each commit that put
    a message into the outbox. `own_address` gives the server's own public address: it counts as the home of old clients
    for which none is declared, as in the replaced system. `clock_moved` gives by how much the clock has been set: see
    `domain.machine.Memory`.
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
        sites: Sites | None = None,
        clock_moved: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._store = store
        self._clock = clock
        self._hub = hub
        self._policy = policy
        self._channels = tuple(channels)
        self._on_commit = on_commit
        self._own_address = own_address
        self._clock_moved = clock_moved
        self._keepalive_policy = policy
        self._known = Knowledge(sites or Sites())
        self._shared: set[str] = set()  # names for which the warning about several agents was logged
        self._unstored: dict[str, float] = {}  # boot time of the last input that a locked row did not take, by tunnel
        self._commits = GroupCommit(self._commit)

    @property
    def forwarded(self) -> Mapping[str, ForwardedAddress]:
        """The forwarded ports that may be tried now, by tunnel."""
        return self._known.forwarded

    async def submit(self, item: Input) -> None:
        """Return when `item` is committed. Raises StoreUnavailable, or Busy when too many wait."""
        await self._commits.put(item)

    async def run(self) -> None:
        """Commit what waits, for ever. On cancellation, every waiting `submit` raises StoreUnavailable."""
        await self._commits.run()

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[Callable[[float], None]]:
        """A context in which nothing is committed. Yields a function to call in it when the clock was set, with the
        seconds: it moves the times of all inputs that wait and of all that is known here.
        """
        async with self._commits.busy:
            yield self._shift_times

    def _shift_times(self, by: float) -> None:
        self._commits.amend(lambda item: inputs.moved(item, by))
        self._known.move(by)

    async def _commit(self, batch: Sequence[Input]) -> Collection[str]:
        """Commit inputs of one kind: reports, which create the tunnels that they name, or the server's own findings.

        Returns the tunnels of which nothing was stored, because their rows are locked.
        """
        # Reports of a reference agent come first: the tunnels of its site are judged with them.
        batch = sorted(batch, key=lambda i: isinstance(i, ReportBatch) and i.role != REFERENCE)
        context = self._context(self._clock.wall())
        names = list(dict.fromkeys(i.tunnel for i in batch))

        def decide_rows(rows: Mapping[str, TunnelRow]) -> Decision:
            return decide(batch, rows, self._known, context)

        create = isinstance(batch[0], ReportBatch)
        decision = await self._store.transact(names, context.now, decide_rows, create=create)
        self._apply(decision.effects)
        for name in names:
            self._unstored.pop(name, None)
        self._unstored.update(dict.fromkeys(decision.locked, self._clock.boottime()))
        return decision.locked

    async def sweep(self, names: Sequence[str], now: float, grace: float = 0.0) -> set[str]:
        """Make those of the tunnels `names` silent whose deadline has passed `grace` seconds ago or earlier.

        Returns those that were not checked: their rows are locked, or were when something came of them, which counts
        as a sign of life for a while. Raises StoreUnavailable.

        The deadline is read again under the row's lock, so of many replicas exactly one makes the transition, and a
        report that came in between keeps the tunnel alive.
        """
        earliest = self._clock.boottime() - _UNSTORED_GRACE_S
        skipped = {name for name in names if self._unstored.get(name, earliest) > earliest}
        names = [name for name in names if name not in skipped]
        if not names:
            return skipped
        c, same_table = tunnels.c, tunnels.alias()
        sites = select(same_table.c.site).where(same_table.c.name.in_(names), same_table.c.site != "")
        async with self._commits.busy:
            # Read under the lock: a report committed just before it shows which agents of a site still report.
            site_members = await self._store.read(
                select(c.name, c.site, c.interval, c.last_seen).where(c.site.in_(sites))
            )
            context = self._context(now)

            def decide_rows(rows: Mapping[str, TunnelRow]) -> Decision:
                return decide_silences(rows.values(), self._known, context, grace, site_members)

            decision = await self._store.transact(names, now, decide_rows, create=False)
            self._apply(decision.effects)
            return skipped | decision.locked

    def _context(self, now: float) -> Context:
        own = self._policy
        # A keepalive declares no home: the server's own address counts, unless a home is set.
        policy = own if own.home_networks else own.with_home(self._own_address())
        if policy != self._keepalive_policy:
            self._keepalive_policy = policy
            self._known.repeats.clear()
        return Context(
            now=now,
            clock_moved=self._clock_moved(),
            policy=own,
            keepalive_policy=self._keepalive_policy,
            channels=self._channels,
        )

    def _apply(self, effects: Effects) -> None:
        """Apply the effects of a committed decision: knowledge, log, hub, dispatcher."""
        self._known.apply(effects.draft)
        for name, error in effects.failures:
            log.error("a deadline could not be judged", extra={"tunnel": name}, exc_info=error)
        for name in effects.shared:
            if name not in self._shared:
                self._shared.add(name)
                log.warning(
                    "several agents report as one tunnel: what is shown of it alternates between them",
                    extra={"tunnel": name, "remedy": "give each its own VPN_SENTINEL_CLIENT_ID"},
                )
        for name, event in effects.state_changes:
            _log_state_change(name, event)
        self._hub.publish(set(effects.tunnels))
        if effects.has_deliveries:
            self._on_commit()


def _log_state_change(name: str, event: StateChanged | Revised) -> None:
    """Log a transition, but not that a new tunnel is well: for a large fleet that is thousands of lines at a start."""
    at = datetime.fromtimestamp(event.at, UTC).isoformat(timespec="seconds")
    if isinstance(event, Revised):
        log.info("the silence is void: the agent kept watching", extra={"tunnel": name, "at": at})
    elif (event.old, event.new) != (State.PENDING, State.PROTECTED):
        level = logging.INFO if event.new is State.PROTECTED else logging.WARNING
        codes = ",".join(f.code for f in event.findings)
        facts = {"tunnel": name, "state": event.new, "was": event.old, "at": at, "codes": codes}
        log.log(level, "tunnel changed", extra=facts)
